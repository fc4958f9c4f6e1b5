"""Cost of a teleport, and of an experiment in one program.

python benchmarks/teleport.py --json results/benchmarks/teleport.json

In one run, so that ratios hold on a noisy machine:
1. one epoch of one replica of Figure 5 as an ordinary training loop (nn.Sequential, autograd, Adam, batch 20,
   50 000 samples; a part is timed and scaled up), and the paper's teleport of one replica, 8 batches of 200
   with 10 ascent steps each, as a fraction of it;
2. the forty replicas of Figure 5 (4 optimizers, with and without teleport, 5 seeds) in one program against
   the same loops one after another;
3. one ascent step for hidden widths 16 to 1024 and batches 20 to 2000, beside one gradient of the same batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from common import environment, save  # noqa: E402

from metatele.data import ImageSet  # noqa: E402
from metatele.experiments import fig5  # noqa: E402
from metatele.geometry import Landscape  # noqa: E402
from metatele.perceptron.activations import LeakyReLU  # noqa: E402
from metatele.perceptron.losses import CrossEntropy  # noqa: E402
from metatele.perceptron.mlp import MLP  # noqa: E402
from metatele.teleport import GradientNormAscent  # noqa: E402
from metatele.training.replicas import Replicas  # noqa: E402

SAMPLES, BATCH, STEPS = 50_000, 20, 200


def seconds(*runs: Callable[[], object], repeats: int) -> list[float]:
    """Median wall-clock of each of several runs, taken in turns after a warm-up."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, kept in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            if repeat:
                kept.append(time.perf_counter() - begin)
    return [statistics.median(kept) for kept in times]


def images() -> ImageSet:
    """Random pixels in MNIST's shape: the time does not depend on what they show."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(SAMPLES, 784, generator=random)
    y = torch.randint(10, (SAMPLES,), generator=random)
    return ImageSet("random", x, y, x[:1000], y[:1000], "")


def ordinary_loop(data: ImageSet, optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[], None]:
    """``STEPS`` steps as one would write them."""
    layers = (784, 16), (16, 10), (10, 10)
    parts = [m for a, b in layers for m in (nn.Linear(a, b, False), nn.LeakyReLU(0.1))]
    model = nn.Sequential(*parts[:-1])
    opt = optimizer(model.parameters())

    def run() -> None:
        for batch in torch.randperm(SAMPLES)[: STEPS * BATCH].split(BATCH):
            opt.zero_grad()
            nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch]).backward()
            opt.step()

    return run


def main() -> None:
    """Print the tables; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    data = images()
    mlp = MLP((784, 16, 10, 10), LeakyReLU(0.1))
    arms = [arm for arm in fig5.arms("ref", SAMPLES) if not arm.resets]
    move = next(arm.teleport for arm in arms if arm.name == "Adam teleport")
    assert move is not None

    flat = torch.randn(mlp.num_parameters, generator=torch.Generator().manual_seed(0)) / 28
    scenes = [
        Landscape(mlp, x.T, y, CrossEntropy())
        for x, y in zip(data.train_images[:1600].split(200), data.train_labels[:1600].split(200), strict=True)
    ]

    def teleport() -> None:
        w = flat
        for scene in scenes:
            w = move(scene, w).weights

    replicas = Replicas(data, mlp, arms, range(5), SAMPLES, BATCH)
    orders = torch.stack([torch.randperm(SAMPLES) for _ in range(5)])

    def together() -> None:
        for step in range(STEPS):
            replicas._step(orders[:, step * BATCH : (step + 1) * BATCH])

    plain = [arm for arm in arms if arm.teleport is None and not arm.resets]
    loops = [ordinary_loop(data, lambda p, arm=arm: arm.optimizer(p, **arm.settings)) for arm in plain]
    *alone, moved, joint = seconds(*loops, teleport, together, repeats=args.repeats)
    epochs = {arm.name: t * SAMPLES / (STEPS * BATCH) for arm, t in zip(plain, alone, strict=True)}
    share = moved / epochs["Adam"]
    print("one epoch of one replica, ordinary loop: " + ", ".join(f"{n} {t:.2f} s" for n, t in epochs.items()))
    print(f"teleport of one replica, 8 x 10 ascent steps: {1e3 * moved:.1f} ms, {share:.3f} of an epoch (Adam)")
    one_by_one = 10 * sum(epochs.values())
    program = joint * SAMPLES / (STEPS * BATCH)
    print(
        f"one epoch of 40 replicas: {one_by_one:.1f} s one after another, {program:.2f} s in one program, "
        f"{one_by_one / program:.1f} times less"
    )

    print(f"{'width':>6} {'batch':>6} {'ascent step':>12} {'gradient':>10} {'ratio':>6}   (ms)")
    rows = []
    for width in (16, 64, 256, 1024):
        for batch in (20, 200, 2000):
            shape = MLP((784, width, width, 10), LeakyReLU(0.1))
            w = torch.randn(shape.num_parameters, generator=torch.Generator().manual_seed(0)) / 28
            scene = Landscape(shape, data.train_images[:batch].T, data.train_labels[:batch], CrossEntropy())
            ten = GradientNormAscent(1e-3, 10, action="approximate", parametrisation="first-order", max_drift=1e9)
            spent, gradient = seconds(
                lambda scene=scene, w=w, ten=ten: ten(scene, w),
                lambda scene=scene, w=w: scene.at(w).gradient,
                repeats=2,
            )
            rows.append({"width": width, "batch": batch, "step_ms": 100 * spent, "gradient_ms": 1e3 * gradient})
            print(f"{width:>6} {batch:>6} {100 * spent:>12.3f} {1e3 * gradient:>10.3f} {0.1 * spent / gradient:>6.1f}")
    result = {
        "epoch_seconds": epochs,
        "teleport_seconds": moved,
        "teleport_in_epochs": share,
        "sequential_epoch_seconds_of_40": one_by_one,
        "batched_epoch_seconds_of_40": program,
        "rows": rows,
        "environment": environment(),
    }
    save(args.json, result)


if __name__ == "__main__":
    main()
