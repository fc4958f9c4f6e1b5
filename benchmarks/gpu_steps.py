"""Parts of gpu.py about a user's training: what a step and a teleport cost, and the time to a held-out loss."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import breadth_tasks
import numpy as np
import optimizer_step
import torch
from gpu_kit import Asked, Kit, Training, sized_gpt, spread, tokens
from torch import Tensor, nn
from torch.nn import functional

import metatele
from metatele.optim.any_module import movable
from metatele.teleport.modules import ascend_

OURS = "any module, mini-batches"  # LearnedOptimizer's default, as optimizer_step.py calls it
AGE = 300  # steps after which looks are as rare as they become
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuLaunchKernelEx", "cudaLaunchKernelExC")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def fused_adam(model: nn.Module) -> torch.optim.Optimizer:
    """Torch's fastest."""
    return torch.optim.Adam(model.parameters(), fused=True)


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same, decoupled."""
    return torch.optim.AdamW(model.parameters(), 3e-4, fused=True)


def aged(optimizer: torch.optim.Optimizer, age: int) -> None:
    """Let a LearnedOptimizer look as rarely as after so many steps."""
    course = optimizer.stepper.course  # type: ignore[attr-defined]
    course.age = max(course.age, age)


# --- c: steps


def steps(kit: Kit) -> None:
    """A step beside Adam's on perceptrons and CNNs, beside fused AdamW's on GPT-2's shapes; launches and waits."""
    for width in kit.sized((256, 512, 1024), (16,)):
        with kit.tried(f"width {width}"):
            _width(kit, width)
    with kit.tried("GPT-2 small"):
        _gpt(kit)
    for name, batch in (("cnn", 128), ("resnet", 128)):
        with kit.tried(name):
            _images(kit, name, kit.sized(batch, 8))


def _width(kit: Kit, width: int) -> None:
    """As optimizer_step.py times it, with fused Adam beside."""
    known = {method.name: method for method in optimizer_step.methods()}
    names = (optimizer_step.ADAM, optimizer_step.ADAMW, optimizer_step.ALONE, OURS)
    chosen = [known[name] for name in names]
    chosen.append(optimizer_step.Method("Adam, fused", fused_adam))
    batches = optimizer_step.data(width, kit.sized(200, 40), kit.device)
    turns: dict[str, list[optimizer_step.Turn]] = {method.name: [] for method in chosen}
    for method in chosen:
        optimizer_step.trained(method, batches, 1, kit.sized(20, 2))
    for _ in range(kit.sized(2, 1)):
        for method in chosen:
            begin, count = kit.sized((60, 240), (3, 5))
            turns[method.name].append(optimizer_step.trained(method, batches, begin, count))
    rows = optimizer_step.compared(turns)
    kit.add(f"steps_width_{width}", rows)
    ours, fused = (next(row for row in rows if row["method"] == name) for name in (OURS, "Adam, fused"))
    note = f"{ours['ms_median']:.2f} ms; {ours['ms_median'] / fused['ms_median']:.2f} x fused Adam"
    kit.row(
        f"LearnedOptimizer step, width {width}", ours["over_adam_median"], "x Adam", "<= 1.2 (was 2.8 to 3.2)", note
    )
    if width == kit.sized(256, 16):
        model = optimizer_step.perceptron(width, kit.device)
        makes = {"LearnedOptimizer": metatele.LearnedOptimizer, "Adam, fused": fused_adam}
        _profiled(kit, f"width {width}", model, functional.cross_entropy, batches, makes)


def _images(kit: Kit, name: str, batch: int) -> None:
    draws = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(batch, 3, 32, 32, generator=draws), torch.randint(10, (batch,), generator=draws)) for _ in range(4)
    ]
    batches = [(x.to(kit.device), y.to(kit.device)) for x, y in pairs]
    _beside(
        kit, name, getattr(breadth_tasks, name), breadth_tasks.class_loss, batches, fused_adam, "x fused Adam", "<= 1.2"
    )


