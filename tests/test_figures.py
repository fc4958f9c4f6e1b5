"""Loss axes show what converges, whatever diverges beside it."""

import importlib
import itertools
import json
import math
from pathlib import Path

import pytest

from metatele import figures


def test_a_line_that_diverges_does_not_stretch_the_axis():
    _, panels = figures.subplots(1, 2, figsize=(4, 2), sharey=True)
    panels[0].plot([4.0, 1.0, 1e-3])
    panels[0].plot([math.nan, 5.0, 1e32])
    panels[1].plot([7.0, math.inf, 1e20])
    figures.loss_axes(*panels)
    for axes in panels:
        assert axes.get_yscale() == "log"
        low, high = axes.get_ylim()
        assert low < 1e-3
        assert high == pytest.approx(700)


@pytest.mark.parametrize("values", [[1.0, 30.0, 0.1], [math.nan, math.inf], []])
def test_what_stays_within_the_frame_is_shown_as_matplotlib_would(values):
    limits = []
    for scale in (figures.loss_axes, lambda axes: axes.set_yscale("log")):
        figure, axes = figures.subplots(1, 1, figsize=(2, 2))
        axes.plot(values)
        scale(axes)
        limits.append(axes.get_ylim())
        assert figures.png(figure)[:4] == b"\x89PNG"
    assert limits[0] == limits[1]


def test_labels_at_line_ends_do_not_overlap():
    figure, panels = figures.subplots(1, 2, figsize=(8, 3), layout="constrained")
    ends = [[1, 1.001, 1.002, 0.999, 0.5, 2], [9.0, 9.0, 9.0, 0.1, 0.1, math.nan]]
    for axes, values in zip(panels, ends, strict=True):
        for place, end in enumerate(values):
            axes.plot([3, 2, end], label=f"line {place}\nof six" if place == 1 else f"line {place}")
    for axes in panels:
        figures.label_lines(axes)
    figure.draw_without_rendering()
    for axes in panels:
        boxes = [text.get_window_extent() for text in axes.texts]
        texts = [type(text).__mro__[1].get_window_extent(text) for text in axes.texts]  # without the line to the curve
        assert len(boxes) == 6
        for one, box in enumerate(texts):
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1 + 1
            assert not any(box.overlaps(other) for other in texts[one + 1 :])


def test_a_label_stands_at_the_height_of_its_line_where_there_is_room():
    figure, axes = figures.subplots(1, 1, figsize=(6, 4), layout="constrained")
    for level in (1.0, 2.0, 3.0):
        axes.plot([0, 1], [level, level], label=f"{level}")
    axes.set_xlim(0, 1)
    figures.label_lines(axes)
    figure.draw_without_rendering()
    for text in axes.texts:
        box = type(text).__mro__[1].get_window_extent(text)
        line = axes.transData.transform((0, float(text.get_text())))[1]
        assert (box.y0 + box.y1) / 2 == pytest.approx(line, abs=3)


def test_long_labels_become_a_legend_below_the_panel():
    figure, axes = figures.subplots(1, 1, figsize=(5, 4), layout="constrained")
    axes.plot([3, 2, 1], label="LSTM(update,tele) /a/folder/with/a/rather/long/name/of/its/own")
    figures.label_lines(axes)
    figure.draw_without_rendering()
    assert not axes.texts
    assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
    assert axes.get_window_extent().width > 0.5 * figure.bbox.width


def test_a_title_is_as_wide_as_its_figure():
    figure, _ = figures.subplots(1, 1, figsize=(4, 3), layout="constrained")
    figures.title(figure, "median of 64 held-out trajectories, 5 seeds; in the table alone: SGD, Momentum, L-BFGS")
    assert figure.texts[0].get_window_extent().width <= figure.bbox.width


@pytest.mark.parametrize("wanted", [[0.0, 0.0, 0.0], [-5.0, 0.4, 0.5, 5.0], [0.9, 1.0], [4.0]])
def test_spread_places_keep_their_distance_and_order_and_are_nearest(wanted):
    found = figures.spread(wanted, [1.0] * len(wanted), -10.0, 10.0)
    assert all(b - a >= 1 - 1e-9 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(wanted))  # of the nearest in least squares the mean is kept
    low = figures.spread(wanted, [1.0] * len(wanted), 7.0, 10.0)
    assert low[0] >= 7.0


def test_colours_differ_on_a_grey_print_and_have_line_styles():
    tones = sorted(map(figures.lightness, figures.COLOURS))
    assert min(b - a for a, b in itertools.pairwise(tones)) > 10
    assert len(figures.COLOURS) == len(figures.LINE_STYLES) == figures.MOST_LINES
    assert len({str(figures.line_style(place)) for place in range(6)}) == 6


def test_ink_can_be_read_on_white():
    assert all(figures.lightness(figures.ink(colour)) <= 52 for colour in figures.COLOURS)


def test_losses_that_fall_far_at_once_do_not_squeeze_the_rest():
    _, axes = figures.subplots(1, 1, figsize=(3, 2))
    axes.plot([100.0, 0.3, 0.25, 0.2])
    figures.loss_axes(axes, since=1)
    assert 0.3 < axes.get_ylim()[1] < 1


STORED = Path(__file__).parent.parent / "results"
DRAWN = {
    "fig5-mnist": "fig5",
    "fig12": "fig12",
    "fig4-digits": "fig4",
    "fig7": "fig7",
    "optimizers-beyond-digits": "optimizers_beyond",
}


@pytest.mark.parametrize("folder", DRAWN)
def test_no_panel_of_an_experiment_has_more_lines_than_can_be_followed(folder, monkeypatch):
    caught = []
    monkeypatch.setattr(figures, "png", lambda figure, **_: caught.append(figure) or b"")
    module = importlib.import_module(f"metatele.experiments.{DRAWN[folder]}")
    module.figure(json.loads((STORED / folder / "results.json").read_text("utf-8")))
    assert figures.crowded(caught[0]) == []


def test_stored_pictures_are_small():
    large = {str(p.relative_to(STORED)): p.stat().st_size for p in STORED.rglob("*.png") if p.stat().st_size > 100_000}
    assert large == {}
