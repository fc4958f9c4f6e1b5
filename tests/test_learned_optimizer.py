"""``LearnedOptimizer`` is a torch optimizer in every way users rely on, and equals the unroll."""

import copy
import gc
import io
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from cases import METHODS, TASK, small_optimizer, small_problems
from torch import nn

import metatele
from metatele.errors import MetateleError, NotExactError, ShapeMismatchError, UnsupportedModelError
from metatele.network.sequential import read_sequential
from metatele.perceptron.activations import ReLU
from metatele.unroll import start, unroll

TRANSFER = Path(__file__).resolve().parent.parent / "checkpoints" / "transfer"


def make(method="update-tele", dtype=torch.float32, bias=False, problem=0, **settings):
    """A module at a problem's initial weights, its optimizer, and the closure of its loss."""
    from metatele.config import TaskConfig

    task = TaskConfig(widths=TASK.widths, samples=TASK.samples, bias=bias)
    meta = small_optimizer(method, task, torch.float32, **settings.pop("meta", {}))
    problems = small_problems(problem + 1, task, torch.float32)
    d, k, o = task.widths
    model = nn.Sequential(nn.Linear(d, k, bias), nn.LeakyReLU(0.1), nn.Linear(k, o, bias))
    sizes = [p.numel() for p in model.parameters()]
    with torch.no_grad():
        for p, part in zip(model.parameters(), problems.initial[problem].split(sizes), strict=True):
            p.copy_(part.view_as(p))
    model.to(dtype)
    x, y = problems.inputs[problem].T.to(dtype), problems.targets[problem].T.to(dtype)
    optimizer = metatele.LearnedOptimizer(model, meta, **settings)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum()
        loss.backward()
        return loss

    return model, optimizer, closure, (x, y)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(optimizer, closure, steps):
    losses = []
    for _ in range(steps):
        losses.append(float(closure().detach()))
        optimizer.step()
    return losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [0.0, 1.0])
def test_steps_are_those_of_the_functional_unroll(method, bias, cap):
    model, optimizer, closure, _ = make(method, bias=bias, meta={"gradient_cap": cap})
    task = optimizer.meta.task
    with torch.no_grad():
        end, losses = unroll(optimizer.meta, start(optimizer.meta, small_problems(1, task, torch.float32)), 8)
    ours = run(optimizer, closure, 8)
    torch.testing.assert_close(flat(model), end.weights[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(ours[1:]), losses[:-1, 0], rtol=1e-4, atol=1e-5)


def test_closure_is_run_with_gradients_and_its_loss_returned():
    (one, a, closure_a, _), (two, b, closure_b, _) = make(), make()
    with torch.no_grad():  # step must switch gradients on for the closure itself
        loss = a.step(closure_a)
    before = closure_b()
    assert b.step() is None
    assert float(loss.detach()) == float(before.detach())
    assert torch.equal(flat(one), flat(two))


def test_grad_scaler_and_schedulers_work():
    model, optimizer, closure, (x, y) = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    twin, twin_optimizer, twin_closure, _ = make()
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(0.5 * (model(x) - y).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        twin_closure()
        twin_optimizer.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-6)
    for scheduler in (
        torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 0.9**e),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=9, cycle_momentum=False),
    ):
        before = optimizer.param_groups[0]["lr"]
        closure()
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] != before or isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)


def test_parameters_come_as_any_torch_optimizer_takes_them():
    references = run(*make()[1:3], 4)
    for form in ("iterable", "dicts", "named"):
        model, _, _, (x, y) = make()
        parameters = {
            "iterable": list(model.parameters()),
            "dicts": [{"params": [model[0].weight]}, {"params": [model[2].weight], "lr": 1.0}],
            "named": list(model.named_parameters()),
        }[form]
        optimizer = metatele.LearnedOptimizer(model, small_optimizer(dtype=torch.float32), params=parameters)

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = 0.5 * (model(x) - y).square().sum()
            loss.backward()
            return loss

        assert run(optimizer, closure, 4) == references
    model, _, _, _ = make()
    meta = small_optimizer(dtype=torch.float32)
    twice = [{"params": [model[0].weight]}, {"params": [model[0].weight]}]
    with pytest.raises(ValueError, match="more than one parameter group"):
        metatele.LearnedOptimizer(model, meta, params=twice)
    with pytest.raises(ValueError, match="does not belong to the model"):
        metatele.LearnedOptimizer(model, meta, params=[nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="empty"):
        metatele.LearnedOptimizer(model, meta, params=[])


def test_no_gradient_means_no_step_and_no_advance():
    model, optimizer, _, _ = make()
    before = flat(model)
    optimizer.step()
    assert torch.equal(flat(model), before)
    assert not optimizer.state


def test_a_parameter_without_gradient_stays_where_it_is():
    model, optimizer, closure, _ = make()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    other = model[2].weight.detach().clone()
    run(optimizer, closure, 3)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[2].weight, other)


