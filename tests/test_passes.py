"""Ways to run a model and to take its gradients: a live optimizer disturbs none, and learns the same in each."""

import copy
import gc
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import metatele
from metatele.config import EquivariantConfig
from metatele.errors import ConfigError, MetateleError, ShapeMismatchError, UnsupportedModelError
from metatele.learned import EquivariantOptimizer
from metatele.network.capture import Capture
from metatele.network.sequential import unwrapped
from metatele.network.wanted import Wanted

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (64,), generator=torch.Generator().manual_seed(2))
STEPS = 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def meta():
    return EquivariantOptimizer(EquivariantConfig(hidden=4), 0).requires_grad_(False)


def optimizer_of(model, **settings):
    return metatele.LearnedOptimizer(model, meta(), **settings)


def train(model, optimizer, call=None, backward=None, inputs=X):
    """The loss after a few steps on one batch."""
    call = model if call is None else call
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = functional.cross_entropy(call(inputs), Y)
        loss.backward() if backward is None else backward(loss)
        optimizer.step()
    return float(functional.cross_entropy(call(X), Y).detach())


@pytest.fixture(scope="module")
def expected():
    model = network()
    loss = train(model, optimizer_of(model))
    assert loss < 0.9
    return loss


class Around(nn.Module):
    """A module of one's own around a plain one."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x.flatten(1))


def by_autograd_grad(model):
    def backward(loss):
        parameters = list(model.parameters())
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = gradient

    return {"backward": backward}


WAYS = {
    "autograd.grad": by_autograd_grad,
    "checkpoint": lambda model: {"call": lambda x: checkpoint(model, x, use_reentrant=False)},
    "reentrant checkpoint": lambda model: {
        "call": lambda x: checkpoint(model, x, use_reentrant=True),
        "inputs": X.clone().requires_grad_(),
    },
    "checkpointed segments": lambda model: {
        "call": lambda x: checkpoint_sequential(model, 3, x, use_reentrant=True),
        "inputs": X.clone().requires_grad_(),
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_the_way_gradients_are_taken_does_not_matter(way, expected):
    model = network()
    assert train(model, optimizer_of(model), **WAYS[way](model)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: Around(), nn.Sequential], ids=["dp", "own", "nested"])
def test_wrappers_are_looked_through(wrap, expected):
    model = wrap(network())
    assert train(model, optimizer_of(model)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", ["optimizer first", "compiled call first", "compiled in place"])
def test_compiled_models_are_learned_on(order, expected):
    model = network()
    if order == "compiled in place":
        model.compile(backend="eager")
        model(X)
        assert train(model, optimizer_of(model)) == pytest.approx(expected, rel=1e-5)
        return
    compiled = torch.compile(model, backend="eager")
    if order == "optimizer first":
        optimizer = optimizer_of(model)
        compiled(X)
    else:
        compiled(X)
        optimizer = optimizer_of(compiled)
    assert unwrapped(compiled) is model
    assert train(model, optimizer, call=compiled) == pytest.approx(expected, rel=1e-5)


def summary_writer(model, folder):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as board:
        board.add_graph(model, X)


def make_fx(model, folder):
    from torch.fx.experimental.proxy_tensor import make_fx

    make_fx(lambda x: model(x).sum())(X)


TRACERS = {
    "jit.trace": lambda model, folder: torch.jit.trace(model, X),
    "add_graph": summary_writer,
    "export": lambda model, folder: torch.export.export(model, (X,)),
    "export strict": lambda model, folder: torch.export.export(model, (X,), strict=True),
    "fx": lambda model, folder: torch.fx.symbolic_trace(model),
    "make_fx": make_fx,
    "vmap of grad": lambda model, folder: torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(X),
    "inference": lambda model, folder: torch.inference_mode()(model)(X),
}


@pytest.mark.parametrize("kind", ["learned", "teleport"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracing_neither_sees_the_hooks_nor_disturbs_the_steps(tracer, kind, expected, tmp_path):
    model = network()
    if kind == "teleport":
        optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, every=1)
        TRACERS[tracer](model, str(tmp_path))
        train(model, optimizer)
        assert optimizer.param_groups[0]["teleport_steps"] == STEPS
        return
    optimizer = optimizer_of(model)
    TRACERS[tracer](model, str(tmp_path))
    assert train(model, optimizer) == pytest.approx(expected, rel=1e-5)


def test_a_model_saved_beside_an_optimizer_loads_without_metatele(tmp_path):
    model = network()
    train(model, optimizer_of(model))
    optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, at=[0])
    torch.save(model, tmp_path / "model.pt")
    del optimizer
    code = (
        "import sys\nsys.modules['metatele'] = None\n"  # importing it fails
        "import torch\nmodel = torch.load('model.pt', weights_only=False)\nprint(model(torch.ones(2, 8)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.tensor(eval(done.stdout)).allclose(model(torch.ones(2, 8)), atol=1e-6)


def test_what_cannot_be_seen_is_named():
    model = network()
    optimizer = optimizer_of(model)
    first, last = model[0], model[2]

    def by_hand(x):
        return functional.linear(functional.linear(x, first.weight, first.bias).relu(), last.weight, last.bias)

    with pytest.raises(MetateleError, match=r"no layer of the model has been called .* F\.linear"):
        train(model, optimizer, call=by_hand)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = optimizer_of(model)
    x = torch.linspace(-1, 1, 20)[:, None].requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (slope - x.cos()).square().mean().backward()
    with pytest.raises(MetateleError, match="of derivatives alone"):
        optimizer.step()
    optimizer.zero_grad()  # with the values beside it, it works
    value = model(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    ((slope - x.cos()).square().mean() + (value - x.sin()).square().mean()).backward()
    optimizer.step()


def test_pruning_after_creation_is_one_sentence():
    from torch.nn.utils import prune

    model = network()
    optimizer = optimizer_of(model)
    prune.random_unstructured(model[0], "weight", 0.3)
    with pytest.raises(UnsupportedModelError, match=r"prune\.remove"):
        train(model, optimizer)
    prune.remove(model[0], "weight")
    train(model, optimizer_of(model))


# --- what a capture keeps


@pytest.mark.parametrize("shape", [(5,), (5, 6), (2, 3, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_moments_are_those_of_all_positions_whatever_the_leading_dimensions(shape, bias):
    model = nn.Sequential(nn.Linear(3, 4, bias), nn.ReLU(inplace=True), nn.Linear(4, 2, bias)).double()
    capture = Capture([model[0], model[2]])
    capture.attach(model)
    capture.wanted = Wanted(
        data=True, ends=True, fingerprint=True, moments=frozenset({0, 1}), squares=True, dtype=torch.float64
    )
    x = torch.randn(*shape, 3, dtype=torch.float64)
    for part in (x, 2 * x):  # two passes of one step
        out = model(part)
        out.square().sum().backward()
    columns = torch.cat([x.reshape(-1, 3), 2 * x.reshape(-1, 3)]).T
    z = model[0](columns.T)
    hidden = [columns, z.relu().T]
    errors = 2 * model[2](hidden[1].T).T
    back = (model[2].weight.T @ errors) * (z.T > 0)
    for layer, (use, delta) in enumerate(zip(capture.uses(), (back, errors), strict=True)):
        h = hidden[layer]
        h = torch.cat([h, torch.ones_like(h[:1])]) if bias else h
        n = h.shape[1]
        assert use.columns == n
        torch.testing.assert_close(use.inputs.dense, h @ h.T / n)
        torch.testing.assert_close(use.errors.dense, delta @ delta.T)
        # Together they are the gradient.
        torch.testing.assert_close((delta @ h.T)[:, : model[2 * layer].in_features], model[2 * layer].weight.grad)
    torch.testing.assert_close(capture.uses()[0].square, z.square().mean())
    torch.testing.assert_close(capture.inputs(torch.float64), columns)
    outputs, gradient = capture.ends(torch.float64)
    torch.testing.assert_close((outputs, gradient), (model[2](hidden[1].T).T, errors))


def test_nothing_of_the_activations_is_kept_that_was_not_asked_for():
    model = network()
    capture = Capture([model[0], model[2]])
    capture.attach(model)
    capture.wanted = Wanted(ends=True, moments=frozenset({1}))
    kept = torch.randn(1000, 8)
    functional.cross_entropy(model(kept), torch.zeros(1000, dtype=torch.long)).backward()

    def sizes(value, seen):
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value.numel()
        elif isinstance(value, list | tuple | set):
            for part in value:
                yield from sizes(part, seen)
        elif isinstance(value, dict):
            yield from sizes(list(value.values()), seen)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            yield from sizes(value.__dict__, seen)

    assert max(sizes(capture, set())) <= 3000  # outputs and the gradient there: 1000 rows of 3


def test_evaluations_penalties_and_abandoned_passes_do_not_count():
    model, twin = network(), network()
    optimizer, other = optimizer_of(model), optimizer_of(twin)
    for step in range(4):
        optimizer.zero_grad()
        other.zero_grad()
        inputs = X.clone().requires_grad_()
        model(X + 7)
        torch.autograd.grad(model(inputs).sum(), inputs)
        with torch.no_grad():
            model(X - step)
        functional.cross_entropy(model(X), Y).backward()
        functional.cross_entropy(twin(X), Y).backward()
        model(X * 3)
        optimizer.step()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_logits_changed_in_place_make_no_other_step():
    weights = []
    for change in (lambda z: z / 3, lambda z: z.div_(3)):
        model = network()
        optimizer = optimizer_of(model)
        for _ in range(8):
            optimizer.zero_grad()
            functional.cross_entropy(change(model(X)), Y).backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*weights, strict=True):
        torch.testing.assert_close(p, q)


def test_passes_that_reach_no_parameter_do_not_pile_up():
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    inputs = X.clone().requires_grad_()

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    for _ in range(20):
        torch.autograd.grad(model(inputs).sum(), inputs)
    before = tensors()
    for _ in range(50):
        torch.autograd.grad(model(inputs).sum(), inputs)
    assert tensors() <= before + 2


def test_a_second_backward_pass_through_one_forward_pass_is_a_step_of_its_own():
    """With ``retain_graph`` the same forward pass serves two steps; what the first one saw does not count again."""
    weights = []
    for again in (False, True):
        model = network()
        optimizer = optimizer_of(model)
        train(model, optimizer)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(X), Y)
        loss.backward(retain_graph=True)
        if again:  # nothing has moved
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*weights, strict=True):
        torch.testing.assert_close(p, q)


def test_gradients_of_one_of_several_passes_are_refused():
    model = network()
    optimizer = optimizer_of(model)
    optimizer.zero_grad()
    inputs, parameters = X.clone().requires_grad_(), list(model.parameters())
    for p, gradient in zip(
        parameters, torch.autograd.grad(functional.cross_entropy(model(X), Y), parameters), strict=True
    ):
        p.grad = gradient
    torch.autograd.grad(model(inputs).sum(), inputs)  # a saliency map
    with pytest.raises(MetateleError, match=r"several calls of torch\.autograd\.grad"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["learned", "teleport", "conjugate"])
def test_a_step_inside_autocast_is_the_same(kind):
    found = []
    for enabled in (False, True):
        model = network()
        if kind == "learned":
            optimizer = optimizer_of(model)
        else:
            move = metatele.Whitening(mode="conjugate") if kind == "conjugate" else None
            optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, move, every=1)
        for _ in range(4):
            optimizer.zero_grad()
            functional.cross_entropy(model(X), Y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*found, strict=True):
        assert torch.equal(p, q)


def test_wrappers_that_subclass_an_optimizer_may_have_attributes_of_their_own():
    """Lightning and Fabric set these on a subclass made on the fly."""
    for made in (
        optimizer_of(model := network()),
        metatele.TeleportOptimizer(torch.optim.Adam(model.parameters()), model, at=[0]),
    ):
        kind = type("Wrapped" + type(made).__name__, (type(made),), {})
        wrapped = kind.__new__(kind)
        wrapped.__dict__.update(made.__dict__)
        for name in ("_optimizer", "_strategy", "_callbacks", "_on_before_step", "_on_after_step", "_gradient_state"):
            assert not hasattr(wrapped, name)
            setattr(wrapped, name, None)


def test_a_state_without_memories_is_refused():
    """Tools that read a saved state into that of a fresh optimizer lose what the fresh one does not have."""
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    state = optimizer.state_dict()
    state["state"] = {number: {"step": entry["step"]} for number, entry in state["state"].items()}
    state["param_groups"][0] = {k: v for k, v in state["param_groups"][0].items() if k != "network"}
    with pytest.raises(ShapeMismatchError, match="holds no memories"):
        optimizer_of(network()).load_state_dict(state)


# --- settings of groups


def test_weight_decay_is_decoupled_and_belongs_to_a_group():
    model, twin = network(), network()
    groups = [{"params": [model[0].weight], "weight_decay": 0.25}, {"params": [*model[0].parameters()][1:]}]
    groups.append({"params": model[2].parameters(), "lr": 0.5, "weight_decay": 0.1})
    optimizer = optimizer_of(model, params=groups)
    other = optimizer_of(twin, params=[{"params": twin[0].parameters()}, {"params": twin[2].parameters(), "lr": 0.5}])
    for _ in range(3):
        for network_, one in ((model, optimizer), (twin, other)):
            one.zero_grad()
            functional.cross_entropy(network_(X), Y).backward()
        with torch.no_grad():  # AdamW's order: decay first
            twin[0].weight *= 1 - 0.25
            for p in twin[2].parameters():
                p *= 1 - 0.5 * 0.1
        optimizer.step()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_step_that_is_not_made_leaves_the_weights_alone():
    model = network()
    optimizer = optimizer_of(model, weight_decay=0.1)
    train(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(X[:0]).sum().backward()  # an empty batch
    optimizer.step()
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(MetateleError, match=r"no layer of the model has been called|no gradient was taken"):
        optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    train(model, optimizer)


def test_most_batches_must_be_small_for_a_warning():
    def sizes(*counts):
        model = network()
        optimizer = optimizer_of(model)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for step, count in enumerate(counts):
                optimizer.zero_grad()
                at = (torch.arange(count) + 7 * step) % 64
                functional.cross_entropy(model(X[at]), Y[at]).backward()
                optimizer.step()
        return [str(w.message) for w in seen if "too noisy" in str(w.message)]

    assert not sizes(*[48, 48, 5] * 5)  # the last of an epoch
    (said,) = sizes(*[48] * 3, *[8] * 12)
    assert said.startswith("batches of 8 samples")
    assert "take at least 32 samples" in said


def test_what_is_no_model_is_one_sentence():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got generator"):
        metatele.LearnedOptimizer(network().parameters())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got NoneType"):
        metatele.TeleportOptimizer(torch.optim.Adam(network().parameters()), None, at=[0])


def test_maximizing_minus_a_loss_is_minimizing_it(expected):
    model = network()
    optimizer = optimizer_of(model, maximize=True)
    found = train(model, optimizer, backward=lambda loss: (-loss).backward())
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weigth_decay": 0.1}, "no setting 'weigth_decay'; it has lr, weight_decay, maximize"),
        ({"betas": (0.9, 0.99)}, "no setting 'betas'"),
        ({"weight_decay": -1.0}, "weight_decay must be zero or positive, got -1.0"),
        ({"maximize": True}, "maximize must be the same for all"),
        ({"weight_decay": 2.0}, "lr times weight_decay must be below 1"),
    ],
)
def test_unknown_settings_of_a_group_are_refused(changes, words):
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), **changes}]
    with pytest.raises(ConfigError, match=words):
        optimizer_of(model, params=groups)


def test_schedulers_that_cycle_the_momentum_work(expected):
    model = network()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=STEPS)
    factors = set()
    for _ in range(STEPS - 1):
        optimizer.zero_grad()
        functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        schedule.step()
        factors.add(round(float(optimizer.param_groups[0]["momentum"]), 3))
    assert len(factors) > 2
    assert float(functional.cross_entropy(model(X), Y).detach()) < 1.1


def test_memories_lie_with_their_parameters():
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    for p in model.parameters():
        entry = optimizer.state[p]
        assert entry["velocity"].shape == entry["direction"].shape == p.shape
        assert float(entry["step"]) == STEPS
    assert optimizer.state[model[0].weight]["moments.inputs.tensor"].shape == (9, 9)
    network_entry = optimizer.param_groups[0]["network"]
    assert network_entry["age"] == STEPS - 1  # the first step was the teleport


def test_a_state_that_version_0_1_has_saved_goes_on_to_the_same_bits():
    """The file holds weights and state after 21 mini-batches, and the weights after 20 more."""
    saved = torch.load(Path(__file__).parent / "data" / "state-0.1.pt", weights_only=True)
    random = torch.Generator().manual_seed(3)
    x, y = torch.randn(240, 4, generator=random), torch.randint(3, (240,), generator=random)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model.load_state_dict(saved["weights"])
    optimizer = metatele.LearnedOptimizer(model, "checkpoints/transfer")
    optimizer.load_state_dict(saved["state"])
    for step in range(21, 41):
        at = slice(24 * (step % 10), 24 * (step % 10) + 24)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()
    for name, p in model.state_dict().items():
        torch.testing.assert_close(p, saved["after"][name], rtol=1e-4, atol=1e-5)  # the bits, on the machine it is from


def test_the_state_of_another_model_is_refused():
    saved = torch.load(Path(__file__).parent / "data" / "state-0.1.pt", weights_only=True)["state"]
    with pytest.raises(ShapeMismatchError, match="does not belong to this model"):
        optimizer_of(network()).load_state_dict(saved)
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    other = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ShapeMismatchError, match="expected velocity of shape"):
        optimizer_of(other).load_state_dict(optimizer.state_dict())


def test_layers_in_no_group_have_their_memories_too():
    model = network()
    optimizer = optimizer_of(model, params=model[2].parameters())
    train(model, optimizer)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    other = network()
    other.load_state_dict(model.state_dict())
    loaded = optimizer_of(other, params=other[2].parameters())
    loaded.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    expected = train(model, optimizer)
    assert train(twin, twin_optimizer) == expected
    assert train(other, loaded) == expected


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_to_the_same_bits(duplicate):
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    twin, other = duplicate((model, optimizer))
    assert train(model, optimizer) == train(twin, other)
