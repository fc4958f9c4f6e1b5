"""Soak and faults of meta-training: the real program, killed and hindered as on a user's machine.

python benchmarks/soak.py --json results/benchmarks/soak.json       # half an hour, and two minutes for the faults
python benchmarks/soak.py --minutes 1 --every 10                    # a short look
python benchmarks/soak.py --preset transfer --only soak             # the other family, without the faults

Soak: one run to its end in peace, then the same run again, killed (SIGKILL) at random moments and gone on with by
--resume until it is done. The published weights and their config.json, the resumable state and the log (but for
ms_per_trajectory_step, the one time in it) must be the same to the last bit, and after each kill what lies in the
folder must be readable. The first kill falls into the time until about the first save; the time to each later one is
exponential with mean --every, and every third waits beyond that for the next write and falls into it.

Memory: resident memory of the undisturbed run, each second. It must be flat: from the first quarter to the last, what
a quarter stays below nine tenths of its time grows by less than FLAT_MB, once the run is long enough to tell
(SETTLED_S). The allocator moves between levels 25 MB apart in the flat family, and in the equivariant one memory
follows the shapes of the problems, up and down by 200 MB; a leak raises all quarters after the first.

Faults: a full disk (a small tmpfs where this user may mount one, else a limit on the size of files), a folder that
cannot be written, damaged states. Each must end in one line without a traceback and lose nothing: what is left is
readable, and the run then goes on to the same bits as one without a fault.

Flags: --minutes, --every, --seed (of the kills; the runs have seed 0), --preset, --only soak or
faults, --no-mount (do without mounts), --json. The exit status is 1 if any of this does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from common import environment, save  # noqa: E402

import metatele  # noqa: E402
from metatele import checkpoint  # noqa: E402
from metatele.config import families, family_with, preset  # noqa: E402
from metatele.errors import MetateleError  # noqa: E402
from metatele.files import existing_folder  # noqa: E402
from metatele.training.run import (  # noqa: E402
    CHECKPOINT_NAME,
    METRICS_NAME,
    PREVIOUS_NAME,
    STATE_NAME,
    begun,
    read_state,
)

FLAT_MB = {"flat": 8.0, "equivariant": 100.0}  # growth that is still called flat
SETTLED_S = 300.0  # a shorter run is still filling its buffers
SHORT = {"updates": 30, "save": 5, "validate": 10, "log": 1}  # the run of the faults, which also tells the speed
PAGE, UNREADABLE = 4096, "not readable"


@dataclass(frozen=True)
class Job:
    """A meta-training run, as the flags of ``train_meta.py``."""

    name: str
    updates: int
    save: int
    validate: int
    log: int

    def flags(self) -> list[str]:
        """What follows the program's name, but for the folder."""
        training = preset(self.name).training
        trajectories = math.ceil(self.updates / len(training.windows)) * training.batch
        flags = [self.name, "--trajectories", str(trajectories), "--save-every", str(self.save)]
        flags += ["--validation-every", str(self.validate), "--log-every", str(self.log)]
        if family_with(self.name).name == "equivariant":
            flags += ["--validation-trajectories", "16"]  # else most of the time goes there
        return [*flags, "--device", "cpu", "--threads", "1", "--quiet"]


@contextmanager
def running(job: Job, out: Path, before: Callable[[], None] | None = None) -> Iterator[subprocess.Popen[str]]:
    """The program, begun or resumed as the folder asks for; it is gone when this is left."""
    command = [sys.executable, str(ROOT / "train_meta.py"), *job.flags(), "--out", str(out)]
    command += ["--resume"] if begun(out) else []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


def ended(process: subprocess.Popen[str], within_s: float) -> bool:
    """Whether the process ends in this time."""
    try:
        process.wait(max(0.0, within_s))
    except subprocess.TimeoutExpired:
        return False
    return True


# --- what a folder holds


