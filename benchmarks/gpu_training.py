"""Parts of gpu.py about meta-training and the paper's figures: what they cost."""

from __future__ import annotations

import gc
import json
import math
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_kit import ROOT, Kit, spread, told
from meta_training import UNROLL, naive_ms, peak_gflops, products_window, training_window

from metatele.data import ImageSet, load_images
from metatele.errors import DataError
from metatele.experiments import fig5, images, table1
from metatele.perceptron.activations import LeakyReLU
from metatele.perceptron.mlp import MLP
from metatele.training.population import Population
from metatele.training.replicas import Replicas

GOALS = {("bf16", 8192): "<= 0.0003 (was 0.0011)", ("bf16", 1024): "<= 0.001 (was 0.0097)"}
STARTS = 3  # windows before those that are timed: a graph is captured in the first


# --- d: meta-training


def meta(kit: Kit) -> None:
    """Ms per trajectory-step by batch and precision, beside its products alone and the naive loop."""
    first = [("bf16", 8192), ("bf16", 1024), ("float32", 8192), ("tf32", 8192), ("bf16", 64)]
    _cases(kit, [*first, *((p, b) for b in (1024, 64) for p in ("float32", "tf32"))], graph=False)
    with kit.tried("profile of a window"):
        _profiled(kit, "bf16", kit.sized(8192, 3))


def graphs(kit: Kit) -> None:
    """The same, each window replayed as one CUDA graph."""
    _cases(kit, [("bf16", 64), ("bf16", 1024), ("bf16", 8192), ("float32", 64), ("float32", 1024)], graph=True)


def _profiled(kit: Kit, precision: str, batch: int) -> None:
    """The dearest operations of a window, by shape, and how many launches it takes."""
    from torch.profiler import ProfilerActivity, profile

    window = training_window(batch, precision, str(kit.device), graph=False)
    for _ in range(kit.sized(STARTS, 1)):
        window()
    kit.wait()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if kit.gpu else [])
    with profile(activities=activities, record_shapes=True) as seen:
        window()
        kit.wait()
    key = "self_device_time_total" if kit.gpu else "self_cpu_time_total"
    for by_shape in (False, True):
        rows = seen.key_averages(group_by_input_shape=by_shape)
        print(rows.table(sort_by=key, row_limit=40, max_name_column_width=50), flush=True)
    launches = sum(row.count for row in seen.key_averages() if "LaunchKernel" in row.key)
    kit.add("profile_window", {"precision": precision, "batch": batch, "launches": launches})


def _cases(kit: Kit, wanted: list[tuple[str, int]], graph: bool) -> None:
    device = str(kit.device)
    peaks: dict[str, float] = kit.values.setdefault("peak_gflops", {})
    if "naive_ms" not in kit.values:
        with kit.tried("naive loop"):
            kit.add("naive_ms", naive_ms(kit.sized(7, 1), device))
    how = "graph" if graph else "eager"
    for precision, batch in wanted[: kit.sized(len(wanted), 2)]:
        batch = kit.sized(batch, {64: 1, 1024: 2, 8192: 3}[batch])
        with kit.tried(f"{how} {precision} {batch}"):
            if precision not in peaks:
                peaks[precision] = peak_gflops(precision, device, kit.sized(2048, 128), kit.sized(9, 1))
            found = _measured(kit, precision, batch, graph)
            found["share_of_peak"] = found.pop("gflops") / peaks[precision]
            naive = kit.values.get("naive_ms", math.nan)
            found["naive_over_ours"] = naive / found["ms"]["median"]
            kit.add(f"{how}_{precision}_{batch}", found)
            note = (
                f"{100 * found['share_of_products']:.0f} % of its products, {100 * found['share_of_peak']:.0f} % of "
                f"peak, {found['naive_over_ours']:.0f} x naive"
            )
            goal = GOALS.get((precision, batch), "")
            kit.row(
                f"meta-training, {precision}, batch {batch}, {how}", found["ms"]["median"], "ms/traj-step", goal, note
            )
    ratios = [v["naive_over_ours"] for k, v in kit.values.items() if k.startswith(how)]
    if ratios:
        kit.row(f"naive loop over ours, best, {how}", max(ratios), "x", ">= 20000 (was 6090)")