def _gpt(kit: Kit) -> None:
    vocabulary, context, batch = kit.sized((50304, 512, 16), (65, 16, 4))
    shape = kit.sized((768, 12, 12), (16, 2, 2))
    batches = tokens(vocabulary, batch, context, 4, kit.device)

    def make() -> nn.Module:
        return sized_gpt(*shape, vocabulary, context)

    _beside(
        kit,
        "GPT-2 small, bf16",
        make,
        breadth_tasks.class_loss,
        batches,
        fused_adamw,
        "x fused AdamW",
        "<= 1.15",
        autocast=True,
    )


def _beside(
    kit: Kit,
    name: str,
    make: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    peer: Callable[[nn.Module], torch.optim.Optimizer],
    unit: str,
    goal: str,
    autocast: bool = False,
) -> None:
    """Time a peer's step and ours in turns, on twins of one network."""
    torch.manual_seed(0)
    first = make().to(kit.device)
    runs: dict[str, Training] = {}
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in first.parameters())}
    makes = {"peer": peer, "ours": metatele.LearnedOptimizer, "alone": None}
    for who, build in makes.items():
        model = copy.deepcopy(first)
        optimizer = None if build is None else build(model)
        runs[who] = Training(model, loss, batches, optimizer, autocast)
        found[f"{who}_first_10_ms"] = kit.chunks(runs[who].step, 1, kit.sized(10, 2))["median"]
        for _ in range(kit.sized(20, 2)):
            runs[who].step()
    aged(runs["ours"].optimizer, AGE)  # type: ignore[arg-type]
    times: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(kit.sized(2, 1)):
        for who, run in runs.items():
            times[who].append(kit.chunks(run.step, 1, kit.sized(30 if autocast else 60, 3))["median"])
    found |= {who: spread(ms) for who, ms in times.items()}
    ratios = [a / b for a, b in zip(times["ours"], times["peer"], strict=True)]
    found["ratio"] = spread(ratios)
    found["last_losses"] = {who: float(run.last) for who, run in runs.items()}
    if kit.gpu:
        found["peak_memory_gib_of_all"] = torch.cuda.max_memory_allocated(kit.device) / 2**30
    kit.add(f"steps_{name}", found)
    note = f"{found['ours']['median']:.2f} ms, {found['peer']['median']:.2f} ms; alone {found['alone']['median']:.2f}"
    kit.row(f"LearnedOptimizer step, {name}", found["ratio"]["median"], unit, goal, note)
    del runs
    _profiled(kit, name, first, loss, batches, {"LearnedOptimizer": metatele.LearnedOptimizer, "peer": peer}, autocast)


def _profiled(
    kit: Kit,
    name: str,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    makes: dict[str, Callable[[nn.Module], torch.optim.Optimizer]],
    autocast: bool = False,
) -> None:
    """Launches, waits and the dearest operations of steps between two looks; and of a look, what is asked for."""
    from torch.profiler import ProfilerActivity, profile

    count = kit.sized(5, 2)
    for who, make in makes.items():
        with kit.tried(f"profile of {who}, {name}"):
            twin = copy.deepcopy(model)
            run = Training(twin, loss, batches, make(twin), autocast)
            for _ in range(kit.sized(12, 3)):
                run.step()
            if who == "LearnedOptimizer":
                aged(run.optimizer, AGE + 1)  # the next look is far
            run.step()
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if kit.gpu else [])
            kit.wait()
            with profile(activities=activities) as seen:
                begin_s = time.perf_counter()
                for _ in range(count):
                    run.step()
                wall_ms = 1e3 * (kit.now_s() - begin_s)
            kit.add(f"profile_{name}_{who}", _counts(seen, count, wall_ms) | _replays(run.optimizer))
            key = "self_device_time_total" if kit.gpu else "self_cpu_time_total"
            print(seen.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60), flush=True)
            if kit.gpu:
                print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=15), flush=True)
            if who == "LearnedOptimizer":
                _asked(kit, name, run)


