"""Several studies of symmetries at one go, so that no process waits for the last run of a study.

python benchmarks/studies.py --data FILE --out results/benchmarks --processes 13 --limit-s 540
python benchmarks/studies.py --out results/benchmarks --redraw

Each study's files are those of its own program: STUDY.raw.jsonl, .json, .md and .png in the folder of ``--out``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import modules  # noqa: E402
import quantise  # noqa: E402
import repair  # noqa: E402
import table1_cnn  # noqa: E402
from breadth_tasks import Arrays  # noqa: E402
from jobs import Bound, Row, Runs, Study, arrays_of, brief, flags, pool_of, work, write  # noqa: E402

STUDIES: dict[str, Study[Any]] = {
    "table1_cnn": table1_cnn.STUDY,
    "quantise": quantise.STUDY,
    "repair": repair.STUDY,
    "modules": modules.STUDY,
}
NETWORKS = 80  # of table1_cnn, whose networks are its seeds


@dataclass(frozen=True)
class Of:
    """A job of a study."""

    study: str
    job: Any


def run(of: Of, arrays: Arrays) -> Row:
    """Its row, and whose it is."""
    return {"study": of.study, "row": STUDIES[of.study].run(of.job, arrays)}


class Several:
    """Finished runs of several studies.

    Args:
        each: Of each study, by its name.
    """

    def __init__(self, each: dict[str, Runs[Any]]) -> None:
        self.each = each

    def add(self, row: Row) -> None:
        """To the study that the row is of."""
        self.each[row["study"]].add(row["row"])

    def missing(self, seeds: int) -> list[Of]:
        """What can begin now: the two first studies' runs, which are long or few, then the others' in turn."""
        found = {
            name: [Of(name, job) for job in STUDIES[name].missing(runs, NETWORKS if name == "table1_cnn" else seeds)]
            for name, runs in self.each.items()
        }
        early = [of for name in ("table1_cnn", "quantise") for of in found.pop(name, [])]
        return early + [of for several in zip_longest(*found.values()) for of in several if of is not None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run what is missing, write and print every study."""
    p = flags(__doc__, 5)
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where each study's files go")
    p.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="STUDY")
    given = p.parse_args(arguments)
    paths = {name: given.out / f"{name}.json" for name in given.studies}
    several = Several({n: Runs(path.with_suffix(".raw.jsonl"), STUDIES[n].kind) for n, path in paths.items()})
    if not given.redraw:
        pool = pool_of(given.processes, arrays_of(p, given))

        def part(of: Of) -> tuple[str, str]:
            place, what = STUDIES[of.study].part(of.job)
            return f"{of.study}, {place}", what

        def told(of: Of, row: Row) -> str:
            return f"{of.study}: {brief(row['row'])}"

        def seconds(of: Of) -> float:
            return STUDIES[of.study].seconds(of.job)

        many = (several, lambda: several.missing(given.seeds), given.limit_s, Bound(run), seconds, part, told)
        for line in work(pool, given.processes, *many):
            print(line, file=sys.stderr, flush=True)
        pool.shutdown()
        print(f"{len(several.missing(given.seeds))} runs could begin now", file=sys.stderr)
    for name, runs in several.each.items():
        if runs.rows:
            print(f"\n{name}\n")
            write(STUDIES[name], runs, paths[name], None if given.redraw else given.processes)


if __name__ == "__main__":
    main()
