"""Parts of gpu.py: what the device can do at most, and whether the package computes there what it does on a CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import breadth_tasks
import optimizer_step
import torch
from cases import small_run
from gpu_kit import Kit, Training
from meta_training import rounded
from torch import Tensor, nn
from torch.nn import functional

import metatele
from metatele.config import transfer
from metatele.data import ImageSet
from metatele.perceptron.activations import LeakyReLU
from metatele.perceptron.mlp import MLP
from metatele.training.equivariant import EquivariantTrainer
from metatele.training.flat import FlatTrainer
from metatele.training.population import Population
from metatele.training.replicas import Arm, Replicas

Pair = tuple[Tensor, Tensor]


# --- a: environment and ceilings


def environment(kit: Kit) -> None:
    """Names and versions, and the best rates of one large product and one large copy."""
    found: dict[str, Any] = {"device": kit.device.type, "torch": torch.__version__, "cuda": torch.version.cuda}
    if kit.gpu:
        properties = torch.cuda.get_device_properties(kit.device)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        with kit.tried("driver"):
            found["driver"] = _driver()
    kit.add("environment", found)
    size = kit.sized(8192, 256)
    for precision in ("bf16", "tf32", "float32"):
        with kit.tried(f"product {precision}"), rounded(precision):
            a = torch.randn(size, size, device=kit.device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
            b = torch.randn_like(a)
            out = torch.empty_like(a)
            ms = kit.events(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), kit.sized(15, 3))
            rate = 2 * size**3 / ms["median"] / 1e9
            kit.add(f"product_{precision}", {**ms, "tflops": rate, "size": size})
            kit.row(f"square product of {size}, {precision}", rate, "TFLOP/s", note=f"{ms['count']} runs, median")
    with kit.tried("copy"):
        count = kit.sized(2**31, 2**20)
        source = torch.empty(count, dtype=torch.uint8, device=kit.device).random_(255)
        target = torch.empty_like(source)
        ms = kit.events(lambda: target.copy_(source), kit.sized(15, 3))
        rate = 2 * count / ms["median"] / 1e6
        kit.add("copy", {**ms, "gbytes_per_second": rate, "bytes": count})
        kit.row("copy on the device, read and written", rate, "GB/s")
    with kit.tried("launch"):
        tiny = torch.zeros(8, device=kit.device)
        ms = kit.chunks(lambda: tiny.add_(1), 5, kit.sized(2000, 20), warm=20)
        kit.add("launch_us", {name: 1e3 * t if name != "count" else t for name, t in ms.items()})
        kit.row("one small operation in a row of them", 1e3 * ms["median"], "us")


def _driver() -> str:
    import subprocess

    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]


# --- b: correctness


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Pair], Callable[[Tensor, Tensor], Tensor]]] = {
    "MLP": (
        lambda: breadth_tasks.mlp((20, 64, 48, 10), nn.ReLU),
        lambda: (torch.randn(256, 20), torch.randint(10, (256,))),
        breadth_tasks.class_loss,
    ),
    "CNN": (
        breadth_tasks.cnn,
        lambda: (torch.randn(128, 3, 32, 32), torch.randint(10, (128,))),
        breadth_tasks.class_loss,
    ),
    "attention": (
        lambda: breadth_tasks.GPT(32, 2, 4),
        lambda: (torch.randint(65, (32, 24)), torch.randint(65, (32, 24))),
        breadth_tasks.class_loss,
    ),
    "GRU": (
        lambda: breadth_tasks.CharGRU(48),
        lambda: (torch.randint(65, (32, 24)), torch.randint(65, (32, 24))),
        breadth_tasks.class_loss,
    ),
}


Agree = Callable[..., None]


def _agreeing(kit: Kit, what: str) -> Agree:
    """Exact products, and what counts the checks that are within their bound."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.simplefilter("ignore", UserWarning)
    done: dict[str, bool] = {}

    def agree(name: str, far: float, bound: float, **more: Any) -> None:
        fine = far <= bound
        done[name] = fine
        kit.rows.clear()  # of what was checked so far, should the time be over
        kit.row(what, sum(done.values()), f"of {len(done)}", goal="all")
        kit.add(f"check {name}", {"far": far, "bound": bound, "fine": fine, **more})
        if not fine:
            kit.failures.append(f"{name}: {far:.1e} apart, at most {bound:.1e} expected")

    return agree


