"""Commands. They parse, call the library and print; nothing here is worth importing."""