def differences(a: Any, b: Any, where: str) -> Iterator[str]:
    """Where two nested values are not the same to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        # Bytes, since torch.equal takes -0 for 0 and no NaN for itself.
        plain = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(*plain):
            yield where
    elif type(a) is not type(b) or repr(a) != repr(b):
        yield where


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    lines = [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]
    for line in lines:
        line.pop("ms_per_trajectory_step", None)
    published = checkpoint.find(folder)
    files = {name: (published / name).read_bytes() for name in (checkpoint.MODEL_NAME, checkpoint.CONFIG_NAME)}
    return {**files, STATE_NAME: read_state(folder), METRICS_NAME: lines}


def departures(whole: Path, folder: Path) -> list[str]:
    """How a run's outcome departs from that of the undisturbed one."""
    try:
        ours = outcome(folder)
    except (MetateleError, OSError, ValueError) as error:
        return [f"its outcome cannot be read: {error}"]
    return [f"not the same bits: {where}" for where in differences(outcome(whole), ours, ".")][:5]


def held(folder: Path) -> dict[str, str]:
    """What can be read in a run folder, and what of it cannot, though it is there."""
    reads: dict[str, Callable[[], str]] = {
        STATE_NAME: lambda: f"update {read_state(folder)['counters'][0]}",
        PREVIOUS_NAME: lambda: f"update {read_state(folder, PREVIOUS_NAME)['counters'][0]}",
        CHECKPOINT_NAME: lambda: f"update {metatele.load(folder).training['update']}",
    }
    found = {}
    for name, read in reads.items():
        if existing_folder(folder / name).exists():
            try:
                found[name] = read()
            except MetateleError as error:
                found[name] = f"{UNREADABLE}: {error}"
    return found


def unreadable(found: dict[str, str]) -> list[str]:
    """What of that cannot be read."""
    return [f"{name} is {how}" for name, how in found.items() if how.startswith(UNREADABLE)]


def unfinished(folder: Path) -> dict[str, int]:
    """What an interrupted write leaves behind, with the time of its last change."""
    found = {}
    for pattern in (".*.tmp", "*.previous"):
        for path in folder.glob(pattern):
            try:
                found[path.name] = path.stat().st_mtime_ns
            except FileNotFoundError:  # it was finished meanwhile
                continue
    if (folder / PREVIOUS_NAME).exists() and not (folder / STATE_NAME).exists():
        found[f"{STATE_NAME} renamed"] = 0
    return found


# --- how fast it is, and memory


@dataclass(frozen=True)
class Speed:
    """Times of the program on this machine, in seconds; a save counts half a validation."""

    start_s: float
    update_s: float
    save_s: float


def measured_speed(job: Job, out: Path) -> Speed:
    """Run the short job to its end; its folder is what the faults are compared with."""
    config = preset(job.name).training
    begin_s, first_s = time.monotonic(), 0.0
    with running(job, out) as process:
        while not ended(process, 0.01):
            if not first_s and begun(out):
                first_s = time.monotonic()
        if process.returncode:
            raise SystemExit(f"soak: the run without any fault failed: {process.communicate()[1].strip()}")
    lines = [json.loads(line) for line in (out / METRICS_NAME).read_text().splitlines()]
    per_step_s = [1e-3 * line["ms_per_trajectory_step"] for line in lines if "meta_loss" in line]
    update_s = statistics.mean(per_step_s) * config.batch * config.unroll
    rest_s = time.monotonic() - first_s - job.updates * update_s
    return Speed(first_s - begin_s, update_s, max(0.0, rest_s) * job.save / job.updates)


def planned(name: str, speed: Speed, minutes: float, every_s: float) -> Job:
    """The job that takes this time in both runs, saved some times between two kills."""
    interval = max(1, round((every_s / 6 - speed.save_s) / speed.update_s))
    interval_s = interval * speed.update_s + speed.save_s
    # A kill costs a start and half the time since the last save.
    lost_s = min(speed.start_s + interval_s / 2, 0.8 * every_s)
    once_s = 60 * minutes / (1 + every_s / (every_s - lost_s))
    return Job(name, max(2, round(once_s / interval_s)) * interval, interval, 2 * interval, 5)


