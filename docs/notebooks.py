"""The tutorials as notebooks: ``python docs/notebooks.py`` writes each beside its script, without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sphinx_gallery.notebook import jupyter_notebook
from sphinx_gallery.py_source_parser import split_code_and_text_blocks

DOCS = Path(__file__).resolve().parent
EXAMPLES = DOCS.parent / "examples"
_SETTINGS = {
    "first_notebook_cell": None,
    "last_notebook_cell": None,
    "pypandoc": False,  # what is installed must not change what is written
    "promote_jupyter_magic": False,
}
_PAGE = re.compile(r":doc:`([^<`]+?)\s+</([\w/-]+)>`")
_CODE = re.compile(r"``(.+?)``")


def scripts() -> list[Path]:
    """Those of the tutorials, in their order.

    Example:
        >>> scripts()[0].name
        '1_train_with_the_learned_optimizer.py'
    """
    return sorted(EXAMPLES.glob("[0-9]_*.py"))


def notebook(script: Path) -> dict[str, Any]:
    """A notebook with the cells of a script; the same whatever Python makes it.

    Args:
        script: Of a tutorial, in the format of sphinx-gallery.

    Example:
        >>> notebook(scripts()[0])["cells"][0]["source"][0].strip()
        '# Train your network with the learned optimizer'
    """
    _, blocks = split_code_and_text_blocks(script)
    made: dict[str, Any] = jupyter_notebook([b if b[0] == "code" else _linked(b) for b in blocks], _SETTINGS, EXAMPLES)
    for cell in made["cells"]:
        cell["metadata"] = {}
        cell["source"] = "".join(cell["source"]).strip().splitlines(keepends=True)
    made["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return made


def text(script: Path) -> str:
    """The file that a script's notebook is stored as."""
    return json.dumps(notebook(script), indent=1, ensure_ascii=False) + "\n"


def write(folder: Path = EXAMPLES) -> None:
    """Write all notebooks.

    Args:
        folder: Where to; by default beside the scripts.
    """
    for script in scripts():
        (folder / script.with_suffix(".ipynb").name).write_text(text(script), encoding="utf-8")


def _linked(block: Any) -> Any:
    """A text block with code and links to pages as Markdown has them."""
    return type(block)(block[0], _CODE.sub(r"`\1`", _PAGE.sub(r"[\1](../docs/\2.md)", block[1])), block[2])


if __name__ == "__main__":
    write()
