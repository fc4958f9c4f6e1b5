"""What passes show of any module: each use's errors times inputs are the gradient; what isn't seen says why."""

import copy
import gc
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from watched_under_ddp import RANKS, data, seen, work

from metatele.errors import UnsupportedModelError
from metatele.network import graph
from metatele.network.graph import Use
from metatele.network.parts import parts_of
from metatele.network.reduced import Look
from metatele.network.unwrap import unwrapped
from metatele.network.use import is_same_batch
from metatele.network.views import is_open
from metatele.network.watch import NOTHING, Watch, sample_hashes

B = 6


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, below=11):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(3))


def everything(watch, **settings):
    numbers = frozenset(range(len(watch.parts)))
    return Look(numbers, numbers, numbers, ends=True, fingerprint=True, samples=True, **settings)


def watching(model, **settings):
    watch = Watch(model, *parts_of(unwrapped(model)))
    watch.attach(watch.root)
    watch.wanted = everything(watch, **settings)
    return watch


class Function(nn.Module):
    """A module with parameters of some shapes, and a function of them."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for number, (name, shape) in enumerate(shapes.items()):
            self.register_parameter(name, nn.Parameter(randn(*shape, seed=10 + number)))

    def forward(self, *arguments):
        return self.function(self, *arguments)


class Tied(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x).tanh())


class Cells(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    def __init__(self, first, cross=False, **settings):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=first, **settings)
        self.first, self.cross = first, cross

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        other = x.flip(0) * 2 if self.cross else x
        out = self.inner(x, other, other)[0]
        return out if self.first else out.transpose(0, 1)


class Packed(nn.Module):
    """Queries, keys and values from one Linear."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Conv(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).flatten(1).tanh()


class Mixer(nn.Module):
    """A layer over positions, then one over features."""

    def __init__(self):
        super().__init__()
        self.over_positions, self.over_features = nn.Linear(5, 5), nn.Linear(8, 3)

    def forward(self, x):
        return self.over_features(x + self.over_positions(x.mT).tanh().mT)


class Windows(nn.Module):
    """Windows of an image, folded into its batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        windows = self.inner(x.view(len(x), 2, 2, 2, 2).transpose(2, 3).reshape(-1, 2, 2)).tanh()
        return self.outer(windows.reshape(-1, 3)).view(len(x), -1)


class First(nn.Module):
    """The first output of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


