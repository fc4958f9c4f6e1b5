"""Links of pages as they are in the repository, made to work in the built documentation too."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Files of the repository that are pages of the documentation, under other names.
PAGES = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
_LINK = re.compile(r"(?<!!)\[((?:[^\]\[]|\[[^\]]*\])+)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)


def rewritten(app: object, docname: str, source: list[str]) -> None:
    """Links out of ``docs/`` become links to the page that stands for a file, or downloads of it.

    Args:
        app: Sphinx.
        docname: Of the page.
        source: Its text, alone in a list.
    """
    here = (DOCS / docname).parent
    whole = {page: file for file, page in PAGES.items() if file != "README.md"}.get(docname)
    text = (ROOT / whole).read_text(encoding="utf-8") if whole else source[0]
    written = ROOT if whole else here  # where the links begin

    def link(found: re.Match[str]) -> str:
        said, path, anchor = found[1], found[2], found[3] or ""
        file = (written / path).resolve()
        if file.parent == ROOT / "examples" and file.suffix == ".py":
            page = DOCS / "tutorials" / f"{file.stem}.rst"
            return f"[{said}]({os.path.relpath(page, here)}{anchor})"
        page = DOCS / f"{PAGES[path.rsplit('/', 1)[-1]]}.md" if file.parent == ROOT and file.name in PAGES else file
        if page.is_relative_to(DOCS):
            return f"[{said}]({os.path.relpath(page, here)}{anchor})"
        plain = re.sub(r"[`<>]", "", said)
        if file.is_file() and file.is_relative_to(ROOT):
            return f"{{download}}`{plain} <{os.path.relpath(file, here)}>`"
        return f"{said} (`{os.path.relpath(file, ROOT)}`)" if "`" not in said else said

    source[0] = "".join(piece if "```" in piece else _LINK.sub(link, piece) for piece in _CODE.split(text))
