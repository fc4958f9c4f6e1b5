"""Tables inside pages that are written by hand: between ``<!-- made: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from benchmarks.gpu_table import table
from benchmarks.pages.model import ROOT, Table, stored

# --- field

_FIELD = {"seeds 0 to 2": "benchmarks/field.json", "seeds 3 to 5": "benchmarks/field-seeds-3-5.json"}
_FIELD_ROWS = (
    ("fine", lambda s: f"{s['fine']} of {s['situations']}"),
    ("wild", lambda s: f"{s['wild']}"),
    ("not finite", lambda s: f"{s['not_finite']}"),
    ("best held-out loss over Adam's, median", lambda s: f"{s['median_held_out_best_ratio']:.2f}"),
    ("training loss at the end over Adam's, median", lambda s: f"{s['median_train_ratio']:.2f}"),
    ("held-out loss at the end over Adam's, median", lambda s: f"{s['median_held_out_end_ratio']:.2f}"),
    ("time of a training step over Adam's, median", lambda s: f"{s['median_cost_ratio']:.1f}"),
)


def field() -> str:
    """How many situations are fine, and those that are not."""
    docs = {name: stored(source) for name, source in _FIELD.items()}
    rows = [[what, *(read(doc["summary"]) for doc in docs.values())] for what, read in _FIELD_ROWS]
    lost: dict[str, dict[str, Any]] = {}
    for name, doc in docs.items():
        for row in doc["rows"]:
            if not row["fine"]:
                lost.setdefault(row["name"], {})[name] = row
    by_name = {name: {row["name"]: row for row in doc["rows"]} for name, doc in docs.items()}

    def cell(situation: str, name: str) -> str:
        row = by_name[name][situation]
        return f"{row['held_out_best_ratio']:.2f}, {row['train_ratio']:.2g}" + (
            ", not fine" if name in lost[situation] else ""
        )

    worst_first = sorted(lost, key=lambda s: -max(by_name[n][s]["held_out_best_ratio"] for n in docs))
    losing = [[situation, *(cell(situation, name) for name in docs)] for situation in worst_first]
    both = sum(len(found) == len(docs) for found in lost.values())
    return "\n\n".join(
        [
            Table("", ["", *docs], rows).shown(),
            Table(
                f"Where it loses: {len(lost)} situations are not fine on some seeds, {both} of them on all six. Best "
                "held-out "
                "loss and last training loss, over Adam's:",
                ["situation", *docs],
                losing,
            ).shown(),
        ]
    )


def field_evolved() -> str:
    """The same with the checkpoint that evolution made."""
    scores, found = stored("benchmarks/evolution.json")["scores"], stored("benchmarks/field-evolved.json")["summary"]
    del scores
    return (
        f"In the field the evolved checkpoint was fine in {found['fine']} of {found['situations']} situations, with a "
        f"median of {found['median_held_out_best_ratio']:.2f} ([field-evolved.json](../results/benchmarks/"
        "field-evolved.json), seeds 0 to 2). It trains faster, and overfits: its training loss at the end is "
        f"{found['median_train_ratio']:.2f} of Adam's in the median."
    )


# --- breadth


def _script(name: str) -> Any:
    """A module of ``benchmarks/``, whose scripts import each other by their bare names."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(name)


@cache
def _breadth() -> dict[str, Any]:
    breadth = _script("breadth")
    found: dict[str, Any] = breadth.result(breadth.Raw(ROOT / "results/benchmarks/breadth.raw.jsonl"))["summary"]
    return found