CASES = {
    **{f"linear {n}d": (lambda: nn.Linear(5, 3), randn(B, *[2, 3, 4][: n - 2], 5)) for n in range(2, 6)},
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), randn(B, 4, 5)),
    "one output": (lambda: nn.Linear(5, 1), randn(B, 5)),
    "strided inputs": (lambda: nn.Sequential(nn.Unflatten(1, (4, 5)), nn.Linear(5, 3)), randn(B, 40)[:, ::2]),
    "conv1d": (lambda: Conv(nn.Conv1d(4, 6, 3, padding=1)), randn(B, 4, 9)),
    "conv2d": (lambda: Conv(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2)), randn(B, 4, 9, 8)),
    "depthwise": (lambda: Conv(nn.Conv2d(4, 4, 3, padding=(2, 1), groups=4, bias=False)), randn(B, 4, 5, 6)),
    "conv3d": (lambda: Conv(nn.Conv3d(2, 3, 2, stride=2, padding=1)), randn(B, 2, 3, 4, 5)),
    "circular": (lambda: Conv(nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular")), randn(B, 2, 5, 5)),
    "channels last": (
        lambda: Conv(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last),
        randn(B, 4, 5, 5).to(memory_format=torch.channels_last),
    ),
    "attention": (lambda: Attention(True), randn(B, 5, 8)),
    "sequence first": (lambda: Attention(False), randn(B, 5, 8)),
    "attention on as many positions as samples": (lambda: Attention(True), randn(B, B, 8)),
    "gru": (lambda: First(nn.GRU(5, 4, batch_first=True)), randn(B, 3, 5)),
    "gru on as many positions as samples": (lambda: First(nn.GRU(5, 4, batch_first=True)), randn(B, B, 5)),
    "mixed positions": (lambda: Mixer(), randn(B, 5, 8)),
    "adapters": (lambda: Function(lambda m, x: (x @ m.A.T) @ m.C.T, A=(2, 5), C=(4, 2)), randn(B, 3, 5)),
    "windows": (lambda: Windows(), randn(B, 4, 4)),
    "two layers both ways": (lambda: First(nn.RNN(5, 4, 2, batch_first=True, bidirectional=True)), randn(B, 3, 5)),
    "cross attention": (lambda: Attention(True, cross=True), randn(B, 5, 8)),
    "separate projections": (lambda: Attention(True, cross=True, kdim=8, vdim=8), randn(B, 5, 8)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), randn(B, 5, 8)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 4, padding_idx=2), nn.Tanh()), tokens(B, 7)),
    "tied": (lambda: Tied(False), tokens(B, 7)),
    "tied with bias": (lambda: Tied(True), tokens(B, 7)),
    "gru cell": (lambda: Cells(nn.GRUCell(5, 4)), randn(B, 3, 5)),
    "lstm cell": (lambda: Cells(nn.LSTMCell(5, 4)), randn(B, 3, 5)),
    "rnn cell": (lambda: Cells(nn.RNNCell(5, 4)), randn(B, 3, 5)),
    "packed": (Packed, randn(B, 5, 8)),
    "F.linear": (lambda: Function(lambda m, x: functional.linear(x, m.W, m.b).tanh(), W=(3, 5), b=(3,)), randn(B, 5)),
    "x @ W": (lambda: Function(lambda m, x: (x @ m.W + m.b).tanh(), W=(5, 3), b=(3,)), randn(B, 4, 5)),
    "addmm": (lambda: Function(lambda m, x: torch.addmm(m.b, x, m.W), W=(5, 3), b=(3,)), randn(B, 5)),
    "einsum": (lambda: Function(lambda m, x: torch.einsum("bli,io->blo", x, m.W).tanh(), W=(5, 3)), randn(B, 4, 5)),
    "einsum oi": (lambda: Function(lambda m, x: torch.einsum("bli,oi->blo", x, m.W).tanh(), W=(3, 5)), randn(B, 4, 5)),
    "W @ x": (lambda: Function(lambda m, x: (m.W @ x).tanh(), W=(3, 5)), randn(B, 5, 4)),
    "experts": (
        lambda: Function(lambda m, x: torch.bmm(x.transpose(0, 1), m.W).transpose(0, 1), W=(2, 5, 3)),
        randn(B, 2, 5),
    ),
    "both ways": (lambda: Function(lambda m, x: (x @ m.W).tanh() @ m.W.T, W=(5, 3)), randn(B, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_times_inputs_are_the_gradient(name):
    """Of the whole batch as of its first half, whose gradient is that of a loss of these samples alone."""
    torch.manual_seed(0)
    make, x = CASES[name]
    model = make()
    watch = watching(model)
    watch.wanted = NOTHING
    out = model(x)
    (out * (1 + randn(*out.shape)))[: B // 2].sum().backward()
    halves_of = {id(p): p.grad.clone() for p in model.parameters()}
    model.zero_grad()
    watch.wanted = everything(watch)
    out = model(x)
    (out * (1 + randn(*out.shape))).sum().backward()
    seen = watch.seen()
    assert sorted(seen) == list(range(len(watch.parts))), [watch.why(n) for n in range(len(watch.parts))]
    for number, one in seen.items():
        part = watch.parts[number]
        expected = part.matrix(halves_of[id(part.weight)], None if part.bias is None else halves_of[id(part.bias)])
        assert one.half is not None, part.name
        torch.testing.assert_close(one.half, expected, rtol=1e-4, atol=1e-5)
    assert watch.scale() == pytest.approx(1, abs=1e-4)


def test_layouts_of_unknown_parameters_are_those_of_their_products():
    for name, shape in {"x @ W": (1, 3, 5), "F.linear": (1, 3, 6), "addmm": (1, 3, 6), "experts": (2, 3, 5)}.items():
        make, x = CASES[name]
        model = make()
        watch = watching(model)
        model(x).sum().backward()
        assert watch.parts[0].kind == "linear"
        assert watch.parts[0].shape == shape
        if shape[-1] == 6:
            assert not watch.vectors
        part, again = watch.parts[0], parts_of(model)[0][0]
        made = again.laid_out(part.layout, part.bias)
        assert (made.shape, made.strides, made.bias_rows) == (part.shape, part.strides, part.bias_rows)


@pytest.mark.parametrize("bias", [True, False])
def test_moments_are_those_of_all_columns(bias):
    x = randn(B, 7, 5)
    model = nn.Linear(5, 3, bias=bias)
    watch = watching(model)
    out = model(x)
    out.backward(randn(*out.shape, seed=4))
    h = torch.cat([x, torch.ones(B, 7, 1)], -1) if bias else x
    h, d = h.reshape(-1, h.shape[-1]), randn(*out.shape, seed=4).reshape(-1, 3)
    (one,) = watch.seen().values()
    torch.testing.assert_close(one.inputs.tensor[0], h.T @ h / len(h))
    torch.testing.assert_close(one.errors.tensor[0], d.T @ d, rtol=1e-4, atol=1e-4)
    assert (one.columns, one.positions) == (B * 7, 7)


@pytest.mark.parametrize("columns", [1000, 20])
def test_moments_of_a_convolution_are_those_of_its_patches(columns):
    x = randn(B, 4, 9, 8)
    layer = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    watch = watching(layer, columns=columns)
    out = layer(x)
    out.backward(randn(*out.shape, seed=4))
    h = functional.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1)).transpose(1, 2).flatten(0, 1)
    d = randn(*out.shape, seed=4).flatten(2).transpose(1, 2).flatten(0, 1)
    h = torch.cat([h, torch.ones(len(h), 1)], -1)
    (one,) = watch.seen().values()
    n = len(h)
    if columns < n:
        step = next(s for s in range(-(-n // columns), n) if torch.gcd(torch.tensor(s), torch.tensor(n)) == 1)
        h, d = h[::step], d[::step]
    torch.testing.assert_close(one.inputs.tensor[0], h.T @ h / len(h))
    torch.testing.assert_close(one.errors.tensor[0], d.T @ d * (n / len(d)), rtol=1e-4, atol=1e-4)
    assert (one.columns, one.positions) == (n, n / B)


def test_inputs_of_an_embedding_are_how_often_each_row_was_looked_up():
    model = nn.Embedding(11, 4)
    watch, x = watching(model), tokens(B, 7)
    model(x).sum().backward()
    (one,) = watch.seen().values()
    torch.testing.assert_close(one.inputs, torch.bincount(x.flatten(), minlength=11)[None] / x.numel())


def test_wide_moments_are_factors():
    model = nn.Linear(400, 3)
    watch = watching(model, widest=64, rank=4)
    model(randn(50, 400)).sum().backward()
    (one,) = watch.seen().values()
    assert one.inputs.tensor.shape == (1, 401, 4)
    assert float(one.inputs.trace) == pytest.approx(float(randn(50, 400).square().sum() / 50 + 1), rel=1e-4)


UNSEEN = {
    "elementwise": (lambda: Function(lambda m, x: x @ m.W + (x * m.W[0]).sum(), W=(5, 5)), randn(B, 5), "Sum|Mul"),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 3), randn(B, 2, 5), "transposed convolution"),
    "fused": (lambda: nn.LSTM(5, 4, batch_first=True), randn(B, 3, 5), "fused recurrent"),
    "checkpointed": (
        lambda: Function(lambda m, x: checkpoint(lambda x: (x @ m.W).tanh() @ m.W, x, use_reentrant=False), W=(5, 5)),
        randn(B, 5).requires_grad_(),
        "checkpointing",
    ),
    "recomputed": (
        lambda: Function(lambda m, x: checkpoint(lambda x: (x @ m.W).tanh(), x, use_reentrant=True), W=(5, 5)),
        randn(B, 5).requires_grad_(),
        "not found",
    ),
    "unused": (lambda: Function(lambda m, x: x @ m.W, W=(5, 3), V=(4, 4)), randn(B, 5), None),
    "product": (lambda: Function(lambda m, x: x @ (m.A @ m.C), A=(5, 2), C=(2, 3)), randn(B, 5), "another parameter"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_not_seen_says_why(name):
    make, x, words = UNSEEN[name]
    model = make()
    watch = watching(model)
    out = model(x)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    seen = watch.seen()
    last = len(watch.parts) - 1
    assert last not in seen
    assert not words or any(word in watch.why(last) for word in words.split("|")), watch.why(last)
    assert watch.fingerprint() is not None
    assert all(p.grad is not None for p in model.parameters()) or name == "unused"


def test_reading_what_a_pass_saved_runs_nobodys_hook():
    calls = []
    model = nn.Linear(5, 3)
    watch = watching(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: (calls.append(1), t)[1]):
        loss = model(randn(B, 5)).sum()
    assert not calls
    loss.backward()
    assert len(calls) == 1
    assert "hook" in watch.why(0)


def test_the_roles_of_parameters_are_told_by_their_layers():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 3),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "norm": nn.LayerNorm(4),
            "attention": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(4, 5),
            "gru": nn.GRUCell(4, 5),
            "embedding": nn.Embedding(7, 4),
        }
    )
    model.positions = nn.Parameter(torch.zeros(1, 6, 4))
    model.token = nn.Parameter(torch.zeros(1, 1, 4))
    model.factor, model.empty = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(0, 3))
    model.wave = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    parts, vectors = parts_of(model)
    shapes = {part.name: (part.kind, *part.shape) for part in parts}
    assert shapes["linear.weight"] == ("linear", 1, 3, 5)
    assert shapes["conv.weight"] == ("conv", 2, 3, 19)
    assert shapes["attention.in_proj_weight[k]"] == ("attention", 1, 4, 5)
    assert shapes["lstm.weight_hh_l0[g]"] == ("recurrent", 1, 5, 6)
    assert shapes["gru.weight_ih[z]"] == ("recurrent", 1, 5, 5)
    assert shapes["embedding.weight"] == ("embedding", 1, 4, 7)
    assert shapes["positions"] == ("unseen", 1, 6, 4)
    assert {name for name, _ in vectors} == {"norm.weight", "norm.bias", "token", "factor", "wave"}


