"""Several processes under DistributedDataParallel: every rank makes the same teleport, that of the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from teleporting_ranks import CASES, trained

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def alone():
    """What one process that sees the whole batches does."""
    return {name: trained(name) for name, (_, _, special) in CASES.items() if "alone" not in special}


@pytest.mark.parametrize("count", [2, 3])
def test_all_ranks_have_the_same_weights_to_the_bit_and_those_of_one_process(count, alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "teleporting_ranks.py"), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for name in CASES:
        first, *others = (rank["cases"][name] for rank in ranks)
        assert first[3] > 0, name
        for other in others:
            assert torch.equal(first[0], other[0]), name
            assert first[1:] == other[1:], name
        if name in alone:
            weights, report, number = alone[name]
            torch.testing.assert_close(first[0], weights, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
            assert first[1:] == (
                pytest.approx(report.objective_before, rel=1e-6),
                pytest.approx(report.objective_after, rel=1e-6),
                number,
            ), name
    assert all("does not work with parameters that are split over processes" in rank["refusal"] for rank in ranks)
