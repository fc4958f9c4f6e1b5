"""Part of gpu.py about CUDA graphs: which operation spoils the capture of a window, and what would help.

``python benchmarks/gpu_capture.py VARIANT DEVICE`` tries one way to capture in a process of its own, as a capture that
failed may leave the allocator unfit for the next. Results are lines that begin with ``=``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_kit import ROOT, Kit, told
from torch.utils._python_dispatch import TorchDispatchMode

from metatele.config import preset
from metatele.training import static
from metatele.training.flat import FlatTrainer

# As the package does it; with collections that would free an earlier graph, which should spoil it; and other ways.
VARIANTS = ("package", "collecting", "thread_local", "relaxed", "one stream")


def diagnosis(kit: Kit) -> None:
    """Every way, if a graph failed."""
    failed = kit.before.get("graphs", {}).get("values", {}).get("failed_graph")
    kit.add("failed_graph", failed)
    for variant in VARIANTS if failed or kit.rehearse else ():
        with kit.tried(f"capture, {variant}"):
            command = [sys.executable, __file__, variant, str(kit.device), *(["--rehearse"] if kit.rehearse else [])]
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(5.0, min(45.0, kit.left_s() - 2)),
                check=False,
            )
            print(done.stdout, flush=True)
            lines = [line[1:] for line in done.stdout.splitlines() if line.startswith("=")]
            found = json.loads(lines[-1]) if lines else {"works": False, "error": f"exit code {done.returncode}"}
            kit.add(f"capture_{variant}", found)
            note = "works" if found["works"] else found.get("spoilt_by") or found["error"]
            kit.row(f"capture of a window, {variant}", float(found["works"]), "works", "", note[:110])


class Watched(TorchDispatchMode):
    """Tells of the first operation after which the capture of a stream is not valid any more.

    Args:
        status: 1 while it is captured, 2 once that is spoilt, 0 otherwise.
        collects: Before which operation to collect garbage; -1: before none.
    """

    def __init__(self, status: Callable[[], int], collects: int = -1) -> None:
        super().__init__()
        self.status, self.collects, self.count, self.first = status, collects, 0, ""
        self.recent: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, then ask."""
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        self.recent = [*self.recent[-9:], f"{self.count}: {func._schema.name} {shapes}"]
        if self.count == self.collects:
            gc.collect()
        self.count += 1
        try:
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            self._tell(f"{func._schema.name} {shapes} raised {told(error)}")
            raise
        if not self.first and self.status() == 2:
            self._tell(f"{func._schema.name} {shapes}, or what ran between it and the one before, left it spoilt")
        return result

    def _tell(self, what: str) -> None:
        if self.first:
            return
        self.first = f"operation {self.count}: {what}"
        print(f"!!! {self.first}\nbefore it:\n  " + "\n  ".join(self.recent), flush=True)
        print("".join(traceback.format_stack(limit=14)), flush=True)


def capture_status() -> int:
    """Of the current stream; -1 where it cannot be asked."""
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "libcudart" in line:
                library = ctypes.CDLL(line.split()[-1])
                status = ctypes.c_int(-1)
                stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
                error = library.cudaStreamIsCapturing(stream, ctypes.byref(status))
                return 2 if error else status.value
    except Exception as error:  # only a help
        print(f"(capture status unknown: {told(error)})", flush=True)
    return -1


@contextlib.contextmanager
def heard_collections(into: list[str]) -> Iterator[None]:
    """Note garbage collections, which may free another graph."""

    def heard(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            into.append(f"generation {info['generation']}, {info['collected']} objects")

    gc.callbacks.append(heard)
    try:
        yield
    finally:
        gc.callbacks.remove(heard)


def trainer_of(batch: int, device: str, tiny: bool) -> FlatTrainer:
    """The trainer whose windows are captured."""
    if tiny:
        changes: dict[str, Any] = {"widths": (4, 5, 3), "samples": 4, "hidden": 6}
    else:
        changes = {"precision": "bf16"}
    config = preset("paper", batch=batch, unroll=10, horizon=100, trajectories=10**9, clip=1.0, **changes)
    return FlatTrainer(config, device)


def captured(trainer: FlatTrainer, variant: str) -> tuple[static.StaticWindow, Watched, list[str]]:
    """Warm up, then capture under watch; on a CPU the body runs under watch."""
    gpu = trainer.device.type == "cuda"
    body = lambda at: trainer.differentiated(at, trainer.config.training.windows[0])  # noqa: E731 as a trainer does
    window = static.StaticWindow(body, list(trainer.optimizer.parameters()), trainer.trajectories)
    trainer.kept = window  # type: ignore[attr-defined]  # a cycle, as in a trainer
    heard: list[str] = []
    watch = Watched(capture_status if gpu else lambda: 0, 50 if variant == "collecting" else -1)
    guard = contextlib.nullcontext() if variant == "collecting" else static.uncollected()
    if not gpu:
        window._run()
        with guard, watch, heard_collections(heard):
            window._run()
        return window, watch, heard
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            window._run()
    torch.cuda.current_stream().wait_stream(side)
    mode = variant if variant in ("thread_local", "relaxed") else "global"
    stream = side if variant == "one stream" else None
    graph = torch.cuda.CUDAGraph()
    try:
        with guard, torch.cuda.graph(graph, stream=stream, capture_error_mode=mode), watch, heard_collections(heard):
            window._run()
        graph.replay()
        torch.cuda.synchronize()
        window._graph = graph
    except Exception as error:
        error.add_note(watch.first)
        raise
    finally:
        print(f"{variant}: {watch.count} operations, collections in the capture: {heard or 'none'}", flush=True)
    return window, watch, heard


def main(variant: str, device: str, tiny: bool) -> None:
    """Capture the windows of several trainers, one after another, each the garbage of the next."""
    result: dict[str, Any] = {"works": True, "collections": []}
    trainer, window = None, None
    try:
        for batch in (1, 2) if tiny else (1, 64, 1024):
            trainer, window = trainer_of(batch, device, tiny), None  # the last one is garbage from here on
            window, _, heard = captured(trainer, variant)
            result["collections"].append(len(heard))
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        result |= {"works": False, "error": told(error), "spoilt_by": " ".join(getattr(error, "__notes__", []))}
    del trainer, window
    print("=" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--rehearse" in sys.argv[3:])
