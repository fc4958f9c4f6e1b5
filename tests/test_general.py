"""The general family under a user's hands: any module, any loop, nothing to choose."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from cases import small_optimizer
from general_cases import MODELS, Language, batch, flat, loss_of, make, optimizer_of, run
from torch import nn
from torch.nn import functional

import metatele
from metatele.config import EquivariantConfig, GeneralConfig
from metatele.config.general import SENSES
from metatele.errors import ConfigError, MetateleError, UnsupportedModelError
from metatele.learned import EquivariantOptimizer
from metatele.learned.general.controller import SEEN, Controller, Sight

# --- any module


@pytest.mark.parametrize("name", MODELS)
def test_every_module_learns_and_all_of_it_moves(name):
    model = make(name)
    before = {key: p.clone() for key, p in model.named_parameters()}
    optimizer = optimizer_of(model)
    losses = run(name, model, optimizer, [step % 4 for step in range(60)])
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    for key, p in model.named_parameters():
        assert not torch.equal(p, before[key]), key


def permuted(name, model):
    """The same function with hidden units in another order, and how its parameters are put back."""
    other, order = copy.deepcopy(model), torch.tensor([2, 0, 3, 1, 7, 6, 4, 5])
    with torch.no_grad():
        if name == "perceptron":
            for p in (other[0].weight, other[0].bias):
                p.copy_(p[order])
            other[2].weight.copy_(other[2].weight[:, order])
        else:  # channels 0 and 1, 2 and 3 change places: those of a group stay together
            order = torch.tensor([1, 0, 3, 2])
            for p in (other[0].weight, other[0].bias, other[1].weight, other[1].bias):
                p.copy_(p[order])
            other[3].weight.copy_(other[3].weight[:, [1, 0]])
    return other


@pytest.mark.parametrize("name", ["perceptron", "convolutional"])
def test_steps_do_not_depend_on_the_order_of_hidden_units(name):
    model = make(name, dtype=torch.float64)
    other = permuted(name, model)
    one, two = optimizer_of(model), optimizer_of(other)
    one.meta.double(), two.meta.double()
    one.stepper.loaded({}, {}), two.stepper.loaded({}, {})
    steps = range(24)
    run(name, model, one, steps, dtype=torch.float64), run(name, other, two, steps, dtype=torch.float64)
    torch.testing.assert_close(flat(permuted(name, model)), flat(other), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["perceptron", "convolutional", "language", "recurrent"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_steps_do_not_depend_on_the_unit_of_the_loss(name, scale):
    one, two = make(name), make(name)
    steps = range(14)
    run(name, one, optimizer_of(one), steps), run(name, two, optimizer_of(two), steps, scale=scale)
    torch.testing.assert_close(flat(one), flat(two), rtol=2e-3, atol=2e-4)


def test_layers_that_are_not_seen_are_stepped_by_moments_of_their_gradients():
    model = make("recurrent")
    optimizer = optimizer_of(model)
    run("recurrent", model, optimizer, range(3))
    how = {row.name: row.how for row in optimizer.describe().rows}
    assert how["lstm.weight_ih_l0[i]"] == "by moments of its gradient"
    assert how["up.weight"] == "by moments of its gradient"
    assert how["last.weight"] == "linear: inputs seen"


def test_channels_last_and_complex_parameters_are_stepped():
    model, same = make("convolutional"), make("convolutional")
    model.to(memory_format=torch.channels_last)
    steps = range(12)
    one = run("convolutional", model, optimizer_of(model), steps)
    assert one == pytest.approx(run("convolutional", same, optimizer_of(same), steps), rel=1e-4)

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase, self.last = nn.Parameter(torch.ones(6, dtype=torch.complex64)), nn.Linear(6, 4)

        def forward(self, x):
            return self.last((x * self.phase * (1 + 1j)).real)

    model = Turned()
    optimizer = optimizer_of(model)
    run("skips", model, optimizer, range(12))
    assert (model.phase.imag != 0).all()
    other = copy.deepcopy(model)
    fresh = optimizer_of(other)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert run("skips", model, optimizer, range(12, 24)) == run("skips", other, fresh, range(12, 24))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_of_another_precision_are_stepped(dtype):
    model = make("skips", dtype=dtype)
    losses = run("skips", model, optimizer_of(model), [s % 4 for s in range(40)], dtype=dtype)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert flat(model).dtype == dtype


def test_what_cannot_be_stepped_is_refused_in_a_sentence():
    with pytest.raises(UnsupportedModelError, match="has no size yet"):
        optimizer_of(nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)))
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    optimizer = optimizer_of(model)
    model(torch.tensor([[0, 1]])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    model = make("skips")
    optimizer = optimizer_of(model)
    model.last = nn.Linear(8, 4)
    loss_of("skips", model, 0).backward()
    with pytest.raises(MetateleError, match="replaced after the optimizer was made"):
        optimizer.step()
    with pytest.raises(ConfigError, match="has no setting 'betas'"):
        optimizer_of(nn.Linear(2, 2), params=[{"params": [], "betas": 1}])


# --- any loop


def test_closures_give_the_loss():
    model = make("skips")
    optimizer = optimizer_of(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of("skips", model, 0)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(optimizer.stepper.course.start_loss) == pytest.approx(math.log(loss.item()), abs=1e-5)


def test_negative_losses_are_no_reason_to_go_back():
    model = make("skips")
    optimizer = optimizer_of(model)
    for step in range(30):
        optimizer.zero_grad()
        loss = loss_of("skips", model, step)
        loss.backward()
        with torch.no_grad():
            shifted = loss - (5 if step % 2 else 0)
        optimizer.step(lambda shifted=shifted: shifted)
    assert optimizer.param_groups[0]["rolled_back"] == 0


@pytest.mark.parametrize("name", ["skips", "language"])
def test_gradients_set_by_hand_and_layers_called_on_their_own_are_enough(name):
    model = make(name)
    twin = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    losses = []
    for step in range(24):
        twin.load_state_dict(model.state_dict())
        loss = loss_of(name, twin, step % 2)
        losses.append(loss.item())
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True):
            p.grad = g
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model, losses = make("skips"), []
    optimizer = optimizer_of(model)
    x, labels = batch("skips", 0)
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model.last(model.norm(torch.tanh(model.first(x)))), labels)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert "called on their own" in str(optimizer.describe())


@pytest.mark.parametrize("how", ["lr", "gradients", "frozen"])
def test_what_does_not_move_keeps_its_momentum(how):
    model = make("skips")
    optimizer = optimizer_of(model, params=[{"params": model.inner.parameters()}, {"params": model.last.parameters()}])
    run("skips", model, optimizer, range(6))
    before = flat(model.inner)
    momentum = optimizer.state[model.inner.weight]["momentum"].clone()
    if how == "lr":
        optimizer.param_groups[0]["lr"] = 0.0
    for step in range(6, 20):
        optimizer.zero_grad()
        model.inner.requires_grad_(how != "frozen")
        loss_of("skips", model, step).backward()
        if how == "gradients":
            model.inner.weight.grad = model.inner.bias.grad = None
        optimizer.step()
    assert torch.equal(flat(model.inner), before)
    torch.testing.assert_close(optimizer.state[model.inner.weight]["momentum"], momentum)
    optimizer.param_groups[0]["lr"] = 1.0
    model.inner.requires_grad_()
    run("skips", model, optimizer, range(20, 24))
    assert not torch.equal(flat(model.inner), before)


def test_layers_frozen_from_the_start_are_freed_in_mid_run():
    model = make("skips")
    model.first.requires_grad_(False)
    before = flat(model.first)
    optimizer = optimizer_of(model)
    run("skips", model, optimizer, range(12))
    assert torch.equal(flat(model.first), before)
    assert next(row.how for row in optimizer.describe().rows if row.name == "first.weight") == "frozen"
    model.first.requires_grad_()
    run("skips", model, optimizer, range(12, 34))
    assert not torch.equal(flat(model.first), before)
    assert next(row.how for row in optimizer.describe().rows if row.name == "first.weight") == "linear: inputs seen"


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_bias_moves_without_its_weight_and_a_weight_without_its_bias(which):
    model = make("skips")
    optimizer = optimizer_of(model)
    still, other = (model.inner.weight, model.inner.bias)[:: 1 if which == "weight" else -1]
    still.requires_grad_(False)
    before, moving = still.clone(), other.clone()
    run("skips", model, optimizer, range(12))
    assert torch.equal(still, before)
    assert not torch.equal(other, moving)


def test_groups_are_added_in_mid_run_and_have_their_own_rates():
    model = make("skips")
    optimizer = optimizer_of(model, params=model.inner.parameters())
    run("skips", model, optimizer, range(6))
    optimizer.add_param_group({"params": model.last.parameters(), "lr": 0.5})
    before = flat(model.last)
    run("skips", model, optimizer, range(6, 12))
    assert not torch.equal(flat(model.last), before)
    changes = []
    for rate in (1.0, 0.25):
        model = make("skips")
        rest = [p for p in model.parameters() if p is not model.inner.bias]
        optimizer = optimizer_of(model, params=[{"params": rest}, {"params": [model.inner.bias], "lr": rate}])
        before = [p.clone() for p in model.parameters()]
        run("skips", model, optimizer, range(1))
        changes.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    for p, whole, part in zip(model.parameters(), *changes, strict=True):
        torch.testing.assert_close(part, (0.25 if p is model.inner.bias else 1.0) * whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_no_rate_changes_nothing(lr):
    model = make("convolutional")
    optimizer, before = optimizer_of(model, lr=lr, weight_decay=0.1), flat(model)
    run("convolutional", model, optimizer, range(3))
    assert torch.equal(flat(model), before)
    assert set(optimizer.state) == set(model.parameters())


def test_rates_may_be_tensors_and_are_factors():
    found = []
    for lr in (1.0, 0.5, torch.tensor(0.5)):
        model = make("skips")
        before = flat(model)
        run("skips", model, optimizer_of(model, lr=lr), range(1))
        found.append(flat(model) - before)
    torch.testing.assert_close(found[1], 0.5 * found[0], rtol=1e-3, atol=1e-6)
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("kind", ["cosine", "one cycle", "warm-up"])
def test_schedulers_work(kind):
    model = make("skips")
    optimizer = optimizer_of(model)
    schedules = torch.optim.lr_scheduler
    scheduler = {
        "cosine": lambda: schedules.CosineAnnealingLR(optimizer, 20),
        "one cycle": lambda: schedules.OneCycleLR(optimizer, 1.0, total_steps=20),
        "warm-up": lambda: schedules.LinearLR(optimizer, 0.1, 1.0, 20),
    }[kind]()
    for step in range(20):
        before = flat(model)
        run("skips", model, optimizer, [step])
        if step < 19:
            scheduler.step()
    moved = (flat(model) - before).norm() / before.norm()
    assert torch.isfinite(moved)
    assert moved < 1e-3 if kind != "warm-up" else moved > 1e-3


def test_weight_decay_is_decoupled():
    found = []
    for decay in (0.0, 0.01):
        model = make("skips")
        before = flat(model)
        run("skips", model, optimizer_of(model, weight_decay=decay, lr=0.5), range(1))
        found.append(flat(model) - before)
    torch.testing.assert_close(found[1], found[0] - 0.005 * before, rtol=0.02, atol=3e-4)


@pytest.mark.parametrize("name", ["skips", "convolutional"])
def test_maximizing_minus_the_loss_is_minimizing_it(name):
    one, two = make(name), make(name)
    first, second = optimizer_of(one), optimizer_of(two, maximize=True)
    run(name, one, first, range(14)), run(name, two, second, range(14), scale=-1.0)
    torch.testing.assert_close(flat(one), flat(two), rtol=1e-4, atol=1e-5)


def test_runs_of_known_length_cool_down():
    for name in ("skips", "perceptron"):
        moved = []
        for total in (None, 40):
            model = make(name)
            optimizer = optimizer_of(model, total_steps=total)
            run(name, model, optimizer, range(39))
            before = flat(model)
            run(name, model, optimizer, [39])
            moved.append(float((flat(model) - before).norm()))
        assert moved[1] < 0.2 * moved[0]
    with pytest.raises(ConfigError, match="total_steps is of the general family"):
        metatele.LearnedOptimizer(make("perceptron"), EquivariantOptimizer(EquivariantConfig()), total_steps=5)
    for wrong in (0, True, 2.5):
        with pytest.raises(ValueError, match="total_steps must be a whole number above zero"):
            optimizer_of(make("perceptron"), total_steps=wrong)


def test_scaled_and_clipped_gradients_are_steps_as_others():
    one, two = make("skips"), make("skips")
    first, second = optimizer_of(one), optimizer_of(two)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(12):
        run("skips", one, first, [step])
        second.zero_grad()
        scaler.scale(loss_of("skips", two, step)).backward()
        scaler.unscale_(second)
        nn.utils.clip_grad_norm_(two.parameters(), 1e9)
        scaler.step(second)
        scaler.update()
    torch.testing.assert_close(flat(one), flat(two), rtol=1e-4, atol=1e-5)
    for step in range(12, 24):
        second.zero_grad()
        loss_of("skips", two, step).backward()
        nn.utils.clip_grad_norm_(two.parameters(), 0.01)
        second.step()
    assert torch.isfinite(flat(two)).all()


@pytest.mark.parametrize("name", ["perceptron", "language"])
@pytest.mark.parametrize("steps", [range(24), [-1] * 24])
def test_gradients_may_be_zeroed_before_and_after_the_forward_pass_or_after_the_step(name, steps):
    found = []
    for when in ("before", "between", "after", "by the model"):
        model = make(name)
        optimizer = optimizer_of(model)
        for step in steps:
            if when == "before":
                optimizer.zero_grad()
            loss = loss_of(name, model, step, squared=True)
            if when == "between":
                optimizer.zero_grad()
            if when == "by the model":
                model.zero_grad()
            loss.backward()
            optimizer.step()
            if when == "after":
                optimizer.zero_grad()
        rows = optimizer.describe().rows
        assert [row.name for row in rows if "by moments" in row.how] == ["places"] * (name == "language")
        found.append(flat(model))
    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_accumulated_batches_are_one():
    one, two = make("skips"), make("skips")
    first, second = optimizer_of(one), optimizer_of(two)
    for step in range(12):
        run("skips", one, first, [step])
        second.zero_grad()
        x, labels = batch("skips", step)
        for half in (slice(0, 6), slice(6, 12)):
            (functional.cross_entropy(two(x[half]), labels[half]) / 2).backward()
        second.step()
    assert first.stepper.course.columns == second.stepper.course.columns
    moments = [optimizer.stepper.course.moments[0].tensor for optimizer in (first, second)]
    torch.testing.assert_close(*moments, rtol=1e-3, atol=1e-3)


def test_autocast_is_left_outside():
    model = make("language")
    optimizer = optimizer_of(model)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of("language", model, step % 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.stepper.course.velocity.dtype == torch.float32


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("name", ["skips", "perceptron"])
@pytest.mark.parametrize("what", ["gradient", "loss", "input", "infinite"])
def test_what_is_not_finite_makes_no_step_and_is_counted(name, repeated, what):
    model = make(name)
    optimizer = optimizer_of(model)
    run(name, model, optimizer, [-1] * 14 if repeated else range(14), True)
    assert optimizer.stepper.repeating == repeated
    before, rate = flat(model), optimizer.stepper.course.log_rate
    for _ in range(2):
        optimizer.zero_grad()
        x, labels = batch(name, -1)
        loss = functional.cross_entropy(model(x * math.nan if what == "input" else x), labels)
        loss.backward()
        if what in ("gradient", "infinite"):
            next(iter(model.parameters())).grad[0, 0] = math.nan if what == "gradient" else math.inf
        optimizer.step((lambda: torch.tensor(math.nan)) if what == "loss" else None)
    assert torch.equal(flat(model), before)
    assert optimizer.param_groups[0]["skipped"] == 2
    assert optimizer.stepper.course.log_rate == rate
    losses = run(name, model, optimizer, [-1] * 14 if repeated else range(14, 28), True)
    assert torch.isfinite(torch.tensor(losses)).all()
    for entry in optimizer.state.values():
        assert all(torch.isfinite(t).all() for t in entry.values())


def test_many_steps_that_are_skipped_are_said():
    model = make("skips")
    optimizer = optimizer_of(model)
    with pytest.warns(UserWarning, match="were not finite"):
        run("skips", model, optimizer, range(12), scale=math.nan)


def test_weights_that_left_their_range_come_back():
    model = make("skips")
    optimizer = optimizer_of(model)
    run("skips", model, optimizer, range(12))
    with torch.no_grad():
        model.inner.weight.fill_(math.inf)
    losses = run("skips", model, optimizer, range(12, 24))
    assert math.isfinite(losses[-1])
    assert optimizer.param_groups[0]["rolled_back"] == 1


def test_empty_batches_and_batches_of_one_leave_it_sound():
    model = make("skips")
    optimizer = optimizer_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(16):
            optimizer.zero_grad()
            loss_of("skips", model, step, samples=0 if step % 4 == 2 else 1).backward()
            optimizer.step()
            optimizer.zero_grad()
            x, labels = batch("skips", step, 0 if step % 4 == 1 else 2)
            functional.cross_entropy(model(x), labels, reduction="sum").backward()
            optimizer.step()
    assert torch.isfinite(flat(model)).all()
    assert optimizer.param_groups[0]["skipped"] == 0  # gradients of nothing are zero


WAYS = [
    ("convolutional", "model"),
    ("language", "model"),
    *(("skips", way) for way in ("in place", "loss", "step", "all")),
]


@pytest.mark.parametrize(("name", "what"), WAYS)
def test_what_is_compiled_is_learned_on_as_what_is_not(name, what):
    def trained(how):
        model = make(name)
        optimizer = optimizer_of(model)
        called = torch.compile(model, backend="aot_eager") if how == "model" else model
        if how == "in place":
            model.compile(backend="aot_eager")

        def loss(x, labels):
            return torch.nn.functional.cross_entropy(called(x), labels)

        def step(x, labels):
            optimizer.zero_grad()
            value = loss(x, labels)
            value.backward()
            optimizer.step()
            return value

        loss = torch.compile(loss, backend="aot_eager") if how == "loss" else loss
        step = torch.compile(step, backend="aot_eager") if how == "all" else step
        if how == "step":
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        for number in range(12):
            step(*batch(name, number))
        buffers = [b.clone() for b in model.buffers()]
        seen = {row.how for row in optimizer.describe().rows}
        return [p.detach().clone() for p in model.parameters()] + buffers, seen

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo does not know")  # what its tracer meets in our hooks
        (mine, seen), (expected, seen_plain) = trained(what), trained("plain")
    assert seen == seen_plain
    for p, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def test_a_compiled_pass_that_cannot_be_made_again_is_stepped_by_gradients():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.dropout = nn.Linear(6, 4), nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(self.layer(x))

    model = Once()
    optimizer, called = optimizer_of(model), torch.compile(model, backend="aot_eager")
    for number in range(3):
        optimizer.zero_grad()
        loss_of("skips", called, number).backward()
        optimizer.step()
    assert optimizer.describe().rows[0][2:4] == ("by moments of its gradient", "it is used in a compiled graph")
    model.eval()
    optimizer.zero_grad()
    loss_of("skips", called, 4).backward()
    model.forward = None  # what cannot be called
    optimizer.step()
    assert "compiled graph" in optimizer.describe().rows[0].why
    torch.compiler.reset()


class Counting(nn.Module):
    """Sets a number and a buffer anew in each pass."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.calls = nn.Linear(6, 8), nn.Linear(8, 4), 0
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        hidden = self.inner(x).relu()
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        self.calls += 1
        return self.outer(hidden - self.mean)