@pytest.mark.parametrize("name", CASES)
def test_parts_and_vectors_are_all_parameters_once(name):
    model = CASES[name][0]()
    parts, vectors = parts_of(model)
    marks = {id(p): torch.zeros_like(p) for p in model.parameters()}
    for part in parts:
        matrix = torch.ones(part.shape)
        weight, bias = part.split(matrix)
        part.of(marks[id(part.weight)]).add_(weight)
        if bias is not None:
            part.of_bias(marks[id(part.bias)]).add_(bias)
    for _, p in vectors:
        marks[id(p)] += 1
    assert all(bool((t == 1).all()) for t in marks.values())


def test_parametrised_pruned_and_lazy_layers():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    parts, vectors = parts_of(model)
    assert [p.kind for p in parts] == ["unseen"]
    assert len(vectors) == 2
    watch = watching(model)
    model(randn(B, 5)).sum().backward()
    assert "WeightNorm" in watch.why(0)
    pruned = prune.random_unstructured(nn.Linear(5, 3), "weight", 0.5)
    assert [(p.name, p.kind) for p in parts_of(pruned)[0]] == [("weight_orig", "unseen")]
    with pytest.raises(UnsupportedModelError, match="before their first batch"):
        parts_of(nn.Sequential(nn.LazyLinear(3)))


