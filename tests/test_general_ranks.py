"""The general family in two processes: all ranks have the same weights, those of one that sees the whole batch."""

import pickle

import pytest
import torch
import torch.multiprocessing as multiprocessing
from general_under_ddp import ALIKE, CASES, few, trained, work


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank trained, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (2, str(folder)), nprocs=2)
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("case", [*CASES, *ALIKE])
def test_all_ranks_have_the_same_weights_to_the_bit(ranks, case):
    (one, told), (other, told_other) = (rank[case] for rank in ranks)
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)
    assert told == told_other


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_one_process_that_sees_the_whole_batch(ranks, case):
    (mine, told), (alone, told_alone) = ranks[0][case], trained(case)
    if case == "samples that come again":
        assert told["epochs"] == told_alone["epochs"] > 1
    assert {key: told[key] for key in ("modes", "skipped", "hashes", "heads")} == {
        key: told_alone[key] for key in ("modes", "skipped", "hashes", "heads")
    }
    assert told["start"] == pytest.approx(told_alone["start"], abs=1e-5)
    assert told["heads"] == (4 if case == "heads in another basis" else 0)
    if case.startswith("one batch"):
        assert any(told["modes"])
    for p, expected in zip(mine, alone, strict=True):
        if case == "uneven shares":  # the first halves of shares are not the first half of the batch
            assert (p - expected).norm() < 0.2 * expected.norm()
        else:
            torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", ALIKE)
def test_convolutions_and_attention_are_stepped_by_their_inputs_with_buckets_and_accumulation(ranks, case):
    (mine, how), (alone, how_alone) = ranks[0][case], few(case)
    assert how == how_alone
    assert any("inputs seen" in one for one in how)
    if not case.startswith("batch norm"):  # whose statistics are of each share
        for p, expected in zip(mine, alone, strict=True):
            assert (p - expected).norm() < (0.2 if "accumulated" in case else 1e-3) * expected.norm() + 1e-4
