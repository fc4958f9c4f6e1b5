"""One learned optimizer on networks and data mostly new to it, beside standard optimizers tuned on each.

Meta-trains ``--seeds`` optimizers (about 14 minutes each on one core) unless ``--runs`` holds them, and with
``--ablations`` shorter ones that lack something. Twelve kinds of full-batch regression, 64 held-out problems
each, and classification by mini-batches of 200, 5 networks each. Standard optimizers are tuned on other problems of the
same kind (for images, on other networks): the least mean loss at step 100, or training loss at the end. Time per step
is that of one torch model on this machine. A kind takes up to 8 minutes; a stopped run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metatele.command_line import OneLineParser, whole_number
from metatele.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from metatele.experiments.transfer.results import Results
    from metatele.experiments.transfer.study import Study


def parser() -> argparse.ArgumentParser:
    """The experiment's flags."""
    p = OneLineParser(prog="metatele.experiments transfer", description=__doc__, allow_abbrev=False)
    p.add_argument("--seeds", type=whole_number(1), default=5, metavar="N", help="meta-training seeds (default 5)")
    p.add_argument(
        "--runs", metavar="FOLDER", default="runs/transfer", help="run folders, used again (default runs/transfer)"
    )
    p.add_argument("--tasks", nargs="+", metavar="NAME", help="which (default all)")
    p.add_argument("--ablations", action="store_true", help="also meta-train without one thing or another")
    p.add_argument("--publish", metavar="FOLDER", help="copy the best run by validation score there")
    p.add_argument("--data-root", metavar="FOLDER", help="folder with MNIST's files (default: METATELE_DATA)")
    p.add_argument("--out", metavar="FOLDER", default="results/transfer", help="(default results/transfer)")
    p.add_argument("--redraw", action="store_true", help="tables and figures again from the stored results.json")
    return p


def main(arguments: Sequence[str], study: Study | None = None) -> None:
    """Parse, run, print the table.

    Args:
        arguments: Of the command line.
        study: How much is run; that of the published tables if not given.
    """
    args = parser().parse_args(arguments)
    out = Path(args.out)
    _check_tasks(args.tasks)

    from metatele.experiments import images as common
    from metatele.experiments.transfer.results import from_json, to_json

    if args.redraw:
        document = common.stored(out, "transfer", rows="tasks")
        _write(document, from_json(document), out)
        return

    from metatele.experiments.transfer.measurement import measure, run_folders
    from metatele.experiments.transfer.selection import publish
    from metatele.experiments.transfer.study import Study

    study = study or Study()
    results = measure(args, out, study)
    _write({"format": common.FORMAT, "experiment": "transfer", **to_json(results)}, results, out)
    if args.publish:
        publish(results, run_folders(args), Path(args.publish), study)


def _write(document: dict[str, Any], results: Results, out: Path) -> None:
    from metatele.experiments import images as common
    from metatele.experiments.transfer.figure import figure
    from metatele.experiments.transfer.report import details, table
    from metatele.files import write_atomically

    write_atomically(out / "details.md", details(results).encode())
    write_atomically(out / "time.png", figure(results, time_axis=True))
    common.finish(document, out, lambda _: table(results), lambda _: figure(results))


def _check_tasks(names: Sequence[str] | None) -> None:
    if not names:
        return
    from metatele.tasks.held_out import CLASSIFICATIONS, REGRESSIONS

    known = [*REGRESSIONS, *CLASSIFICATIONS]
    for name in names:
        if name not in known:
            raise ConfigError(f"tasks must be among {', '.join(known)}, got {name!r}")
