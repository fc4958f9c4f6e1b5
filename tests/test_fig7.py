"""Figure 7: distances are exact, and the mean over directions agrees with closed forms."""

import json
import math

import numpy as np
import pytest

from metatele.errors import ConfigError
from metatele.experiments.__main__ import main
from metatele.geometry.displacement import CURVES, STRAIGHT, Circle, Parabola, circle_closed_form, expected_displacement


@pytest.mark.parametrize("curve", CURVES.values(), ids=lambda c: c.name)
def test_without_curvature_the_mean_is_two_over_pi(curve):
    assert curve.expected_distance(0.0) == pytest.approx(2 / math.pi, abs=1e-14)
    assert curve.expected_distance(1e-6) == pytest.approx(STRAIGHT, abs=1e-11)


@pytest.mark.parametrize("curvature", [0.001, 0.1, 0.9, 1.0, 1.5, 1.999, 2.0, 2.001, 10.0, 300.0])
def test_quadrature_of_the_circle_is_its_elliptic_integral(curvature):
    assert Circle().expected_distance(curvature) == pytest.approx(circle_closed_form(curvature), abs=1e-10)


def test_limits_of_large_curvature_are_a_point_and_a_ray():
    # A circle shrinks to w₀; a parabola closes to the upper half of the second axis.
    assert Circle().expected_distance(1e4) == pytest.approx(1, abs=2e-4)
    assert Parabola().expected_distance(1e6) == pytest.approx(1 / 2 + 1 / math.pi, abs=1e-3)


def test_distance_to_the_parabola_is_that_to_the_nearest_root_of_the_cubic():
    random = np.random.default_rng(0)
    for _ in range(2000):
        (a, b), x = random.normal(size=2), 10 ** random.uniform(-3, 2)
        roots = np.roots([x * x / 2, 0, 1 - x * b, -a])
        real = roots[np.abs(roots.imag) < 1e-7].real
        nearest = np.hypot(real - a, x * real**2 / 2 - b).min()
        assert Parabola().distance((a, b), x) == pytest.approx(nearest, abs=1e-12)


@pytest.mark.parametrize("name", CURVES)
def test_mean_agrees_with_random_draws_and_depends_on_the_product_alone(name):
    angles = 2 * math.pi * np.random.default_rng(1).random(20_000)
    draws = np.array([CURVES[name].distance((math.cos(t), math.sin(t)), 1.3) for t in angles])
    mean = expected_displacement(name, 13.0, 0.1)
    assert abs(draws.mean() - mean) < 4 * draws.std() / math.sqrt(len(draws))
    assert expected_displacement(name, 0.65, 2.0) == pytest.approx(mean, abs=1e-12)


def test_arguments_that_cannot_be_used_are_named():
    for curvature in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="curvature must be a finite number"):
            expected_displacement("circle", curvature, 1.0)
    with pytest.raises(ConfigError, match="shift must be a finite length above 0, got 0"):
        expected_displacement("circle", 1.0, 0.0)
    with pytest.raises(ConfigError, match="curve must be one of parabola, circle, got 'line'"):
        expected_displacement("line", 1.0, 1.0)
    with pytest.raises(ConfigError, match="above 0, got 0"):
        circle_closed_form(0.0)


def test_experiment_leaves_results_a_table_and_a_figure(tmp_path, capsys):
    main(["fig7", "--steps", "10", "--out", str(tmp_path)])
    doc = json.loads((tmp_path / "results.json").read_text())
    assert [arm["shift"] for arm in doc["arms"]] == [2, 1, 0.5, 0.2, 0.1, 0.1, 0.05, 0.02, 0.01, 0.005]
    assert all(arm["displacement"][0] == pytest.approx(STRAIGHT, abs=1e-14) for arm in doc["arms"])
    assert doc["distance_from_closed_form"] < 1e-8
    # As drawn in the paper: at the largest curvature the parabola is above 2/π, the circle below.
    assert all((arm["displacement"][-1] > STRAIGHT) == (arm["curve"] == "parabola") for arm in doc["arms"])
    table = (tmp_path / "table.md").read_text()
    assert "Running time" in table
    assert (tmp_path / "displacement.png").read_bytes()[:4] == b"\x89PNG"
    main(["fig7", "--redraw", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == table
    assert "displacement.png" in capsys.readouterr().out
