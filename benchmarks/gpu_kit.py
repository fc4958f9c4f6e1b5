"""What the parts of gpu.py share: a device, clocks, what is recorded, and the networks that are timed."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import breadth_tasks  # noqa: E402
from asked import Asked  # noqa: E402, F401 (the parts count by it)

Step = Callable[[], object]


class Kit:
    """A part's device, time, and result, which is written whenever something is added.

    Args:
        device: Where.
        rehearse: Whether all sizes are tiny.
        data_root: Folder with the data sets, if there is one.
        out: Folder for figures.
        file: Where the result is written.
        limit_s: Time of the part.
        before: Results of the parts before.

    Attributes:
        values: All numbers, by name.
        rows: Of the table: ``{"what", "value", "goal", "unit", "note"}``.
        failures: One line for each measurement that failed; tracebacks go to stderr.
    """

    def __init__(
        self,
        device: torch.device,
        rehearse: bool,
        data_root: Path | None,
        out: Path,
        file: Path | None,
        limit_s: float,
        before: dict[str, Any] | None = None,
    ) -> None:
        self.device, self.rehearse, self.data_root, self.out, self.file = device, rehearse, data_root, out, file
        self.before = before or {}
        self.end_s = time.monotonic() + limit_s
        self.values: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []

    @property
    def gpu(self) -> bool:
        """Whether the device is one."""
        return self.device.type == "cuda"

    def left_s(self) -> float:
        """Seconds until this part is ended."""
        return self.end_s - time.monotonic()

    def sized(self, real: Any, tiny: Any) -> Any:
        """A size, or the one of a rehearsal."""
        return tiny if self.rehearse else real

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def now_s(self) -> float:
        """The clock, after that."""
        self.wait()
        return time.perf_counter()

    # --- what is recorded

    def add(self, name: str, value: Any) -> None:
        """Record a number, or several."""
        self.values[name] = value
        print(f"{name}: {json.dumps(plain(value))}", flush=True)
        self.save()

    def row(self, what: str, value: float, unit: str, goal: str = "", note: str = "") -> None:
        """A row of the table; in the place of the one of this name, if there is one."""
        one = {"what": what, "value": plain(value), "unit": unit, "goal": goal, "note": note}
        at = next((n for n, row in enumerate(self.rows) if row["what"] == what), len(self.rows))
        self.rows[at : at + 1] = [one]
        self.save()

    def save(self) -> None:
        """Write what there is, whole or not at all."""
        if self.file is None:
            return
        result = {"values": self.values, "rows": self.rows, "failures": self.failures}
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps(plain(result)), encoding="utf-8")
        os.replace(beside, self.file)

    @contextmanager
    def tried(self, name: str) -> Iterator[None]:
        """Go on after what fails in here: a line in the result, the traceback in the log."""
        begin_s = time.monotonic()
        try:
            yield
        except Exception as error:  # whatever it is, the other measurements are worth having
            print(f"--- {name} failed", file=sys.stderr, flush=True)
            traceback.print_exc()
            self.failures.append(f"{name}: {told(error)}")
        finally:
            if self.gpu:
                with _quiet():  # a broken context is told by the next measurement
                    torch.cuda.empty_cache()
            print(f"({name}: {time.monotonic() - begin_s:.1f} s)", flush=True)
            self.save()

    # --- clocks

    def chunks(self, step: Step, chunks: int, inner: int, warm: int = 0) -> dict[str, float]:
        """Milliseconds of a step: median over chunks of ``inner`` steps each, between synchronised clocks."""
        for _ in range(warm):
            step()
        found = []
        for _ in range(chunks):
            begin_s = self.now_s()
            for _ in range(inner):
                step()
            found.append(1e3 * (self.now_s() - begin_s) / inner)
        return spread(found)

    def events(self, run: Step, repeats: int, warm: int = 3) -> dict[str, float]:
        """Milliseconds of one run by the device's own clock; by the host's on a CPU."""
        if not self.gpu:
            return self.chunks(run, repeats, 1, warm)
        for _ in range(warm):
            run()
        pairs = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        self.wait()
        return spread([begin.elapsed_time(end) for begin, end in pairs])


@contextmanager
def _quiet() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        print(f"(cleaning up: {told(error)})", file=sys.stderr)


def told(error: BaseException) -> str:
    """An error in one line, without the machine's paths."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    words = ["<path>" if word.strip("'\"(),:;[]").startswith("/") else word for word in lines[0].split()]
    return f"{type(error).__name__}: {' '.join(words)}"[:300]


def spread(found: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(found), "least": min(found), "most": max(found), "count": len(found)}


def plain(value: Any) -> Any:
    """As JSON has it: what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


# --- networks


def sized_gpt(width: int, depth: int, heads: int, vocabulary: int, context: int) -> nn.Module:
    """The GPT of breadth.py in another size."""
    model = breadth_tasks.GPT(width, depth, heads)
    model.embed = nn.Embedding(vocabulary, width)
    model.position = nn.Embedding(context, width)
    model.head = nn.Linear(width, vocabulary, bias=False)
    model.head.weight = model.embed.weight
    for embedding in (model.embed, model.position):
        nn.init.normal_(embedding.weight, std=width**-0.5 if width < 256 else 0.02)
    return model


def tokens(vocabulary: int, batch: int, context: int, count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Random batches of a language: the time does not depend on what they say."""
    draws = torch.Generator().manual_seed(0)
    text = torch.randint(vocabulary, (count, batch, context + 1), generator=draws).to(device)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in text]


class Training:
    """A training loop of one network, a step at a time.

    Args:
        model: On its device.
        loss: Of outputs and targets.
        batches: Gone through in turn.
        optimizer: Or ``None``.
        autocast: bfloat16 in the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        batches: Sequence[tuple[Tensor, Tensor]],
        optimizer: torch.optim.Optimizer | None,
        autocast: bool = False,
    ) -> None:
        self.model, self.loss, self.batches, self.optimizer = model, loss, batches, optimizer
        self.autocast, self.done = autocast, 0
        self.last = torch.zeros(())

    def step(self) -> None:
        """One step."""
        x, y = self.batches[self.done % len(self.batches)]
        (self.model if self.optimizer is None else self.optimizer).zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.model(x), y)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.last = loss.detach()
        self.done += 1
