"""The built wheel, used as a stranger uses it: installed elsewhere, run from another folder."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

import metatele
from metatele.errors import CheckpointError
from metatele.named import NAMED, named_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = "quick --widths 3,4,2 --samples 3 --hidden 4 --batch 2 --trajectories 4 --horizon 4 --unroll 2 --quiet"
TINY += " --validation-steps 4 --validation-score-at 4 --validation-trajectories 4 --device cpu"
DIGITS = """
import torch
from sklearn.datasets import load_digits
from torch import nn

import metatele

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images).float() / 16, torch.tensor(labels)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = metatele.LearnedOptimizer(model, "transfer")
for batch in torch.randperm(len(x)).split(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
print(metatele.__file__)
print(float(nn.functional.cross_entropy(model(x), y)))
"""
CONSUMER = """
import metatele
import torch

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
optimizer: torch.optim.Optimizer = metatele.LearnedOptimizer(model, "transfer")
version: str = metatele.__version__
found: metatele.Checkpoint = metatele.load("transfer", device="cpu")
scores: dict[str, object] = found.scores
"""


def output(command, folder):
    """What a command prints, from a folder that is not the repository."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, so that nothing an earlier build has left can be in it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("metatele", "checkpoints"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    output([*pip, "--wheel-dir", str(folder / "dist"), str(folder)], folder)
    (found,) = (folder / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def home(wheel, tmp_path_factory):
    """A new environment's programs: the wheel alone is installed there, what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    output([*pip, "--no-deps", "--no-index", "--ignore-installed", str(wheel)], folder)
    return folder / "bin"


def test_the_wheel_is_small_and_holds_what_it_should(wheel):
    assert wheel.stat().st_size < 1.4e6
    names = set(ZipFile(wheel).namelist())
    assert "metatele/py.typed" in names
    for name in ("general", "transfer", "lr-tele"):
        assert {f"metatele/checkpoints/{name}/{file}" for file in ("config.json", "model.safetensors")} <= names
    assert not any(re.match(r"(metatele/checkpoints/update|tests/|benchmarks/|setup)", name) for name in names)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "metatele").rglob("*.py")}
    assert sources <= names


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (found["title"], found["version"]) == ("metatele", metatele.__version__)
    assert [a["family-names"] for a in found["references"][0]["authors"]] == ["Zhao", "Gower", "Walters", "Yu"]


def test_digits_are_learned_from_any_folder(home, tmp_path):
    where, loss = output([home / "python", "-c", DIGITS], tmp_path).split()
    assert Path(where).is_relative_to(home.parent)
    assert float(loss) < 0.5


def test_its_commands_run(home, tmp_path):
    command = home / "metatele"
    assert output([command, "--version"], tmp_path) == f"metatele {metatele.__version__}\n"
    assert output([command, "--help"], tmp_path).startswith("usage: metatele COMMAND")
    for program in ([command], [home / "python", "-m", "metatele"]):
        out = tmp_path / f"run{len(program)}"
        output([*program, "train", *TINY.split(), "--out", out], tmp_path)
        assert (out / "checkpoint" / "model.safetensors").is_file()
    flags = ["--trajectories", "2", "--steps", "2", "--device", "cpu", "--out", "evaluation"]
    assert "LSTM(update,tele)" in output([command, "evaluate", "run1", "transfer", *flags], tmp_path)
    assert (tmp_path / "evaluation" / "loss.png").is_file()


def test_a_type_checker_reads_its_types(home, tmp_path):
    """Outside the repository, where only ``py.typed`` makes them known."""
    pytest.importorskip("mypy")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "wrong.py").write_text("import metatele\n\nmetatele.load(3)\n")
    skipped = "[mypy]\nincremental = False\nstrict = True\n[mypy-torch.*]\nfollow_imports = skip\n"  # saves a minute
    (tmp_path / "mypy.ini").write_text(skipped)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(home / "python"), "consumer.py", "wrong.py"]
    done = subprocess.run(mypy, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.count("error:") == 1, done.stdout + done.stderr
    assert 'wrong.py:3: error: Argument 1 to "load" has incompatible type "int"' in done.stdout


@pytest.mark.parametrize("name", NAMED)
def test_published_checkpoints_load_by_name(name):
    assert named_checkpoint(name) == ROOT / "checkpoints" / name
    assert metatele.load(name).training["preset"]


def test_a_folder_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "checkpoints" / "lr-tele", "transfer")
    assert metatele.load("transfer").method.title == "LSTM(lr,tele)"


def test_unknown_names_and_paths_are_one_sentence():
    with pytest.raises(CheckpointError, match="one of general, transfer, lr-tele, update, update-tele, got 'tele'"):
        named_checkpoint("tele")
    with pytest.raises(CheckpointError, match="does not exist, nor is it one of general, transfer, lr-tele"):
        metatele.load("nowhere")


def test_what_is_too_large_for_the_wheel_says_where_it_is(home, tmp_path):
    code = "from metatele.errors import CheckpointError\nfrom metatele.named import named_checkpoint\n"
    code += "try:\n    named_checkpoint('update-tele')\nexcept CheckpointError as error:\n    print(error)"
    printed = output([home / "python", "-c", code], tmp_path)
    assert "get the folder checkpoints/update-tele from metatele's repository and give its path" in printed
    assert printed.count("\n") == 1