def _measured(kit: Kit, precision: str, batch: int, graph: bool) -> dict[str, Any]:
    """Times of windows, and of their products alone, in turns."""
    device = str(kit.device)
    alone, flops = products_window(batch, precision, device)
    begin_s = time.perf_counter()
    window = training_window(batch, precision, device, graph=graph)
    built_s = time.perf_counter() - begin_s
    gc.collect()
    begin_s = time.perf_counter()
    try:
        for _ in range(kit.sized(STARTS, 1)):
            window()
            alone()
    except Exception as error:
        kit.values.setdefault("failed_graph", [precision, batch, told(error)])
        raise
    starts_s = time.perf_counter() - begin_s
    ours, products = [], []
    for _ in range(kit.sized(10, 2)):  # as many windows as a trajectory has: all begin anew once
        for run, kept in ((window, ours), (alone, products)):
            begin_s = kit.now_s()
            run()
            kept.append(kit.now_s() - begin_s)
    unit = 1e3 / (UNROLL * batch)
    share = statistics.median(products) / statistics.median(ours)
    if kit.gpu:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", flush=True)
        torch.cuda.reset_peak_memory_stats()
    return {
        "ms": spread([unit * t for t in ours]),
        "ms_mean_with_restarts": unit * statistics.mean(ours),
        "products_ms": spread([unit * t for t in products]),
        "share_of_products": share,
        "gflops": flops / statistics.median(ours) / 1e9,
        "built_s": built_s,
        "starts_s": starts_s,
    }


# --- e: quick


TINY = "--trajectories 4 --batch 2 --hidden 8 --horizon 20 --unroll 5 --validation-trajectories 2 "
TINY += "--validation-steps 10 --validation-score-at 9"


def quick(kit: Kit) -> None:
    """``train_meta.py quick`` as a user starts it, to its checkpoint; then again, to see where its time goes."""
    with kit.tried("quick"):
        _quick(kit, "quick", [str(ROOT / "train_meta.py")], "<= 8 (was 30)")
    spent_s = kit.values.get("quick", {}).get("seconds", math.inf)
    if kit.left_s() < 2 * spent_s + 5:
        kit.add("quick, profiled", "left out: no time left")
        return
    with kit.tried("quick, profiled"), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile"
        _quick(kit, "quick, profiled", ["-m", "cProfile", "-o", str(file), str(ROOT / "train_meta.py")], "")
        profile = pstats.Stats(str(file))
        for order, count in (("cumtime", 120), ("tottime", 40)):
            profile.sort_stats(order).print_stats(count)


def _quick(kit: Kit, name: str, program: list[str], goal: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = ["quick", "--out", str(out), "--device", kit.device.type, "--quiet", *kit.sized([], TINY.split())]
        begin_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *program, *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(10.0, kit.left_s() - 3),
            check=False,
        )
        spent_s = time.perf_counter() - begin_s
        print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
        if done.returncode:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["nothing said"]
            raise RuntimeError(f"exit code {done.returncode}: {last[-1][:200]}")
        if "CUDA graph" in done.stderr:
            kit.failures.append(f"{name}: its windows were not captured")
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ms = [m["ms_per_trajectory_step"] for m in metrics if "ms_per_trajectory_step" in m]
    scores = [m["validation_score"] for m in metrics if "validation_score" in m]
    found = {"seconds": spent_s, "ms_per_trajectory_step": statistics.median(ms) if ms else None}
    kit.add(name, {**found, "score": min(scores) if scores else None})
    kit.row(f"{name}, start to checkpoint", spent_s, "s", goal)


# --- f: the paper's figures


EPOCHS = 40  # of both
Rest = Callable[[], None]


def figures(kit: Kit) -> None:
    """Figure 5 (9 arms, 5 seeds) and Table 1 (100 networks): two epochs of each, then all forty where time allows."""
    data, source = _images(kit)
    kit.add("images", source)
    rests: list[tuple[str, Rest]] = []
    for name, begin in (("fig5", _fig5), ("table1", _table1)):
        with kit.tried(name), _captures_told(kit, name):
            rests.append((name, begin(kit, data, source)))
    for name, rest in rests:
        with kit.tried(f"{name}, the rest"), _captures_told(kit, name):
            rest()


@contextmanager
def _captures_told(kit: Kit, name: str) -> Iterator[None]:
    """A capture that fails in here is a failure."""
    with warnings.catch_warnings(record=True) as told_of:
        warnings.simplefilter("always")
        yield
    kit.failures += [f"{name}: {w.message}"[:200] for w in told_of if "CUDA graph" in str(w.message)]