def checks(kit: Kit) -> None:
    """Everything in float32 on the device beside float64 on a CPU; rows are how many agree."""
    agree = _agreeing(kit, "checks that agree")
    cudnn = torch.backends.cudnn.flags
    for name in NETWORKS:
        # A fused GRU shows no uses of its matrices, so they are stepped in another way.
        with kit.tried(f"learned optimizer, {name}"), cudnn(enabled=name != "GRU", allow_tf32=False):
            _learned(kit, name, agree)
    with kit.tried("replayed steps"):
        _replayed(kit, agree)
    with kit.tried("learned optimizer, fused GRU"), cudnn(enabled=True, allow_tf32=False):
        curve = _curve("GRU", kit.device, torch.float32, kit.sized(16, 3))
        agree("learned optimizer, fused GRU, falls", curve[-1] / curve[0], 1.0, curve=curve)
    for name in ("MLP", "CNN", "attention"):
        with kit.tried(f"moves, {name}"):
            _moves(kit, name, agree)
    with kit.tried("teleports"):
        _teleports(kit, agree)


def batched(kit: Kit) -> None:
    """Likewise for what trains many networks in one program, with and without CUDA graphs."""
    agree = _agreeing(kit, "checks of many networks in one program that agree")
    with kit.tried("replicas"):
        _replicas(kit, agree)
    with kit.tried("meta-training"):
        _meta_training(kit, agree)


def _curve(name: str, device: torch.device, dtype: torch.dtype, steps: int, autocast: bool = False) -> list[float]:
    """Losses of a run on two batches in turn."""
    make, draw, loss = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(device, dtype)
    torch.manual_seed(1)
    x, y = draw()
    x = (x.to(dtype) if x.is_floating_point() else x).to(device)
    half = len(x) // 2
    batches = [(x[:half], y[:half].to(device)), (x[half:], y[half:].to(device))]
    meta = copy.deepcopy(metatele.load("general").optimizer).to(dtype)
    run = Training(model, loss, batches, metatele.LearnedOptimizer(model, meta), autocast)
    found = []
    for _ in range(steps):
        run.step()
        found.append(float(run.last))
    return found


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, theirs, strict=True))


def _learned(kit: Kit, name: str, agree: Agree) -> None:
    """A few steps: as near to float64 as float32 on a CPU is, to a factor.

    On a GPU the largest directions of wide moments are found by products alone, and differ by what is left out anyway.
    """
    steps, cpu = kit.sized(16, 3), torch.device("cpu")
    exact = _curve(name, cpu, torch.float64, steps)
    near = _apart(_curve(name, cpu, torch.float32, steps), exact)
    curve = _curve(name, kit.device, torch.float32, steps)
    agree(f"learned optimizer, {name}", _apart(curve, exact), max(30 * near, 3e-3), cpu=near, end=curve[-1])
    half = _curve(name, kit.device, torch.float32, steps, autocast=True)
    agree(f"learned optimizer, {name}, bf16 autocast", _apart(half, exact), 0.1, end=half[-1])


def _replayed(kit: Kit, agree: Agree) -> None:
    """Steps between looks as graphs and one call after another: the same to rounding, and some were graphs."""
    curves: dict[str, list[float]] = {}
    counts = {}
    for kind in ("plain", "replayed"):
        torch.manual_seed(0)
        model = optimizer_step.perceptron(kit.sized(256, 16), kit.device)
        batches = optimizer_step.data(kit.sized(256, 16), 64, kit.device)
        optimizer = metatele.LearnedOptimizer(model)
        run, found = Training(model, functional.cross_entropy, batches, optimizer), []
        for step in range(kit.sized(40, 3)):
            run.step()
            found.append(float(run.last))
            if not step and kind == "plain":
                optimizer.stepper.course.replays = None
        curves[kind], replays = found, optimizer.stepper.course.replays
        counts[kind] = (0, 0) if replays is None else (replays.count, replays.captures)
    far = _apart(curves["replayed"], curves["plain"])
    agree("replayed steps", far, 2e-2, counts=counts, end=curves["replayed"][-1])
    agree("replayed steps, made by graphs", float(kit.gpu and counts["replayed"][0] < 20), 0.0)


