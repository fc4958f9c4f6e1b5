"""What is found in modules of every kind: which groups, whether anything is missing, and that it holds elsewhere."""

import collections
import copy
import math

import pytest
import torch
from random_nets import Net
from symmetry_cases import CASES, Wrap, rows
from torch import nn
from torch.nn import functional as F

from metatele.errors import ConfigError, UnsupportedModelError
from metatele.network.spaces import Place, Space
from metatele.symmetry.exact import act_, random_element
from metatele.symmetry.find import find_symmetries

PERM2 = {"perm 2": 1}
HEADS = {"GL 2": 4, "shift 2": 4}  # two heads: queries with keys, and values; biases of keys, and of values
NORM = {"O 5": 1, "perm 5": 1, "scale 5": 1}
# What is found, by group and k; and how many directions are missing, with the reason.
EXPECTED = {
    "relu": ({"perm 5": 1, "scale 5": 1}, 0, ""),
    "leaky": ({"perm 5": 1, "scale 5": 1}, 0, ""),
    "prelu": ({"perm 5": 1, "scale 5": 1}, 0, ""),
    "prelu one": ({"perm 5": 1, "scale 5": 1}, 0, ""),
    "gelu": ({"perm 5": 1}, 0, ""),
    "tanh": ({"perm 5": 1}, 0, ""),
    "abs": ({"perm 5": 1, "scale 5": 1}, 0, ""),
    "linear": ({"GL 3": 1, "shift 3": 1}, 0, ""),
    "linear without bias": ({"GL 3": 1}, 0, ""),
    "bottleneck of three": ({"GL 3": 2, "shift 3": 2}, 0, ""),
    "convolutions": ({"perm 3": 1, "scale 3": 1}, 0, ""),
    "pooled": ({"perm 3": 1, "scale 3": 1}, 0, ""),
    "depthwise": ({"perm 4": 1, "scale 4": 2}, 0, ""),
    "grouped": ({"perm 2": 4, "scale 2": 4}, 0, ""),
    "transposed": ({"perm 3": 1, "scale 3": 1}, 0, ""),
    "batch norm": ({"perm 3": 1, "scale 3": 1}, 3, "scales before the norm, which its eps makes depend on this batch"),
    "batch norm eval": (
        {"perm 3": 1, "scale 3": 1},
        3,
        "the norm is affine then, with constants that are no parameters",
    ),
    "group norm": ({"perm 2": 1, "scale 4": 1}, 0, ""),
    "layer norm": (NORM | {"shift 1": 1, "shift 4": 1, "shift 5": 1}, 6, "what each of 6 readers has of the mean, 0"),
    "layer norm without gains": ({"O 5": 1}, 11, "the same of 6 readers, and the mean of 4 inputs and the bias"),
    "rms norm": (NORM, 1, "the bias of as many units as inputs and one can stand for a part of eps"),
    "rms written out": (NORM, 1, "the same"),
    "stream": ({"O 5": 1, "perm 3": 1, "perm 5": 1, "scale 5": 2}, 0, ""),
    "stream centred": (
        {"O 5": 1, "perm 3": 1, "perm 5": 1, "scale 5": 2, "shift 1": 2, "shift 3": 1, "shift 4": 1, "shift 5": 2},
        9,
        "what 3 and 6 readers have of the mean, 0",
    ),
    "swiglu": ({"perm 5": 1, "scale 5": 1}, 0, ""),
    "reglu": ({"perm 5": 1, "scale 5": 2}, 0, ""),
    "low rank": (
        {"GL 2": 1, "perm 5": 1},
        14,
        "the full matrix takes any change of the pair: 2 (4 + 5) directions, 4 are GL",
    ),
    "attention": (HEADS | PERM2, 0, ""),
    "attention without bias": ({"GL 2": 4, "perm 2": 1}, 0, ""),
    "attention bias kv": (
        {"GL 2": 2},
        16,
        "a key of its own beside the others is read as a unit: values are left alone",
    ),
    "cross attention": (HEADS, 0, ""),
    "fused": (HEADS | PERM2, 0, ""),
    "heads": ({"GL 4": 4, "perm 2": 1}, 0, ""),
    "grouped queries": ({"GL 4": 2}, 0, ""),
    "rotary": ({"GL 4": 2, "phase 2": 2, "perm 2": 1}, 0, ""),
    "encoder layer": (
        HEADS | {"perm 2": 1, "perm 5": 1, "scale 5": 1},
        20,
        "the mean of 5 and 6 writers, what 5 readers have of it, and 4 shifts between biases along the stream",
    ),
    "encoder layer norm first": (
        HEADS | {"perm 2": 1, "perm 5": 1, "scale 4": 2, "scale 5": 1, "shift 4": 1},
        None,
        "as above; inputs are in the stream",
    ),
    "decoder layer": (HEADS | {"GL 2": 8, "shift 2": 8, "perm 2": 2, "perm 5": 1, "scale 5": 1}, None, "as above"),
    "decoder layer norm first": (
        {"GL 2": 8, "shift 2": 8, "perm 2": 2, "perm 5": 1, "scale 4": 3, "scale 5": 1, "shift 4": 1},
        None,
        "as above",
    ),
    "transformer": (
        {"GL 2": 12, "shift 2": 12, "perm 2": 3, "perm 5": 2, "scale 4": 1, "scale 5": 2, "shift 1": 2},
        None,
        "as above",
    ),
    "tied embeddings": ({"O 4": 1, "perm 4": 1, "perm 5": 1, "scale 4": 1}, 0, ""),
    "squeeze and excite": ({"perm 3": 1, "perm 4": 1, "scale 3": 1, "scale 4": 1}, 0, ""),
    "experts": (
        {"GL 4": 1, "perm 2": 1, "perm 3": 2, "shift 1": 1, "shift 3": 1},
        4,
        "a shift of all experts at once into the next bias",
    ),
    "RNN": ({"perm 3": 1}, 3, "two biases that are added"),
    "RNN relu": ({"perm 3": 1, "scale 3": 1}, 3, "the same"),
    "LSTM": ({"perm 3": 1}, 12, "the same, of four gates"),
    "GRU": ({"perm 3": 1}, 6, "the same, of two gates"),
    "RNNCell": ({"perm 3": 1}, 3, "the same"),
    "LSTMCell": ({"perm 3": 1}, 12, "the same"),
    "GRUCell": ({"perm 3": 1}, 6, "the same"),
}