def test_a_pass_made_again_leaves_what_a_forward_sets():
    model = Counting()
    optimizer, called = optimizer_of(model), torch.compile(model, backend="aot_eager")
    for number in range(4):
        optimizer.zero_grad()
        loss_of("skips", called, number).backward()
        mean, values = model.mean, model.mean.clone()
        optimizer.step()
        assert model.calls == number + 1
        assert model.mean is mean
        assert torch.equal(mean, values)
    torch.compiler.reset()


def test_layers_that_are_not_compiled_are_seen_beside_compiled_ones_with_dropout():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.dropout = nn.Linear(6, 6), nn.Dropout(0.2)

        def forward(self, x):
            return self.dropout(self.layer(x))

    model = nn.Sequential(nn.Linear(6, 6), Dropping(), nn.Linear(6, 4))
    model[1].compile(backend="aot_eager")
    optimizer = optimizer_of(model)
    for number in range(3):
        optimizer.zero_grad()
        loss_of("skips", model, number).backward()
        optimizer.step()
    hows = [row.how for row in optimizer.describe().rows]
    assert hows == ["linear: inputs seen", "by moments of its gradient", "linear: inputs seen"]
    torch.compiler.reset()


def test_all_of_many_compiled_passes_of_a_step_are_made_again():
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        optimizer = optimizer_of(model)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        for step in range(12):
            optimizer.zero_grad()
            for number in range(11):
                (loss_of("skips", called, 11 * step + number) / 11).backward()
            optimizer.step()
        found.append(flat(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def drops(model, x):
    return nn.functional.dropout(model[0](x), 0.5)


def overwrites(model, x):
    return model[0](x)


@pytest.mark.parametrize("how", [drops, overwrites])
def test_a_pass_that_comes_out_otherwise_when_made_again_is_not_counted(how):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 4)])

        def forward(self, x):
            return how(self.layers, x)

    model = Net()
    optimizer, called = optimizer_of(model), torch.compile(model, backend="aot_eager")
    for number in range(3):
        optimizer.zero_grad()
        x, labels = batch("skips", number)
        functional.cross_entropy(called(x), labels).backward()
        if how is overwrites:
            x.normal_()
        optimizer.step()
    assert optimizer.describe().rows[0].how == "by moments of its gradient"
    torch.compiler.reset()


