"""Several processes that train one model: all ranks have the same weights, those of one that sees the whole batch."""

import pickle

import pytest
import torch
import torch.multiprocessing as multiprocessing
from replicas_under_ddp import trained, work

CASES = ("fresh batches", "one batch", "opening", "accumulated", "wrapped", "flat", "empty shares", "evaluations")


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """Weights of each rank after training, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (request.param, CASES, str(folder)), nprocs=request.param)
    return [pickle.loads((folder / f"{request.param}-{rank}.pkl").read_bytes()) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_same_weights_to_the_bit(ranks, case):
    for other in ranks[1:]:
        for mine, theirs in zip(ranks[0][case], other[case], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_one_process_that_sees_the_whole_batch(ranks, case):
    for mine, alone in zip(ranks[0][case], trained(case), strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-6, atol=1e-8)


def test_parameters_that_are_split_over_processes_are_refused(ranks):
    for rank in ranks:
        learned, teleport, later = rank["refusals"]
        assert learned.startswith("LearnedOptimizer does not work with parameters that are split over processes")
        assert teleport.startswith("TeleportOptimizer does not work with parameters that are split over processes")
        assert "was replaced after the optimizer was made" in later