def made(name):
    """A case with weights of which none is 0 or 1."""
    torch.manual_seed(0 if name != "depthwise" else 3)
    model, *inputs = CASES[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, tuple(inputs)


def kinds(found):
    return dict(collections.Counter(f"{space.group} {space.k}" for space in found.spaces))


def wide(t):
    return t.double() if t.is_floating_point() else t


@torch.no_grad()
def drifts(model, spaces, inputs, condition=100.0):
    """By how much a random element of each space changes the outputs, relatively."""
    model = copy.deepcopy(model)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    kept = {name: p.clone() for name, p in tensors.items()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def outputs():
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
        out = model(*inputs)
        return out[0] if isinstance(out, tuple) else out

    before, found = outputs(), []
    for n, space in enumerate(spaces):
        act_(space, random_element(space, condition, n), tensors)
        found.append(float((outputs() - before).abs().max() / before.abs().max()))
        for name in space.parameters:
            tensors[name].copy_(kept[name])
    return found


@pytest.mark.parametrize("name", CASES)
def test_kinds(name):
    model, inputs = made(name)
    example = tuple(t[:12] for t in inputs)
    found = find_symmetries(model, example)
    assert kinds(found) == EXPECTED[name][0]
    assert not found.dropped
    others = tuple(t[12:17].roll(1, 0).mul(1.5) if t.is_floating_point() else t[12:17] for t in inputs)
    assert max(drifts(copy.deepcopy(model).double(), found.spaces, tuple(map(wide, others)))) < 1e-9
    assert max(drifts(model, found.spaces, example)) < 1e-5


@pytest.mark.parametrize("name", [name for name, (_, missing, _) in EXPECTED.items() if missing is not None])
def test_whether_anything_is_missing(name):
    model, inputs = made(name)
    certificate = find_symmetries(model, inputs).certificate()
    assert certificate.nullity - certificate.found == EXPECTED[name][1], EXPECTED[name][2]


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_networks(first):
    for seed in range(first, first + 10):
        net = Net(seed)
        net.train(seed % 4 == 3)
        found = find_symmetries(net, net.example(seed))
        assert not found.dropped, net.story
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn_like(p))
        for t in (3, 4):
            change = drifts(copy.deepcopy(net).double(), found.spaces, (wide(net.example(seed + 1, 5, t)),))
            assert max(change, default=0.0) < 1e-9, (net.story, found.spaces[change.index(max(change))])


# --- danger: what holds on the example alone


def test_a_unit_that_sleeps_on_the_example():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-50.0)
    found = find_symmetries(model, torch.randn(5, 3))
    assert kinds(found) == {"scale 4": 1, "perm 4": 1}


