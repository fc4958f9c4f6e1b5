"""Do sharpness φ and curvature ψ of small CNNs go with their held-out loss, as Table 1 of the paper asks of MLPs?

python benchmarks/table1_cnn.py --data-root DATA --json results/benchmarks/table1_cnn.json --seeds 80   # resumable
python benchmarks/table1_cnn.py --json results/benchmarks/table1_cnn.json --redraw

A CNN from every seed: 1-8-16 channels of 3 × 3 with stride 2, ReLU, then 784-10; SGD with batches of 20 on 10 000
images of Fashion-MNIST, 10 epochs, the same batches for all; five networks in one program. Then, as in Zhao et al.
2024, Eq. 4, φ is the loss averaged over random displacements ``t d``, with d uniform on the unit sphere, on batches of
200 training images each; beside it stand the training loss on the same batches and the rise φ - L, averaged over d and
-d. ψ is the curvature at t = 0 of ``exp(tT)·w``, averaged over random T in the algebra of the CNN's exact symmetries
(Eq. 5), which are scales of its channels. The held-out loss is that of 1000 test images.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from breadth_runs import loss_on  # noqa: E402
from breadth_tasks import Arrays, Headed, Split, Task, _images, class_loss  # noqa: E402
from jobs import Row, Runs, Study, main  # noqa: E402
from modules import named, random_tangent  # noqa: E402
from short_runs import finite  # noqa: E402

import metatele  # noqa: E402
from metatele.experiments.table1 import partial, pearson  # noqa: E402
from metatele.figures import COLOURS, WIDTH, png, subplots, title  # noqa: E402
from metatele.network.spaces import Space  # noqa: E402
from metatele.symmetry.exact import act, element_of  # noqa: E402

EPOCHS, BATCH, LR = 10, 20, 1e-2
TOGETHER = 5  # networks in one program
BATCHES, SAMPLES, CURVES = 50, 200, 200
DISPLACEMENTS = tuple(1e-4 + 1e-3 * 2 * i for i in range(10))  # the range of the reference for Fashion-MNIST
QUANTITIES = {
    "sharpness": "sharpness φ",
    "even_rise": "φ - L, mean over ±d",
    "curvature": "curvature ψ",
    "train_loss": "training loss L",
}


@dataclass(frozen=True)
class Job:
    """Some networks."""

    first: int
    count: int


class Small(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.inner = Headed(nn.Sequential(*convolutions, nn.Flatten()), nn.Linear(16 * 49, 10))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.inner(x.unsqueeze(1))


TASK = Task("Fashion-MNIST, small CNN", 0, Small, _images("fashion", BATCH), class_loss, 30)


def curvature(spaces: Sequence[Space], tensors: Mapping[str, Tensor], tangents: Sequence[Tensor]) -> float:
    r"""``κ = ‖γ''_⊥‖ / ‖γ'‖²`` at t = 0 of ``γ(t) = exp(tT)·w``, all spaces in one curve (Zhao et al. 2024, Eq. 47).

    Args:
        spaces: Of continuous groups; one after another acts.
        tensors: Parameters by name, which are w.
        tangents: T of each space.
    """
    own = {name: tensors[name].double() for name in dict.fromkeys(n for s in spaces for n in s.parameters)}

    def curve(t: Tensor) -> Tensor:
        moved = dict(own)
        for space, T in zip(spaces, tangents, strict=True):
            moved.update(act(space, element_of(space, t * T), moved))
        return torch.cat([p.flatten() for p in moved.values()])

    def velocity(t: Tensor) -> Tensor:
        return torch.func.jvp(curve, (t,), (torch.ones_like(t),))[1]

    zero = torch.zeros((), dtype=torch.float64)
    first, second = torch.func.jvp(velocity, (zero,), (torch.ones_like(zero),))
    across = second - first * (first @ second) / (first @ first)
    return float(across.norm() / first.square().sum())


def psi(model: nn.Module, x: Tensor, curves: int) -> float:
    """Mean curvature over random T, the same for every network."""
    spaces = [s for s in metatele.find_symmetries(model, x).spaces if s.group != "perm"]
    random = torch.Generator().manual_seed(0)
    tensors = named(model)
    total = 0.0
    for _ in range(curves):
        total += curvature(spaces, tensors, [random_tangent(space, random) for space in spaces])
    return total / curves


@torch.no_grad()
def phi(model: nn.Module, split: Split, batches: int) -> dict[str, float]:
    """φ, the loss itself and the rise over ±d, each direction on its own batch, the same for every network."""
    random, totals = torch.Generator().manual_seed(0), {"sharpness": 0.0, "train_loss": 0.0, "even_rise": 0.0}
    own = named(model)
    before = {n: t.clone() for n, t in own.items()}
    for _ in range(batches):
        draws = [split.draw(random) for _ in range(SAMPLES // BATCH)]
        x, y = (torch.cat(parts) for parts in zip(*draws, strict=True))
        loss = float(TASK.loss(model(x), y))
        d = {n: torch.randn(t.shape, generator=random) for n, t in before.items()}
        size = math.sqrt(sum(float(t.square().sum()) for t in d.values()))
        ahead = back = 0.0
        for t in DISPLACEMENTS:
            for sign in (1.0, -1.0):
                for n, p in own.items():
                    torch.add(before[n], d[n], alpha=sign * t / size, out=p)
                there = float(TASK.loss(model(x), y)) / len(DISPLACEMENTS)
                ahead, back = (ahead + there, back) if sign > 0 else (ahead, back + there)
        for n, p in own.items():
            p.copy_(before[n])
        totals["sharpness"] += ahead / batches
        totals["train_loss"] += loss / batches
        totals["even_rise"] += ((ahead + back) / 2 - loss) / batches
    return totals


def models(job: Job, split: Split, steps: int) -> list[nn.Module]:
    """Networks after training, each with gradients of its own, all with the same batches."""
    made = []
    for seed in range(job.first, job.first + job.count):
        torch.manual_seed(seed)
        made.append(TASK.model())
    stacked = {name: p.detach().requires_grad_() for name, p in torch.func.stack_module_state(made)[0].items()}
    one = TASK.model()

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return TASK.loss(torch.func.functional_call(one, parameters, (x,)), y)

    losses = torch.func.vmap(loss, (0, None, None))
    optimizer, random = torch.optim.SGD(stacked.values(), LR), torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = split.draw(random)
        optimizer.zero_grad()
        losses(stacked, x, y).sum().backward()
        optimizer.step()
    for n, model in enumerate(made):
        model.load_state_dict({name: p[n].detach() for name, p in stacked.items()})
    return made


def trained(job: Job, arrays: Arrays, epochs: int = EPOCHS, batches: int = BATCHES, curves: int = CURVES) -> Row:
    """Networks, and their numbers."""
    split, begin_s = TASK.split(arrays), time.perf_counter()
    made = models(job, split, round(epochs * len(arrays["fashion_train_y"]) / BATCH))
    trained_s = time.perf_counter()
    networks = []
    for n, model in enumerate(made):
        values = {**phi(model, split, batches), "curvature": psi(model, split.subset[0][:4], curves)}
        row = {"test_loss": loss_on(TASK, model, split.held_out), **values}
        networks.append({"seed": job.first + n, **{name: finite(value) for name, value in row.items()}})
    seconds = {"training_s": trained_s - begin_s, "geometry_s": time.perf_counter() - trained_s}
    return {**asdict(job), "networks": networks, **seconds}


def missing(runs: Runs[Job], seeds: int) -> list[Job]:
    """Some at a time."""
    jobs = [Job(first, min(TOGETHER, seeds - first)) for first in range(0, seeds, TOGETHER)]
    return [job for job in jobs if job not in runs.rows]


def result(runs: Runs[Job]) -> Row:
    """All networks, and the correlations of those whose numbers are finite."""
    each = {network["seed"]: network for row in runs.rows.values() for network in row["networks"]}
    rows = [each[seed] for seed in sorted(each)]
    kept = [row for row in rows if all(row[name] is not None for name in (*QUANTITIES, "test_loss"))]
    y = [row["test_loss"] for row in kept]
    found = {}
    for name in QUANTITIES:
        x = [row[name] for row in kept]
        r, low, high = pearson(x, y) if x else (math.nan,) * 3
        given = partial(x, y, [row["train_loss"] for row in kept]) if x and name != "train_loss" else math.nan
        numbers = {"mean": sum(x) / max(len(x), 1), "r": r, "low": low, "high": high, "given_train_loss": given}
        found[name] = {key: finite(value) for key, value in numbers.items()}
    about = {"epochs": EPOCHS, "batch": BATCH, "lr": LR, "displacements": DISPLACEMENTS, "curves": CURVES}
    return {"networks": rows, "kept": len(kept), "correlations": found, "directions": BATCHES, **about}


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def table(doc: Row) -> str:
    """Correlations with the held-out loss."""
    lines = ["| quantity | mean | Pearson with held-out loss | 95 % interval | given the training loss |"]
    lines.append("|:--|--:|--:|--:|--:|")
    for name, words in QUANTITIES.items():
        c = doc["correlations"][name]
        interval = f"{_signed(c['low'])} to {_signed(c['high'])}"
        lines.append(
            f"| {words} | {c['mean']:.4g} | {_signed(c['r'])} | {interval} | {_signed(c['given_train_loss'])} |"
        )
    losses = [row["test_loss"] for row in doc["networks"] if row["test_loss"] is not None]
    span = f"{min(losses):.4f} to {max(losses):.4f}" if losses else "none"
    lines += ["", f"{doc['kept']} networks, {doc['epochs']} epochs; held-out losses {span}."]
    return "\n".join(lines)


def drawn(doc: Row) -> bytes:
    """Scatter plots: each point is a network."""
    figure, axes = subplots(1, len(QUANTITIES), figsize=(WIDTH, 2.6), layout="constrained", sharey=True)
    for axis, (name, words) in zip(axes, QUANTITIES.items(), strict=True):
        rows = [r for r in doc["networks"] if r[name] is not None and r["test_loss"] is not None]
        axis.scatter(
            [r[name] for r in rows], [r["test_loss"] for r in rows], s=12, color=COLOURS[1], alpha=0.7, linewidth=0
        )
        title(axis, f"r = {_signed(doc['correlations'][name]['r'])}")
        axis.set_xlabel(words.replace(", ", ",\n"))
        axis.locator_params(axis="x", nbins=3)
    axes[0].set_ylabel("held-out loss")
    return png(figure)


STUDY = Study(
    Job,
    trained,
    missing,
    seconds=lambda job: 120.0,
    part=lambda job: ("Fashion-MNIST", "small CNN"),
    result=result,
    table=table,
    drawn=drawn,
)

if __name__ == "__main__":
    main(STUDY, __doc__, seeds=80)
