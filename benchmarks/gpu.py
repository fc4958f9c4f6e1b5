"""Everything that is to be known on a GPU, in one run of at most eight minutes.

make gpu
PYTHONPATH=. python3 benchmarks/gpu.py --out runs/gpu --data-root DATA
PYTHONPATH=. python3 benchmarks/gpu.py --out runs/rehearsal --device cpu --rehearse

Parts, what was measured least first; each in a process of its own with a time limit, so that one which fails or hangs
costs itself alone, and one that runs out of time keeps what it has:
environment (names, versions, best rates), checks (the same numbers as on a CPU), batched (the same for many networks in
one program, with and without CUDA graphs), figures (Figure 5 and Table 1), moves (teleports in gradient steps), quality
(a char-GPT to AdamW's loss), steps (a user's step beside Adam's), graphs (meta-training by batch and precision, by CUDA
graphs), quick (the preset to its checkpoint), meta (as graphs, call by call), diagnosis (what stops a capture, if
something did), tests (the device tests; beside checks and batched, as none of them is timed).

--out gets gpu.json and table.md, written after each part, log.txt with all that was printed, and figures. --rehearse
makes everything tiny; its numbers mean nothing. The exit code is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

TESTS = (
    "test_devices",
    "test_general",
    "test_general_states",
    "test_replicas",
    "test_static_steps",
    "test_any_module",
    "test_balance",
)
_STOP_S = 5.0  # for what is ended to end
_LEAST_S = 8.0  # with less no part begins


class Part(NamedTuple):
    """A part of the run.

    Attributes:
        where: Its module and function.
        limit_s: Its time.
    """

    where: str
    limit_s: float


PARTS: dict[str, Part] = {
    "environment": Part("gpu_checks:environment", 45),
    "checks": Part("gpu_checks:checks", 100),
    "batched": Part("gpu_checks:batched", 40),
    "figures": Part("gpu_training:figures", 70),
    "moves": Part("gpu_steps:moves", 60),
    "quality": Part("gpu_steps:quality", 95),
    "steps": Part("gpu_steps:steps", 115),
    "graphs": Part("gpu_training:graphs", 60),
    "quick": Part("gpu_training:quick", 65),
    "meta": Part("gpu_training:meta", 80),
    "diagnosis": Part("gpu_capture:diagnosis", 60),
    "tests": Part("gpu:device_tests", 120),
}
BESIDE = "tests"  # runs at the same time as these, one after the other: none of them is timed
UNTIMED = ("checks", "batched")


# --- a part, in its process


def device_tests(kit: Any) -> None:
    """The tests of devices and of what runs on them."""
    names = kit.sized([f"tests/{name}.py" for name in TESTS], ["tests/test_house.py"])
    names = [name for name in names if (ROOT / name).is_file()]
    workers = ["-n", "8", "--dist", "worksteal"] if kit.gpu and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *names, "-x", *workers]  # pyproject.toml says that it is quiet
    limit_s, late = max(5.0, kit.left_s() - 1), False
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # of each worker
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
            process.terminate()
            process.wait()
        output.seek(0)
        stdout = output.read()
    print(stdout[-20_000:], flush=True)
    lines = [line.strip("= ") for line in stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    said = lines[-1] if lines else "nothing said"
    if late:
        dots = sum(len(line.split()[0]) for line in stdout.splitlines() if re.match(r"[.sxXFE]+(\s+\[|$)", line))
        said = f"ended after {limit_s:.0f} s, {dots} tests"
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", said)}
    kit.add("tests", {**counts, "exit_code": process.returncode, "said": said})
    bad = [line.split(" - ")[0] for line in stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    kit.row("device tests", counts.get("passed", 0), "pass", "all", "; ".join([said, *bad])[:160])
    if process.returncode:
        kit.failures.append(f"pytest: {said}; {'; '.join(bad[:5])}")


def child(args: argparse.Namespace) -> int:
    """Run one part and leave its result in a file."""
    import torch
    from gpu_kit import Kit, told

    torch.set_num_threads(max(1, min(8, (os.cpu_count() or 1) // 2)) if args.device != "cpu" else 1)
    device = torch.device(args.device)
    before = json.loads(args.before.read_text(encoding="utf-8")) if args.before else {}
    kit = Kit(device, args.rehearse, args.data_root, args.out, args.file, args.until - time.time(), before)
    if kit.gpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu --rehearse tries the script without one")
    if args.part == args.fail:
        raise RuntimeError("it was asked to fail")
    if args.part == args.hang:
        time.sleep(3600)
    module, _, function = PARTS[args.part].where.partition(":")
    try:
        if module == "gpu":
            device_tests(kit)
        else:
            getattr(importlib.import_module(module), function)(kit)
    except Exception as error:
        kit.failures.append(told(error))
        kit.save()
        raise
    kit.save()
    return 0


# --- the run


Running = tuple[subprocess.Popen[bytes], float, float, TextIO]


class Run:
    """All parts, and what is known so far.

    Args:
        args: Of the command line.
        log: Where all that is printed goes.
        scratch: A folder for the parts' own files.
    """

    def __init__(self, args: argparse.Namespace, log: TextIO, scratch: Path) -> None:
        self.args, self.log, self.scratch = args, log, scratch
        self.end_s = time.monotonic() + args.limit_s
        self.results: dict[str, dict[str, Any]] = {}
        self.began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def left_s(self) -> float:
        """Seconds until the run is to be over."""
        return self.end_s - time.monotonic()

    def all(self) -> None:
        """Each part, and one beside those that are not timed."""
        names = [name for name in PARTS if name in self.args.parts]
        untimed = [name for name in names if name in UNTIMED]
        if self.args.device == "cpu" or BESIDE not in names or not untimed:
            untimed = []
        for name in names:
            if untimed and name == untimed[0]:
                self.together([untimed, [BESIDE]])
            elif not untimed or name not in (*untimed, BESIDE):
                self.together([[name]])

    def together(self, lanes: Sequence[Sequence[str]]) -> None:
        """Run lanes of parts at the same time, each part of a lane after the last, until all are done or ended."""
        running: dict[str, Running] = {}
        waiting = [list(lane) for lane in lanes]
        at: list[str | None] = [None] * len(lanes)
        try:
            while running or any(waiting):
                for number, lane in enumerate(waiting):
                    if at[number] not in running and lane:
                        at[number] = self.begun(lane.pop(0), running)
                self.watch(running)
                time.sleep(0.1)
        finally:  # where this run is ended, its parts are too
            for process, *_ in running.values():
                ended(process)

    def begun(self, name: str, running: dict[str, Running]) -> str:
        """Start a part, if there is time."""
        limit_s = min(PARTS[name].limit_s, self.args.part_limit_s, self.left_s() - _STOP_S)
        if limit_s < min(_LEAST_S, self.args.part_limit_s):
            self.keep(name, "left out", 0.0, "no time left")
        else:
            running[name] = self.started(name, limit_s)
        return name

    def watch(self, running: dict[str, Running]) -> None:
        """Take in what there is; parts that are done, or whose time is over, run no more."""
        for name, (process, begin_s, end_s, output) in list(running.items()):
            code, late = process.poll(), time.monotonic() > end_s
            if code is None and not late:
                self.merge(name)
                continue
            if code is None:
                ended(process)
            del running[name]
            output.close()
            spent_s = time.monotonic() - begin_s
            said = self.copied(name)
            if code is None:
                self.keep(name, "out of time", spent_s, f"ended after {spent_s:.0f} s")
            else:
                self.keep(name, "failed" if code else "done", spent_s, said if code else "")

    def started(self, name: str, limit_s: float) -> Running:
        """A part's process, when it began and when it is to end, and its output."""
        args, before = self.args, self.scratch / f"{name}.before"
        before.write_text(json.dumps(self.results), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--out", str(args.out)]
        command += ["--device", args.device, "--until", f"{time.time() + limit_s - 3:.1f}", "--before", str(before)]
        command += ["--file", str(self.scratch / f"{name}.json")]
        command += ["--rehearse"] if args.rehearse else []
        command += ["--data-root", str(args.data_root)] if args.data_root else []
        command += ["--fail", args.fail] if args.fail else []
        command += ["--hang", args.hang] if args.hang else []
        output = (self.scratch / f"{name}.txt").open("w", encoding="utf-8")
        # Triton and others keep caches at home, which may be missing or read-only.
        environment = {"PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(self.scratch / "triton"), **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        print(f"{name} ...", flush=True)
        self.results[name] = {"status": "running", "values": {}, "rows": [], "failures": []}
        self.write()
        begin_s = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        return process, begin_s, begin_s + limit_s, output

    def copied(self, name: str) -> str:
        """A part's output, to the log; the last line of it."""
        text = (self.scratch / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
        self.log.write(f"\n{'=' * 30} {name}\n{text}")
        self.log.flush()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "nothing said"

    def merge(self, name: str) -> bool:
        """Take in what a part has written so far; whether that is new."""
        file = self.scratch / f"{name}.json"
        with suppress(OSError, ValueError):
            found = json.loads(file.read_text(encoding="utf-8"))
            if found != self.results.get(name, {}).get("found"):
                self.results[name] = {"status": "running", "found": found, **found}
                self.write()
                return True
        return False

    def keep(self, name: str, status: str, spent_s: float, why: str) -> None:
        """A part's end."""
        self.merge(name)
        result = self.results.setdefault(name, {"values": {}, "rows": [], "failures": []})
        result |= {"status": status, "seconds": round(spent_s, 1), "why": unpathed(why)}
        self.write()
        print(f"{name}: {status} ({spent_s:.0f} s) {result['why'][:200]}", flush=True)
        for failure in result["failures"]:
            print(f"    {failure[:200]}", flush=True)

    def write(self) -> None:
        """gpu.json and table.md."""
        shown = {name: {k: v for k, v in r.items() if k != "found"} for name, r in self.results.items()}
        doc = {"format": 1, "rehearsal": self.args.rehearse, "limit_s": self.args.limit_s, "began": self.began}
        doc["parts"] = shown
        beside = self.args.out / "gpu.json.new"
        beside.write_text(json.dumps(anywhere(doc), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.args.out / "gpu.json")
        (self.args.out / "table.md").write_text(table(self.results), encoding="utf-8")


def ended(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_STOP_S if sign == signal.SIGTERM else None)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it


def unpathed(text: str) -> str:
    """Without names of this machine's folders."""
    return re.sub(r"(?<![\w.])/[\w.\-/]+", "<path>", text)[:300]


def anywhere(value: Any) -> Any:
    """A document without them."""
    if isinstance(value, dict):
        return {name: anywhere(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [anywhere(part) for part in value]
    return unpathed(value) if isinstance(value, str) else value


def table(results: dict[str, dict[str, Any]]) -> str:
    """All rows, then what failed."""
    lines = ["| what | found | goal | note |", "|:--|--:|--:|:--|"]
    for result in results.values():
        for row in result.get("rows", []):
            value = "none" if row["value"] is None else f"{row['value']:.4g}"
            lines.append(f"| {row['what']} | {value} {row['unit']} | {row['goal']} | {row['note']} |")
    lines += ["", "| part | how it went | seconds | why |", "|:--|:--|--:|:--|"]
    for name, result in results.items():
        why = "; ".join(filter(None, [result.get("why", ""), *result.get("failures", [])]))
        lines.append(f"| {name} | {result['status']} | {result.get('seconds', '')} | {unpathed(why)} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Of both the run and its parts."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    p.add_argument("--data-root", type=Path, metavar="FOLDER", help="with MNIST/raw and tinyshakespeare")
    p.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu")
    p.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that everything runs")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    p.add_argument("--limit-s", type=float, default=480.0, metavar="S", help="of all (default 480)")
    p.add_argument("--part-limit-s", type=float, default=math.inf, metavar="S", help="of each part (default: its own)")
    p.add_argument("--fail", choices=PARTS, metavar="PART", help="let a part raise, to see what becomes of the others")
    p.add_argument("--hang", choices=PARTS, metavar="PART", help="let a part hang, likewise")
    for hidden in ("--file", "--before"):
        p.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    p.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    p.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the table."""
    args = parser().parse_args(arguments)
    if args.part:
        return child(args)
    args.out = args.out.resolve()
    args.data_root = args.data_root and args.data_root.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    begin_s = time.monotonic()
    # A run that is ended from outside ends its parts too; what is known is written already.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (args.out / "log.txt").open("w", encoding="utf-8") as log, tempfile.TemporaryDirectory() as scratch:
        run = Run(args, log, Path(scratch))
        run.all()
    print(f"\n{table(run.results)}\n{time.monotonic() - begin_s:.0f} s in all", flush=True)
    bad = any(result["status"] != "done" or result["failures"] for result in run.results.values())
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
