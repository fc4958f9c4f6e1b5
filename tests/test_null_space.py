"""Moves in the null space of layers' inputs: exact on a batch, and there alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metatele
from metatele.errors import ConfigError, UnsupportedModelError
from metatele.geometry import Curvature, ModulePoint, Objective, Sharpness
from metatele.network.layer_inputs import LAYERS, Seen, held_layers, listening


class Twice(nn.Module):
    """A layer that is used twice, two layers of one weight, and an embedding whose weight a layer reads too."""

    def __init__(self):
        super().__init__()
        self.table, self.again = nn.Embedding(7, 12), nn.Linear(12, 12)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, 7)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens).mean(1)
        x = self.again(torch.tanh(self.again(x)))
        return self.head(self.second(torch.tanh(self.first(x))))


def convolutions(**named):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, **named), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.Flatten()
    )
    size = model(torch.zeros(2, 3, 6, 6)).shape[1]
    return model.append(nn.Linear(size, 5)), torch.randn(2, 3, 6, 6)


def perceptron():
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 5)), torch.randn(
        8, 20
    )


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 40, dropout=0.1, batch_first=True)
    return nn.Sequential(layer, nn.Linear(16, 3)), torch.randn(2, 4, 16)


MODELS = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "reflected": lambda: convolutions(padding=1, padding_mode="reflect", stride=2),
    "dilated": lambda: convolutions(padding="same", dilation=2),
    "used twice": lambda: (Twice(), torch.randint(7, (5, 3))),
    "transformer": transformer,
}


def made(name, seed=0):
    torch.manual_seed(seed)
    model, x = MODELS[name]()
    return model.double(), x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_on_the_batch_and_change_elsewhere(name, training):
    model, x = made(name)
    if name == "transformer":  # dropout draws other inputs each time
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        model[0].self_attn.dropout = 0.0
    model.train(training)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    report = metatele.null_space_(model, x, 0.3)
    assert report.drift <= 1e-9
    for n, b in model.named_buffers():
        assert torch.equal(b, state[n])
    names = {n for n, m in model.named_modules() if isinstance(m, LAYERS)}
    assert {n for r in report.rows for n in r.layer.split(", ")} == names
    held = {n: h for h in held_layers(model)[0] for n in [", ".join(h.layers)]}
    for row in report.rows:
        if not row.reason:
            assert row.rank < row.inputs
            h = held[row.layer]
            new = [dict(model.named_parameters())[n].detach() for n in (h.weight, h.bias) if n]
            old = [state[n] for n in (h.weight, h.bias) if n]
            gap = sum(float((a - b).square().sum()) for a, b in zip(new, old, strict=True)) ** 0.5
            size = sum(float(b.square().sum()) for b in old) ** 0.5
            assert gap == pytest.approx(0.3 * size, rel=1e-9)
            assert row.change == pytest.approx(0.3, rel=1e-9)
    moved = {n for h in held.values() if ", ".join(h.layers) in report.moved for n in (h.weight, h.bias) if n}
    assert all(torch.equal(t, state[n]) for n, t in model.named_parameters() if n not in moved)
    after = {n: t.clone() for n, t in model.state_dict().items()}
    others = torch.randn_like(x) if x.is_floating_point() else (x * 3 + 1) % 7

    def of(weights, data):
        """Outputs, and running statistics after the pass."""
        model.load_state_dict(weights)
        return [model(data).detach(), *[t.clone() for t in model.buffers()]]

    for now, was in zip(of(after, x), of(state, x), strict=True):
        torch.testing.assert_close(now, was, rtol=1e-9, atol=1e-9)
    now, was = of(after, others)[0], of(state, others)[0]
    assert (now - was).abs().max() > 1e-3 * was.abs().max()


def test_all_layers_that_can_move_do_and_others_say_why():
    model, x = made("used twice")
    report = metatele.null_space_(model, x)
    assert report.moved == ("again", "first, second")
    assert [r.samples for r in report.rows if not r.reason] == [10, 10]
    assert "that of table" in report.refused["head"]
    model, x = made("transformer")
    refused = metatele.null_space_(model, x).refused
    assert "does not call it" in refused["0.self_attn.out_proj"]
    model, _ = made("perceptron")
    report = metatele.null_space_(model, torch.randn(25, 20).double())
    assert report.refused == {
        "0": "its inputs have full rank 21 on these 25 samples",
        "4": "its inputs have full rank 17 on these 25 samples",
    }
    assert report.moved == ("2",)
    assert "full rank 21" in str(report)


def test_nothing_moves_where_no_layer_can():
    model, _ = made("perceptron")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"no layer can move .* such as 0: its inputs have full rank 21 on these 64"):
        metatele.null_space_(model, torch.randn(64, 20).double())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(ConfigError, match="no linear layer and no convolution"):
        metatele.null_space_(nn.LSTM(3, 4), torch.randn(2, 3, 3))


class Elsewhere(nn.Module):
    """A weight that the pass reads besides its layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.b(self.a(x)) + self.a.weight.square().sum()


def test_a_weight_with_another_use_is_put_back():
    torch.manual_seed(0)
    model, x = Elsewhere().double(), torch.randn(3, 9).double()
    before, weight = model(x), model.a.weight.detach().clone()
    report = metatele.null_space_(model, x)
    assert report.moved == ("b",)
    assert "other uses" in report.refused["a"]
    assert torch.equal(model.a.weight, weight)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", [None, "grad-norm", Sharpness(directions=2, displacements=(0.01,)), Curvature()])