def _images(kit: Kit) -> tuple[ImageSet, str]:
    """MNIST, or random pixels of its shape: the time does not depend on what they show."""
    if not kit.rehearse:
        try:
            return load_images("mnist", kit.data_root), "MNIST"
        except DataError as error:
            kit.failures.append(f"figures: random pixels, as {told(error)}")
    draws, count = torch.Generator().manual_seed(0), kit.sized(60_000, 1_900)
    x, y = torch.rand(count, 784, generator=draws), torch.randint(10, (count,), generator=draws)
    test = count // 6
    return ImageSet("random", x[test:], y[test:], x[:test], y[:test], ""), "random pixels"


def _fig5(kit: Kit, data: ImageSet, source: str) -> Rest:
    count = images.train_count(data) if not kit.rehearse else len(data.train_labels)
    count = min(count, kit.sized(50_000, count))
    arms = fig5.arms("ref", count)
    replicas = Replicas(data, MLP((data.features, 16, 10, 10), LeakyReLU(0.1)), arms, range(5), count, 20, kit.device)
    times: list[float] = []
    stepped = [0.0]

    def epoch() -> None:
        begin_s = kit.now_s()
        replicas.train(1)
        times.append(kit.now_s() - begin_s)
        history = replicas.history
        stepped.append(history.step_seconds)
        parts = {
            "steps_s": history.step_seconds,
            "step_ms": 1e3 * (stepped[-1] - stepped[-2]) / (count // 20),
            "teleports_s": history.teleport_seconds,
            "evaluations_s": history.evaluation_seconds,
        }
        whole_s, note = of_all(times, kit.sized(EPOCHS, 3))
        kit.add("fig5", {"epochs_s": times, "whole_s": whole_s, **parts})
        kit.row("fig5, 40 epochs, 9 arms x 5 seeds", whole_s, "s", "<= 30", f"{source}, {note}")

    return _two_and_the_rest(kit, epoch, times)


def of_all(times: Sequence[float], epochs: int) -> tuple[float, str]:
    """Seconds of all epochs, those to come like the median of those after the first; and where that is from."""
    each_s = statistics.median(times[1:] or times)
    if len(times) >= epochs:
        return sum(times), f"all {epochs} epochs, the first {times[0]:.2f} s, then {each_s:.2f} s each"
    note = f"extrapolated from {len(times)} epochs: the first {times[0]:.2f} s, then {each_s:.2f} s each"
    return sum(times) + (epochs - len(times)) * each_s, note


def _two_and_the_rest(kit: Kit, epoch: Callable[[], None], times: Sequence[float]) -> Rest:
    """Two epochs now; and what makes the others, as long as there is time."""
    for _ in range(2):
        epoch()

    def rest() -> None:
        while len(times) < kit.sized(EPOCHS, 3) and kit.left_s() > 2 * max(times[1:]) + 2:
            epoch()

    return rest


def _table1(kit: Kit, data: ImageSet, source: str) -> Rest:
    networks = kit.sized(100, 3)
    count = min(len(data.train_labels), kit.sized(50_000, 400))
    mlp = MLP((data.features, 16, 10, 10), LeakyReLU(0.1))
    population = Population(data, mlp, range(networks), 1e-2, count, 20, kit.device)
    times: list[float] = []
    geometry: dict[str, Any] = {}

    def epoch() -> None:
        begin_s = kit.now_s()
        population.train(len(times) + 1)
        times.append(kit.now_s() - begin_s)
        told_now()

    def told_now() -> None:
        whole_s, note = of_all(times, kit.sized(EPOCHS, 3))
        whole_s += geometry.get("geometry_s", 0.0)
        kit.add("table1", {"epochs_s": times, "whole_s": whole_s, **geometry})
        after = f"geometry {geometry['geometry_s']:.1f} s" if geometry else "without the geometry"
        kit.row("table1, 40 epochs, 100 networks", whole_s, "s", "<= 30", f"{source}, {note}; {after}")

    rest = _two_and_the_rest(kit, epoch, times)
    begin_s = kit.now_s()
    values = table1.geometry(population, tuple(1e-3 + 1e-2 * i for i in range(kit.sized(20, 2))))
    geometry["finite"] = all(bool(torch.isfinite(v).all()) for v in values.values())
    geometry["geometry_s"] = kit.now_s() - begin_s
    told_now()
    return rest
