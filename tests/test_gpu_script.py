"""benchmarks/gpu.py: parts run on a CPU, and one that fails or hangs costs itself alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import metatele

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_table  # noqa: E402
import gpu_training  # noqa: E402
from gpu_kit import Asked, Kit, Training, told  # noqa: E402


def run(tmp_path, *arguments, device="cpu"):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "out"), "--device", device]
    done = subprocess.run([*command, "--rehearse", *arguments], capture_output=True, text=True, cwd=tmp_path)
    return done, json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]


def test_parts_go_on_after_one_that_fails(tmp_path):
    done, parts = run(tmp_path, "--parts", "moves", "figures", "environment", "--fail", "figures")
    assert done.returncode == 1
    assert list(parts) == ["environment", "figures", "moves"]
    assert [part["status"] for part in parts.values()] == ["done", "failed", "done"]
    assert parts["figures"]["why"] == "RuntimeError: it was asked to fail"
    assert not parts["environment"]["failures"] + parts["moves"]["failures"]
    assert {row["what"] for row in parts["moves"]["rows"]} >= {"teleport, width 16, default"}
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text()
    assert (tmp_path / "out" / "table.md").read_text() in done.stdout
    for secret in (str(ROOT), str(tmp_path)):
        assert secret not in (tmp_path / "out" / "gpu.json").read_text() + done.stdout


def test_a_part_that_hangs_is_ended(tmp_path):
    done, parts = run(tmp_path, "--parts", "environment", "--hang", "environment", "--part-limit-s", "3")
    assert done.returncode == 1
    assert parts["environment"]["status"] == "out of time"


def test_without_time_parts_are_left_out(tmp_path):
    done, parts = run(tmp_path, "--parts", "environment", "--limit-s", "6")
    assert done.returncode == 1
    assert parts["environment"]["status"] == "left out"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done, parts = run(tmp_path, "--parts", "environment", device="cuda")
    assert done.returncode == 1
    assert "there is no CUDA device here" in parts["environment"]["why"]


def test_parts_that_are_not_timed_follow_each_other_beside_the_tests(tmp_path, monkeypatch):
    begun = []

    class Done:
        def poll(self):
            return 0

    def started(self, name, limit_s):
        begun.append((name, sorted(running)))
        running.add(name)
        return Done(), 0.0, float("inf"), (tmp_path / "out").open("w")

    running = set()
    monkeypatch.setattr(gpu.Run, "started", started)
    monkeypatch.setattr(gpu.Run, "copied", lambda self, name: "")
    monkeypatch.setattr(gpu.Run, "keep", lambda self, name, *_: running.discard(name))
    arguments = ["--out", str(tmp_path), "--parts", "environment", "checks", "batched", "figures", "tests"]
    with (tmp_path / "log").open("w") as log:
        gpu.Run(gpu.parser().parse_args(arguments), log, tmp_path).all()
    assert begun[:3] == [("environment", []), ("checks", []), ("tests", ["checks"])]
    assert begun[3:] == [("batched", []), ("figures", [])]


def test_epochs_that_were_not_made_take_as_long_as_those_that_were():
    whole_s, note = gpu_training.of_all([10.0, 2.0, 4.0, 3.0], 40)
    assert (whole_s, "from 4 epochs" in note) == (10 + 2 + 4 + 3 + 36 * 3.0, True)
    whole_s, note = gpu_training.of_all([3.0, 1.0, 1.5], 3)
    assert (whole_s, "all 3 epochs" in note) == (5.5, True)


def test_figures_go_on_to_all_epochs_and_keep_a_row_at_any_time(tmp_path):
    kit = Kit(torch.device("cpu"), True, None, tmp_path, tmp_path / "part.json", 100.0)
    gpu_training.figures(kit)
    assert not kit.failures
    assert [row["what"].partition(",")[0] for row in kit.rows] == ["fig5", "table1"]
    assert all("all 3 epochs" in row["note"] for row in kit.rows)
    kit = Kit(torch.device("cpu"), True, None, tmp_path, tmp_path / "part.json", 0.0)
    gpu_training.figures(kit)
    assert all("from 2 epochs" in row["note"] for row in kit.rows)


def test_the_table_names_the_card_of_each_run(capsys):
    files = sorted((ROOT / "results" / "gpu").glob("*.json"))
    assert "NVIDIA H200" in gpu_table.table(files[:1]).splitlines()[0]
    gpu_table.main([str(files[0])])
    assert capsys.readouterr().out == gpu_table.table(files[:1])


def test_numbers_of_the_table_are_short():
    numbers = (0.00052045, 10364.2, 1.0, 282.67, 0.0, 0.0999)
    assert [gpu_table.short(n) for n in numbers] == ["0.00052", "10364", "1.0", "283", "0", "0.10"]


def test_what_failed_in_a_part_is_one_line_and_the_rest_stays(tmp_path):
    kit = Kit(torch.device("cpu"), True, None, tmp_path, tmp_path / "part.json", 10.0)
    with kit.tried("first"):
        raise ValueError("no such file: '/home/someone/data'\nand more")
    kit.add("second", float("nan"))
    assert json.loads((tmp_path / "part.json").read_text()) == {
        "values": {"second": None},
        "rows": [],
        "failures": ["first: ValueError: no such file: <path>"],
    }
    assert told(ValueError()) == "ValueError: "
    assert gpu.unpathed("in /usr/lib/x.py, of ms/step") == "in <path>, of ms/step"


def test_a_step_between_looks_asks_the_device_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))
    batches = [(torch.randn(20, 6), torch.randint(4, (20,))) for _ in range(4)]
    training = Training(model, nn.functional.cross_entropy, batches, metatele.LearnedOptimizer(model))
    for _ in range(31):
        training.step()
    for _ in range(8):  # the next look is at 40
        x, y = batches[training.done % 4]
        training.optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with Asked() as asked:
            training.optimizer.step()
        training.done += 1
        assert [operation for operation, _ in asked.found] == ["tolist"], asked.found
        assert asked.count == 1
