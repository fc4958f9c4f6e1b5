"""The programs: help at once, one clear line for every mistake, the promised files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import small_optimizer

import metatele
from metatele.cli import evaluate, train
from metatele.command_line import device_named
from metatele.config import MethodConfig, TaskConfig, TrainingConfig
from metatele.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def script(name, *arguments):
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def one_line(done, code, words):
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert done.stdout == ""


WITHOUT_TORCH = """
import runpy, sys
sys.argv = {arguments!r}
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print("torch" in sys.modules)
"""


def module(*arguments):
    """`python -m` with the arguments, and whether torch was loaded as the last line of the output."""
    code = WITHOUT_TORCH.format(arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("name", ["train_meta.py", "eval_meta.py"])
def test_help_does_not_wait_for_torch(name):
    done = script(name, "--help")
    assert done.returncode == 0
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / name), "--help"], capture_output=True, text=True, check=False
    )
    assert "torch" not in loaded.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 0, "usage: python -m metatele COMMAND"),
        (["--help"], 0, "usage: python -m metatele COMMAND"),
        (["--version"], 0, f"metatele {metatele.__version__}"),
        (["train", "--help"], 0, "python -m metatele train quick --out runs/quick"),
        (["evaluate", "--help"], 0, "usage: python -m metatele evaluate"),
        (["experiments"], 0, "usage: python -m metatele experiments NAME"),
        (["experiments", "fig5", "--help"], 0, "usage: python -m metatele experiments fig5"),
        (
            ["tran"],
            2,
            "python -m metatele: error: command must be one of demo, train, evaluate, experiments, got 'tran'",
        ),
        (["train", "quick"], 2, "python -m metatele train: error: the following arguments are required: --out"),
        (
            ["train", "quick", "--out", "x", "--batch", "0"],
            2,
            "metatele train: error: batch must be positive",
        ),
        (["train", "quick", "--out", "x", "--unroll", "500"], 2, "python -m metatele train: error: unroll must be"),
        (["evaluate", "a", "--out", "x", "--device", "gpu"], 2, "python -m metatele evaluate: error: device must be"),
        (["experiments", "fig99"], 2, "python -m metatele experiments: error: experiment must be one of fig4"),
        (["experiments", "fig5", "--turbo"], 2, "python -m metatele experiments fig5: error: unrecognized arguments"),
    ],
)
def test_the_command_answers_without_torch(arguments, code, words):
    done = module("metatele", *arguments)
    assert done.returncode == code, done.stderr
    assert words in (done.stderr if code else done.stdout)
    assert done.stderr.count("\n") == (1 if code else 0)
    assert done.stdout.endswith("False\n")


def test_messages_begin_with_what_was_called():
    for name in ("train_meta.py", "eval_meta.py"):
        assert script(name).stderr.startswith(f"{name}: error: ")
        assert script(name, "--help").stdout.startswith(f"usage: {name} ")
    assert "  python train_meta.py quick --out runs/quick\n" in script("train_meta.py", "--help").stdout
    assert module("metatele.experiments").stdout.startswith("usage: python -m metatele.experiments NAME")
    named = module("metatele.experiments", "fig6", "--turbo").stderr
    assert named.startswith("python -m metatele.experiments fig6: error: ")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "PASSIVE None 0"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7 None"),
        ({"KMP_BLOCKTIME": "9"}, "None None 9"),
    ],
)
def test_threads_wait_passively_unless_the_environment_says_otherwise(given, found):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    bare = {name: value for name, value in os.environ.items() if name not in names}
    code = f"""
import os
from metatele.command_line import run_program
def main(arguments):
    print(*(os.environ.get(name) for name in {names!r}))
run_program(main, "program")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**bare, **given}, check=True)
    assert done.stdout == found + "\n"