# --- passes


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def test_passes_add_up_and_clearing_forgets():
    model, x = network(), randn(2 * B, 5)
    watch = watching(model)
    model(x).sum().backward()
    one = watch.seen()
    watch.clear()
    assert not watch.seen()
    model.zero_grad()
    for part in (x[:B], x[B:]):
        model(part).sum().backward()
    both = watch.seen()
    for number in one:
        torch.testing.assert_close(both[number].inputs.tensor, one[number].inputs.tensor)
        assert both[number].columns == one[number].columns
    assert is_same_batch(watch.fingerprint().numbers(), fingerprint_of(x))
    outputs, gradients = watch.outputs()
    torch.testing.assert_close(outputs, model(x).detach())
    torch.testing.assert_close(gradients, torch.ones(2 * B, 3))
    assert torch.equal(watch.samples(), sample_hashes(x))


def fingerprint_of(x):
    other = nn.Linear(x.shape[1], 1)
    watch = watching(other)
    other(x).sum().backward()
    return watch.fingerprint().numbers()


def test_evaluations_penalties_and_abandoned_passes_do_not_count():
    model, x = network(), randn(B, 5)
    watch = watching(model)
    with torch.no_grad():
        model(x)
    model(3 * x)
    inputs = x.clone().requires_grad_()
    torch.autograd.grad(model(inputs).sum(), inputs)
    assert watch.ended == [] or len(watch.ended) == 1  # the only one whose gradients were taken
    watch.clear()
    torch.autograd.grad(model(inputs).sum(), inputs)
    model(x).sum().backward()
    model(5 * x)
    assert watch.seen()[0].columns == B
    model.zero_grad()
    model(x[:4]).sum().backward()  # gradients were cleared by the model, which the watch is not told of
    assert watch.seen()[0].columns == 4