def resident_mb(pid: int) -> float:
    """Resident memory of a process, 0 if it has just ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)


def undisturbed(job: Job, out: Path, expected_s: float) -> list[tuple[float, float]]:
    """Run to the end; seconds and megabytes, each second or oftener in a short run."""
    samples, begin_s = [], time.monotonic()
    with running(job, out) as process:
        while not ended(process, min(1.0, expected_s / 60)):
            if mb := resident_mb(process.pid):
                samples.append((time.monotonic() - begin_s, mb))
        if process.returncode:
            raise SystemExit(f"soak: the run without any fault failed: {process.communicate()[1].strip()}")
    return samples


def memory(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Megabytes that each quarter of the run stays below nine tenths of its time."""
    end_s = samples[-1][0]
    quarters = [sorted(mb for t, mb in samples if q <= 4 * t / end_s <= q + 1) for q in range(4)]
    marks = {f"{25 * q}_percent_mb": levels[len(levels) * 9 // 10] for q, levels in enumerate(quarters, 1)}
    growth = marks["100_percent_mb"] - marks["25_percent_mb"]
    return {**marks, "peak_mb": max(mb for _, mb in samples), "growth_mb": growth}


# --- kills


@dataclass(frozen=True)
class Kill:
    """One kill: when after the start, whether it waited for a write, what it hit, and what was left half done."""

    after_s: float
    aimed: bool
    hit: str
    left: list[str]


class Killed:
    """A run that is killed until it is done.

    Attributes:
        kills: In their order.
        broken: Promises that did not hold.
        warned: Lines on stderr of the run that reached the end.
    """

    def __init__(self, job: Job, out: Path, speed: Speed, every_s: float, whole_s: float, seed: int) -> None:
        self.job, self.out, self.speed, self.every_s, self.whole_s = job, out, speed, every_s, whole_s
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self.broken: list[str] = []
        self.warned: list[str] = []

    def _moment_s(self) -> float:
        drawn = self.random.expovariate(1 / self.every_s)
        if not self.kills:
            return self.random.uniform(0, self.speed.start_s)
        # However short the run is, one kill falls into it.
        return min(drawn, self.whole_s / 2) if len(self.kills) == 1 else drawn

    def run(self) -> float:
        """Go on to the end; the seconds it took."""
        begin_s = time.monotonic()
        while True:
            # A run that gets nowhere is brought to its end in peace, so that it can be compared.
            tired = time.monotonic() - begin_s > 4 * self.whole_s + 120
            if self._done(math.inf if tired else self._moment_s()):
                if tired:
                    self.broken.append("it got nowhere between the kills: raise --every")
                return time.monotonic() - begin_s

    def _done(self, moment_s: float) -> bool:
        saved, before, start_s = begun(self.out), unfinished(self.out), time.monotonic()
        aimed = len(self.kills) % 3 == 2
        with running(self.job, self.out) as process:
            over = ended(process, min(moment_s, 1e6))
            if aimed and not over:
                over = self._reached_write(process)
            if not over:
                process.send_signal(signal.SIGKILL)
            stderr = process.communicate()[1].splitlines()
        if over or process.returncode != -signal.SIGKILL:
            self.warned = stderr
            if process.returncode:
                self.broken.append(f"exit code {process.returncode} without a kill: {' | '.join(stderr[-1:])}")
            return True
        after_s, left = time.monotonic() - start_s, unfinished(self.out)
        written = sorted(name for name in left if left[name] != before.get(name))
        self.kills.append(Kill(after_s, aimed, self._hit(after_s, saved, written), sorted(left)))
        self.broken += [f"after kill {len(self.kills)}: {what}" for what in unreadable(held(self.out))]
        self.broken += [f"a traceback before kill {len(self.kills)}: {stderr[-1]}"] if has_traceback(stderr) else []
        return False

    def _reached_write(self, process: subprocess.Popen[str]) -> bool:
        """Wait for a write to begin and some milliseconds more; whether the run ended before."""
        known, until_s = unfinished(self.out), time.monotonic() + self.every_s
        while time.monotonic() < until_s and unfinished(self.out) == known:
            if ended(process, 0.0005):
                return True
        return ended(process, 0.05 * self.random.random() ** 3)

    def _hit(self, after_s: float, saved: bool, written: list[str]) -> str:
        if written:
            return f"while writing ({', '.join(written)})"
        if not begun(self.out):
            return "before the first save"
        return "while starting again" if saved and after_s < self.speed.start_s else "between saves"


def has_traceback(stderr: list[str]) -> bool:
    return any("Traceback" in line for line in stderr)


def soak(job: Job, work: Path, speed: Speed, every_s: float, seed: int) -> dict[str, Any]:
    """The run in peace and the killed one; what they show."""
    expected_s = speed.start_s + job.updates * (speed.update_s + speed.save_s / job.save)
    print(f"{job.updates} updates, saved every {job.save}, of about {expected_s:.0f} s", flush=True)
    samples = undisturbed(job, work / "whole", expected_s)
    whole_s, rss = samples[-1][0], memory(samples)
    shown = ", ".join(f"{mb:.0f} at {name.split('_')[0]} %" for name, mb in rss.items() if "percent" in name)
    bound_mb = FLAT_MB[family_with(job.name).name]
    verdict = "too short to tell" if whole_s < SETTLED_S else "flat" if rss["growth_mb"] < bound_mb else "NOT FLAT"
    print(f"undisturbed: {whole_s:.0f} s; resident MB: {shown}, peak {rss['peak_mb']:.0f}; ", end="")
    print(f"{verdict} (growth {rss['growth_mb']:+.1f} MB, flat below {bound_mb:g})", flush=True)

    killed = Killed(job, work / "killed", speed, every_s, whole_s, seed)
    killed_s = killed.run()
    broken = killed.broken + departures(work / "whole", work / "killed")
    hits = Counter(kill.hit.split(" (")[0] for kill in killed.kills)
    left = sorted(unfinished(work / "killed"))
    print(f"killed: {len(killed.kills)} times in {killed_s:.0f} s: {', '.join(f'{n} {h}' for h, n in hits.items())}")
    for kill in killed.kills:
        if kill.hit.startswith("while writing"):
            print(f"  after {kill.after_s:.2f} s{' (aimed)' if kill.aimed else ''}: {kill.hit}")
    print(f"left behind at the end: {', '.join(left) or 'nothing'}")
    print(f"same bits: {'NO' if broken else 'yes'}", flush=True)
    if verdict == "NOT FLAT":
        broken.append(f"memory grew by {rss['growth_mb']:.1f} MB")
    return {
        "job": dataclasses.asdict(job),
        "undisturbed_s": whole_s,
        "killed_s": killed_s,
        "kills": [dataclasses.asdict(kill) for kill in killed.kills],
        "hits": dict(hits),
        "left_behind": left,
        "stderr_at_the_end": killed.warned,
        "memory": {
            **rss,
            "verdict": verdict,
            "flat_below_mb": bound_mb,
            "samples_s_mb": [[round(t, 2), round(m, 1)] for t, m in samples],
        },
        "broken": broken,
    }


# --- faults


@dataclass
class Fault:
    """What a fault led to."""

    name: str
    how: str
    exit_code: int | None = None
    stderr: list[str] = dataclasses.field(default_factory=list)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    broken: list[str] = dataclasses.field(default_factory=list)

    def show(self) -> None:
        """Print it, with the last line that the program said."""
        code = "-" if self.exit_code is None else self.exit_code
        print(f"{'BROKEN' if self.broken else 'ok':>6}  {self.name} ({self.how}): exit code {code}")
        print("".join(f"        | {line}\n" for line in self.stderr[-1:]), end="")
        if self.exit_code is not None:
            print(f"        left: {', '.join(f'{name} ({how})' for name, how in self.left.items()) or 'no run'}")
        print("".join(f"        ! {what}\n" for what in self.broken), end="", flush=True)


class Place:
    """Where a run folder lies, with room that can be taken away: a tmpfs, or without one a limit for the program."""

    def __init__(self, folder: Path, mounts: bool) -> None:
        self.root, self.mounts, self.limit = folder, mounts, 0
        self.out = folder / "run"

    def __enter__(self) -> Place:
        self.root.mkdir()
        if self.mounts:
            mount("tmpfs", self.root, "-t", "tmpfs", "-o", "size=4g")
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounts:
            subprocess.run(["umount", str(self.root)], check=True)
        else:
            self.heal()
        shutil.rmtree(self.root)

    @property
    def how(self) -> str:
        """What takes the room away."""
        return "tmpfs" if self.mounts else "limit on the size of files"

    def leave_room(self, room: int) -> None:
        """No more than this many bytes can be added, or stand in one file."""
        if self.mounts:
            disk = os.statvfs(self.root)
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            mount("tmpfs", self.root, "-o", f"remount,size={used + room}")
        self.limit = room

    def make_read_only(self) -> str | None:
        """How it was done; nothing if it cannot be."""
        if self.mounts:
            mount("tmpfs", self.root, "-o", "remount,ro")
            return "read-only tmpfs"
        folder = self.out if self.out.exists() else self.root
        folder.chmod(0o555)
        return None if os.access(folder, os.W_OK) else "chmod 555"  # permissions do not bind root

    def heal(self) -> None:
        """Room and permission are back."""
        self.limit = 0
        if self.mounts:
            mount("tmpfs", self.root, "-o", "remount,rw,size=4g")
        else:
            for folder in (self.root, self.out):
                if folder.exists():
                    folder.chmod(0o755)

    def before(self) -> None:
        """What the program is started under."""
        if self.limit and not self.mounts:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


def mount(what: str, where: Path, *options: str) -> None:
    subprocess.run(["mount", *options, what, str(where)], check=True, capture_output=True)


def may_mount(work: Path) -> bool:
    try:
        with Place(work / "trial", mounts=True):
            return True
    except (OSError, subprocess.CalledProcessError):
        (work / "trial").rmdir()
        return False


class Faults:
    """The faults, on copies of a run that was killed half way.

    Attributes:
        found: What they led to.
    """

    def __init__(self, job: Job, work: Path, whole: Path, seed: int, mounts: bool) -> None:
        self.job, self.work, self.whole, self.mounts = job, work, whole, mounts
        self.random = random.Random(seed)
        self.half = work / "half"
        self.found: list[Fault] = []
        self.limit_s = 300.0

    def run(self) -> list[Fault]:
        """All faults, one after another."""
        self._half_way()
        size = (self.half / STATE_NAME).stat().st_size
        log = -(-(self.half / METRICS_NAME).stat().st_size // PAGE) * PAGE
        self._full("full disk, no first state", 16 * PAGE, fresh=True)
        self._full("full disk, no room for the next state", size // 2)
        self._full("full disk, no room for the log", log + PAGE)
        self._read_only("read-only, new run", fresh=True)
        self._read_only("read-only, run gone on with")
        self._damaged("last state cut short", self._cut)
        self._damaged("last state with bytes flipped", self._flipped)
        self._damaged("last state missing", Path.unlink)
        self._both_damaged()
        return self.found

    def _half_way(self) -> None:
        """A run that was killed after its third save, so that it has two states and a checkpoint."""
        seen: set[int] = set()
        with running(self.job, self.half) as process:
            while len(seen) < 4 and not ended(process, 0.01):
                if (self.half / STATE_NAME).exists():
                    seen.add((self.half / STATE_NAME).stat().st_mtime_ns)
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"soak: the run could not be killed half way: it ended with {process.returncode}")

    @contextmanager
    def _place(self, fresh: bool = False, mounts: bool | None = None) -> Iterator[Place]:
        with Place(self.work / "place", self.mounts if mounts is None else mounts) as place:
            if not fresh:
                shutil.copytree(self.half, place.out)
            yield place

    def _tried(self, fault: Fault, place: Place, code: int) -> None:
        """Run under the fault: it ends with this code, and says one line."""
        with running(self.job, place.out, place.before) as process:
            try:
                fault.stderr = process.communicate(timeout=self.limit_s)[1].splitlines()
            except subprocess.TimeoutExpired:
                fault.broken.append(f"it did not end within {self.limit_s:g} s")
        fault.exit_code, fault.left = process.returncode, held(place.out)
        if fault.exit_code != code:
            fault.broken.append(f"exit code {fault.exit_code} instead of {code}")
        if has_traceback(fault.stderr):
            fault.broken.append("a traceback")
        if len(fault.stderr) != 1:
            fault.broken.append(f"{len(fault.stderr)} lines on stderr instead of one")

    def _ended(self, fault: Fault) -> None:
        fault.show()
        self.found.append(fault)

    def _goes_on(self, fault: Fault, place: Place) -> None:
        """What is left is readable, and the run goes on from it, without the fault, to the same bits."""
        fault.broken += unreadable(fault.left)
        place.heal()
        with running(self.job, place.out) as process:
            stderr = process.communicate(timeout=self.limit_s)[1].splitlines()
        if process.returncode:
            fault.broken.append(f"it does not go on: {' | '.join(stderr[-1:])}")
        else:
            fault.broken += departures(self.whole, place.out)

    def _full(self, name: str, room: int, fresh: bool = False) -> None:
        with self._place(fresh) as place:
            fault = Fault(name, place.how)
            place.leave_room(room)
            self._tried(fault, place, code=1)
            self._goes_on(fault, place)
        self._ended(fault)

    def _read_only(self, name: str, fresh: bool = False) -> None:
        with self._place(fresh) as place:
            how = place.make_read_only()
            fault = Fault(name, how or "not checked: nothing binds root but a mount, and it may not mount")
            if how:
                self._tried(fault, place, code=1)
                self._goes_on(fault, place)
        self._ended(fault)

    def _cut(self, path: Path) -> None:
        os.truncate(path, self.random.randrange(path.stat().st_size))

    def _flipped(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        middle = self.random.randrange(len(content) // 4, 3 * len(content) // 4)
        for i in range(middle, middle + 8):
            content[i] ^= self.random.randrange(1, 256)
        path.write_bytes(content)

    def _damaged(self, name: str, damage: Callable[[Path], None]) -> None:
        with self._place(mounts=False) as place:
            fault = Fault(name, "on a copy")
            damage(place.out / STATE_NAME)
            self._tried(fault, place, code=0)
            if not any(PREVIOUS_NAME in line for line in fault.stderr):
                fault.broken.append(f"no warning that it goes on from {PREVIOUS_NAME}")
            fault.broken += departures(self.whole, place.out)
        self._ended(fault)

    def _both_damaged(self) -> None:
        with self._place(mounts=False) as place:
            fault = Fault("both states damaged", "on a copy")
            self._cut(place.out / STATE_NAME)
            self._flipped(place.out / PREVIOUS_NAME)
            before = digests(place.out)
            self._tried(fault, place, code=1)
            if digests(place.out) != before:
                fault.broken.append("files of the folder were changed")
            if not any(str(place.out) in line for line in fault.stderr):
                fault.broken.append("the message does not say which folder")
            if fault.left[CHECKPOINT_NAME].startswith(UNREADABLE):
                fault.broken.append("the checkpoint cannot be read")
        self._ended(fault)


def digests(folder: Path) -> dict[str, str]:
    """Checksums of all files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Print the report; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=30.0, help="of both runs of the soak together")
    parser.add_argument("--every", type=float, default=20.0, metavar="SECONDS", help="mean time between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", choices=[name for family in families() for name in family.presets], default="quick")
    parser.add_argument("--only", choices=("soak", "faults"))
    parser.add_argument("--no-mount", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no mount or program outlives this
    name, family = args.preset, family_with(args.preset).name
    result: dict[str, Any] = {
        "settings": {**vars(args), "json": None, "family": family},
        "environment": environment(threads=1),
    }
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="soak.") as folder:
        work = Path(folder)
        short = Job(name, **SHORT)
        speed = measured_speed(short, work / "short")
        result["speed"] = dataclasses.asdict(speed)
        print(f"start {speed.start_s:.1f} s, update {speed.update_s:.3f} s, save {speed.save_s:.2f} s", flush=True)
        if args.only != "faults":
            result["soak"] = soak(planned(name, speed, args.minutes, args.every), work, speed, args.every, args.seed)
            broken += result["soak"]["broken"]
        if args.only != "soak":
            mounts = not args.no_mount and may_mount(work)
            found = Faults(short, work, work / "short", args.seed, mounts).run()
            result["faults"] = [dataclasses.asdict(fault) for fault in found]
            broken += [f"{fault.name}: {what}" for fault in found for what in fault.broken]
    print("\n".join(["broken promises:", *broken]) if broken else "all promises held")
    stored = json.dumps({**result, "broken": broken}).replace(f"{work}/", "")  # messages name this machine's folder
    save(args.json, json.loads(stored))
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
