"""A record of what a learned optimizer does: its step length, what its controller sets, and what that saw."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from metatele.errors import ConfigError
from metatele.extras import require_modules
from metatele.figures import COLOURS, MOST_LINES, line_style
from metatele.learned.general.controller import Controls, Sight
from metatele.learned.general.direction import norms
from metatele.optim.general import GeneralStepper
from metatele.optim.steppers import Situation

Row = dict[str, Any]
# What is kept of each layer at a look: its name in rows, and the field of the controls or the sight that it is.
SET = {"damping": "damping", "exponent": "anneal", "stretch": "stretch", "decay": "decay", "spectral": "spectral"}
SEEN = {"agreement": "agreement", "momentum": "momentum", "grown": "grown"}
_ALIKE = 1e-6  # relative difference of what is drawn as one


class Recording:
    """What ``optimizer.record()`` returns: rows of plain numbers, a figure of them, scalars for TensorBoard.

    It reads what is on the host anyway, and at looks a few numbers of each layer from the device, in one transfer. So
    steps are the same to the bit with it and without, and CUDA graphs between looks stay. As a context manager it
    stops at the end.

    Args:
        optimizer: Whose; it is known weakly.
        writer: TensorBoard's, or anything with ``add_scalar(tag, value, step)``; rows are also written there as they
            come.
        every: Steps between two looks are kept every so many; looks always are.

    Attributes:
        active: Whether steps are still recorded.

    Example:
        >>> import metatele
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> optimizer = metatele.LearnedOptimizer(model)
        >>> with optimizer.record() as recording:
        ...     for _ in range(2):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 3)).square().mean().backward()
        ...         optimizer.step()
        >>> [(row["step"], row["kind"], list(row["layers"])) for row in recording.rows()]
        [(0, 'look', ['0.weight', '2.weight']), (1, 'look', ['0.weight', '2.weight'])]
        >>> sorted(recording.rows()[0]["layers"]["0.weight"])[:4]
        ['agreement', 'damping', 'decay', 'exponent']
    """

    def __init__(self, optimizer: Any, writer: Any = None, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every must be a whole number above zero, got {every!r}")
        _check_writer(writer)
        self._optimizer = weakref.ref(optimizer)
        self._writer, self._every = writer, every
        self._rows: list[Row] = []
        self._heard: tuple[Sight, Controls] | None = None
        self.active = True

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *failed: object) -> None:
        self.stop()

    def __len__(self) -> int:
        return len(self._rows)

    def stop(self) -> None:
        """Record no more; what was recorded stays."""
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._recording is self:
            optimizer._recording = None
        self.active = False

    def rows(self) -> list[Row]:
        """One for each step that is kept, of numbers, names and nothing else: as JSON takes them.

        - ``step``: from 0 on; ``kind``: ``look``, ``step``, ``skipped`` (not finite), ``back`` (to the weights of the
          last look), or ``one batch`` (stepped as ``transfer`` does, with numbers of its own that are not kept).
        - ``log_length``: ``log η``; ``length``: η, as it is cooled down at the end of a run of known length.
        - ``loss``: that of the closure; without one, at looks alone, what outputs and their gradient tell: the mean of
          a cross-entropy, any other loss up to a constant factor. ``None`` if it is not known.

        At looks also:

        - ``layers``: by name, what is set (``damping``, ``exponent``, ``stretch``, ``decay``, ``spectral``), what was
          seen (``agreement`` of half batches, ``momentum`` over usual gradients, ``grown``: log of the size over the
          first) and ``moved``: ‖ΔW‖/‖W‖ of that step, before ``lr``. Of a grouped layer the mean over its groups.
        - ``controls``: what is one for all: ``longest``, ``target``, ``gain``, and ``vectors``, the stretch of vectors.
        - ``seen``: ``agreement``, ``slope``, ``known``, ``epochs``, ``samples`` of the whole network.
        """
        return [_copied(row) for row in self._rows]

    def write(self, writer: Any) -> None:
        """All rows so far as scalars, named ``learned/damping/0.weight`` and the like.

        Args:
            writer: TensorBoard's ``SummaryWriter``, or anything with ``add_scalar(tag, value, step)``.

        Raises:
            ConfigError: It cannot take scalars.
        """
        _check_writer(writer)
        for row in self._rows:
            _write(writer, row)

    def figure(self, path: str | Path | None = None) -> Any:
        """Four panels: step length, dampings, exponents, spectral shares.

        Args:
            path: Where it is saved too, as a PNG or what its ending says.

        Returns:
            A matplotlib figure.

        Raises:
            ConfigError: Nothing was recorded.
            MissingExtraError: Matplotlib is not installed.
        """
        made = figure_of(self._rows)
        if path is not None:
            made.savefig(path, dpi=120)
        return made

    # --- as it steps

    def around(self, at: Situation) -> bool:
        """Let the optimizer advance, and record what it does; whether there was a step."""
        stepper: GeneralStepper = self._optimizer().stepper  # type: ignore[union-attr]  # it is what calls
        course = stepper.course
        age = 0 if course is None else course.age
        cooled = 1.0 if course is None else stepper._cooled(course, at)
        back, self._heard = at.group["rolled_back"], None
        hook = stepper.meta.controller.register_forward_hook(self._hear)  # for this step alone: copies carry none
        try:
            done = stepper.advance(at)
        finally:
            hook.remove()
        course, heard, self._heard = stepper.course, self._heard, None
        if course is None:
            return done
        kind = "step" if done else "skipped"
        if done and stepper.repeating:
            kind = "one batch"
        elif done and at.group["rolled_back"] > back:
            kind = "back"
        elif done and heard is not None and heard[1] is course.controls:
            kind = "look"
        if kind == "step" and age % self._every:
            return done
        row: Row = {"step": age, "kind": kind, "log_length": course.log_rate, "loss": at.loss}
        row["length"] = None if kind in ("one batch", "skipped") else math.exp(course.log_rate) * cooled
        if kind == "look" and heard is not None:
            self._look(row, stepper, *heard)
        self._rows.append(row)
        if self._writer is not None:
            _write(self._writer, row)
        return done

    def _hear(self, controller: Any, seen: tuple[Sight], controls: Controls) -> None:
        self._heard = seen[0], controls

    def _look(self, row: Row, stepper: GeneralStepper, sight: Sight, controls: Controls) -> None:
        """What is known of each layer at a look: all of it in one transfer."""
        course = stepper.course
        assert course is not None
        assert course.sizes is not None
        layout, L = course.layout, course.layout.matrices
        changes = [norms(bucket.of(course.change)) for bucket in layout.buckets]
        moved = torch.cat(changes) / course.sizes.clamp_min(1e-30) if changes else course.sizes
        columns = {name: getattr(controls, field)[:L] for name, field in SET.items()}
        columns |= {name: getattr(sight, field)[:L] for name, field in SEEN.items()}
        columns["moved"] = moved
        joint = torch.stack([controls.longest, controls.target, controls.gain, controls.stretch[-1]])
        flat = torch.cat(
            [*(c.to(moved) for c in columns.values()), joint.to(moved), sight.agreement_all[None].to(moved)]
        )
        numbers = flat.tolist()
        tables = {name: numbers[n * L : (n + 1) * L] for n, name in enumerate(columns)}
        longest, target, gain, vectors, agreement = numbers[len(columns) * L :]
        row["layers"] = {
            part.name: {name: _mean(table[layout.rows(number)]) for name, table in tables.items()}
            for number, part in enumerate(stepper.capture.parts)
        }
        row["controls"] = {"longest": longest, "target": target, "gain": gain, "vectors": vectors}
        row["seen"] = {
            "agreement": agreement,
            "slope": float(sight.slope),
            "known": sight.known,
            "epochs": sight.epochs,
            "samples": sight.samples,
        }
        fallen = float(sight.fallen)
        if row["loss"] is None and course.start_loss is not None and (fallen or not sight.age):
            row["loss"] = math.exp(float(course.start_loss) + fallen)


def _copied(value: Any) -> Any:
    return {key: _copied(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check_writer(writer: Any) -> None:
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise ConfigError(f"writer must have add_scalar(tag, value, step), as TensorBoard's has; got {type(writer)}")


def _write(writer: Any, row: Row) -> None:
    step = row["step"]
    for name in ("length", "loss"):
        if row[name] is not None:
            writer.add_scalar(f"learned/{name}", row[name], step)
    for layer, numbers in row.get("layers", {}).items():
        for name, value in numbers.items():
            writer.add_scalar(f"learned/{name}/{layer}", value, step)
    for group in ("controls", "seen"):
        for name, value in row.get(group, {}).items():
            writer.add_scalar(f"learned/{group}/{name}", value, step)


# --- drawing


def figure_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The figure of rows that :meth:`Recording.rows` gave, which may have been stored meanwhile.

    Args:
        rows: Of one run.

    Returns:
        A matplotlib figure.

    Raises:
        ConfigError: There is no look among them.
        MissingExtraError: Matplotlib is not installed.

    Example:
        >>> layers = {"0.weight": dict(damping=5.0, exponent=0.2, spectral=0.9, moved=0.01)}
        >>> row = dict(step=0, kind="look", length=0.03, loss=1.0, layers=layers)
        >>> [axes.get_title() for axes in figure_of([row]).axes]
        ['Step length', 'Damping λ', 'Exponent p', 'Spectral share r']
    """
    looks = [row for row in rows if "layers" in row]
    if not looks:
        raise ConfigError("nothing was recorded: a figure needs a step at which the controller was asked")
    require_modules("the figure of a recording", "matplotlib")
    from matplotlib.figure import Figure  # no window, and no state that others share

    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(2, 2).flat
    (length, damping, exponent, spectral) = panels
    lengths = [(row["step"], row["length"]) for row in rows if row["length"]]
    length.plot(*_cut(*zip(*lengths, strict=True)), **line_style(0), label="η, of the whole network")
    moved = [median(numbers["moved"] for numbers in row["layers"].values()) for row in looks]
    if any(moved):
        at = [row["step"] for row in looks]
        length.plot(*_cut(at, moved), **line_style(1), label="‖ΔW‖/‖W‖, median layer")
    length.set_yscale("log")
    length.legend(fontsize=9, frameon=False)
    drawn: dict[str, Any] = {}
    for axes, name in ((damping, "damping"), (exponent, "exponent"), (spectral, "spectral")):
        drawn |= _draw(axes, looks, name)
    damping.set_yscale("log")
    spectral.set_ylim(-0.03, 1.03)
    titles = ("Step length", "Damping λ", "Exponent p", "Spectral share r")
    for axes, title in zip((length, damping, exponent, spectral), titles, strict=True):
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    exponent.set_xlabel("step")
    spectral.set_xlabel("step")
    if drawn:
        handles, labels = list(drawn.values()), list(drawn)
        figure.legend(handles, labels, loc="outside lower center", ncols=MOST_LINES // 2, fontsize=9, frameon=False)
    return figure


def _cut(at: Sequence[float], *columns: Sequence[float]) -> list[list[float]]:
    """Steps and what belongs to them, with a gap where a loaded state took the run back: no line leads there."""
    cuts = [n for n in range(1, len(at)) if at[n] <= at[n - 1]]
    series = [list(one) for one in (at, *columns)]
    for one in series:
        for n in reversed(cuts):
            one.insert(n, math.nan)
    return series


def _draw(axes: Any, looks: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """A line for each layer, one for layers that are alike, or median and range of many; what is drawn, by label."""
    layers = list(dict.fromkeys(layer for row in looks for layer in row["layers"]))
    at = [row["step"] for row in looks]
    values = [[numbers[name] for numbers in row["layers"].values()] for row in looks]
    low, high, middle = [min(one) for one in values], [max(one) for one in values], [median(one) for one in values]
    colour, still = COLOURS[0], max(middle) - min(middle) <= _ALIKE * abs(max(middle))
    alike = all(b - a <= _ALIKE * abs(b) for a, b in zip(low, high, strict=True))
    at, low, high, middle = _cut(at, low, high, middle)
    if alike:
        axes.plot(at, middle, color=colour)
        text = f"{middle[0]:.3g} in every layer, at every look" if still else "the same in every layer"
        axes.text(0.5, 0.6 if still else 0.05, text, transform=axes.transAxes, ha="center", fontsize=9)
        return {}
    if len(layers) > MOST_LINES:
        band = axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        return {f"range of {len(layers)} layers": band, "median layer": axes.plot(at, middle, color=colour)[0]}
    drawn = {}
    for place, layer in enumerate(layers):
        points = [(row["step"], row["layers"][layer][name]) for row in looks if layer in row["layers"]]
        drawn[layer] = axes.plot(*_cut(*zip(*points, strict=True)), **line_style(place))[0]
    return drawn