def test_gradients_by_autograd_grad_are_seen():
    model, x = network(), randn(B, 5)
    watch = watching(model)
    gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g
    assert sorted(watch.seen()) == [0, 1]
    assert watch.scale() == pytest.approx(1)


def test_two_backward_passes_through_one_forward_pass_add_their_errors():
    model, x = network(), randn(B, 5)
    watch = watching(model)
    out = model(x)
    out.sum().backward(retain_graph=True)
    out.square().sum().backward()
    seen = watch.seen()
    assert [one.columns for one in seen.values()] == [B, B]
    again = network()
    other = watching(again)
    out = again(x)
    (out.sum() + out.square().sum()).backward()
    for number, one in other.seen().items():
        torch.testing.assert_close(seen[number].half, one.half)
        torch.testing.assert_close(seen[number].inputs.tensor, one.inputs.tensor)


def test_halves_are_in_the_scale_of_the_gradients():
    model, x = network(), randn(B, 5)
    watch = watching(model)
    (1000 * model(x).sum()).backward()
    for p in model.parameters():
        p.grad /= 4000
    plain = network()
    other = watching(plain)
    (model_loss := plain(x).sum() / 4).backward()
    assert model_loss.isfinite()
    for number, one in other.seen().items():
        torch.testing.assert_close(watch.seen()[number].half, one.half)
        torch.testing.assert_close(watch.seen()[number].errors.tensor, one.errors.tensor)


def test_autocast_is_looked_through():
    model, x = network(), randn(B, 5)
    watch = watching(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().sum()
    loss.backward()
    assert sorted(watch.seen()) == [0, 1]
    assert watch.seen()[0].inputs.tensor.dtype == torch.float32
    torch.testing.assert_close(watch.seen()[0].inputs.tensor[0, :5, :5], x.T @ x / B, rtol=0.03, atol=0.03)


@dataclass
class Answer:
    loss: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize("wrap", ["dict", "tuple", "dataclass", "arguments by name"])
def test_outputs_may_be_nested(wrap):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            out = self.net(x)
            loss = out.square().sum()
            return {"dict": {"loss": loss, "o": [out]}, "tuple": (loss, (out,)), "dataclass": Answer(loss, out)}.get(
                wrap, (loss, out)
            )

    model = Around()
    watch = watching(model)
    found = model(x=randn(B, 5))
    loss = found["loss"] if wrap == "dict" else found.loss if wrap == "dataclass" else found[0]
    loss.backward()
    assert sorted(watch.seen()) == [0, 1]
    outputs, gradients = watch.outputs()
    torch.testing.assert_close(gradients, 2 * outputs)


def test_logits_changed_in_place_are_kept_as_they_were():
    model, x = network(), randn(B, 5)
    watch = watching(model)
    out = model(x)
    expected = out.detach().clone()
    out.mul_(2).sum().backward()
    torch.testing.assert_close(watch.outputs()[0], expected)
    torch.testing.assert_close(watch.outputs()[1], torch.full_like(expected, 2))


def test_children_called_on_their_own_are_not_seen():
    model = network()
    watch = watching(model)
    model[2](model[0](randn(B, 5))).sum().backward()
    assert watch.seen() == {}
    assert watch.fingerprint() is None
    assert "not been called" in watch.why(0)


def test_copies_and_saved_models_have_no_traces(tmp_path):
    model, x = network(), randn(B, 5)
    watch = watching(model)
    model(x).sum().backward()
    both = copy.deepcopy({"model": model, "watch": watch})
    assert both["watch"].parts[0].weight is both["model"][0].weight
    both["watch"].attach(both["model"])
    both["model"](x).sum().backward()
    assert sorted(both["watch"].seen()) == [0, 1]
    again = pickle.loads(pickle.dumps({"model": model, "watch": watch}))
    assert again["watch"].parts[1].weight is again["model"][2].weight
    assert not again["watch"].ended


def test_nothing_is_left_of_a_pass_after_clearing():
    def alive():
        return sum(isinstance(thing, Use) for thing in gc.get_objects())

    model, x = network(), randn(B, 5)
    watch = watching(model)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for back in (True, False):
            out = model(x)
            assert alive() == before + 2
            if back:
                out.sum().backward()
            watch.clear()
            del out
            assert alive() == before
    finally:
        gc.enable()


def test_tracing_transforms_and_inference_are_not_disturbed():
    model, x = network(), randn(B, 5)
    watch = watching(model)
    torch.jit.trace(model, x, check_trace=False)
    torch.export.export(model, (x,))
    parameters = dict(model.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    with torch.inference_mode():
        model(x)
    watch.clear()
    model(x).sum().backward()
    assert sorted(watch.seen()) == [0, 1]
    assert watch.seen()[0].columns == B


def test_samples_are_known_again_in_other_batches():
    x = randn(20, 3, 4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_hashes(x[order]), sample_hashes(x)[order])
    assert len(sample_hashes(x).unique()) == 20
    t = tokens(20, 9)
    assert torch.equal(sample_hashes(t[order][:5]), sample_hashes(t)[order][:5])


def test_batches_of_tokens_are_told_apart():
    one, other = tokens(B, 7), tokens(B, 8)[:, 1:]
    model = nn.Embedding(11, 4)
    watch, numbers = watching(model), []
    for x in (one, one.flip(0), other):
        watch.clear()
        model.zero_grad()
        model(x).sum().backward()
        numbers.append(watch.fingerprint().numbers())
    assert is_same_batch(numbers[0], numbers[1])
    assert not is_same_batch(numbers[0], numbers[2])


def test_positions_that_all_samples_share_have_no_half():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(11, 4), nn.Embedding(12, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.tokens(x) + self.positions(torch.arange(x.shape[1])))

    model = Model()
    watch = watching(model)
    model(tokens(B, 2 * B)).sum().backward()
    seen = watch.seen()
    assert [seen[n].half is None for n in range(3)] == [False, True, False]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.DataParallel(nn.DataParallel(m))])