def breadth() -> str:
    """The means over ten tasks, ours in both ways and each peer."""
    found = _breadth()
    METHODS = _script("peers").METHODS

    rows = []
    for method, means in found["methods"].items():
        ratios = [v for v in means["held_out_over_best_peer"].values() if v is not None]
        whole = len(ratios) == means["steps"]["tasks"]
        best = sum(v < 1 for v in ratios)
        rows.append(
            [
                METHODS[method].title,
                *(_mean(means[key]) for key in ("steps", "time")),
                f"{means['steps']['never']} of {means['steps']['tasks']}",
                *(f"{means['train_ahead_of'][peer]}" if method != peer else "" for peer in ("muon", "soap")),
                f"{max(ratios):.2f}" if whole else "diverged",
                f"{best}",
            ]
        )
    ours = found["methods"]["ours"]
    lost = {t: v for t, v in ours["held_out_over_best_peer"].items() if v is not None and v >= 1}
    worst = max(lost, key=lambda t: lost[t])
    larger = {t: cells for t, cells in found["tasks"].items() if t not in ours["held_out_over_best_peer"]}
    return "\n\n".join(
        [
            Table(
                "Steps and time are geometric means over the tasks that got there. *Worst* and *below all* compare the "
                "held-out loss at the end with that of the best other tuned peer.",
                ["method", "steps", "time", "never", "ahead of Muon", "of SOAP", "worst", "below all"],
                rows,
            ).shown(),
            "\n".join(
                [
                    f"- Steps: {ours['steps']['geometric_mean_of_reached']:.2f} of tuned AdamW's over all "
                    f"{ours['steps']['tasks']} tasks, none above {ours['steps']['largest']:.2f}. Time: "
                    f"{ours['time']['geometric_mean_of_reached']:.2f}.",
                    f"- Held-out loss at the end: a tuned peer ends lower on {len(lost)} of {ours['steps']['tasks']} "
                    "tasks: "
                    + ", ".join(f"{_TASK[t]} ({v:.2f}, {METHODS[_best(t)].title})" for t, v in lost.items())
                    + ".",
                    f"- Worst is {_TASK[worst]}: {lost[worst]:.2f} times the best tuned peer's.",
                    *(_extra(cells) for cells in larger.values()),
                ]
            ),
        ]
    )


def _mean(means: dict[str, Any]) -> str:
    value = means["geometric_mean_of_reached"]
    return "–" if value is None else f"{value:.2f}"


def _best(task: str) -> str:
    """The tuned peer with the lowest held-out loss at the end."""
    METHODS = _script("peers").METHODS

    cells = _breadth()["tasks"][task]
    known = {m: c["held_out"] for m, c in cells.items() if METHODS[m].rates and c["held_out"] is not None}
    return min(known, key=lambda m: known[m])


def _extra(cells: dict[str, Any]) -> str:
    METHODS = _script("peers").METHODS

    known = {m: c["held_out"] for m, c in cells.items() if METHODS[m].rates and c["held_out"] is not None}
    best = min(known, key=lambda m: known[m])
    return (
        f"- The larger GPT, which is not among the ten: {cells['ours']['steps_share']:.2f} of AdamW's steps, a final "
        "held-out "
        f"loss of {cells['ours']['held_out']:.2f} against {known[best]:.2f} of {METHODS[best].title}, the best of the "
        "peers."
    )


class _Titles(dict[str, str]):
    def __missing__(self, task: str) -> str:
        title: str = _script("breadth_tasks").TASKS[task].title
        return title


_TASK = _Titles()


# --- speed

_STEP = (
    ("LearnedOptimizer, mini-batches", "ours, mini-batches"),
    ("LearnedOptimizer, one batch", "ours, one batch"),
    ("Teleport(Adam), never due", "teleport, never due"),
    ("Teleport(Adam), every 100", "teleport, every 100"),
)


