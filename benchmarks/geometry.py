"""Cost of sharpness φ and curvature ψ for many networks, against plain loops.

python benchmarks/geometry.py --json results/benchmarks/geometry.json

100 networks of Table 1's MNIST shape (784-16-10-10) on one batch of 200: φ with 200 directions and 20
displacements, ψ with 200 curves, against a plain loop over networks, directions and displacements (curves) that
evaluates one loss (one curvature) at a time; a part of the loop is timed in the same run, before and after, and scaled
up. Then both for 100 networks of CIFAR-10's size (3072-128-32-10), with the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from common import environment, save  # noqa: E402

from metatele.geometry import Curvature, Landscape, Sharpness, curvatures  # noqa: E402
from metatele.perceptron.activations import LeakyReLU  # noqa: E402
from metatele.perceptron.losses import CrossEntropy  # noqa: E402
from metatele.perceptron.mlp import MLP  # noqa: E402

NETWORKS, DIRECTIONS, SAMPLES = 100, 200, 200


def scene(widths: tuple[int, ...]) -> tuple[Landscape, torch.Tensor]:
    """Random images and networks: the time does not depend on what they show."""
    random = torch.Generator().manual_seed(0)
    mlp = MLP(widths, LeakyReLU(0.1))
    x = torch.rand(widths[0], SAMPLES, generator=random)
    y = torch.randint(10, (SAMPLES,), generator=random)
    w = torch.randn(NETWORKS, mlp.num_parameters, generator=random) / widths[0] ** 0.5
    return Landscape(mlp, x, y, CrossEntropy()), w


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@torch.no_grad()
def plain_sharpness(landscape: Landscape, w: torch.Tensor, phi: Sharpness, networks: int) -> torch.Tensor:
    """One loss at a time."""
    values = torch.zeros(networks)
    for d in phi.draw(w.shape[-1], w):
        for t in phi.displacements:
            for m in range(networks):
                values[m] += landscape.value(w[m] + t * d)
    return values / (phi.directions * len(phi.displacements))


@torch.no_grad()
def plain_curvature(landscape: Landscape, w: torch.Tensor, psi: Curvature, networks: int) -> torch.Tensor:
    """One curve of one network at a time."""
    values = torch.zeros(networks)
    drawn = psi.draw(landscape.mlp, w)
    for m in range(networks):
        for c in range(psi.curves):
            values[m] += curvatures(landscape, landscape.mlp.unflatten(w[m]), [M[c : c + 1] for M in drawn]).kappa[0]
    return values / psi.curves


def main() -> None:
    """Print the table; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    landscape, w = scene((784, 16, 10, 10))
    few_phi, few_psi = Sharpness(directions=4), Curvature(curves=20)
    part = 10  # networks of the plain loops
    # They agree, and everything is warm.
    torch.testing.assert_close(
        few_phi.value(landscape.at(w[:part])), plain_sharpness(landscape, w, few_phi, part), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        few_psi.value(landscape.at(w[:part])), plain_curvature(landscape, w, few_psi, part), rtol=1e-3, atol=1e-6
    )
    scale = NETWORKS / part
    timings = []
    for _ in range(3):
        row = {
            "plain_sharpness": seconds(lambda: plain_sharpness(landscape, w, few_phi, part))
            * scale
            * DIRECTIONS
            / few_phi.directions,
            "sharpness": seconds(lambda: Sharpness(directions=DIRECTIONS).value(landscape.at(w))),
            "plain_curvature": seconds(lambda: plain_curvature(landscape, w, few_psi, part))
            * scale
            * DIRECTIONS
            / few_psi.curves,
            "curvature": seconds(lambda: Curvature(curves=DIRECTIONS).value(landscape.at(w))),
        }
        timings.append(row)
    best = {name: sorted(row[name] for row in timings)[1] for name in timings[0]}
    for name in ("sharpness", "curvature"):
        ratio = best[f"plain_{name}"] / best[name]
        print(f"{name:>10}: {best[name]:6.2f} s, plain loop {best[f'plain_{name}']:7.1f} s, 1/{ratio:.1f}")
    plain, ours = (best[f"{p}sharpness"] + best[f"{p}curvature"] for p in ("plain_", ""))
    print(f"{'both':>10}: {ours:6.2f} s, plain loop {plain:7.1f} s, 1/{plain / ours:.1f}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    landscape, w = scene((3072, 128, 32, 10))
    large = {
        "sharpness": seconds(lambda: Sharpness(directions=4).value(landscape.at(w))) * DIRECTIONS / 4,
        "curvature": seconds(lambda: Curvature(curves=8).value(landscape.at(w))) * DIRECTIONS / 8,
    }
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"3072-128-32-10: sharpness {large['sharpness']:.0f} s, curvature {large['curvature']:.0f} s (scaled up from "
        f"parts), weights {w.nbytes / 2**20:.0f} MiB, peak of the process {after / 2**10:.0f} MiB "
        f"({before / 2**10:.0f} before)"
    )
    result = {
        "networks": NETWORKS,
        "directions": DIRECTIONS,
        "displacements": 20,
        "samples": SAMPLES,
        "seconds": best,
        "all_seconds": timings,
        "ratio": plain / ours,
        "cifar10_seconds": large,
        "peak_mib": after / 2**10,
        "weights_mib": w.nbytes / 2**20,
        "environment": environment(),
    }
    save(args.json, result)


if __name__ == "__main__":
    main()
