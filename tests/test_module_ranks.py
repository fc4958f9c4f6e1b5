"""Any module in several processes: every rank makes the same teleport, that of the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from module_ranks import CASES, trained

ROOT = Path(__file__).resolve().parent.parent


def test_all_ranks_have_the_same_weights_to_the_bit_and_those_of_one_process(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "module_ranks.py"), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, (_, _, special) in CASES.items():
        weights, moments, told, counts = first["cases"][name]
        assert counts[0] > 0, name
        others = second["cases"][name]
        assert torch.equal(weights, others[0]), name
        assert torch.equal(moments, others[1]), name
        assert (told, counts) == others[2:], name
        if "alone" in special:
            continue
        alone = trained(name)
        for mine, his in ((weights, alone[0]), (moments, alone[1])):
            torch.testing.assert_close(mine, his, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
        assert told[:2] == pytest.approx(alone[2][:2], rel=1e-6), name
        assert (told[3:], counts) == (alone[2][3:], alone[3]), name
    for rank in (first, second):
        assert "different symmetries" in rank["refusal"]