def test_wrappers_are_looked_through(wrap):
    model, x = network(), randn(B, 5)
    watch = watching(wrapped := wrap(model))
    wrapped(x).sum().backward()
    assert sorted(watch.seen()) == [0, 1]


def test_compiled_models_say_so_and_go_on():
    model, x = network(), randn(B, 5)
    compiled = torch.compile(model, backend="aot_eager")
    watch = watching(compiled)
    for _ in range(2):
        watch.clear()
        model.zero_grad()
        compiled(x).sum().backward()
        assert watch.seen() == {}
        assert "compiled" in watch.why(0)
        assert watch.fingerprint() is not None
        assert watch.outputs()[0].shape == (B, 3)


def test_all_ranks_see_what_one_process_sees_of_the_whole_batch(tmp_path):
    multiprocessing.spawn(work, (RANKS, str(tmp_path)), nprocs=RANKS)
    both = [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(RANKS)]
    for case, last in ((0, 8), (1, 7)):  # the last part is used on the first rank alone, or on none
        (one, fingerprint, shapes), (other, *_) = (rank[case] for rank in both)
        assert sorted(one) == sorted(other) == list(range(last))
        for number in one:
            for mine, theirs in zip(flat(one[number]), flat(other[number]), strict=True):
                assert torch.equal(mine, theirs)
            assert one[number].half.shape == shapes[number]
    alone, numbers, _ = seen(extra=False)
    assert is_same_batch(fingerprint.numbers(), numbers.numbers())
    for number, mine in one.items():
        assert mine[3:] == alone[number][3:]
        torch.testing.assert_close(mine.half, alone[number].half / RANKS)  # of means over ranks, and theirs are sums
        if number < 6:  # the last one's are factors of one process's columns
            for a, b in zip(flat(mine[:1]), flat(alone[number][:1]), strict=True):
                torch.testing.assert_close(a, b)
    assert both[0][0][0][7].columns == len(data()) // RANKS


def flat(seen):
    """The tensors of what was seen of a part."""
    for thing in seen:
        if isinstance(thing, tuple):
            yield from (t for t in thing if t is not None)
        elif isinstance(thing, torch.Tensor):
            yield thing


