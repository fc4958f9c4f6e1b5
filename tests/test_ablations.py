"""What benchmarks/ablations.py switches off is off, and its results are written, kept and drawn again."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablations  # noqa: E402
from ablations import VARIANTS, meta_of  # noqa: E402

from metatele.named import named_checkpoint  # noqa: E402
from metatele.optim.learned import LearnedOptimizer  # noqa: E402

FOLDER = str(named_checkpoint("general"))
TINY = ["--problems", "2", "--generations", "1", "--meta-seeds", "2", "--pairs", "1", "--budget-ms", "15"]


def controls_of(name):
    """What the controller of a variant sets in a short run."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = LearnedOptimizer(model, meta_of(FOLDER, VARIANTS[name]))
    x, y = torch.randn(8, 40, 6), torch.randint(3, (8, 40))
    for a, b in zip(x, y, strict=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(a), b).backward()
        optimizer.step()
    return optimizer.stepper.course.controls


def test_the_spectral_exponent_is_what_a_variant_says_and_the_controllers_else():
    own = controls_of("checkpoint").spectral
    assert ((own > 0) & (own < 1)).all()
    assert (controls_of("whitened").spectral == 0).all()
    assert (controls_of("msign").spectral == 1).all()


def test_noise_is_hidden_from_the_controller_alone():
    blind, seeing = (meta_of(FOLDER, VARIANTS[name]) for name in ("unseen-noise", "checkpoint"))
    assert float(seeing.controller.visible.sum() - blind.controller.visible.sum()) == 3  # numbers about noise
    for (name, a), (_, b) in zip(blind.named_parameters(), seeing.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_results_are_kept_and_drawn_again(tmp_path, capsys):
    file = tmp_path / "ablations.json"
    where = ["--json", str(file), "--runs", str(tmp_path / "runs")]
    ablations.main([*TINY, *where, "--variants", "checkpoint", "whitened"])
    first = json.loads(file.read_text())
    ablations.main([*TINY, *where, "--variants", "checkpoint", "whitened", "no-held-out"])
    result = json.loads(file.read_text())
    assert set(result["rows"]) == {"checkpoint", "whitened", "no-held-out"}
    assert result["adam"] == first["adam"]
    assert result["rows"]["whitened"] == first["rows"]["whitened"]
    assert len(result["rows"]["no-held-out"]["seeds"]) == 2
    stored = json.loads((tmp_path / "runs" / "no-held-out" / "checkpoint" / "config.json").read_text())
    assert stored["training"]["training"]["held_end_weight"] == 0
    capsys.readouterr()
    ablations.main(["--redraw", str(file)])
    drawn = capsys.readouterr().out
    assert drawn == file.with_suffix(".md").read_text()
    assert all(VARIANTS[name].title in drawn for name in result["rows"])
    with pytest.raises(SystemExit, match="is of other settings"):
        ablations.main([*TINY, *where, "--problems", "3"])


def test_adams_own_runs_score_nothing():
    run = [1.0, 0.5, 0.6, 0.4, 0.1]
    row = {"outcomes": [run, run, None], "seeds": []}
    found = ablations.summary(row, row, [run, run, run])
    assert found["score"] == found["difference"] == 0
    assert found["fine"] == 1
