"""Cost of a user's training step with each optimizer of this package, beside Adam's, and what it remembers.

python benchmarks/optimizer_step.py --json results/benchmarks/optimizer_step.json

A step is zero_grad, forward, backward and the optimizer's step, on a perceptron with two hidden layers; the
optimizer's share is what a step takes beyond the same without any optimizer, its hooks in the passes included. A turn
trains a new model of every method, one after another. So all turns do the same work, and the least and the median
over them differ by the machine's noise alone; ratios are of times of the same turn, medians over the turns.

``over_adamw`` is the same beside AdamW. Bytes of state are those of all tensors that the optimizer holds at the end of
a turn, its own work space included, for each number of the model; parameters and their gradients are none of them.

The move timed is GradientNormAscent(), the paper's, on the data of the step.

What a step costs depends on its age. LearnedOptimizer teleports once at the beginning, looks at each of the first
mini-batches and at every 16th later, and renews its spectra after a quarter more steps, up to a period that grows
with the width (on mini-batches 48 steps to width 443, 256 at 1024). Hence two numbers: of the first ``--begin`` steps,
and of ``--steps`` after them, in which a width of 1024 still renews more often than later on. Both should be
multiples of 100, the steps between two teleports. All widths by default: about 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from common import environment, save  # noqa: E402

import metatele  # noqa: E402
from metatele.command_line import whole_number  # noqa: E402

ADAM, ADAMW, ALONE = "Adam", "AdamW", "no optimizer"
BATCHES, CLASSES, EVERY = 10, 10, 100
Batch = tuple[Tensor, Tensor]


class Method(NamedTuple):
    """How a model is trained.

    Attributes:
        name: As in the table.
        optimizer: Made for a model; what only has gradients cleared is no optimizer.
        batches: How many it goes through in turn.
    """

    name: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer | None]
    batches: int = BATCHES


class Turn(NamedTuple):
    """One training run.

    Attributes:
        first_ms: Mean of its first steps.
        ms: Mean of those after them.
        loss: Of the last step, to see that it trained.
        bytes: Of state for each number of the model.
    """

    first_ms: float
    ms: float
    loss: float
    bytes: float


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The base; foreach, which torch chooses by itself on GPUs alone."""
    return torch.optim.Adam(model.parameters(), foreach=True)


def methods() -> list[Method]:
    """All of them, Adam first; the checkpoint is read once, outside of every turn."""
    checkpoint = metatele.load(ROOT / "checkpoints" / "transfer")

    general = metatele.load("general")

    def learned(model: nn.Module) -> torch.optim.Optimizer:
        return metatele.LearnedOptimizer(model, checkpoint)

    def any_module(model: nn.Module) -> torch.optim.Optimizer:
        return metatele.LearnedOptimizer(model, general)

    def teleporting(model: nn.Module) -> torch.optim.Optimizer:
        # Named, as the default move changes with versions: stored numbers stay comparable.
        return metatele.TeleportOptimizer(adam(model), model, metatele.GradientNormAscent(), every=EVERY)

    return [
        Method(ADAM, adam),
        Method(ADAMW, lambda model: torch.optim.AdamW(model.parameters(), foreach=True)),
        Method(ALONE, lambda model: None),
        Method("any module, mini-batches", any_module),
        Method("any module, one batch", any_module, batches=1),
        Method("LearnedOptimizer, mini-batches", learned),
        Method("LearnedOptimizer, one batch", learned, batches=1),
        Method("Teleport(Adam), never due", lambda model: metatele.TeleportOptimizer(adam(model), model, at=[])),
        Method(f"Teleport(Adam), every {EVERY}", teleporting),
    ]


def data(width: int, batch: int, device: torch.device) -> list[Batch]:
    """Ten mini-batches, as compressible as images are."""
    draws = torch.Generator().manual_seed(0)
    x = (torch.randn(BATCHES * batch, 40, generator=draws) @ torch.randn(40, width, generator=draws) - 3).relu()
    y = torch.randint(CLASSES, (BATCHES * batch,), generator=draws)
    return list(zip(x.to(device).split(batch), y.to(device).split(batch), strict=True))


