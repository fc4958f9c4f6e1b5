"""A module at a random and at the canonical point of its orbit, and an optimizer's memories along the way."""

import copy

import pytest
import torch
from balance_cases import CASES, GPT, TOKENS, cnn, images, made
from torch import nn

import metatele
from metatele.errors import ConfigError, NotExactError
from metatele.network.spaces import Place, Space
from metatele.symmetry.canonical import canonical_, helmert
from metatele.symmetry.find import Symmetries, find_symmetries


@torch.no_grad()
def apart(a, b):
    """The largest relative difference of a parameter; where it is zero, of its largest entry from zero."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).norm() / p.norm() if p.norm() > 1e-9 else q.norm()) for p, q in pairs)


def gradients(model, x):
    y = model(x)
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    model.zero_grad()
    (y * along).sum().backward()


@torch.no_grad()
def outputs(model, x):
    return model(x)


# --- the canonical point


@pytest.mark.parametrize("name", CASES)
def test_every_point_of_an_orbit_leads_to_one(name):
    model, x = made(name)
    before, one = outputs(model, x), copy.deepcopy(model)
    report = metatele.balance_(one, x)
    assert report.unique, report
    torch.testing.assert_close(outputs(one, x), before, rtol=1e-9, atol=1e-9)
    for seed in (1, 2):
        other = copy.deepcopy(model)
        moved = metatele.randomize_(other, x, seed=seed)
        assert min(row.change for row in moved.rows if row.group != "perm") > 0.1
        torch.testing.assert_close(outputs(other, x), before, rtol=1e-8, atol=1e-8)
        metatele.balance_(other, x)
        assert apart(one, other) < 1e-6


@pytest.mark.parametrize("name", ["mlp", "gpt", "llama"])
def test_the_canonical_point_stays(name):
    model, x = made(name)
    metatele.balance_(model, x)
    again = copy.deepcopy(model)
    metatele.balance_(again, x)
    assert apart(model, again) < 1e-9


def test_single_precision_comes_to_one_point_as_well():
    torch.manual_seed(0)
    model = GPT()
    other = copy.deepcopy(model)
    moved = metatele.randomize_(other, TOKENS)
    report = metatele.balance_(model, TOKENS)
    metatele.balance_(other, TOKENS)
    assert moved.drift < 1e-5
    assert report.drift < 1e-5
    assert apart(model, other) < 1e-3


def test_writers_and_readers_have_one_gram_matrix():
    model, x = made("attention")
    metatele.balance_(model, x)
    weight, bias = model.attention.in_proj_weight.detach(), model.attention.in_proj_bias.detach()
    q, k, v = torch.cat([weight, bias[:, None]], 1).split(8)
    for head in (slice(0, 4), slice(4, 8)):
        for left, right in ((q[head], k[head]), (v[head], model.attention.out_proj.weight.detach()[:, head].T)):
            A, B = left @ left.T, right @ right.T
            torch.testing.assert_close(A, B, atol=1e-9, rtol=0)
            torch.testing.assert_close(A, A.diagonal().diag(), atol=1e-9, rtol=0)
            assert (A.diagonal().diff() < 0).all()
    assert not bias[8:].any()  # of keys, which softmax does not see, and of values, which the last bias takes up


def test_no_other_point_is_as_small():
    model, x = made("mlp")
    metatele.balance_(model, x)
    metatele.randomize_(model, x, groups=("shift",), seed=1)
    size = sum(float(p.detach().square().sum()) for p in model.parameters())
    metatele.balance_(model, x)
    least = sum(float(p.detach().square().sum()) for p in model.parameters() if p.ndim == 2)
    for seed in range(5):
        other = copy.deepcopy(model)
        metatele.randomize_(other, x, condition=1.5, seed=seed, groups=("GL", "scale"))
        assert sum(float(p.detach().square().sum()) for p in other.parameters()) > least
    assert size > least


def test_gains_of_a_stream_are_one_and_its_gram_matrix_is_diagonal():
    model, x = made("llama")
    signs = [n.weight.detach().sign().sort().values for n in (model.n1, model.n2, model.last)]
    metatele.balance_(model, x)
    for norm, sign in zip((model.n1, model.n2, model.last), signs, strict=True):
        torch.testing.assert_close(norm.weight.detach().sort().values, sign)
    G = model.embed.weight.T @ model.embed.weight + model.o.weight @ model.o.weight.T
    G = G + model.down.weight @ model.down.weight.T
    for norm, readers in ((model.n1, "qkv"), (model.n2, ("gate", "up")), (model.last, ("head",))):
        for reader in readers:
            R = getattr(model, reader).weight * norm.weight
            G = G + R.T @ R
    torch.testing.assert_close(G, G.diagonal().diag(), atol=1e-8, rtol=0)


def test_what_cannot_be_unique_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 6)).double()
    x = images(5, 3)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[2].weight[:, 1] = model[2].weight[:, 0]  # a copy
        model[2].weight[:, 2] = 0  # read by nothing
        model[3].weight[:, 1] = 2 * model[3].weight[:, 0]
    before = outputs(model, x)
    report = metatele.balance_(model, x)
    notes = {row.group: row.note for row in report.rows}
    assert not report.unique
    assert notes["perm"] == "1 units are as large as another"
    assert notes["scale"] == "1 units are not both written and read"
    assert "rank" in notes["GL"]
    assert "left as it was" in str(report)
    torch.testing.assert_close(outputs(model, x), before)


def test_weights_that_a_space_both_reads_and_writes_settle():
    index = torch.arange(9).view(3, 3)
    places = (Place("W", index[:, :1], index[0], False), Place("W", index[:1].T, index[:, 0], True))
    weights = {"W": images(3, 3)}
    course = canonical_([Space("scale", 3, places)], weights, 500, 1e-10, 1e-14)
    W = weights["W"].square()
    assert course.sweeps < 500
    torch.testing.assert_close(W.sum(0), W.sum(1), rtol=1e-8, atol=0)


def test_deep_networks_settle_soon():
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(8, 3)).double()
    x = images(4, 8)
    other = copy.deepcopy(model)
    report = metatele.balance_(model, x)
    assert report.settled
    assert report.sweeps < 120  # exact steps alone take more than 250
    metatele.randomize_(other, x)
    metatele.balance_(other, x)
    assert apart(model, other) < 1e-8


class Ring(nn.Module):
    """A recurrent ReLU layer with a skip around it, and units that nothing reads."""

    def __init__(self):
        super().__init__()
        self.into, self.again, self.out = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.far = nn.Linear(7, 6)
        with torch.no_grad():
            self.far.weight[2], self.far.bias[2] = 0, 0
        self.end = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        h = torch.relu(self.into(x))
        h = torch.relu(self.again(h))
        return self.out(h) + self.end(torch.relu(self.far(h)))


@pytest.mark.parametrize("name", ["deep", "ring", "convolutions"])
def test_scales_solved_together_come_to_where_sweeps_do(name, monkeypatch):
    torch.manual_seed(0)
    deep = [layer for _ in range(20) for layer in (nn.Linear(6, 6), nn.ReLU())]
    pictures = (nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    model = {"deep": nn.Sequential(*deep), "ring": Ring(), "convolutions": nn.Sequential(*pictures)}[name].double()
    x = torch.randn(*((4, 2, 4, 4) if name == "convolutions" else (4, 6 if name == "deep" else 5))).double()
    metatele.randomize_(model, x, 1e4, groups=("scale",))
    swept = copy.deepcopy(model)
    report = metatele.balance_(model, x, groups=("scale",))
    assert report.settled
    assert report.sweeps <= 6
    assert report.drift < 1e-10
    monkeypatch.setattr("metatele.symmetry.canonical.least_scales", lambda *_: None)
    slow = metatele.balance_(swept, x, groups=("scale",))
    assert slow.settled
    assert slow.sweeps > report.sweeps
    assert apart(model, swept) < 1e-9
    assert [row.note for row in report.rows] == [row.note for row in slow.rows]


def test_helmert_is_a_basis_of_what_has_no_mean():
    H = helmert(7)
    torch.testing.assert_close(H.T @ H, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(H.sum(0), torch.zeros(6, dtype=torch.float64), atol=1e-14, rtol=0)


# --- norms


@pytest.mark.parametrize("name", ["encoder", "gpt", "llama"])
def test_gains_fold_into_their_readers(name):
    model, x = made(name)
    before = outputs(model, x)
    report = metatele.fold_norms_(model, x)
    torch.testing.assert_close(outputs(model, x), before, rtol=1e-9, atol=1e-9)
    folded = [key for row in report.rows for key in row.parameters if key.split(".")[-2][0] in "nl"]
    gains = [p for key, p in model.named_parameters() if key in folded and key.endswith("weight") and p.ndim == 1]
    assert len(gains) == {"encoder": 2, "gpt": 4, "llama": 3}[name]
    for gain in gains:
        torch.testing.assert_close(gain.detach(), torch.ones_like(gain))


def test_a_gain_before_relu_keeps_its_sign():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([2.0, -3.0, 0.5, 1.0]))
    x = images(5, 3)
    before = outputs(model, x)
    metatele.fold_norms_(model, x)
    torch.testing.assert_close(outputs(model, x), before)
    torch.testing.assert_close(model[1].weight.detach(), torch.tensor([1.0, -1.0, 1.0, 1.0]).double())


# --- memories


@pytest.mark.parametrize("move", [metatele.randomize_, metatele.balance_, metatele.fold_norms_])
@pytest.mark.parametrize("name", CASES)
def test_gradients_follow_a_move(name, move):
    model, x = made(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    gradients(model, x)
    optimizer.step()
    metatele.carry_along_(optimizer, model, move(model, x))
    gradients(model, x)
    scale = max(float(p.grad.norm()) for p in model.parameters())
    for key, p in model.named_parameters():
        if key == "last.weight" and name == "gpt":
            continue  # rotations hold only while this gain is even, so that its gradient is of its own
        carried = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(carried, p.grad, rtol=1e-7, atol=1e-9 * scale, msg=key)


@pytest.mark.parametrize("name", ["mlp", "cnn", "llama"])
def test_second_moments_follow_scales_and_orders_exactly(name):
    model, x = made(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.5, 0.5))
    gradients(model, x)
    optimizer.step()
    metatele.carry_along_(optimizer, model, metatele.randomize_(model, x, groups=("scale", "perm")))
    gradients(model, x)
    for p in model.parameters():
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], p.grad.square() / 2)


def test_second_moments_of_what_mixes_are_the_squares_of_the_dual():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)).double()
    x = images(5, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    gradients(model, x)
    optimizer.step()
    v, w = (optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters())
    report = metatele.randomize_(model, x, groups=("GL",), condition=3.0)
    ((_, element),) = report.path
    metatele.carry_along_(optimizer, model, report)
    M = element.value
    torch.testing.assert_close(optimizer.state[model[0].weight]["exp_avg_sq"], torch.linalg.inv(M).T.square() @ v)
    torch.testing.assert_close(optimizer.state[model[1].weight]["exp_avg_sq"], w @ M.square().T)


def test_adams_steps_stay_bounded():
    model, x = made("gpt")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    gradients(model, x)
    optimizer.step()

    def largest():
        entries = [optimizer.state[p] for p in model.parameters()]
        return max(float((e["exp_avg"].abs() / (e["exp_avg_sq"].sqrt() + 1e-30)).max()) for e in entries)

    before = largest()
    metatele.carry_along_(optimizer, model, metatele.balance_(model, x))
    assert largest() <= before * (1 + 1e-9)


def test_memories_may_be_kept_or_reset():
    model, x = made("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    gradients(model, x)
    optimizer.step()
    report = metatele.randomize_(model, x)
    kept = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    metatele.carry_along_(optimizer, model, report, state="keep")
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], k) for p, k in zip(model.parameters(), kept, strict=True)
    )
    with pytest.raises(ConfigError, match="another model"):
        metatele.carry_along_(optimizer, nn.Linear(2, 2), report)
    with pytest.raises(ConfigError, match="keep, reset, transport"):
        metatele.carry_along_(optimizer, model, report, state="lose")
    metatele.carry_along_(optimizer, model, report, state="reset")
    assert not optimizer.state


# --- what is refused


def test_symmetries_that_do_not_hold_move_nothing():
    model, x = made("mlp")
    found = find_symmetries(model, x)
    wrong = Space("scale", 6, (Place("2.weight", torch.arange(6)[:, None] * 7, torch.arange(7), False),))
    before = copy.deepcopy(model)
    with pytest.raises(NotExactError, match="nothing was moved"):
        metatele.randomize_(model, x, found=Symmetries((*found.spaces, wrong), {}))
    assert apart(before, model) == 0


def test_bad_input_is_refused_in_a_sentence():
    model, x = made("mlp")
    with pytest.raises(ConfigError, match="at least 1"):
        metatele.randomize_(model, x, condition=0.5)
    with pytest.raises(ConfigError, match="no group 'SO'"):
        metatele.balance_(model, x, groups=("SO",))
    with pytest.raises(ConfigError, match="another model"):
        metatele.balance_(nn.Sequential(nn.Linear(5, 2)).double(), x, found=find_symmetries(model, x))
    with pytest.raises(ConfigError, match="asks for a gradient"):
        metatele.balance_(model.requires_grad_(False), x)


@pytest.mark.parametrize("move", [metatele.randomize_, metatele.balance_, metatele.fold_norms_])
def test_inputs_of_another_dtype_are_refused_in_a_sentence(move):
    model, x = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.randn(3, 5)
    before = copy.deepcopy(model)
    with pytest.raises(
        ConfigError, match=r"inputs are torch\.float32, parameters torch\.float64 \(RuntimeError"
    ) as error:
        move(model, x)
    assert "\n" not in str(error.value)
    assert apart(before, model) == 0
    assert move(model, x.double()).rows


def test_a_model_without_a_symmetry_that_may_move_has_a_report_without_rows():
    model, x = nn.Sequential(nn.Linear(5, 2), nn.Tanh()).double(), torch.randn(3, 5).double()
    for report in (metatele.randomize_(model, x), metatele.balance_(model, x), metatele.fold_norms_(model, x)):
        assert report.rows == ()
        assert str(report) == "no symmetry was found along which this model can move"


def test_a_move_is_carried_into_an_optimizer_once():
    model, x = made("mlp")
    one, other = (torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9) for _ in range(2))
    for optimizer in (one, other):
        gradients(model, x)
        optimizer.step()
    report = metatele.randomize_(model, x)
    metatele.carry_along_(one, model, report)
    kept = [one.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match="carry each move once"):
        metatele.carry_along_(one, model, report)
    assert all(torch.equal(one.state[p]["momentum_buffer"], k) for p, k in zip(model.parameters(), kept, strict=True))
    metatele.carry_along_(other, model, report)
    metatele.carry_along_(one, model, metatele.randomize_(model, x, seed=1))


def test_frozen_parameters_stay_and_what_depends_on_them():
    model, x = made("mlp")
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    report = metatele.randomize_(model, x)
    assert report.rows
    assert not any("0.weight" in row.parameters for row in report.rows)
    assert torch.equal(model[0].weight, before[0].weight)


def test_buffers_and_modes_stay():
    torch.manual_seed(0)
    model = cnn().double().train()
    x = images(2, 3, 8, 8)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    metatele.balance_(model, x)
    assert model.training
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_one_seed_is_one_point():
    ends = []
    for seed in (1, 1, 2):
        model, x = made("mlp")
        metatele.randomize_(model, x, seed=seed)
        ends.append(model)
    assert apart(ends[0], ends[1]) == 0
    assert apart(ends[0], ends[2]) > 0.1