# --- one batch


def test_a_batch_that_comes_again_is_fitted_and_others_are_learned_after_it():
    for name in ("perceptron", "skips", "convolutional"):
        model = make(name)
        optimizer = optimizer_of(model)
        losses = run(name, model, optimizer, [-1] * 60, True)
        assert optimizer.stepper.repeating
        assert losses[-1] < 0.01 * losses[0]
        run(name, model, optimizer, range(24), True)
        assert not optimizer.stepper.repeating
        assert not [key for entry in optimizer.state.values() for key in entry if "one." in key]
        run(name, model, optimizer, [-1] * 24, True)
        assert optimizer.stepper.repeating


# --- what is told


def test_describe_names_every_parameter_before_and_after_the_first_step():
    model = Language()
    model.places.requires_grad_(False)
    rest = [p for p in model.parameters() if p is not model.block.norm1.weight]
    optimizer = optimizer_of(model, params=rest)
    named = {name for name, _ in model.named_parameters()}
    for step in range(2):
        described = optimizer.describe()
        how = {row.name: row.how for row in described.rows}
        assert {name.split("[")[0] for name in how} | {n for n in named if n.endswith("bias")} == named
        assert how["places"] == "frozen"
        assert how["block.norm1.weight"] == "in no group"
        assert how["block.norm2.weight"] == "vector"
        assert ("No step was made yet" in str(described)) == (step == 0)
        run("language", model, optimizer, [step])
    assert how["block.self_attn.in_proj_weight[q]"] == "attention: inputs seen"
    assert all(len(line) < 200 for line in str(described).splitlines())


