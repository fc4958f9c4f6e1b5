"""Memories of the equivariant family as plain tensors: of all trajectories, of each layer, as earlier code wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
