"""Loss axes show what converges, whatever diverges beside it."""

import math

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
