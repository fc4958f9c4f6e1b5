"""Several processes share a meta-training run as torchrun starts them: the same run, whatever their number."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metatele
from metatele.training.processes import Processes
from metatele.training.run import read_state

ROOT = Path(__file__).resolve().parent.parent
FLAT = shlex.split(
    "quick --trajectories 60 --batch 5 --hidden 16 --widths 3,4,2 --samples 3 --horizon 8 --unroll 4 "
    "--save-every 7 --validation-every 10 --validation-trajectories 4 --validation-steps 8 --validation-score-at 8"
)
EQUIVARIANT = shlex.split(
    "transfer --trajectories 20 --batch 4 --groups 3 --horizon 8 --shorter 4,8 --unroll 4 --save-every 5 "
    "--validation-every 5 --validation-trajectories 4 --validation-steps 8 --validation-score-at 8"
)


def started(count, out, *flags, program="train_meta.py", restarts=0):
    """torchrun with this number of processes, to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [f"--max-restarts={restarts}", *map(str, program.split()), *flags, "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def assert_same(a, b, tolerance):
    """Two runs are at the same point, up to rounding."""
    ours, theirs = (read_state(folder) for folder in (a, b))
    assert ours["counters"] == theirs["counters"]
    for name, value in ours["optimizer"].items():
        torch.testing.assert_close(theirs["optimizer"][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("total", [1, 5, 7, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_disjoint_complete_and_even(total, count):
    shares = [Processes(rank, count).share(total) for rank in range(count)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_flat_family_does_not_depend_on_the_number_of_processes(tmp_path):
    for count in (1, 2, 3):
        done = started(count, tmp_path / str(count), *FLAT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("24 updates") == 1  # the first process alone speaks
    for count in (2, 3):
        assert_same(tmp_path / "1", tmp_path / str(count), 1e-4)
        assert metatele.load(tmp_path / str(count)).training["trajectories_started"] > 5
    lines = [(tmp_path / str(count) / "metrics.jsonl").read_text().splitlines() for count in (1, 2, 3)]
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


def test_the_equivariant_family_does_not_depend_on_the_number_of_processes(tmp_path):
    for count in (1, 3):
        done = started(count, tmp_path / str(count), *EQUIVARIANT)
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "1", tmp_path / "3", 1e-3)


@pytest.mark.parametrize("flags", [FLAT, EQUIVARIANT], ids=["flat", "equivariant"])
def test_a_process_that_dies_stops_all_and_others_go_on(tmp_path, flags):
    assert started(1, tmp_path / "whole", *flags).returncode == 0
    done = started(2, tmp_path / "run", *flags, program=f"{ROOT / 'tests' / 'dying.py'} 8")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert 0 < read_state(tmp_path / "run")["counters"][0] <= 8
    done = started(3, tmp_path / "run", *flags, "--resume")  # another number than before
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "whole", tmp_path / "run", 1e-3)


def test_torchrun_restarts_a_run_where_it_was(tmp_path):
    assert started(1, tmp_path / "whole", *FLAT).returncode == 0
    done = started(2, tmp_path / "run", *FLAT, program=f"{ROOT / 'tests' / 'dying.py'} 10", restarts=1)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "whole", tmp_path / "run", 1e-3)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux does")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time, torch\n"
        "from metatele.training.processes import joined\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "with joined() as processes:\n"
        "    torch.optim.Adam([torch.ones(1, requires_grad=True)])\n"
        "    processes.gathered(torch.ones(1))\n"
        "    assert len(os.listdir('/proc/self/task')) > before\n"
        # A thread that was joined is in the kernel's list for a moment longer; one that is kept is there for ever.
        "end = time.monotonic() + 10\n"
        "while len(os.listdir('/proc/self/task')) > before and time.monotonic() < end:\n"
        "    time.sleep(0.01)\n"
        "assert len(os.listdir('/proc/self/task')) == before\n"
    )
    done = started(2, tmp_path / "unused", program=str(program))
    assert done.returncode == 0, done.stderr


def test_mistakes_are_one_sentence_in_every_process(tmp_path):
    few = [f if f != "5" else "2" for f in FLAT]
    done = started(3, tmp_path / "few", *few)
    assert done.returncode != 0
    assert "batch must be at least the number of processes (3), got 2" in done.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    done = started(2, tmp_path / "other", *FLAT)
    assert done.returncode != 0
    assert "it holds mine.txt" in done.stderr
    assert (
        "Traceback" not in done.stderr.split("ChildFailedError")[0].split("Root Cause")[0].split("torch/distributed")[0]
    )