def perceptron(width: int, device: torch.device) -> nn.Module:
    """Two hidden layers, the same weights each time."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers).to(device)


def storages(value: Any, found: dict[int, int], seen: set[int]) -> dict[int, int]:
    """Bytes of the tensors in an object of this package or of torch.optim, by where they lie."""
    if id(value) in seen or isinstance(value, nn.Module):
        return found
    seen.add(id(value))
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for one in value.values():
            storages(one, found, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for one in value:
            storages(one, found, seen)
    elif type(value).__module__.startswith(("metatele.learned", "metatele.optim", "metatele.network", "torch.optim")):
        storages(vars(value) if hasattr(value, "__dict__") else (), found, seen)
    return found


def state_bytes(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> float:
    """What an optimizer holds, for each number of a model."""
    if optimizer is None:
        return 0.0
    optimizer.zero_grad()
    found = storages(vars(optimizer), {}, set())
    for p in model.parameters():
        found.pop(p.untyped_storage().data_ptr(), None)
    return sum(found.values()) / sum(p.numel() for p in model.parameters())


def now_s(device: torch.device) -> float:
    """The clock, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def trained(method: Method, batches: Sequence[Batch], begin: int, steps: int) -> Turn:
    """A new model, for ``begin`` steps and ``steps`` more."""
    inputs = batches[0][0]
    model = perceptron(inputs.shape[1], inputs.device)
    optimizer = method.optimizer(model)
    cleared = model if optimizer is None else optimizer
    gc.collect()  # of the models before
    stamps = []
    loss = torch.zeros(())
    for step in range(begin + steps):
        if step in (0, begin):
            stamps.append(now_s(inputs.device))
        x, y = batches[step % method.batches]
        cleared.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
    start_s, middle_s = stamps
    end_s = now_s(inputs.device)
    return Turn(
        1e3 * (middle_s - start_s) / begin,
        1e3 * (end_s - middle_s) / steps,
        float(loss.detach()),
        state_bytes(optimizer, model),
    )


def compared(turns: dict[str, list[Turn]]) -> list[dict[str, Any]]:
    """A row for each method: least and median over the turns, alone and beside Adam's."""
    base, decoupled, alone = ([turn.ms for turn in turns[name]] for name in (ADAM, ADAMW, ALONE))
    rows = []
    for name, done in turns.items():
        ms = [turn.ms for turn in done]
        share = [m - a for m, a in zip(ms, alone, strict=True)]
        rows.append(
            {
                "method": name,
                "ms_least": min(ms),
                "ms_median": statistics.median(ms),
                "over_adam_least": min(ms) / min(base),
                "over_adam_median": statistics.median(m / b for m, b in zip(ms, base, strict=True)),
                "over_adamw_median": statistics.median(m / b for m, b in zip(ms, decoupled, strict=True)),
                "state_bytes": done[-1].bytes,
                "optimizer_ms_least": min(ms) - min(alone),
                "optimizer_ms_median": statistics.median(share),
                "first_ms_least": min(turn.first_ms for turn in done),
                "first_ms_median": statistics.median(turn.first_ms for turn in done),
                "last_loss": done[-1].loss,
                "turns_ms": ms,
            }
        )
    return rows


def show(width: int, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of one width."""
    for row in rows:
        print(
            f"{width:>5}  {row['method']:<30} {row['ms_least']:>8.3f} {row['ms_median']:>8.3f}"
            f" {row['over_adam_least']:>7.2f} {row['over_adam_median']:>7.2f} {row['over_adamw_median']:>8.2f}"
            f" {row['optimizer_ms_least']:>10.3f} {row['optimizer_ms_median']:>8.3f} {row['first_ms_median']:>9.3f}"
            f" {row['state_bytes']:>7.1f}",
            flush=True,
        )


def main() -> None:
    """Print the table; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=whole_number(1), nargs="+", default=[16, 64, 256, 512, 1024], metavar="N")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help=f"beginnings of names; with {ADAM}, {ADAMW} and {ALONE}"
    )
    parser.add_argument("--batch", type=whole_number(1), default=200, metavar="N", help="samples (default 200)")
    parser.add_argument("--turns", type=whole_number(1), default=5, metavar="N", help="(default 5)")
    parser.add_argument("--begin", type=whole_number(1), default=100, metavar="N", help="first steps (default 100)")
    parser.add_argument("--steps", type=whole_number(1), default=300, metavar="N", help="after them (default 300)")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"{'':>5}  {'':<30} {'ms/step':^17} {'of Adam':^15} {'of AdamW':>8} {'optimizer ms':^19}"
        f" {f'first {args.begin}':>9} {'bytes':>7}"
    )
    print(
        f"{'width':>5}  {'method':<30} {'least':>8} {'median':>8} {'least':>7} {'median':>7}"
        f" {'median':>8} {'least':>10} {'median':>8} {'median':>9} {'of state':>7}"
    )
    kept = (ADAM, ADAMW, ALONE, *(args.methods or [""]))
    every = [method for method in methods() if method.name.startswith(kept)]
    rows: list[dict[str, Any]] = []
    for width in args.widths:
        batches = data(width, args.batch, args.device)
        turns: dict[str, list[Turn]] = {method.name: [] for method in every}
        for method in every:
            trained(method, batches, 1, 20)  # warms up threads, kernels and caches
        for _ in range(args.turns):
            for method in every:
                turns[method.name].append(trained(method, batches, args.begin, args.steps))
        found = compared(turns)
        show(width, found)
        rows += [{"width": width, **row} for row in found]
    settings = {name: getattr(args, name) for name in ("batch", "turns", "begin", "steps")}
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu"
    save(args.json, {**settings, "rows": rows, "environment": environment(device=str(args.device), device_name=where)})


if __name__ == "__main__":
    main()