class Around(nn.Module):
    """A module around a plain one, of the kind that a training framework wants."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x).tanh()


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m.net(x)])
def test_a_module_or_the_one_that_holds_all_of_it_may_be_called(call):
    model, x = Around(), randn(B, 5)
    watch = watching(model)
    for _ in range(2):
        call(model, x).sum().backward()
    assert [one.columns for one in watch.seen().values()] == [2 * B, 2 * B]
    assert watch.samples().shape == (2 * B,)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_is_called_by_checkpointing(reentrant):
    model, x = network(), randn(B, 5).requires_grad_()
    watch = watching(model)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert sorted(watch.seen()) == ([0, 1] if reentrant else [])
    assert watch.fingerprint().columns == B


def test_of_more_passes_than_are_followed_no_half_is_claimed():
    model, x = network(), randn(B, 5)
    watch = watching(model)
    sum(model(x).sum() for _ in range(12)).backward()
    assert all(one.half is None for one in watch.seen().values())


def test_frozen_parameters_say_so_and_are_seen_when_they_are_freed():
    model, x = network(), randn(B, 5)
    model[0].requires_grad_(False)
    watch = watching(model)
    model(x).sum().backward()
    assert sorted(watch.seen()) == [1]
    assert watch.why(0) == "it is frozen"
    watch.clear()
    model.requires_grad_(True).zero_grad()
    model(x).sum().backward()
    assert sorted(watch.seen()) == [0, 1]


def test_parts_add_what_was_split_from_a_matrix():
    torch.manual_seed(0)
    for name in ("attention", "lstm cell", "channels last", "embedding", "depthwise"):
        model = CASES[name][0]()
        before = {id(p): p.detach().clone() for p in model.parameters()}
        parts, _ = parts_of(model)
        for part in parts:
            part.add_(torch.ones(part.shape), 0.5)
        touched = {id(p) for part in parts for p in (part.weight, part.bias)}
        for p in model.parameters():
            torch.testing.assert_close(p.detach(), before[id(p)] + 0.5 * (id(p) in touched))


@pytest.mark.parametrize("name", ["linear 3d", "linear without bias", "embedding"])
def test_mean_squares_of_outputs_follow_from_the_inputs(name):
    make, x = CASES[name]
    model = make()
    watch = watching(model)
    out = model(x)
    out.sum().backward()
    (one,), (part,) = watch.seen().values(), watch.parts
    matrix = part.matrix(part.weight.detach(), None if part.bias is None else part.bias.detach())
    expected = (out if name != "embedding" else model[0](x)).detach().square().mean()
    torch.testing.assert_close(one.square(matrix), expected)


class Raw:
    """A saved tensor of an earlier torch, which refuses a second hook."""

    def __init__(self, hooked):
        self.hooked = hooked

    def register_hooks(self, pack, unpack):
        if self.hooked:
            raise RuntimeError("hooks have already been set")
        self.hooked = True


@pytest.mark.parametrize("hooked", [True, False])
def test_earlier_versions_are_asked_whether_a_saved_tensor_is_guarded(hooked):
    node = SimpleNamespace(_raw_saved_input=Raw(hooked), metadata={})
    assert [is_open(node, "input") for _ in range(2)] == [not hooked] * 2
    assert not is_open(node, "other")


def test_the_table_says_of_each_parameter_how_it_is_seen():
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Unflatten(1, (2, 2)), nn.ConvTranspose1d(2, 1, 2))
    watch = watching(model)
    model(randn(B, 5)).sum().backward()
    watch.seen()
    watch.clear()
    rows = {name: (shape, kind, why) for name, shape, kind, why in watch.table()}
    assert rows["0.weight"] == ((1, 4, 6), "linear", "")
    assert rows["1.bias"] == ((4,), "vector", "")
    assert rows["3.weight"] == ((1, 2, 2), "unseen", "it is used in a transposed convolution")
    assert list(rows) == ["0.weight", "3.weight", "1.weight", "1.bias", "3.bias"]


def test_biases_that_a_fused_recurrent_cell_adds_are_added_to_its_gates():
    class Node:
        def __init__(self, name, *under):
            self.name, self.next_functions = (lambda: name), tuple((node, 0) for node in under)

    gates = Node("MmBackward0"), Node("MmBackward0")
    cell, nodes = Node("ThnnFusedGruCellBackward0", *gates, None, None, None), dict(zip(gates, (1, 2), strict=True))
    found = [graph.added_to(graph.User(cell, cell.name(), slot, []), nodes) for slot in (2, 3, 4)]
    assert found == [None, 1, 2]