def _asked(kit: Kit, name: str, run: Training) -> None:
    """What ``step`` asks the device for, between looks and at one."""
    found = {}
    for when, age in (("between looks", AGE + 20), ("at a look", AGE + 60 - 1)):
        run.optimizer.stepper.course.age = age  # type: ignore[union-attr]
        run.step()  # after which the passes know what is wanted
        x, y = run.batches[0]
        run.optimizer.zero_grad()  # type: ignore[union-attr]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=run.autocast):
            loss = run.loss(run.model(x), y)
        loss.backward()
        with Asked() as asked:
            run.optimizer.step()  # type: ignore[union-attr]
        lines = {f"{operation} {line}": times for (operation, line), times in asked.found.most_common()}
        found[when] = {"waits": asked.count, "operations": asked.operations, "lines": lines}
    kit.add(f"asked_{name}", found)


def _replays(optimizer: Any) -> dict[str, Any]:
    """How many bodies were replayed as graphs so far, and how many graphs were made."""
    replays = getattr(getattr(getattr(optimizer, "stepper", None), "course", None), "replays", None)
    return (
        {}
        if replays is None
        else {"replayed": replays.count, "captures": replays.captures, "off": replays.off, "full": replays.full}
    )


def _counts(seen: Any, count: int, wall_ms: float) -> dict[str, float]:
    """Of each step."""
    averages = list(seen.key_averages())

    def of(names: Sequence[str]) -> float:
        return sum(event.count for event in averages if event.key.startswith(tuple(names))) / count

    kernels_us = sum(
        getattr(event, "self_device_time_total", 0.0) for event in averages if "CUDA" in str(event.device_type)
    )
    return {
        "ms_profiled": wall_ms / count,
        "launches": of(LAUNCHES),
        "waits": of(WAITS),
        "copies": of(("cudaMemcpyAsync",)),
        "values_read": of(("aten::_local_scalar_dense",)),
        "device_busy_share": kernels_us / 1e3 / wall_ms,
    }


# --- g: teleports


def moves(kit: Kit) -> None:
    """Ten steps of ascent, in steps of a training with fused Adam on the same batch."""
    for width in kit.sized((256, 1024), (16,)):
        with kit.tried(f"perceptron of width {width}"):
            model = optimizer_step.perceptron(width, kit.device)
            x, y = optimizer_step.data(width, kit.sized(200, 40), kit.device)[0]
            gradient_ms = _gradient_ms(kit, model, x, y, functional.cross_entropy, False)
            paper = metatele.GradientNormAscent(
                1e-3, 10, action="approximate", parametrisation="first-order", max_drift=math.inf
            )
            kinds: dict[str, dict[str, Any]] = {
                "default": {"steps": 10, "action": "approximate"},
                "paper's": {"move": paper},
            }
            for kind, settings in kinds.items():
                with kit.tried(f"{kind} teleport of width {width}"):
                    _ascent(kit, f"width {width}, {kind}", model, x, y, settings, gradient_ms)
    for shape in kit.sized(((64, 2, 4), (384, 6, 6)), ((16, 1, 2),)):
        with kit.tried(f"GPT {shape}"):
            _gpt_ascent(kit, shape)


def _gradient_ms(kit: Kit, model: nn.Module, x: Tensor, y: Tensor, loss: Any, autocast: bool) -> float:
    twin = copy.deepcopy(model)
    run = Training(twin, loss, [(x, y)], fused_adam(twin), autocast)
    return kit.chunks(run.step, kit.sized(5, 2), kit.sized(20, 2), warm=kit.sized(10, 1))["median"]


def _ascent(
    kit: Kit, name: str, model: nn.Module, x: Tensor, y: Tensor, settings: dict[str, Any], gradient_ms: float
) -> None:
    times, report = [], None
    for turn in range(kit.sized(4, 2)):
        twin = copy.deepcopy(model)
        begin_s = kit.now_s()
        report = metatele.teleport_(twin, x, y, functional.cross_entropy, **settings)
        if turn:  # the first one loads kernels
            times.append(1e3 * (kit.now_s() - begin_s))
    assert report is not None
    ms = spread(times)
    more = {"steps": report.steps, "moved": report.moved, "reason": report.reason, "drift": report.drift}
    ratio = ms["median"] / gradient_ms
    kit.add(f"teleport_{name}", {**ms, "gradient_step_ms": gradient_ms, "gradient_steps": ratio, **more})
    kit.row(
        f"teleport, {name}", ratio, "steps", "<= 20" if kit.rehearse or "1024" in name else "", f"{ms['median']:.1f} ms"
    )