@pytest.mark.parametrize(
    ("program", "flags", "given", "found"),
    [
        ("train", "", {}, 1),
        ("train", "", {"OMP_NUM_THREADS": "2"}, 2),
        ("train", "--threads 2", {}, 2),
        ("train", "--hidden 4000", {"OMP_NUM_THREADS": "2"}, 2),
        ("train", "--hidden 4000", {}, 3),
        ("evaluate", "", {}, 1),
        ("evaluate", "", {"OMP_NUM_THREADS": "2"}, 2),
        ("evaluate", "--threads 2", {"OMP_NUM_THREADS": "3"}, 2),
        ("evaluate", "--trajectories 2000", {}, 3),
        ("functions", "--steps 10", {}, 1),
        ("functions", "--steps 10", {"OMP_NUM_THREADS": "2"}, 2),
        ("fig5", "--dataset mnist", {}, 3),
    ],
)
def test_small_runs_take_one_thread_unless_told_otherwise(program, flags, given, found, tmp_path):
    bare = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    module = f"cli.{program}" if program in ("train", "evaluate") else f"experiments.{program}"
    first = {"train": ["quick", "--resume"], "evaluate": [str(tmp_path / "nothing")]}.get(program, [])
    first += ["--data-root", str(tmp_path)] if program == "fig5" else []
    code = f"""
import torch
from metatele.{module} import main
torch.set_num_threads(int({given.get("OMP_NUM_THREADS", "3")!r}))
from metatele.errors import CheckpointError, DataError, RunFolderError
try:
    main({[*first, "--device", "cpu", "--out", str(tmp_path / "none"), *flags.split()]!r})
except (CheckpointError, DataError, RunFolderError):  # there is nothing to resume or to read: nothing was computed
    pass
print(torch.get_num_threads())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**bare, **given}, check=True)
    assert done.stdout.splitlines()[-1] == str(found)


SMALL = "quick --widths 3,4,2 --samples 3 --hidden 4 --batch 2 --horizon 4 --unroll 2 --validation-steps 4"
SMALL += " --validation-score-at 4 --validation-trajectories 4 --threads 1 --device cpu --quiet"


def test_a_warning_is_one_line(tmp_path):
    flags = [*SMALL.split(), "--trajectories", 8, "--save-every", 2, "--out", tmp_path]
    assert script("train_meta.py", *flags).returncode == 0
    (tmp_path / "training_state.pt").write_bytes(b"damaged")
    done = script("train_meta.py", *flags, "--resume")
    assert done.returncode == 0
    assert done.stderr.startswith("train_meta.py: warning: ")
    assert done.stderr.count("\n") == 1
    assert "going on from training_state.previous.pt" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the size of files stands for a full disk")
def test_a_full_disk_is_one_line_also_where_tensorboard_meets_it_first(tmp_path):
    limited = "import resource, signal, subprocess, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
    limited += "sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = [*SMALL.split(), "--trajectories", 2000, "--log-every", 1, "--save-every", 100000, "--out", str(tmp_path)]
    command = [sys.executable, "-c", limited, str(ROOT / "train_meta.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    one_line(done, 1, "File too large")


def test_every_setting_is_a_flag():
    help_text = train.parser().format_help()
    import dataclasses

    for cls in (MethodConfig, TrainingConfig, TaskConfig):
        for f in dataclasses.fields(cls):
            assert "--" + f.name.replace("_", "-") in help_text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quick", "--method", "teleport", "--out", "x"], "invalid choice: 'teleport'"),
        (["fast", "--out", "x"], "invalid choice: 'fast'"),
        (["quick"], "--out"),
        (["quick", "--out", "x", "--batch", "0"], "batch must be positive, got 0"),
        (["quick", "--out", "x", "--hidden", "-3"], "hidden must be positive, got -3"),
        (["quick", "--out", "x", "--unroll", "500"], "unroll must be at most the horizon"),
        (["quick", "--out", "x", "--widths", "3,x"], "whole numbers separated by commas"),
        (["quick", "--out", "x", "--bias", "maybe"], "expected true or false"),
        (["quick", "--out", "x", "--seed", "-1"], "expected at least 0"),
        (["quick", "--out", "x", "--turbo", "1"], "unrecognized arguments: --turbo"),
        (["quick", "--out", "x", "--activation", "relu"], "the exact action needs an invertible activation"),
        (["quick", "--out", "x", "--device", "cuda:63"], "device cuda:63 is not there"),
        (["quick", "--out", "x", "--widths", "4,3"], "a teleport needs a hidden layer"),
        (["quick", "--out", "x", "--device", "quantum"], "device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path):
    done = script("train_meta.py", *[str(tmp_path / "x") if a == "x" else a for a in arguments])
    one_line(done, 2, words)
    assert not (tmp_path / "x").exists()


def test_a_boolean_flag_may_stand_alone():
    for flags, value in (([], True), (["yes"], True), (["false"], False), (["auto"], None)):
        flags = ["--graph", *flags]
        assert train.parser().parse_args(["quick", "--out", "x", *flags]).graph is value


def test_folders_that_cannot_be_used_are_one_line(tmp_path):
    (tmp_path / "f").write_text("x")
    one_line(script("train_meta.py", "quick", "--out", tmp_path / "f"), 1, "is a file")
    one_line(script("train_meta.py", "quick", "--out", tmp_path / "f" / "g"), 1, "could not create")
    one_line(script("train_meta.py", "quick", "--resume", "--out", tmp_path / "none"), 1, "no run to resume")
    one_line(script("eval_meta.py", tmp_path / "none", "--out", tmp_path / "o"), 1, "does not exist")
    one_line(script("eval_meta.py", tmp_path, "--steps", "0", "--out", tmp_path / "o"), 2, "at least 1")
    metatele.save(tmp_path / "c", small_optimizer(dtype=torch.float32))
    one_line(script("eval_meta.py", tmp_path / "c", "--out", tmp_path / "f"), 1, "it is a file")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"torn")
    one_line(script("eval_meta.py", tmp_path / "c", "--out", tmp_path / "o"), 1, "damaged")
    assert not (tmp_path / "o").exists()


def test_train_then_evaluate(tmp_path, capsys):
    small = "--hidden 8 --widths 4,5,3 --samples 4 --trajectories 16 --batch 4 --horizon 6 --unroll 2"
    checks = "--validation-steps 6 --validation-score-at 6 --log-every 4"
    train.main(["quick", "--out", str(tmp_path / "run"), *small.split(), *checks.split(), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "update 12/12" in printed
    assert f"best checkpoint in {tmp_path}/run/checkpoint" in printed
    arguments = ["--trajectories", "3", "--steps", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
    evaluate.main([str(tmp_path / "run"), str(tmp_path / "run"), *arguments])
    printed = capsys.readouterr().out
    assert f"figure: {tmp_path}/out/loss.png" in printed
    assert printed.count("LSTM(update,tele)") == 2
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"curves.json", "table.csv", "table.md", "loss.png"}
    assert json.loads((tmp_path / "out" / "curves.json").read_text())["steps"] == 4


def test_devices_by_name():
    assert device_named("cpu") == torch.device("cpu")
    assert device_named("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="device"):
        device_named("mps")


def test_importing_the_package_is_light():
    def loaded(statement, names):
        code = f"import metatele, sys; {statement}; print([m for m in {names!r} if m in sys.modules])"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout

    heavy = ("matplotlib", "higher", "tensorboard")
    assert loaded("pass", ("torch", *heavy)) == "[]\n"
    assert loaded("metatele.LearnedOptimizer", heavy) == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = metatele.nonsense
