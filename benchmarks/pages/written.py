"""Every file that is made from the results: pages, their overview, and blocks in pages written by hand."""

from __future__ import annotations

import re

from benchmarks.pages import geometry, learned, moves, shifts, theory, training
from benchmarks.pages.blocks import BLOCKS
from benchmarks.pages.model import ROOT, Claim
from benchmarks.pages.overview import index
from benchmarks.pages.render import page
from benchmarks.pages.tables import TABLES

FOLDER = "docs/results"
CLAIMS: list[Claim] = [
    *theory.CLAIMS,
    *shifts.CLAIMS,
    *geometry.CLAIMS,
    *moves.CLAIMS,
    *training.CLAIMS,
    *learned.CLAIMS,
]
_MADE = {**BLOCKS, **TABLES}
_BLOCK = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written() -> dict[str, str]:
    """Text by the file's place in the repository."""
    found = {f"{FOLDER}/{claim.slug}.md": page(claim) for claim in CLAIMS}
    found[f"{FOLDER}/index.md"] = index(CLAIMS)
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if "<!-- made: " in text:
            found[f"docs/{path.name}"] = filled(text)
    return found


def filled(text: str) -> str:
    """A page with its blocks made anew; a block that nobody makes is an error."""
    return _BLOCK.sub(lambda m: f"{m[1]}\n{_MADE[m[2]]().strip()}\n\n{m[3]}", text)
