"""The table of docs/speed.md, "On a GPU", from what runs of gpu.py left; `make pages` puts it there.

python benchmarks/gpu_table.py FILE ...      # prints it; default: results/gpu/*.json
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = "not run"

Found = dict[str, dict[str, Any]]  # rows of a run by what they tell of
Cell = Callable[[Found], str]


def rows_of(doc: dict[str, Any]) -> Found:
    """All rows of a run."""
    return {row["what"]: row for part in doc["parts"].values() for row in part.get("rows", [])}


def short(value: float, digits: int = 2) -> str:
    """A number with so many digits that count, without an exponent.

    Example:
        >>> short(0.00052045), short(10364.2), short(1.0), short(282.67, 3)
        ('0.00052', '10364', '1.0', '283')
    """
    if value == 0:
        return "0"
    before = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if before >= digits:
        return f"{value:.0f}"
    if before:
        return f"{value:.{digits - before}f}"
    after = f"{value:.{digits - 1}e}"
    return f"{value:.{digits - 1 - int(after.partition('e')[2])}f}"


def several(names: Sequence[str], digits: int = 2, unit: str = "") -> Cell:
    """The values of rows, one after the other."""

    def cell(found: Found) -> str:
        values = [found.get(name, {}).get("value") for name in names]
        if all(value is None for value in values):
            return NOT_RUN
        told = " / ".join(NOT_RUN if value is None else short(value, digits) for value in values)
        return told + (f" {unit}" if unit else "")

    return cell


def of_all_epochs(name: str) -> Cell:
    """Seconds of all epochs, and of how many they are."""

    def cell(found: Found) -> str:
        if name not in found:
            return NOT_RUN
        row = found[name]
        count = re.search(r"from (\d+) epochs|(\d+) epochs of [\d.]+ and [\d.]+ s extrapolated", row["note"])
        from_ = "" if count is None else f", from {count[1] or count[2]} epochs"
        return f"{row['value']:.0f} s{from_}"

    return cell


def best_naive(found: Found) -> str:
    """The naive loop over the best of ours."""
    values = [row["value"] for name, row in found.items() if name.startswith("naive loop over ours")]
    return f"{max(values):.0f}" if values else NOT_RUN


def agree(found: Found) -> str:
    """Numbers that agree with a CPU's, of how many."""
    rows = [row for name, row in found.items() if name.startswith("checks") and name.endswith("agree")]
    if not rows:
        return NOT_RUN
    return f"{sum(row['value'] for row in rows)} of {sum(int(row['unit'].removeprefix('of ')) for row in rows)}"


def quality(found: Found) -> str:
    """Time to AdamW's last loss, and of how many steps."""
    row = next((row for name, row in found.items() if name.startswith("char-GPT")), None)
    if row is None:
        return NOT_RUN
    steps = re.search(r"(\d+) steps", row["note"])
    after = "" if steps is None else f", {steps[1]} steps"
    return ("not reached" if row["value"] is None else short(row["value"])) + after


def _meta(how: str) -> Cell:
    return several([f"meta-training, bf16, batch {batch}, {how}" for batch in (64, 1024, 8192)], unit="ms")


STEP = "LearnedOptimizer step, "
LINES: list[tuple[str, Cell]] = [
    ("numbers that agree with a CPU's", agree),
    ("one trajectory-step of meta-training, bf16, batch 64 / 1024 / 8192, as CUDA graphs", _meta("graph")),
    ("the same, call by call", _meta("eager")),
    ("the naive loop on the same GPU over the best of these, in float32 too", best_naive),
    ("the preset `quick`, from the command to its checkpoint", several(["quick, start to checkpoint"], 2, "s")),
    (
        "a training step with `LearnedOptimizer` over one with Adam, batch 200, width 256 / 512 / 1024",
        several([f"{STEP}width {width}" for width in (256, 512, 1024)]),
    ),
    ("the same over fused AdamW, shapes of GPT-2 small, bf16 autocast", several([f"{STEP}GPT-2 small, bf16"])),
    ("the same over fused Adam, a CNN / a residual CNN", several([f"{STEP}cnn", f"{STEP}resnet"])),
    ("40 epochs of Figure 5 on MNIST, 45 replicas", of_all_epochs("fig5, 40 epochs, 9 arms x 5 seeds")),
    ("40 epochs of Table 1 on MNIST, 100 networks", of_all_epochs("table1, 40 epochs, 100 networks")),
    (
        "a teleport by ascent, 10 steps, in gradient steps: width 256 / 1024, default",
        several([f"teleport, width {width}, default" for width in (256, 1024)], 3),
    ),
    (
        "the same by the paper's action, width 256 / 1024",
        several([f"teleport, width {width}, paper's" for width in (256, 1024)], 3),
    ),
    (
        "the same on GPTs, 2 layers of 64 / 6 of 384, symmetries known",
        several([f"teleport, GPT {shape}, spaces known" for shape in ("2 x 64", "6 x 384")], 3),
    ),
    ("a char-GPT of 6 layers of 384: time to AdamW's last held-out loss over AdamW's", quality),
]


def stored(files: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each run, in the order they were made; earlier ones do not say when."""
    read = [(file.stem, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return sorted(read, key=lambda one: (one[1].get("began", ""), one[0]))


def table(files: Sequence[Path]) -> str:
    """A column for each run, headed by its name and its card."""
    runs = stored(files)
    heads = []
    for name, doc in runs:
        about = doc["parts"].get("environment", {}).get("values", {}).get("environment", {})
        heads.append(f"{name}: {about.get('name', 'no card named')}, torch {about.get('torch', '?').partition('+')[0]}")
    found = [rows_of(doc) for _, doc in runs]
    lines = [f"| what | {' | '.join(heads)} |", "|:--|" + ":--|" * len(runs)]
    lines += [f"| {what} | {' | '.join(cell(rows) for rows in found)} |" for what, cell in LINES]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", type=Path, nargs="*", metavar="FILE", help="default: results/gpu/*.json")
    print(table(p.parse_args(arguments).files or sorted((ROOT / "results" / "gpu").glob("*.json"))), end="")


if __name__ == "__main__":
    main()