def _moves(kit: Kit, name: str, agree: Agree) -> None:
    """Symmetries, random and canonical points, matching, and memories carried along."""
    make, draw, loss = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(1)
    x, y = draw()
    few = x[:4]
    here, there = copy.deepcopy(model), copy.deepcopy(model).to(kit.device)
    spaces = [
        [(s.group, s.k, s.parameters) for s in metatele.find_symmetries(m, t).spaces]
        for m, t in ((here, few), (there, few.to(kit.device)))
    ]
    agree(f"find_symmetries, {name}", float(spaces[0] != spaces[1]), 0.0, spaces=len(spaces[0]))
    optimizers = []
    for m, d in ((here, torch.device("cpu")), (there, kit.device)):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        run = Training(m, loss, [(x.to(d), y.to(d))], optimizer)
        for _ in range(3):
            run.step()
        optimizers.append(optimizer)
    there.load_state_dict(here.state_dict())  # to move both from the same point
    for kind, move in (("randomize_", metatele.randomize_), ("balance_", metatele.balance_)):
        settings = {"condition": 10.0} if kind == "randomize_" else {}
        reports = [move(m, t, **settings) for m, t in ((here, few), (there, few.to(kit.device)))]
        agree(f"{kind}, {name}, drift", reports[1].drift, 1e-3, cpu=reports[0].drift)
        pairs = zip(here.parameters(), there.parameters(), strict=True)
        far = max(float((p - q.cpu()).abs().max() / p.abs().max().clamp_min(1e-6)) for p, q in pairs)
        agree(f"{kind}, {name}, weights", far, 1e-2)
        for m, optimizer, report in zip((here, there), optimizers, reports, strict=True):
            metatele.carry_along_(optimizer, m, report)
        states = [
            torch.cat([optimizer.state[p]["exp_avg"].flatten().cpu() for p in m.parameters()])
            for m, optimizer in zip((here, there), optimizers, strict=True)
        ]
        far = float(torch.linalg.vector_norm(states[0] - states[1]) / torch.linalg.vector_norm(states[0]))
        agree(f"carry_along_ after {kind}, {name}", far, 2e-2)
    torch.manual_seed(2)
    other = make()
    matched = [
        metatele.match_(copy.deepcopy(other).to(d), m, few.to(d))
        for m, d in ((here, torch.device("cpu")), (there, kit.device))
    ]
    agree(f"match_, {name}, drift", matched[1].drift, 1e-3, cpu=matched[0].drift)
    agree(f"match_, {name}, similarity", abs(matched[1].similarity[1] - matched[0].similarity[1]), 1e-2)


def _teleports(kit: Kit, agree: Agree) -> None:
    """teleport_ and TeleportOptimizer, on a perceptron and on other modules."""
    for name in ("perceptron", "CNN", "attention"):
        reports, ends = [], []
        for device in (torch.device("cpu"), kit.device):
            torch.manual_seed(0)
            if name == "perceptron":
                model: nn.Module = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
                model.append(nn.Linear(16, 10))
                x, y, loss = torch.randn(64, 12), torch.randint(10, (64,)), functional.cross_entropy
            else:
                model, (x, y), loss = NETWORKS[name][0](), NETWORKS[name][1](), breadth_tasks.class_loss
            model, x, y = model.to(device), x[:32].to(device), y[:32].to(device)
            action = "approximate" if name == "perceptron" else None
            reports.append(metatele.teleport_(model, x, y, loss, steps=kit.sized(5, 1), action=action))
            torch.manual_seed(0)
            optimizer = metatele.TeleportOptimizer(torch.optim.Adam(model.parameters(), 1e-3), model, every=3)
            run = Training(model, loss, [(x, y)], optimizer)
            for _ in range(kit.sized(8, 3)):
                run.step()
            ends.append(float(run.last))
        ours, theirs = reports[1], reports[0]
        more = {"reason": ours.reason, "raised": ours.objective_after / ours.objective_before, "steps": ours.steps}
        agree(f"teleport_, {name}, drift", ours.drift, 0.02, cpu=theirs.drift, **more)
        far = abs(ours.objective_after / theirs.objective_after - 1)
        agree(f"teleport_, {name}, objective", far, 5e-2, moved=[theirs.moved, ours.moved])
        agree(f"TeleportOptimizer, {name}", abs(ends[1] / ends[0] - 1), 5e-2, loss=ends[1])


