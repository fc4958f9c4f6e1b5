"""Memories of the equivariant family as plain tensors: of all trajectories, of each layer, as earlier code wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import metatele
from metatele.config import EquivariantConfig
from metatele.learned import EquivariantOptimizer, EquivariantStates, Observation
from metatele.learned.equivariant.observation import parted
from metatele.learned.equivariant.old_states import read_old
from metatele.perceptron.activations import Tanh
from metatele.perceptron.losses import MeanSquaredError
from metatele.perceptron.mlp import MLP, Pass

# What versions before the states became records wrote: meta-parameters, data, and for two ages the states, the
# weights they belong to, and the weights a few steps later.
OLD = load_file(Path(__file__).parent / "data" / "old_states.safetensors")
SHAPE = MLP((5, 8, 6, 3), Tanh(), True)


def below(prefix):
    return {name.removeprefix(prefix): t for name, t in OLD.items() if name.startswith(prefix)}


def optimizer(**settings):
    made = EquivariantOptimizer(EquivariantConfig(hidden=4, hold=3, opening=False, **settings)).requires_grad_(False)
    made.load_state_dict(below("optimizer."))
    return made


def advanced(meta, weights, states, steps):
    """Steps on batches of four samples in turn, or on all where the weights are of several trajectories."""
    for step in steps:
        k = slice(step * 4 % 12, step * 4 % 12 + 4)
        done = Pass(SHAPE, SHAPE.unflatten(weights), OLD["inputs"][:, k])
        done.backward(OLD["targets"][:, k], MeanSquaredError())
        observed = Observation.of(done, meta.config.dense, meta.config.rank)
        changes, states, _ = meta.step(observed, states)
        weights = weights + SHAPE.flatten(parted(changes, SHAPE.biases))
    return weights, states


@pytest.mark.parametrize(("saved", "end"), [(2, 6), (20, 25)])
def test_states_that_earlier_code_stored_go_on_as_they_did(saved, end):
    states = read_old(below(f"states_{saved}."))
    assert states.age == saved
    weights, after = advanced(optimizer(), OLD[f"weights_{saved}"], states, range(saved, end + 1))
    torch.testing.assert_close(weights, OLD[f"after_{end}"], rtol=1e-5, atol=1e-6)
    assert after.age == end + 1


@pytest.mark.parametrize("rank", [3, 8])
def test_moments_of_wide_layers_that_earlier_code_stored_whole_become_factors(rank):
    stored, meta = below("states_20."), optimizer(dense=5, rank=rank)
    whole, states = read_old(stored), read_old(stored, dense=5, rank=rank)
    for name in ("inputs", "errors"):
        for old, new in zip(whole.moments, states.moments, strict=True):
            M, F = getattr(old, name), getattr(new, name)
            assert (F.rest is None) == (M.rows <= 5)
            torch.testing.assert_close(F.trace, M.trace)
            if F.rest is not None:
                assert F.tensor.shape[-1] == min(rank, M.rows)
                largest = torch.linalg.eigvalsh(M.tensor)[..., -F.tensor.shape[-1] :]
                torch.testing.assert_close(F.tensor.square().sum(-2), largest, rtol=1e-3, atol=1e-4)
    for layer in states.moments:
        assert all(s.vectors.shape[-1] <= max(5, rank) for s in (layer.input_spectrum, layer.error_spectrum))
    weights, after = advanced(meta, OLD["weights_20"], states, range(20, 60))
    assert bool(torch.isfinite(weights).all())
    assert [m.inputs.rest is not None for m in after.moments] == [True, True, True]


def test_factors_with_a_column_for_every_row_go_on_as_the_matrices_did():
    states = read_old(below("states_20."), dense=5, rank=9)
    weights, _ = advanced(optimizer(dense=5, rank=9), OLD["weights_20"], states, range(20, 26))
    torch.testing.assert_close(weights, OLD["after_25"], rtol=1e-3, atol=1e-4)


def test_an_optimizer_reads_a_state_of_earlier_code_for_layers_wider_than_its_matrices():
    layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers)
    nn.utils.vector_to_parameters(OLD["weights_20"][0].clone(), model.parameters())
    learned = metatele.LearnedOptimizer(model, optimizer(dense=5, rank=3))
    saved = learned.state_dict()
    learned.load_state_dict({**saved, "state": {0: {"step": torch.tensor(20.0), **below("states_20.")}}})
    for step in range(20, 40):
        k = slice(step * 4 % 12, step * 4 % 12 + 4)
        learned.zero_grad()
        nn.functional.mse_loss(model(OLD["inputs"][:, k].T), OLD["targets"][:, k].T).backward()
        learned.step()
    widest = learned.state[layers[2].weight]["moments.inputs.tensor"]
    assert widest.shape == (9, 3)


@pytest.mark.parametrize("count", [1, 3, 19, 20, 21])
@pytest.mark.parametrize("settings", [{}, {"dense": 5, "rank": 3}], ids=["matrices", "factors"])
def test_states_go_on_to_the_same_bits_from_their_parts(count, settings):
    meta = optimizer(**settings)
    weights, states = advanced(meta, OLD["weights_2"], None, range(count))
    joint, layers = states.parts()
    assert len(layers) == 3
    assert [layer["motion.velocity"].shape for layer in layers] == [(8, 6), (6, 9), (3, 7)]
    plain = (int, float, str, bool, type(None))
    for value in joint.values():
        assert isinstance(value, plain) or all(isinstance(part, plain) for part in value)
    copies = [{name: t.clone() for name, t in layer.items()} for layer in layers]
    again = EquivariantStates.from_parts(joint, copies, like=weights)
    before, after = states.tensors(), again.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) and t.dtype == after[name].dtype for name, t in before.items())
    expected, _ = advanced(meta, weights, states, range(count, count + 5))
    found, _ = advanced(meta, weights, again, range(count, count + 5))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("settings", [{}, {"dense": 5, "rank": 3}], ids=["matrices", "factors"])
def test_states_of_several_trajectories_survive_as_plain_tensors(settings):
    meta = optimizer(**settings)
    weights, states = advanced(meta, OLD["weights_2"] * torch.tensor([[1.0], [0.5]]), None, range(18))
    again = EquivariantStates.from_tensors(states.tensors())
    found, expected = (advanced(meta, weights, s, range(18, 24))[0] for s in (again, states))
    assert torch.equal(found, expected)
    moved = states.map(lambda t: t.double()).tensors()
    assert all(t.dtype == torch.float64 for t in moved.values())


def test_only_what_has_changed_since_may_be_asked_for():
    meta = optimizer()
    weights, states = advanced(meta, OLD["weights_2"], None, range(18))
    _, after = advanced(meta, weights, states, range(18, 19))
    whole, changed = after.tensors(), after.tensors(since=states)
    assert {"counters", "motion.velocity.0", "motion.direction.2"} <= changed.keys() < whole.keys()
    assert not any(name.startswith(("moments", "control")) for name in changed)
    assert all(torch.equal(t, states.tensors()[name]) for name, t in whole.items() if name not in changed)
