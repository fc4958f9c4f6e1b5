"""Meta-training that disturbs what a controller asks for, not its weights; and when a course looks."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from metatele.config import EvolutionTrainingConfig, GeneralConfig, GeneralRunConfig, ModulesConfig
from metatele.learned.general import GeneralOptimizer
from metatele.learned.general.controller import SEEN, SET
from metatele.learned.general.course import Course
from metatele.learned.general.scene import Piece
from metatele.training.evolution import Evolution
from metatele.training.general import GeneralTrainer


def asked_of(meta, numbers):
    """What the controller's linear part asks for."""
    c = meta.controller
    return numbers @ c.direct.T + c.offset


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_lifted_direction_asks_for_as_much_as_what_is_seen_resembles_what_was_seen(hidden):
    """The change of what is asked for on x is ε (1 + ⟨seen, x⟩), and without anything seen it is ε."""
    meta = GeneralOptimizer(GeneralConfig(hidden=hidden))
    g = torch.Generator().manual_seed(0)
    asked, seen = torch.randn(len(SET), generator=g), torch.rand(len(SEEN), generator=g)
    numbers = torch.rand(5, len(SEEN), generator=g)
    before, begun = asked_of(meta, numbers).detach(), parameters_to_vector(meta.evolved()).detach()
    for known, factor in ((seen, 1 + numbers @ seen), (torch.zeros(0), torch.ones(5))):
        vector_to_parameters(begun + meta.lifted(asked, known), meta.evolved())
        change = asked_of(meta, numbers).detach() - before
        torch.testing.assert_close(change, factor[:, None] * asked, rtol=1e-4, atol=1e-4)


def test_evolution_finds_where_a_setting_is_worth_something():
    """A score that wants more of setting 0 where number 2 is seen, and of nothing else: that weight grows, alone."""
    meta = GeneralOptimizer(GeneralConfig())
    config = EvolutionTrainingConfig(pairs=64, sigma=0.5, sigma_end=0.5, meta_lr=0.3, step="momentum", average=0.0)
    begin = parameters_to_vector(meta.evolved()).detach().double()
    evolution, g = Evolution(begin, config, 0, meta.explored()), torch.Generator().manual_seed(1)
    for _ in range(20):
        noise, sigma = evolution.asked(0.0)
        seen = torch.rand(len(noise), len(SEEN), generator=g, dtype=torch.float64)
        seen[:, 2] = torch.randint(2, (len(noise),), generator=g)
        differences = -2 * sigma * noise[:, 0] * seen[:, 2]
        evolution.told(meta.lifted(noise, seen), differences, sigma, 1.0)
    vector_to_parameters((evolution.mean - begin).float(), meta.evolved())
    moved = meta.controller.direct.detach()
    assert moved[0, 2] > 0
    assert moved[0, 2] == moved.max()
    assert moved[1:].abs().max() < 0.5 * moved[0, 2]


def trainer(**changes):
    task = ModulesConfig(kinds=("regression", "classification"), budget_ms=10.0, longest=25, broadest=16, deepest=2)
    training = EvolutionTrainingConfig(
        **{"generations": 3, "pairs": 2, "disturb": "settings", "step": "momentum", "validation_problems": 2, **changes}
    )
    return GeneralTrainer(GeneralRunConfig(task=task, training=training))


def test_what_runs_saw_moves_weights_and_goes_on_to_the_same_bits():
    one, again = trainer(meta_seeds=2), trainer(meta_seeds=2)
    begun = one.begin.clone()
    one.step()
    again.load_state_dict(one.state_dict())
    for t in (one, again):
        t.step()
    assert torch.equal(one.averaged, again.averaged)
    table = (one.averaged - begun)[: len(SET) * len(SEEN)].view(len(SET), len(SEEN))
    assert bool(table.any(0).sum() > 5)  # weights of many of the numbers moved, though the offsets alone were disturbed
    assert one.optimizer.controller.noted is None


def test_looks_become_rarer_up_to_a_bound():
    def looks(**settings):
        course = Course(GeneralConfig(**settings), [Piece((1, 2, 3), "linear", False)], [], torch.empty(0))
        return [age for age in range(700) if course.looks_at(age)]

    always = looks(rarest=1)
    assert always == [*range(10), *range(10, 700, 10)]
    found = looks(rarest=3, settle=100)
    assert found == [*range(10), *range(10, 200, 10), *range(200, 300, 20), *range(300, 700, 30)]
    assert looks() == [*found[:19], 100, 120, 140, 150, 180, 200, 240, 250, *range(300, 700, 60)]