def _meta_training(kit: Kit, agree: Agree) -> None:
    """A few updates of both families that unroll."""
    for method in ("update-tele", "update", "lr-tele"):
        for precision, bound in (("float32", 1e-3), ("tf32", 3e-2), ("bf16", 3e-2)):
            ours = FlatTrainer(small_run(method=method, precision=precision), kit.device)
            theirs = FlatTrainer(small_run(method=method), "cpu")
            pairs = [(ours.step()["meta_loss"], theirs.step()["meta_loss"]) for _ in range(4)]
            far = max(abs(a - b) / max(abs(b), 1.0) for a, b in pairs)
            agree(f"meta-training, {method}, {precision}", far, bound)
    with _captures() as told:
        both = [FlatTrainer(small_run(graph=graph), kit.device) for graph in (None, False)]
        pairs = [(both[0].step(k == 2), both[1].step(k == 2)) for k in range(4)]
        scores = [trainer.validate()[0] for trainer in both]
    names = [name for name in pairs[2][1] if name != "ms_per_trajectory_step"]
    far = max(abs(pairs[2][0][name] - pairs[2][1][name]) / max(abs(pairs[2][1][name]), 1e-3) for name in names)
    agree("meta-training, measured in a graph", far, 1e-2)
    agree("meta-training, validated in a graph", abs(scores[0] - scores[1]), 1e-2)
    agree("meta-training, captures that failed", float(len(told)), 0.0, told=told)
    config = transfer(trajectories=16, batch=2, groups=2, horizon=8, shorter=(4,), unroll=4, widest=12, hidden=8)
    both = EquivariantTrainer(config, kit.device), EquivariantTrainer(config, "cpu")
    pairs = [(both[0].step()["meta_loss"], both[1].step()["meta_loss"]) for _ in range(3)]
    agree("meta-training, equivariant", max(abs(a - b) / max(abs(b), 1.0) for a, b in pairs), 1e-2)


def _replicas(kit: Kit, agree: Agree) -> None:
    """Many networks in one program, in windows of many steps and step by step."""
    draws = torch.Generator().manual_seed(0)
    x, y = torch.rand(1900, 64, generator=draws), torch.randint(10, (1900,), generator=draws)
    images = ImageSet("random", x[:1500], y[:1500], x[1500:], y[1500:], "")  # 75 steps an epoch: 50 and 25
    mlp = MLP((64, 12, 10), LeakyReLU(0.1))
    arms = [
        Arm("SGD", torch.optim.SGD, {"lr": 0.1}),
        Arm("Momentum", torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        Arm("Adam", torch.optim.Adam, {"lr": 1e-3}),
        Arm("Adam reset", torch.optim.Adam, {"lr": 1e-3}, resets=(1,)),
        Arm("AdamW", torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
        Arm("RMSprop", torch.optim.RMSprop, {"lr": 1e-4}),
        Arm("AdaGrad", torch.optim.Adagrad, {"lr": 1e-2}, resets=(1,)),
        Arm("teleport", torch.optim.SGD, {"lr": 0.1}, metatele.GradientNormAscent(steps=2), (0,), 1, 200),
    ]
    expected = Replicas(images, mlp, arms, range(3), 1500, 20).train(2).train_loss[-1].flatten().tolist()
    for graph in (None, False):
        with _captures() as told:
            replicas = Replicas(images, mlp, arms, range(3), 1500, 20, kit.device, graph=graph)
            losses = replicas.train(2).train_loss[-1].flatten().tolist()
        name = "replicas" if graph is None else "replicas, step by step"
        agree(name, _apart(losses, expected), 1e-3)
        agree(f"{name}, captures that failed", float(len(told)), 0.0, told=told)
    here = Population(images, mlp, range(4), 0.1, 1500, 20)
    here.train(2)
    for graph in (None, False):
        with _captures() as told:
            there = Population(images, mlp, range(4), 0.1, 1500, 20, kit.device, graph=graph)
            there.train(2)
        name = "population" if graph is None else "population, step by step"
        found = [p.measured("test")[0].cpu().flatten().tolist() for p in (there, here)]
        agree(name, _apart(*found), 1e-3)
        agree(f"{name}, captures that failed", float(len(told)), 0.0, told=told)


@contextmanager
def _captures() -> Iterator[list[str]]:
    """What is told of captures that fail in here."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told.extend(str(w.message)[:200] for w in caught if "CUDA graph" in str(w.message))
