"""Commands. They parse, call the library and print; nothing here is worth importing."""

import os

from ..namesake import refuse_namesake

# Again, because the package's own __init__ may be the other package's.
refuse_namesake(os.path.dirname(__path__[0]))
