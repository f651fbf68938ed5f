"""What MkDocs is told beyond mkdocs.yml: pages that live outside of docs/.

The README is the site's first page. Files that pages link to by ``../``, such as logs
of measurements, are copied below ``repository/``, so that no link leaves the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
#: A link or picture by ``../``: what MkDocs looks for among pages.
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and every file that a page links to outside of docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=from_root(readme)))
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for name in sorted({name for page in pages for name in linked(page)}):
        files.append(
            File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name))
        )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside of docs/ lead to their copies."""
    if page.file.src_uri.startswith("repository/"):
        return markdown
    return _OUTSIDE.sub(r"](repository/\1", markdown)


def linked(page: Path) -> set[str]:
    """Files outside of docs/ that a page links to, from the root."""
    text = page.read_text(encoding="utf-8")
    if page.parent == ROOT:
        text = from_root(text)
    return set(_OUTSIDE.findall(text))


def from_root(text: str) -> str:
    """A text of the root's, with its links as a page in docs/ would write them."""
    text = re.sub(r"\]\((?!\w+:|#|docs/)", "](../", text)
    return text.replace("](docs/", "](")