@pytest.mark.parametrize("descend", [False, True])
def test_along_a_gradient_it_rises_or_falls_as_told(objective, descend):
    model, x = made("perceptron")
    other, y = torch.randn(40, 20).double(), torch.randint(5, (40,))

    def loss():
        return F.cross_entropy(model(other), y)

    def value():
        if objective is None:
            return loss()
        goal = metatele.geometry.objective(objective) if isinstance(objective, str) else objective
        return goal.value(ModulePoint(model, loss, metatele.find_symmetries(model, x).spaces))

    before = value()
    report = metatele.null_space_(model, x, 1e-3, loss=loss, objective=objective, descend=descend)
    assert (value() < before) == descend
    assert report.drift <= 1e-9


def test_the_step_is_the_projected_gradient():
    model, x = made("perceptron")
    other = torch.randn(40, 20).double()
    old = model[0].weight.detach().clone()
    g, b = torch.autograd.grad(model(other).square().mean(), (model[0].weight, model[0].bias))
    H = torch.cat([x, torch.ones(8, 1)], 1).T
    wanted = (torch.cat([g, b[:, None]], 1) @ (torch.eye(21) - H @ torch.linalg.pinv(H)))[:, :20]
    metatele.null_space_(model, x, loss=lambda: model(other).square().mean(), layers=["0"])
    step = model[0].weight.detach() - old
    torch.testing.assert_close(step / step.norm(), wanted / wanted.norm(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_on_the_batch_itself_has_no_direction(dtype):
    model, x = made("perceptron")
    model, x = model.to(dtype), x.to(dtype)
    with pytest.raises(ConfigError, match="no part in the null space"):
        metatele.null_space_(model, x, loss=lambda: model(x).square().mean())


def test_single_precision_drifts_by_rounding():
    model, x = made("perceptron")
    report = metatele.null_space_(model.float(), x.float())
    assert 0 < report.drift < 1e-5
    assert len(report.moved) == 3


def test_parts_of_a_pass_give_the_span_of_the_whole():
    torch.manual_seed(0)
    x = torch.randn(4, 30, dtype=torch.float64) @ torch.randn(30, 30, dtype=torch.float64)
    layer = nn.Linear(30, 2).double()
    seen = Seen(1, with_ones=False)
    for rows in (x, x[:2] + x[1:3], x * 2, torch.zeros(50, 30).double()):
        seen.add(layer, rows)
    (basis,) = seen.span(1e-10)
    assert (basis.shape, seen.columns) == ((30, 4), 60)
    torch.testing.assert_close(basis @ basis.mT @ x.mT, x.mT)


@pytest.mark.parametrize("name", ["convolutions", "reflected", "dilated"])
def test_patches_are_what_a_convolution_multiplies(name):
    model, x = made(name)
    held, _ = held_layers(model)
    kept = {}
    with listening(model, held) as seen:
        for m in model:
            if isinstance(m, nn.Conv2d):
                kept[m] = x
            x = m(x)
    for h in held:
        layer = model[int(h.layers[0])]
        if layer in kept:  # the pre-activations lie where the patches span them
            out = layer(kept[layer]).unflatten(1, (layer.groups, -1))
            columns = out.transpose(1, 2).transpose(0, 2).flatten(2)  # [groups, o, n]
            assert seen[h.weight].columns == columns.shape[2]
            weights = [t.unflatten(0, (layer.groups, -1)) for t in (layer.weight, layer.bias)]
            for factor, part, w, b in zip(seen[h.weight].factor, columns, *weights, strict=True):
                rows = torch.cat([w.flatten(1), b[:, None]], 1)
                torch.testing.assert_close(rows @ factor.mT @ factor @ rows.mT, part @ part.mT)


class Own(Objective):
    def value(self, point):
        return torch.zeros(())

    def value_and_gradient(self, point):
        return torch.zeros(()), torch.zeros(1)


def test_bad_input_gets_a_sentence():
    model, x = made("perceptron")
    for bad, words in (
        ({"size": 0.0}, "size must be"),
        ({"size": float("nan")}, "size must be"),
        ({"loss": 3.0}, "loss must be a function"),
        ({"descend": True}, "random move has no direction"),
        ({"objective": "grad-norm"}, "is of a loss"),
        ({"objective": "flatness"}, "objective must be one of"),
        ({"objective": Own(), "loss": lambda: model(x).sum()}, "grad-norm, sharpness or curvature"),
        ({"layers": ["5"]}, "no linear layer and no convolution '5'"),
        ({"loss": lambda: model(x).sum() * float("nan")}, "not finite"),
    ):
        with pytest.raises(ConfigError, match=words):
            metatele.null_space_(model, x, **bad)
    model[0].weight.requires_grad_(False)
    assert metatele.null_space_(model, x).refused["0"] == "its weight asks for no gradient"
    model[0].weight.requires_grad_(True)
    nn.utils.parametrizations.spectral_norm(model[0])
    assert "computed from other" in metatele.null_space_(model.eval(), x).refused["0"]


def test_zero_weights_stay_where_a_move_is_random():
    model, x = made("perceptron")
    for p in model[4].parameters():
        nn.init.zeros_(p)
    assert "weights are zero" in metatele.null_space_(model, x).refused["4"]


def test_several_processes_are_refused(tmp_path, monkeypatch):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model, x = made("perceptron")
        assert metatele.null_space_(model, x).moved  # one process is none
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(UnsupportedModelError, match="several processes"):
            metatele.null_space_(model, x)
    finally:
        torch.distributed.destroy_process_group()