def _gpt_ascent(kit: Kit, shape: tuple[int, int, int]) -> None:
    context = kit.sized(256 if shape[0] > 64 else 64, 16)
    torch.manual_seed(0)
    model = sized_gpt(*shape, 65, context).to(kit.device)
    x, y = tokens(65, kit.sized(32, 4), context, 1, kit.device)[0]
    loss = breadth_tasks.class_loss
    gradient_ms = _gradient_ms(kit, model, x, y, loss, False)
    begin_s = kit.now_s()
    spaces = movable(model, (x,), {}, list(model.parameters()))
    found_s = kit.now_s() - begin_s
    kit.add(f"find_symmetries_gpt_{shape[0]}", {"seconds": found_s, "spaces": len(spaces)})
    times = []
    for turn in range(kit.sized(3, 2)):
        twin = copy.deepcopy(model)
        begin_s = kit.now_s()
        report = ascend_(twin, spaces, lambda twin=twin: loss(twin(x), y), steps=kit.sized(10, 2))
        if turn:
            times.append(1e3 * (kit.now_s() - begin_s))
    ms = spread(times)
    ratio = ms["median"] / gradient_ms
    more = {"steps": report.steps, "raised": report.objective_after / report.objective_before, "drift": report.drift}
    kit.add(f"teleport_gpt_{shape[0]}", {**ms, "gradient_step_ms": gradient_ms, "gradient_steps": ratio, **more})
    note = f"{ms['median']:.0f} ms, {report.steps} kept; symmetries found in {found_s:.1f} s, once"
    kit.row(f"teleport, GPT {shape[1]} x {shape[0]}, spaces known", ratio, "steps", "<= 20", note)


# --- h: time to quality


