"""Networks that fully_shard has split are stepped as whole ones are."""

import pickle

import pytest
import torch
import torch.multiprocessing as multiprocessing
from general_sharded import CASES, work


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank trained, by case."""
    folder = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(work, (2, str(folder)), nprocs=2)
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_split_parameters_take_the_steps_that_whole_ones_take_under_ddp(ranks, case):
    (mine, told), (whole, told_whole) = ranks[0][case]
    for p, expected in zip(mine, whole, strict=True):
        assert (p - expected).norm() <= 1e-5 * expected.norm() + 1e-7
    assert told == told_whole
    assert any("inputs seen" in how for _, how in told[0])
    assert told[2] == (case == "one batch")


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_same_weights_to_the_bit(ranks, case):
    for mine, theirs in zip(ranks[0][case][0][0], ranks[1][case][0][0], strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_split_in_part_and_other_families_are_refused(ranks):
    *before, late = ranks[0]["refusals"]
    assert len(before) == 3
    assert all("split over processes" in said for said in before)
    assert "was replaced after the optimizer was made" in late
