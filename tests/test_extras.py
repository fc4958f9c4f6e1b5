"""A package that is missing is named before anything is computed, with the command that installs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from metatele.extras import EXTRAS, missing_message, require_modules

ROOT = Path(__file__).resolve().parent.parent
# As if they were not installed: none of those that Python asks for a module finds them.
WITHOUT = """
import sys
class Blind:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Blind, sys.meta_path)
import runpy
sys.argv = {arguments!r}
try:
    runpy.{run}
finally:
    print("torch" in sys.modules)
"""
TRAINING = """
import sys
import torch
import metatele
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
x, y = torch.randn(32, 4), torch.randn(32, 2)
losses = []
optimizers = [metatele.LearnedOptimizer(model, "transfer")]
optimizers.append(metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, every=2))
for optimizer in optimizers:
    for _ in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(float(not all(map(torch.isfinite, torch.tensor(losses)))), losses[-1] < losses[0])
"""
CHECKPOINT = str(ROOT / "checkpoints" / "transfer")


def without(names, *arguments, module=True):
    run = f"run_module({arguments[0]!r}, run_name='__main__', alter_sys=True)"
    run = run if module else f"run_path({arguments[0]!r}, run_name='__main__')"
    code = WITHOUT.format(names=names, arguments=list(arguments), run=run)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("names", "command", "words"),
    [
        (["tqdm"], "metatele train quick", "meta-training needs tqdm: "),
        (["tqdm", "tensorboard"], "metatele train quick", "meta-training needs tqdm and tensorboard: "),
        (["matplotlib"], f"metatele evaluate {CHECKPOINT}", "an evaluation's figure needs matplotlib: "),
        (["matplotlib"], "metatele experiments fig5", "the experiment fig5 needs matplotlib: "),
        (["scipy"], "metatele.experiments theory", "the experiment theory needs scipy: "),
        (["sklearn"], "metatele.experiments transfer", "the experiment transfer needs scikit-learn: "),
        (["tensorboard"], str(ROOT / "train_meta.py") + " quick", "meta-training needs tensorboard: "),
        (["matplotlib"], str(ROOT / "eval_meta.py") + f" {CHECKPOINT}", "an evaluation's figure needs matplotlib: "),
    ],
)
def test_programs_name_what_is_missing_before_they_begin(names, command, words, tmp_path):
    out = tmp_path / "out"
    module = not command.partition(" ")[0].endswith(".py")
    done = without(names, *command.split(), "--out", str(out), module=module)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith(words + "pip install 'metatele[train]' (see README.md#install)\n")
    assert done.stderr.count("\n") == 1
    assert done.stdout == "False\n"  # torch was not loaded
    assert not out.exists()


def test_digits_name_what_they_are_read_with(tmp_path):
    done = without(["sklearn"], "metatele.experiments", "fig5", "--out", str(tmp_path / "out"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("needs scikit-learn: pip install 'metatele[train]' (see README.md#install)\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["metatele train --help", "metatele experiments fig5 --help"])
def test_help_needs_no_extra(command):
    done = without(list(EXTRAS), *command.split())
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


def test_optimizers_need_no_extra(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    done = without(list(EXTRAS), str(tmp_path / "train.py"), module=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.0 True\nTrue\n"


def test_several_extras_are_one_command():
    require_modules("this", *EXTRAS)  # all are here
    expected = "this needs higher and scikit-learn: pip install 'metatele[higher,train]' (see README.md#install)"
    assert missing_message("this", "higher", "sklearn") == expected
