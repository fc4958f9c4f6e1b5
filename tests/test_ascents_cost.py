"""What an ascent asks of a device, counted: operations beside those of a gradient, and numbers that are read."""

import copy

import pytest
import torch
import torch.nn.functional as F
from symmetry_cases import CASES
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import metatele
from metatele.symmetry.exact import act_, element_of, pullback
from metatele.symmetry.find import find_symmetries
from metatele.symmetry.stacked import Stacked
from metatele.teleport.modules import ascend_

VIEWS = {  # operations that launch nothing
    *(
        "view",
        "_unsafe_view",
        "as_strided",
        "t",
        "transpose",
        "permute",
        "slice",
        "select",
        "unbind",
        "expand",
        "split",
    ),
    *("split_with_sizes", "detach", "alias", "unsqueeze", "squeeze", "empty", "empty_like", "diagonal", "lift_fresh"),
}
READS = {"item", "tolist", "cpu", "__bool__", "__float__", "__int__", "nonzero"}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += str(function).partition(".")[2].partition(".")[0] not in VIEWS
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in READS
        return function(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        h = self.first(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.feed(self.second(x))


def transformer(depth, heads=6, width=24):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, width), *(Block(width, heads) for _ in range(depth)), nn.Linear(width, 11))
    x = torch.randint(11, (3, 5))
    return model, lambda m: F.cross_entropy(m(x).flatten(0, 1), x.roll(1, 1).flatten()), x


def counted(function):
    with Operations() as operations, Reads() as reads:
        result = function()
    return operations.count, reads.count, result


@pytest.mark.parametrize("depth", [2, 4])
def test_ten_steps_of_a_transformer_cost_few_gradients_and_two_reads_a_step(depth):
    model, loss, x = transformer(depth)
    # Rotations of the residual stream are one space, which acts on every layer's weights one by one.
    spaces = [space for space in find_symmetries(model, x).spaces if space.group != "O"]
    assert sum(space.dimension > 0 for space in spaces) > 20 * depth
    gradient, _, _ = counted(lambda: loss(model).backward())
    model.zero_grad()
    operations, reads, report = counted(lambda: ascend_(model, spaces, lambda: loss(model)))
    assert report.steps == 10
    # Two gradients a step; what is done beside them does not grow with the number of layers and heads.
    assert operations <= 21 * gradient + 1800
    assert reads <= 2 * 10 + 4


def test_ten_steps_of_a_perceptron_read_the_device_twice_a_try():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(40, 16), torch.randint(4, (40,))
    gradient, _, _ = counted(lambda: F.cross_entropy(model(x), y).backward())
    move = metatele.GradientNormAscent(1e-3, 10, parametrisation="first-order")
    operations, reads, report = counted(
        lambda: metatele.teleport_(copy.deepcopy(model), x, y, F.cross_entropy, move=move)
    )
    assert report.steps == 10
    assert operations <= 110 * gradient
    assert reads <= 2 * 10 + 15


def test_a_search_reads_less_than_four_numbers_a_space():
    model, _, x = transformer(4)
    operations, reads, found = counted(lambda: find_symmetries(model, x))
    assert reads <= 4 * len(found.spaces)
    assert operations <= 120 * len(found.spaces)


@pytest.mark.parametrize("name", [name for name in CASES if "cross" not in name and "coder layer" not in name])
def test_stacked_spaces_act_as_they_do_one_by_one(name):
    torch.manual_seed(0)
    model, x = (transformer(2)[0], transformer(2)[2]) if name == "relu" else CASES[name]()[:2]
    model = model.double()
    inputs = x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    try:
        spaces = [space for space in find_symmetries(model, inputs).spaces if space.dimension]
    except metatele.errors.ConfigError:
        pytest.skip("it is called with more than one tensor")
    if not spaces:
        pytest.skip("it has no continuous symmetry")
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    along = {n: torch.randn_like(t) for n, t in tensors.items()}
    stacked = Stacked(spaces, tensors)
    w = stacked.flat(tensors)
    A = stacked.pullback(w, stacked.flat(along))
    size = sum(pullback(space, tensors, along).square().sum() for space in spaces).sqrt()
    torch.testing.assert_close(A.norm(), size, rtol=1e-12, atol=0)
    elements = stacked.elements(A * (0.3 / A.norm()), 0.3)
    expected = {n: t.clone() for n, t in tensors.items()}
    for space, element in stacked.each(elements):
        own = element_of(space, pullback(space, tensors, along) * (0.3 / size))
        torch.testing.assert_close(element.value, own.value, rtol=0, atol=1e-10)  # matrix_exp is not exact to rounding
        torch.testing.assert_close(element.inverse, own.inverse, rtol=0, atol=1e-10)
        act_(space, element, expected)
    stacked.act_(w, elements)
    for n, t in stacked.parts(w).items():
        torch.testing.assert_close(t, expected[n], rtol=1e-12, atol=1e-13)