def test_sparse_gradients_raise_in_adam_s_words():
    model, optimizer, closure, _ = make()
    closure()
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_zero_lr_changes_nothing_but_builds_state(lr):
    model, optimizer, closure, _ = make(lr=lr)
    before = flat(model)
    closure()
    optimizer.step()
    assert torch.equal(flat(model), before)
    assert len(optimizer.state) == 2
    memories = [t.data_ptr() for state in optimizer.state.values() for t in state.values()]
    assert len(set(memories)) == len(memories)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    _, twin, twin_closure, _ = make()
    assert run(optimizer, closure, 3) == run(twin, twin_closure, 3)


def test_lr_multiplies_the_local_update_and_may_be_a_tensor():
    ends = []
    for lr in (0.5, torch.tensor(0.5), 1.0):
        model, optimizer, closure, _ = make("update", lr=lr)
        begin = flat(model)
        run(optimizer, closure, 1)
        ends.append(flat(model) - begin)
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(2 * ends[0], ends[2], rtol=1e-4, atol=1e-6)
    for bad in (-1.0, float("nan"), float("inf"), torch.ones(2)):
        with pytest.raises(ValueError, match="lr must be"):
            make(lr=bad)


def test_groups_can_be_added_while_running():
    model, _, _, (x, y) = make()
    optimizer = metatele.LearnedOptimizer(model, small_optimizer(dtype=torch.float32), params=[model[2].weight])

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum()
        loss.backward()
        return loss

    before = model[0].weight.detach().clone()
    run(optimizer, closure, 2)
    assert torch.equal(model[0].weight, before)
    optimizer.add_param_group({"params": [model[0].weight], "lr": 0.5})
    run(optimizer, closure, 2)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saved_state_goes_on_to_the_same_bits(dtype):
    model, optimizer, closure, _ = make(dtype=dtype)
    run(optimizer, closure, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    expected = run(optimizer, closure, 3)
    untouched = copy.deepcopy(saved)
    for _ in range(2):  # twice from one dictionary, before any step of the new optimizer
        other, fresh, other_closure, _ = make(dtype=dtype)
        other.load_state_dict(weights)
        fresh.load_state_dict(saved)
        for state in fresh.state.values():
            assert all(v.dtype == torch.float32 for v in state.values())
        assert run(fresh, other_closure, 3) == expected
    for key, state in untouched["state"].items():
        assert all(torch.equal(v, saved["state"][key][name]) for name, v in state.items())


def test_state_survives_a_safe_file_and_an_empty_dictionary():
    model, optimizer, closure, _ = make()
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, closure, 2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other, fresh, other_closure, _ = make()
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert run(fresh, other_closure, 2) == run(optimizer, closure, 2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_of_model_and_optimizer_go_on_together(duplicate):
    model, optimizer, closure, (x, y) = make()
    run(optimizer, closure, 2)
    twin_model, twin = duplicate((model, optimizer))

    def twin_closure():
        twin.zero_grad()
        loss = 0.5 * (twin_model(x) - y).square().sum()
        loss.backward()
        return loss

    assert run(twin, twin_closure, 3) == run(optimizer, closure, 3)
    assert torch.equal(flat(model), flat(twin_model))


def test_a_copy_of_the_model_alone_keeps_no_data():
    model, optimizer, closure, (x, _) = make()
    run(optimizer, closure, 1)
    lonely = copy.deepcopy(model)
    for _ in range(3):
        lonely(x)
    assert not optimizer.capture.seen
    lonely(x).sum().backward()
    assert not optimizer.capture.seen
    closure()
    assert optimizer.capture.seen
    twin_model, twin = pickle.loads(pickle.dumps((model, optimizer)))
    del optimizer, closure, twin
    gc.collect()
    assert not any(layer._forward_hooks for layer in (*model, *twin_model))


def test_input_buffers_may_be_used_again_and_gradients_cleared_to_zero():
    (one, first, _, (x, y)), (two, second, _, _) = make(), make()
    buffer = torch.empty_like(x[:2])
    for part in (slice(0, 2), slice(2, 4)):
        buffer.copy_(x[part])
        (0.5 * (one(buffer) - y[part]).square().sum()).backward()
        (0.5 * (two(x[part]) - y[part]).square().sum()).backward()
    buffer.zero_()
    first.step(), second.step()
    assert torch.equal(flat(one), flat(two))
    (0.5 * (one(x) + y).square().sum()).backward()  # abandoned: the model's own zero_grad follows
    for model, optimizer in ((one, first), (two, second)):
        model.zero_grad(set_to_none=False)
        (0.5 * (model(x[:2]) - y[:2]).square().sum()).backward()
        optimizer.step()
    assert torch.equal(flat(one), flat(two))


def test_distributed_checkpoints_of_the_state_go_on_to_the_same_bits():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer, closure, _ = make()
    run(optimizer, closure, 3)
    saved, weights = copy.deepcopy(get_optimizer_state_dict(model, optimizer)), copy.deepcopy(model.state_dict())
    expected = run(optimizer, closure, 3)
    other, fresh, other_closure, _ = make()
    other.load_state_dict(weights)
    set_optimizer_state_dict(other, fresh, saved)
    assert run(fresh, other_closure, 3) == expected


def test_state_of_another_optimizer_is_refused():
    _, optimizer, closure, _ = make()
    run(optimizer, closure, 1)
    _, other, _, _ = make("update")
    with pytest.raises(ShapeMismatchError, match="does not belong to this checkpoint"):
        other.load_state_dict(optimizer.state_dict())
    model, optimizer, _, _ = make()
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(4)).sum().backward()
    adam.step()
    with pytest.raises(ShapeMismatchError, match="exp_avg"):
        optimizer.load_state_dict(adam.state_dict())


def test_a_teleport_that_drifts_is_rolled_back_and_counted():
    model, optimizer, _, (x, y) = make(meta={"parametrisation": "first-order", "radius": 0.5}, max_drift=1e-3)
    twin_model, twin, twin_closure, _ = make(meta={"parametrisation": "first-order", "radius": 0.5}, max_drift=1.0)
    begin = flat(model)
    (0.5 * (model(x) - y).square().sum()).backward()
    optimizer.step()
    run(twin, twin_closure, 1)
    group = optimizer.param_groups[0]
    assert group["rolled_back"] == 1
    assert group["drift"] > 1e-3
    assert twin.param_groups[0]["rolled_back"] == 0
    assert not torch.equal(flat(model), flat(twin_model))
    assert not torch.equal(flat(model), begin)
    _, exact, exact_closure, _ = make(meta={"radius": 0.5})
    run(exact, exact_closure, 5)
    assert exact.param_groups[0]["rolled_back"] == 0
    assert exact.param_groups[0]["drift"] < 1e-3
    with pytest.raises(ValueError, match="max_drift"):
        make(max_drift=0)


def test_a_skipped_step_and_the_model_s_own_zero_grad_leave_no_old_batch():
    references = run(*make()[1:3], 1)
    model, optimizer, _, (x, y) = make()
    model(torch.randn(4, 4)).sum().backward()  # as when GradScaler finds an overflow and does not step
    model.zero_grad()
    loss = 0.5 * (model(x) - y).square().sum()
    loss.backward()
    optimizer.step()
    assert [float(loss.detach())] == references


def test_evaluation_passes_do_not_disturb_the_teleport():
    references = run(*make()[1:3], 3)
    model, optimizer, closure, _ = make()
    losses = []
    for _ in range(3):
        losses.append(float(closure().detach()))
        with torch.no_grad():
            model(torch.randn(50, 4))
        model(torch.randn(50, 4))  # with gradients recorded, but never taken
        optimizer.step()
    assert losses == references


def test_accumulated_batches_are_teleported_on_together():
    model, optimizer, _, (x, y) = make()
    whole, whole_optimizer, whole_closure, _ = make()
    for half in (slice(0, 2), slice(2, 4)):
        (0.5 * (model(x[half]) - y[half]).square().sum()).backward()
    optimizer.step()
    run(whole_optimizer, whole_closure, 1)
    torch.testing.assert_close(flat(model), flat(whole), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_done_is_one_clear_error():
    meta = small_optimizer(dtype=torch.float32)
    linear, leaky = nn.Linear(4, 5, bias=False), nn.LeakyReLU(0.1)
    wrong = nn.Sequential(nn.Linear(4, 6), leaky, nn.Linear(6, 3))
    with pytest.raises(ShapeMismatchError, match=r"4-6-3 leaky_relu:0.1 with bias.*4-5-3 leaky_relu:0.1 without"):
        metatele.LearnedOptimizer(wrong, meta)
    for model, words in (
        (nn.Sequential(linear, leaky, nn.Linear(5, 3)), "4-5-3 leaky_relu:0.1 with some bias"),
        (nn.Sequential(linear, nn.Tanh(), nn.Linear(5, 3, bias=False)), "4-5-3 tanh without bias"),
    ):
        with pytest.raises(ShapeMismatchError, match=words):
            metatele.LearnedOptimizer(model, meta)
    for model, words in (
        (linear, "must be an nn.Sequential"),
        (nn.Sequential(linear, nn.Dropout(), nn.Linear(5, 3)), "'1' \\(Dropout\\)"),
        (nn.Sequential(linear, nn.Linear(5, 3)), "'1' follows another Linear"),
        (nn.Sequential(linear, leaky, leaky, nn.Linear(5, 3)), "must stand between"),
        (nn.Sequential(leaky, linear), "must stand between"),
        (nn.Sequential(linear, leaky), "last layer must be Linear"),
        (nn.Sequential(), "no Linear"),
        (nn.Sequential(s := nn.Linear(4, 4), leaky, s), "layers '0' and '2' share a weight"),
        (nn.Sequential(linear, nn.Softplus(beta=2), nn.Linear(5, 3)), "beta=2.* is not supported; Linear, .* are"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            metatele.LearnedOptimizer(model, meta)
    with pytest.raises(TypeError, match="must be a name, a path, a Checkpoint or a meta-optimizer, got int"):
        metatele.LearnedOptimizer(make()[0], 5)
    model, optimizer, _, (x, _) = make()
    model(x * float("nan")).sum().backward()
    optimizer.step()  # no teleport on such a batch; the local move is the trainer's own affair
    assert optimizer.param_groups[0]["rolled_back"] == 1
    model, optimizer, closure, _ = make()
    closure()
    model[0].weight = nn.Parameter(torch.ones(5, 4))
    with pytest.raises(MetateleError, match="was replaced"):
        run(optimizer, closure, 1)
    model, optimizer, closure, _ = make()
    closure()
    optimizer.capture.clear()
    with pytest.raises(MetateleError, match=r"no layer of the model has been called|no gradient was taken"):
        optimizer.step()
    optimizer.zero_grad()
    model(torch.randn(9, 4)).sum().backward()
    with pytest.raises(NotExactError, match="at most as many samples"):
        optimizer.step()


def test_nested_models_are_read():
    tanh = nn.Tanh()  # one module in two places
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 5), tanh), nn.Linear(5, 6), tanh, nn.Sequential(nn.Linear(6, 3)))
    linears, mlp = read_sequential(model)
    assert mlp.widths == (4, 5, 6, 3)
    assert linears[2] is model[3][0]
    assert read_sequential(nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0), nn.Linear(5, 3)))[1].activations == (ReLU(),)


