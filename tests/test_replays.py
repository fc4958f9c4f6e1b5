"""Steps that are replayed: the same as those that are made, wherever their memory stays in place."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metatele
from metatele.learned.general import replays as module
from metatele.learned.general.replays import LARGEST, Replays, replays_for


class Recorded(TorchDispatchMode):
    """What a CUDA graph keeps of a body: operations, with the memory and the numbers of the host that they had."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.done:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            new = func(*args, **kwargs)
            for old, one in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(one)


def recorded(body):
    """As a capture, whose body has not run: its first replay is the run in which it was recorded."""
    with torch.no_grad(), Recorded() as record:
        output = body()
    fresh = [True]

    def replay():
        if not fresh.pop() if fresh else True:
            with torch.no_grad():
                record.replay()

    return replay, output


def perceptron(width, *norm):
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), *norm, nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


NETWORKS = {
    "small": lambda: perceptron(20, nn.LayerNorm(20)),
    "factors": lambda: perceptron(150),
    "stale": lambda: perceptron(260),
}


def halved(step):
    return 0.5 if step >= 40 else 1.0


def curve(make, replays, steps=48, rate=halved):
    torch.manual_seed(0)
    model = make()
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(5)]
    optimizer = metatele.LearnedOptimizer(model)
    losses = []
    for step in range(steps):
        x, y = data[step % 5]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if step == 30:  # far longer than usual, so that it is clipped
            for p in model.parameters():
                p.grad.mul_(40)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        if step == 0:
            optimizer.stepper.course.replays = replays
        losses.append(float(loss.detach()))
    return losses, [p.detach().clone() for p in model.parameters()]


def falling(step):
    return 1 - step / 60


CURVES = {name: (make, halved) for name, make in NETWORKS.items()} | {"schedule": (NETWORKS["small"], falling)}


@pytest.mark.parametrize(("make", "rate"), CURVES.values(), ids=CURVES)
def test_replayed_steps_are_those_that_are_made(make, rate):
    replays = Replays(recorded)
    plain, weights = curve(make, None, rate=rate)
    losses, ours = curve(make, replays, rate=rate)
    assert replays.count > 40  # of measures and steps, in 37 steps after the first looks
    assert replays.captures < 12
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain), rtol=1e-3, atol=1e-4)
    for one, other in zip(ours, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_a_capture_that_fails_is_said_once_and_changes_nothing():
    def failing(body):
        raise RuntimeError("no graph")

    replays = Replays(failing)
    plain, _ = curve(NETWORKS["small"], None, steps=20)
    with pytest.warns(UserWarning, match="no CUDA graph") as said:
        losses, _ = curve(NETWORKS["small"], replays, steps=20)
    assert len([w for w in said if "no CUDA graph" in str(w.message)]) == 1
    assert replays.off
    assert losses == plain


def test_what_looks_replace_is_read_anew():
    x, replays = torch.zeros(2), Replays(lambda body: recorded(body))
    for value in (1.0, 2.0, 3.0, 4.0):
        held = torch.full((2,), value)
        replays.run("add", [held], lambda held=held: x.add_(held))
    assert x.tolist() == [10.0, 10.0]


def test_few_graphs_are_kept():
    x, replays = torch.zeros(1), Replays(lambda body: recorded(body))
    for _ in range(3):
        for key in range(9):
            for _ in range(3):
                replays.run(key, [], lambda: x.add_(1))
    assert x.item() == 81
    assert replays.captures > 9  # those let go of are made anew


def test_without_room_no_more_graphs_are_made_and_those_there_are_go_on():
    room = [True, False, True]
    x, replays = torch.zeros(1), Replays(lambda body: recorded(body), lambda: room.pop(0))
    for _ in range(4):
        for key in ("first", "second", "third"):
            replays.run(key, [], lambda: x.add_(1))
    assert x.item() == 12
    assert (replays.captures, replays.count, replays.full) == (1, 3, True)
    assert len(room) == 1  # asked no more


class Device:
    """A tensor on a GPU, as far as is asked here."""

    is_cuda, device = True, torch.device("cuda", 0)

    @staticmethod
    def element_size():
        return 4


def test_networks_above_the_largest_need_three_times_their_memory_free(monkeypatch):
    asked, made, needed = [], [], 3 * 4 * 2 * LARGEST
    left = [needed, needed - 1]

    def free(device):
        asked.append(device)
        return left.pop(0), 1 << 40

    def graph(device, stream, body, pool=None):
        assert stream == ("stream of", device)  # torch's own may be of another device
        made.append(pool)
        return recorded(body)

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream of", device))
    monkeypatch.setattr(module, "cuda_graph", graph)
    assert replays_for(torch.zeros(1), 5) is None
    for size, captures in ((LARGEST, 1), (2 * LARGEST, 1), (2 * LARGEST, 0)):
        replays, x = replays_for(Device, size), torch.zeros(1)
        for _ in range(3):
            replays.run("key", [], lambda x=x: x.add_(1))
        assert replays.captures == captures
        assert x.item() == 3
    assert made == [None, (0, 7)]  # larger ones share a memory
    assert asked == [Device.device] * 2
