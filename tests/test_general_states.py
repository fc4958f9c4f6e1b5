"""The general family's memories: resumed to the same bits, copied, moved, and no larger than promised."""

import copy
import io
import pickle

import pytest
import torch
from general_cases import MODELS, batch, flat, make, optimizer_of, run
from torch import nn
from torch.nn import functional

from metatele.errors import ShapeMismatchError

SAME = [-1] * 14  # one batch that comes again


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Steps before and after, and whether the loss is a squared error, which a batch that comes again is fitted by.
CASES = {
    **{name: (name, range(13), range(13, 36), False) for name in MODELS},
    "before the first look's end": ("skips", range(3), range(3, 24), False),
    "one batch, perceptron": ("perceptron", SAME, SAME, True),
    "one batch, module": ("skips", SAME, SAME, True),
    "one batch, convolutional": ("convolutional", SAME, SAME, True),
    "one batch at its beginning": ("skips", SAME[:2], SAME, True),
    "one batch, and then others": ("skips", SAME, [-1, *range(14)], True),
    "perceptron, others at once": ("perceptron", SAME, range(14), True),
    "before the first step": ("skips", [], range(12), False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["file", "twice", "deepcopy", "pickle"])
def test_resumed_runs_go_on_to_the_same_bits(case, how):
    name, before, after, squared = CASES[case]
    model = make(name)
    optimizer = optimizer_of(model)
    run(name, model, optimizer, before, squared)
    optimizer.zero_grad()
    if how in ("file", "twice"):
        state, other = through_file(optimizer.state_dict()), copy.deepcopy(model)
        kept = copy.deepcopy(state)
        fresh = optimizer_of(other)
        if how == "twice":
            fresh.load_state_dict(fresh.state_dict())
            fresh.load_state_dict(state)
            run(name, copy.deepcopy(other), fresh, [])
        fresh.load_state_dict(state)
    else:
        pair = model, optimizer
        other, fresh = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    if case.startswith("one batch") and len(before) > 2:
        assert optimizer.stepper.repeating
    expected = run(name, model, optimizer, after, squared)
    assert run(name, other, fresh, after, squared) == expected
    assert torch.equal(flat(model), flat(other))
    if how in ("file", "twice"):
        assert str(kept) == str(state)  # what was loaded is the caller's


def test_parameters_in_no_group_are_saved_with_the_network():
    model = make("skips")
    optimizer = optimizer_of(model, params=[*model.inner.parameters(), *model.last.parameters()])
    before = flat(model.first)
    run("skips", model, optimizer, range(12))
    assert torch.equal(flat(model.first), before)
    other = copy.deepcopy(model)
    fresh = optimizer_of(other, params=[*other.inner.parameters(), *other.last.parameters()])
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    assert run("skips", model, optimizer, range(12, 24)) == run("skips", other, fresh, range(12, 24))


@pytest.mark.parametrize("steps", [range(13), SAME])
def test_distributed_checkpoints_go_on_to_the_same_bits(steps):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = make("skips")
    optimizer = optimizer_of(model)
    run("skips", model, optimizer, steps, True)
    saved, other = copy.deepcopy(get_optimizer_state_dict(model, optimizer)), copy.deepcopy(model)
    fresh = optimizer_of(other)
    set_optimizer_state_dict(other, fresh, saved)
    assert run("skips", model, optimizer, range(12), True) == run("skips", other, fresh, range(12), True)


def test_states_of_others_are_refused():
    model, other = make("skips"), make("convolutional")
    optimizer = optimizer_of(model)
    run("skips", model, optimizer, range(2))
    with pytest.raises(ShapeMismatchError):
        optimizer_of(make("product")).load_state_dict(optimizer.state_dict())
    adam = torch.optim.Adam(other.parameters())
    run("convolutional", other, adam, range(2))
    with pytest.raises(ShapeMismatchError, match="of another optimizer"):
        optimizer_of(other).load_state_dict(adam.state_dict())


def test_memories_of_parameters_of_low_precision_stay_float32():
    model = make("perceptron", dtype=torch.bfloat16)
    optimizer = optimizer_of(model)
    run("perceptron", model, optimizer, range(12), dtype=torch.bfloat16)
    other = copy.deepcopy(model)
    fresh = optimizer_of(other)
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    after = range(12, 24)
    expected = run("perceptron", model, optimizer, after, dtype=torch.bfloat16)
    assert run("perceptron", other, fresh, after, dtype=torch.bfloat16) == expected
    assert fresh.state[other[0].weight]["momentum"].dtype == torch.float32


def tensors_in(value, seen):
    """Bytes of all tensors that an object holds, each storage once."""
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for one in value.values():
            tensors_in(one, seen)
    elif isinstance(value, (list, tuple, set)):
        for one in value:
            tensors_in(one, seen)
    elif type(value).__module__.startswith("metatele.learned"):
        tensors_in(vars(value), seen)
    return seen


@pytest.mark.parametrize("width", [100, 128, 192, 256])
def test_memories_take_at_most_24_bytes_a_parameter_of_square_layers(width):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())))
    optimizer = optimizer_of(model)
    for step in range(12):
        x = torch.randn(16, width, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), x.argmax(1)).backward()
        optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    course = sum(tensors_in(optimizer.stepper.course, {}).values())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert course <= 1.01 * 24 * parameters  # a moment of inputs has a row and column for the bias
    assert file.tell() <= 24 * parameters + 20_000  # names, and numbers of each sample


def test_a_model_moved_to_another_precision_goes_on():
    model = make("skips")
    optimizer = optimizer_of(model)
    first = run("skips", model, optimizer, range(12))
    model.double()
    optimizer.zero_grad()
    x, labels = batch("skips", 12)
    functional.cross_entropy(model(x.double()), labels).backward()
    optimizer.step()
    assert torch.isfinite(flat(model)).all()
    assert first[-1] > 0