# --- the bridge to higher


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_modules_that_compute_something_else_are_refused():
    def layers(kind=nn.Linear):
        return kind(4, 4), nn.Tanh(), nn.Linear(4, 4)

    orthogonal = nn.Sequential(*layers())
    nn.utils.parametrizations.orthogonal(orthogonal[0])
    for model in (Residual(*layers()), nn.Sequential(*layers(Doubled)), orthogonal, nn.Sequential(Residual(*layers()))):
        with pytest.raises(UnsupportedModelError):
            read_sequential(model)


def closing_higher():
    gc.collect()  # higher leaves each copy of the model in a reference cycle


@pytest.mark.parametrize("variant", [{"method": m} for m in METHODS] + [{"gradient_rates": True}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_meta_gradients_inside_higher_are_ours(variant, bias):
    import higher

    import metatele.optim.higher_bridge
    from metatele.config import TaskConfig

    task = TaskConfig(widths=TASK.widths, samples=TASK.samples, bias=bias)
    meta, problems, steps = small_optimizer(task=task, **variant), small_problems(1, task), 4
    d, k, o = task.widths
    model = nn.Sequential(nn.Linear(d, k, bias), nn.LeakyReLU(0.1), nn.Linear(k, o, bias)).double()
    with torch.no_grad():
        sizes = [p.numel() for p in model.parameters()]
        for p, part in zip(model.parameters(), problems.initial[0].split(sizes), strict=True):
            p.copy_(part.view_as(p))
    optimizer = metatele.LearnedOptimizer(model, meta)
    x, y = problems.inputs[0].T, problems.targets[0].T
    total = torch.zeros((), dtype=torch.float64)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        for step in range(steps):
            diffopt.step(0.5 * (fmodel(x) - y).square().sum())
            total = total + 0.5 * (fmodel(x) - y).square().sum()
            if step == 1:  # a meta-gradient in between, on other data, is not teleported on
                torch.autograd.grad(fmodel(x[:3]).sum() + total, list(meta.parameters()), retain_graph=True)
        end = torch.cat([p.flatten() for p in fmodel.parameters()]).detach()
        theirs = torch.autograd.grad(total, list(meta.parameters()))
    ours_end, losses = unroll(meta, start(meta, problems), steps)
    ours = torch.autograd.grad(losses.sum(), list(meta.parameters()))
    torch.testing.assert_close(end, ours_end.weights[0].detach(), rtol=1e-9, atol=1e-10)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    closing_higher()


def test_higher_needs_its_patched_model():
    import higher

    import metatele.optim.higher_bridge  # noqa: F401

    model, optimizer, _, _ = make()
    with pytest.raises(MetateleError, match="innerloop_ctx"):
        higher.get_diff_optim(optimizer, model.parameters())


def perceptron(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [layer for d, o in itertools.pairwise(widths) for layer in (nn.Linear(d, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_rises_from_outside_is_learned_again(seed):
    model = perceptron(10, 32, 3, seed=seed)
    x, y, losses = torch.randn(200, 10), torch.randn(200, 3), []
    optimizer = metatele.LearnedOptimizer(model, TRANSFER)
    for step in range(150):
        if step == 50:
            y = torch.randn(200, 3)
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[149] < 0.25 * losses[50]


@pytest.mark.parametrize("seed", range(3))
def test_clipping_does_not_look_like_a_rise_of_the_loss(seed):
    teacher, model = perceptron(10, 20, 3, seed=10 + seed), perceptron(10, 32, 32, 3, seed=seed)
    x = torch.randn(200, 10)
    y = teacher(x).detach()
    optimizer = metatele.LearnedOptimizer(model, TRANSFER)
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y, reduction="sum")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 2e-3
    assert optimizer.param_groups[0]["rolled_back"] < 10


@pytest.mark.parametrize("seed", range(3))
def test_a_small_last_batch_does_not_look_like_a_rise_of_the_loss(seed):
    teacher, model = perceptron(10, 20, 4, seed=10 + seed), perceptron(10, 32, 32, 4, seed=seed)
    x = torch.randn(1832, 10)
    y = teacher(3 * x).detach()
    optimizer = metatele.LearnedOptimizer(model, TRANSFER)
    for _ in range(40):
        for batch in torch.randperm(1832).split(600):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
    assert nn.functional.mse_loss(model(x), y) < 3e-3


def test_the_state_of_another_kind_of_optimizer_is_refused():
    model = perceptron(4, 5, 3)
    optimizer = metatele.LearnedOptimizer(model, TRANSFER)
    with pytest.raises(ShapeMismatchError, match="another kind of optimizer"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
