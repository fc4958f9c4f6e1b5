"""The study's tables, from its stored results. Imports no torch until a table is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from metatele.experiments.transfer.results import (
    OURS,
    PATIENT,
    WHITENING,
    ClassificationTask,
    RegressionTask,
    Results,
    Task,
    mean_of,
)

SHOWN = (10, 30, 100, 300, 1000)  # steps of the tables of details

Table = list[list[str]]


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return "diverged" if math.isinf(value) else f"{value:.2g}"


def _spread(values: Sequence[float]) -> str:
    """Mean over meta-training seeds, and the range."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return _number(sum(values) / len(values))
    return f"{_number(sum(values) / len(values))} ({_number(min(values))} to {_number(max(values))})"


def _precise(values: Sequence[float]) -> str:
    """The same to four places, for losses and accuracies on images."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    text = f"{sum(values) / len(values):.4f}"
    return text if len(values) < 2 else f"{text} ({min(values):.4f} to {max(values):.4f})"


def _mean_of_known(steps: Sequence[int | None]) -> float | None:
    """Mean of the steps at which meta-seeds reached a loss; ``None`` if one did not."""
    known = [step for step in steps if step is not None]
    return sum(known) / len(known) if len(known) == len(steps) else None


def _heading(task: Task) -> str:
    return f"{task.title}, {'-'.join(map(str, task.widths))}"


def _patient(task: RegressionTask, steps: float) -> float:
    """The better of both Adams' losses at the last stored step up to one; not a number beyond the last."""
    found = [m for name in ("Adam", PATIENT) for m in task.of(name)]
    known = [s for s in found[0].steps if s <= steps]
    return math.nan if steps > found[0].steps[-1] else min(m.at(known[-1]) for m in found)


def table(results: Results) -> Table:
    """A row for each task: losses of all methods at equal steps, and where ours stands against tuned Adam."""
    names = results.names
    rows = [["task", *names, "Adam / ours", "steps to Adam's", "Adam / ours at equal time", "ms a step, of Adam's"]]
    for task in results.tasks:
        found = {name: task.scores(name) for name in names}
        mean = sum(found[OURS]) / len(found[OURS])
        pace = task.milliseconds[OURS] / task.milliseconds["Adam"]
        steps, equal_time, head = "", "", _heading(task)
        if isinstance(task, RegressionTask):
            reached = _mean_of_known([m.reached(task.adam) for m in task.of(OURS)])
            steps = "not reached" if reached is None else f"{reached:.0f} of {task.target}"
            equal_time = _number(_patient(task, pace * task.target) / mean)
            head += f", {task.samples} samples"
        cells = [_spread(values) if values else "" for values in found.values()]
        rows.append([head, *cells, f"{task.adam / mean:.2g}", steps, equal_time, f"{pace:.1f}"])
    return rows


def _regression_details(task: RegressionTask, names: Sequence[str]) -> Table:
    head = [*(f"step {s}" for s in SHOWN), "steps to Adam's loss", "ms a step", "ms to Adam's loss", "highest / first"]
    rows = [["method", *head]]
    for name in names:
        if found := task.of(name):
            ms, mean = task.milliseconds[name], _mean_of_known([m.reached(task.adam) for m in found])
            rise = max(m.highest_over_first or math.inf for m in found)
            reached = ("", "") if mean is None else (f"{mean:.0f}", f"{mean * ms:.3g}")
            losses = [_spread([m.at(s) for m in found]) for s in SHOWN]
            rows.append([name, *losses, reached[0], f"{ms:.2f}", reached[1], f"{rise:.3g}"])
    return rows


def _classification_details(task: ClassificationTask, names: Sequence[str]) -> Table:
    rows = [["method", "training loss", "test loss", "test accuracy", "ms a step", "seconds"]]
    for name in names:
        if found := task.of(name):
            ms, steps = task.milliseconds[name], (len(found[0].train_loss) - 1) * task.batches
            columns = (
                [mean_of(m_rows[-1]) for m_rows in column]
                for column in (
                    [m.train_loss for m in found],
                    [m.test_loss for m in found],
                    [m.test_accuracy for m in found],
                )
            )
            rows.append([name, *map(_precise, columns), f"{ms:.2f}", f"{ms * steps / 1e3:.1f}"])
    return rows


def _geometric(values: Sequence[float]) -> float:
    return math.inf if math.inf in values else math.exp(sum(math.log(max(v, 1e-30)) for v in values) / len(values))


def _ablations(results: Results) -> Table:
    kinds = [task for task in results.tasks if isinstance(task, RegressionTask)]
    names = [task.name for task in kinds]
    plain = {task.name: task.score(task.of(WHITENING)[0]) / task.adam for task in kinds}
    listed = [
        (a.name, [[math.inf if (r := ratios[n]) is None else r for n in names] for ratios in a.ratios])
        for a in results.ablations
    ]
    listed.append(("whitening + GD, tuned on each, nothing learned", [[plain[n] for n in names]]))
    rows = [["", *names, "all"]]
    for name, values in listed:
        overall = [_geometric(row) for row in values]
        text = _number(_geometric(overall))
        if len(overall) > 1:
            text += f" ({_number(min(overall))} to {_number(max(overall))})"
        rows.append([name, *(_number(_geometric(column)) for column in zip(*values, strict=True)), text])
    return rows


def details(results: Results) -> str:
    """The other tables, in Markdown: over time, at other steps, test losses, ablations."""
    from metatele.training.report import markdown

    parts = []
    for task in results.tasks:
        rows = (
            _regression_details(task, results.names)
            if isinstance(task, RegressionTask)
            else _classification_details(task, results.names)
        )
        parts += [f"\n{_heading(task)}\n\n", markdown(rows)]
    if results.ablations:
        parts.append(
            "\nMeta-trained for less time, without something; mean loss at step 100 over tuned Adam's, geometric means "
            "over seeds, and over all kinds with the range of seeds\n\n"
        )
        parts.append(markdown(_ablations(results)))
    return "".join(parts)