def _by_width(source: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for row in stored(source)["rows"]:
        found.setdefault(row["width"], {})[row["method"]] = row
    return found


def step_transfer() -> str:
    """Time of a step with ``transfer``, and with teleports."""
    rows = [
        [
            f"{width}",
            f"{cells['Adam']['ms_least']:.3g}",
            *(f"{cells[name]['over_adam_least']:.2f}" for name, _ in _STEP),
        ]
        for width, cells in _by_width("benchmarks/optimizer_step.json").items()
    ]
    return Table("", ["width", "Adam, ms", *(title for _, title in _STEP)], rows).shown()


def step_general() -> str:
    """Time of a step with the default, and what it holds."""
    found = _by_width("benchmarks/optimizer_step-general.json")
    rows = []
    for width, cells in found.items():
        many, one = cells["any module, mini-batches"], cells["any module, one batch"]
        rows.append(
            [
                f"{width}",
                f"{many['over_adamw_median']:.1f}",
                f"{one['over_adamw_median']:.1f}",
                f"{many['first_ms_median'] / cells['Adam']['first_ms_median']:.1f}",
                f"{many['state_bytes']:.0f}",
                f"{cells['AdamW']['state_bytes']:.0f}",
            ]
        )
    head = ["width", "mini-batches", "one batch", "first 100 steps, over Adam's", "bytes a parameter", "AdamW's"]
    return Table("", head, rows).shown()


def meta_step() -> str:
    """Time of one step of meta-training."""
    doc = stored("benchmarks/meta_training.json")
    naive = sorted((doc["naive_ms_per_trajectory_step"], doc["naive_ms_again_at_the_end"]))
    rows = [
        [
            row["precision"],
            f"{row['batch']}",
            f"{row['ms_per_trajectory_step']:.4f}",
            " to ".join(f"{ms / row['ms_per_trajectory_step']:.1f}" for ms in naive),
            f"{100 * row['share_of_product_rate']:.0f} %",
            f"{100 * row['share_of_peak']:.0f} %",
        ]
        for row in doc["rows"]
    ]
    head = ["precision", "batch", "ms per trajectory-step", "naive / ours", "of products alone", "of peak"]
    return Table("", head, rows).shown()


def memory() -> str:
    """Memory of a window of meta-training, and what ``--remat`` trades for it."""
    pairs: dict[tuple[int, int], dict[bool, Any]] = {}
    for row in stored("benchmarks/scaling.json")["memory"]:
        pairs.setdefault((row["batch"], row["unroll"]), {})[row["remat"]] = row
    rows = [
        [
            f"{batch}",
            f"{steps}",
            f"{both[False]['peak_mb']:.0f}",
            f"{both[True]['peak_mb']:.0f}",
            f"{both[True]['ms_per_trajectory_step'] / both[False]['ms_per_trajectory_step']:.1f} times",
        ]
        for (batch, steps), both in pairs.items()
    ]
    return Table("", ["batch", "steps in a window", "MB", "MB with `--remat`", "its time"], rows).shown()


def quality() -> str:
    """Seconds of meta-training to a target."""
    found: dict[float, dict[str, Any]] = {}
    doc = stored("benchmarks/time_to_quality.json")
    for row in doc["rows"]:
        found.setdefault(row["target"], {})[row["naive_preset"]] = row

    def naive(row: dict[str, Any]) -> str:
        if row["naive_reached"]:
            return f"{row['naive_seconds']:.{0 if row['naive_seconds'] > 100 else 1}f} s"
        return f"not in {doc['naive_seconds']:g} s (best {row['naive_best_loss']:.1f})"

    rows = []
    for target, by_preset in found.items():
        own = by_preset["paper"]
        low, high = own["seconds_range"]
        first = f"{own['seconds']:.1f} s ({low:.1f} to {high:.1f})"
        rows.append([f"{target}", first, naive(by_preset["paper"]), naive(by_preset["quick"])])
    head = ["held-out loss", "`quick`", "naive, the paper's settings", "naive, settings of `quick`"]
    return Table("", head, rows).shown()


# --- GPU


def gpu() -> str:
    """What runs of ``make gpu`` found."""
    return table(sorted((ROOT / "results" / "gpu").glob("*.json")))


BLOCKS: dict[str, Callable[[], str]] = {
    "field": field,
    "field-evolved": field_evolved,
    "breadth": breadth,
    "step-transfer": step_transfer,
    "step-general": step_general,
    "meta-step": meta_step,
    "memory": memory,
    "quality": quality,
    "gpu": gpu,
}