def quality(kit: Kit) -> None:
    """A GPT of characters with AdamW (1e-3, warm-up, cosine) and with LearnedOptimizer: time to AdamW's last loss."""
    width, depth, heads, context, batch = kit.sized((384, 6, 6, 256, 64), (16, 2, 2, 16, 8))
    text, source = _text(kit)
    end = len(text) * 9 // 10
    places = torch.arange(context, device=kit.device)

    def windows(begins: Tensor) -> tuple[Tensor, Tensor]:
        at = begins.to(kit.device)[:, None] + places
        return text[at], text[at + 1]

    held_out = [
        windows(part) for part in torch.linspace(end, len(text) - context - 2, kit.sized(512, 8)).long().split(128)
    ]
    probe = _Quality(kit, width, depth, heads, context, batch, windows, end, held_out)
    ms = {who: probe.run(who, kit.sized(25, 2), kit.sized(25, 1))["ms_per_step"] for who in ("AdamW", "ours")}
    fit = int(0.7 * kit.left_s() / max(1e-3 * sum(ms.values()), 1e-4))
    count = kit.sized(max(100, min(1000, fit)), 6)
    kit.add("quality_plan", {"steps": count, "first_ms": ms, "text": source})
    curves = {}
    for who in ("AdamW", "ours"):
        curves[who] = probe.run(who, count, max(1, count // 25))
        kit.add(f"quality_{who}", curves[who])
    target = curves["AdamW"]["loss"][-1]
    total_s = curves["AdamW"]["seconds"][-1]
    reached = [s for s, v in zip(curves["ours"]["seconds"], curves["ours"]["loss"], strict=True) if v <= target]
    share = reached[0] / total_s if reached else math.nan
    best = {who: min(curve["loss"]) for who, curve in curves.items()}
    note = (
        f"AdamW ends at {target:.4f} in {total_s:.1f} s; ours at {curves['ours']['loss'][-1]:.4f} in "
        f"{curves['ours']['seconds'][-1]:.1f} s; {count} steps, one seed"
    )
    kit.add("quality_summary", {"share_of_time": share, "best": best, "target": target})
    kit.row(f"char-GPT {depth} x {width}: time to AdamW's last loss", share, "of AdamW's", "<= 0.7", note)
    with kit.tried("figure"):
        _drawn(kit, curves)


def _text(kit: Kit) -> tuple[Tensor, str]:
    """Tiny Shakespeare as numbers, or random characters of the same length where it is not."""
    if kit.data_root is not None and (kit.data_root / "tinyshakespeare" / "input.txt").is_file():
        codes = np.frombuffer((kit.data_root / "tinyshakespeare" / "input.txt").read_bytes(), dtype=np.uint8)
        text = torch.from_numpy(np.searchsorted(np.unique(codes), codes).astype(np.int64))
        return text.to(kit.device), "tiny Shakespeare"
    kit.failures.append("quality: no text under --data-root, random characters instead")
    return torch.randint(65, (kit.sized(1_000_000, 2_000),), generator=torch.Generator().manual_seed(0)).to(
        kit.device
    ), "random"


class _Quality:
    """Runs of one network from one start on one order of batches."""

    def __init__(
        self,
        kit: Kit,
        width: int,
        depth: int,
        heads: int,
        context: int,
        batch: int,
        windows: Callable[[Tensor], tuple[Tensor, Tensor]],
        end: int,
        held_out: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self.kit, self.windows, self.held_out = kit, windows, held_out
        self.last, self.batch = end - context - 1, batch
        torch.manual_seed(0)
        self.first = sized_gpt(width, depth, heads, breadth_tasks.CHARACTERS, context).to(kit.device)

    @torch.no_grad()
    def measured(self, model: nn.Module) -> float:
        """Mean held-out loss."""
        with torch.autocast(self.kit.device.type, torch.bfloat16):
            losses = [breadth_tasks.class_loss(model(x).float(), y) for x, y in self.held_out]
        return float(torch.stack(losses).mean())

    def run(self, who: str, count: int, every: int) -> dict[str, Any]:
        """Held-out losses and the seconds of training before each."""
        model = copy.deepcopy(self.first)
        schedule = None
        if who == "AdamW":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
            )
            warm = max(1, count // 10)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda s: min((s + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(1.0, s / count)))
            )
        else:
            optimizer = metatele.LearnedOptimizer(model, total_steps=count)
        draws = torch.Generator().manual_seed(0)
        begins = torch.randint(self.last, (count, self.batch), generator=draws).to(self.kit.device)
        seconds, losses, at, spent_s = [], [], [], 0.0
        begin_s = self.kit.now_s()
        for number in range(count):
            x, y = self.windows(begins[number])
            optimizer.zero_grad()
            with torch.autocast(self.kit.device.type, torch.bfloat16):
                loss = breadth_tasks.class_loss(model(x), y)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if (number + 1) % every == 0 or number + 1 == count:
                spent_s += self.kit.now_s() - begin_s
                seconds.append(spent_s)
                losses.append(self.measured(model))
                at.append(number + 1)
                self.kit.values[f"quality_{who}"] = {"steps": at, "seconds": seconds, "loss": losses, "of": count}
                self.kit.save()  # stays, if time runs out
                begin_s = self.kit.now_s()
        return {"steps": at, "seconds": seconds, "loss": losses, "ms_per_step": 1e3 * spent_s / count}


def _drawn(kit: Kit, curves: dict[str, dict[str, Any]]) -> None:
    from metatele.figures import label_lines, line_style, png, subplots

    figure, axes = subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for part, what in zip(axes, ("seconds", "steps"), strict=True):
        for place, (who, curve) in enumerate(curves.items()):
            label = "LearnedOptimizer" if who == "ours" else who
            part.plot(curve[what], curve["loss"], label=label, **line_style(place))
        part.set_xlabel(f"{what} of training")
    axes[0].set_ylabel("held-out loss")
    label_lines(axes[-1])
    (kit.out / "quality.png").write_bytes(png(figure))