def test_gains_of_one_that_training_moves():
    """Tied embeddings rotate while all gains are 1, and never after."""

    def forward(s, x):
        h = s.e(x)
        return s.n(h + s.branch(h)) @ s.e.weight.t()

    net = Wrap(forward, e=nn.Embedding(7, 4), n=nn.RMSNorm(4), branch=nn.Linear(4, 4, bias=False))
    assert "O 4" not in kinds(find_symmetries(net, torch.arange(7)[:, None]))


@pytest.mark.parametrize("k", [2, 3])
def test_permutations_that_only_some_are(k):
    """What is flipped commutes with one permutation: that is not all of them."""
    net = Wrap(
        lambda s, x: s.b(F.gelu(s.a(x)) + F.gelu(s.a(x)).flip(-1).cumsum(-1)), a=nn.Linear(3, k), b=nn.Linear(k, 2)
    )
    assert not find_symmetries(net, torch.randn(6, 3)).spaces


def test_zero_gains():
    """A branch that a gain of zero shuts at first is not divided by it."""
    net = Wrap(lambda s, x: s.o(s.a(x) * s.g), a=nn.Linear(3, 4), g=nn.Parameter(torch.zeros(4)), o=nn.Linear(4, 2))
    found = find_symmetries(net, torch.randn(5, 3))
    assert max(drifts(net.double(), found.spaces, (torch.randn(5, 3).double(),)), default=0.0) < 1e-9


def test_infinite_outputs_are_compared():
    net = Wrap(
        lambda s, x: s.b(s.a(x).relu()).masked_fill(torch.eye(2, dtype=torch.bool), -math.inf),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 2),
    )
    assert kinds(find_symmetries(net, torch.randn(2, 3))) == {"scale 4": 1, "perm 4": 1}


# --- bad input, and models that are not plain


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: nn.ReLU(), ConfigError, "has no parameters"),
        (
            lambda: nn.Sequential(nn.Linear(5, 2)),
            ConfigError,
            "pass on the example failed .* shapes cannot be multiplied",
        ),
        (lambda: nn.Linear(3, 2, device="meta"), UnsupportedModelError, "parameter weight is on the meta device"),
        (lambda: nn.LazyLinear(2), UnsupportedModelError, "parameter weight has no shape yet"),
        (
            lambda: nn.Linear(3, 2, dtype=torch.complex64),
            UnsupportedModelError,
            "parameter weight is of torch.complex64",
        ),
        (
            lambda: Wrap(lambda s, x: s.p + x, p=nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)),
            UnsupportedModelError,
            "parameter p is of torch.int8",
        ),
        (
            lambda: Wrap(lambda s, x: s.a(x).argmax(-1), a=nn.Linear(3, 2)),
            UnsupportedModelError,
            "no tensor of floating",
        ),
        (
            lambda: Wrap(lambda s, x: s.a(x) / 0, a=nn.Linear(3, 2)),
            ConfigError,
            "outputs on the example are not finite",
        ),
    ],
)
def test_bad_models(model, error, words):
    with pytest.raises(error, match=words) as said:
        find_symmetries(model(), torch.ones(4, 3))
    assert "\n" not in str(said.value)


def test_weights_that_are_not_finite():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.bias[0] = math.nan
    with pytest.raises(ConfigError, match="parameter bias holds numbers that are not finite"):
        find_symmetries(model, torch.ones(4, 3))