def test_describe_works_for_other_families():
    optimizer = metatele.LearnedOptimizer(make("perceptron"), EquivariantOptimizer(EquivariantConfig()))
    assert [row.how for row in optimizer.describe().rows] == ["linear: inputs seen"] * 3
    shape = small_optimizer().task.widths
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(shape)))
    model = nn.Sequential(model[0], nn.LeakyReLU(0.1), model[1])
    optimizer = metatele.LearnedOptimizer(model, small_optimizer(dtype=torch.float32))
    assert [row.name for row in optimizer.describe().rows] == ["0.weight", "2.weight"]


def test_senses_are_those_of_the_controller_s_table_and_no_other_is_hidden():
    assert tuple(dict.fromkeys(measure.sense for measure in SEEN)) == SENSES
    with pytest.raises(ConfigError, match="blind must be among feedback, noise"):
        GeneralConfig(blind=("nonsense",))


def a_sight(layers: int = 5) -> Sight:
    g = torch.Generator().manual_seed(0)
    row = {name: torch.rand(layers, generator=g) for name in ("agreement", "momentum", "grown", "aspect", "positions")}
    number = {
        name: torch.rand((), generator=g) for name in ("slope", "slope_long", "agreement_all", "length", "fallen")
    }
    plain = {"known": 0.4, "epochs": 2.0, "age": 30, "progress": 0.3, "same": True, "samples": 32, "parameters": 900}
    ends = {"first": torch.eye(layers)[0], "last": torch.eye(layers)[-1]}
    return Sight(**row, **number, **plain, **ends, depth=layers, kinds=torch.arange(layers).float())


@pytest.mark.parametrize("sense", SENSES)
def test_a_sense_that_is_hidden_has_no_part_in_what_the_controller_sets(sense):
    blind, seeing, without = Controller(0, (sense,)), Controller(0), Controller(0)
    weights = torch.randn(blind.direct.shape, generator=torch.Generator().manual_seed(1))
    hidden = torch.tensor([measure.sense == sense for measure in SEEN])
    with torch.no_grad():
        blind.direct.copy_(weights)
        seeing.direct.copy_(weights)
        without.direct.copy_(weights.masked_fill(hidden, 0.0))
    given = [torch.cat([t.flatten() for t in controller(a_sight())]) for controller in (blind, seeing, without)]
    assert torch.equal(given[0], given[2])
    assert not torch.allclose(given[0], given[1], rtol=1e-3)