def test_a_model_in_training_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))
    before, seed = state(model), torch.get_rng_state()
    found = find_symmetries(model, torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert kinds(found) == {"scale 6": 1, "perm 6": 1}  # the gains with what reads them: dropout is taken out
    assert same(model, before)
    assert model.training
    assert model[3].p == 0.5
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(seed, torch.get_rng_state())


def test_a_branch_on_numbers_is_found_and_said():
    net = Wrap(
        lambda s, x: s.b(s.a(x).relu() if s.a(x).sum() < 1e9 else s.a(x).tanh()), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )
    found = find_symmetries(net, torch.randn(5, 3))
    assert any("scalar" in name or name in ("lt", "is_nonzero") for name in found.unknown)


def test_what_failed_its_check_is_printed(monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    found = find_symmetries(model, x)
    assert "failed their check" not in str(found)
    wrong = Space("scale", 2, (Place("2.bias", torch.arange(2)[:, None], torch.zeros(1, dtype=torch.long), False),))
    monkeypatch.setattr("metatele.symmetry.find.spaces_of", lambda record: [*found.spaces, wrong])
    found = find_symmetries(model, x)
    assert [space.group for space in found.spaces] == ["scale", "perm"]
    assert found.frozen == {"2.bias": "a symmetry of it failed its check"}
    assert "failed their check and left out: scale of 2.bias" in str(found).splitlines()


def test_frozen_parameters_are_found_like_others():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    everything = kinds(find_symmetries(model, rows(5, 3)))
    model[0].requires_grad_(False)
    assert kinds(find_symmetries(model, rows(5, 3))) == everything
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("how", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_layers(how):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), how(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    before = state(model)
    found = find_symmetries(model, rows(6, 3))
    assert same(model, before)
    assert not found.dropped
    assert max(drifts(model.eval().double(), found.spaces, (rows(6, 3).double(),)), default=0.0) < 1e-9


def test_wrappers():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for outer in (torch.compile(model), nn.DataParallel(model)):
        found = find_symmetries(outer, rows(5, 3))
        assert found.spaces[0].parameters == ("0.weight", "0.bias", "2.weight")


def test_writing_into_views():
    def forward(s, x):
        h = s.a(x)
        h[:, 0] = h[:, 1] * 2
        return s.b(h)

    net = Wrap(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    found = find_symmetries(net, torch.randn(5, 3))
    assert not found.dropped
    assert max(drifts(net.double(), found.spaces, (torch.randn(5, 3).double(),)), default=0.0) < 1e-9


# --- models of transformers


def config(name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    words, pixels = torch.randint(40, (2, 6)), torch.randn(2, 3, 32, 32)
    match name:
        case "gpt2":
            made = transformers.GPT2Config(
                n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=12, bos_token_id=0, eos_token_id=0
            )
            return transformers.GPT2LMHeadModel(made), words
        case "llama":
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**small, num_key_value_heads=1, vocab_size=40)
            ), words
        case "bert":
            return transformers.BertModel(transformers.BertConfig(**small, vocab_size=40)), words
        case "vit":
            return transformers.ViTForImageClassification(
                transformers.ViTConfig(**small, image_size=32, patch_size=8)
            ), pixels
        case "convnext":
            made = transformers.ConvNextConfig(hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32)
            return transformers.ConvNextForImageClassification(made), pixels
        case "resnet":
            made = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
            return transformers.ResNetForImageClassification(made), pixels
    timm = pytest.importorskip("timm")
    return timm.create_model(name), pixels


DIMENSIONS = {
    # Each layer: GL of queries with keys and of values in two heads, shifts of both, gains, biases of norms.
    "gpt2": 2 * (2 * 64 + 2 * 64 + 16 + 16 + 2 * 16 + 2 * 16),
    # Values, pairs of RoPE, gains, products; the last gain and rotations of the stream.
    "llama": 2 * (64 + 2 * 4 + 2 * 16 + 24) + 16 + 16 * 15 // 2,
    # As GPT-2 without norms, which the outputs hold; the mean of each row of three tables.
    "bert": 2 * (2 * 64 + 2 * 64 + 16 + 16) + 40 + 512 + 2,
    # As GPT-2; the last norm; rotations that keep the mean; the mean of all that writes the stream.
    "vit": 2 * (4 * 64 + 6 * 16) + 2 * 16 + 15 * 14 // 2 + (192 + 1 + 1 + 17) + 2 * (16 + 1 + 24 + 1),
    # Gains of norms, of layers, between stages, of the last; biases into dense layers; means before norms.
    "convnext": 28 + 28 + 20 + 8 + 28 + 8 + 4 + 49,
    # Batch norms before ReLU.
    "resnet": 4 + 4 + 8 + 8,
    "resnet10t": None,
    "mobilenetv3_small_050": None,
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_models(name):
    torch.manual_seed(0)
    model, inputs = config(name)
    model.eval()
    found = find_symmetries(model, inputs)
    assert not found.unknown
    assert not found.dropped
    if DIMENSIONS[name] is not None:
        assert found.dimension == DIMENSIONS[name]
