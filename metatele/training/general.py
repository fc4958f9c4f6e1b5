"""Meta-training of the general family: evolution on whole inner runs, made as users make them."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from metatele.checkpoint import load
from metatele.config import EvolutionTrainingConfig, GeneralRunConfig, RunConfig, to_dict
from metatele.errors import CheckpointError, ConfigError, DivergedError
from metatele.files import write_atomically
from metatele.learned.families import learned_family
from metatele.learned.general.optimizer import GeneralOptimizer
from metatele.named import named_checkpoint
from metatele.optim.learned import LearnedOptimizer
from metatele.tasks.modules import Modules
from metatele.training.evolution import Evolution, rate_share
from metatele.training.inner import (
    REFERENCE_RATES,
    MakeOptimizer,
    Outcome,
    fine,
    from_plain,
    plain,
    score,
)
from metatele.training.jobs import Job, flat, set_flat, worker
from metatele.training.processes import Processes
from metatele.training.trainer import MetaTrainer
from metatele.training.workers import Lost, Workers

_SHARED_SEED = 0  # of problems that are the same for all seeds of meta-training
_REFERENCES = 1  # version of the file of Adam's runs: raise it when problems change


class EvolutionTrainer(MetaTrainer):
    """Meta-training by evolution strategies over whole runs; both of a pair see the same problem.

    Several evolutions go on side by side, from one beginning, each with directions of its own: those of the seeds
    ``seed`` to ``seed + meta_seeds - 1``. The mean of their weights is what is validated and published.

    Args:
        config: What to train and how.
        device: Where published weights lie; inner runs are on the CPU, where small ones are fastest.
        processes: One alone: the work is shared by ``workers``.
        build: Gives the meta-optimizer; a function of a module, or a partial of one, as it travels to workers.
        make: ``make(meta, model, total_steps)`` gives the optimizer of a run; the same is true of it.

    Raises:
        ConfigError: There are several processes.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device | str,
        processes: Processes,
        build: Callable[[], nn.Module],
        make: MakeOptimizer,
    ) -> None:
        if processes.count > 1:
            raise ConfigError(f"the general family trains in one process with workers, got {processes.count} processes")
        super().__init__(config, build(), device, processes)
        self.optimizer.requires_grad_(False)
        self.modules = Modules(config.task)
        self.begin = flat(self.optimizer)
        seeds = range(config.seed, config.seed + config.training.meta_seeds)
        self.disturbs = config.training.disturb == "settings"
        count = cast("GeneralOptimizer", self.optimizer).explored() if self.disturbs else None
        self.evolutions = [Evolution(self.begin, config.training, seed, count) for seed in seeds]
        arguments = (config.task, build, make)
        self.workers = Workers(config.training.workers, worker, arguments, config.training.timeout_s)
        self.references: dict[str, Outcome] = {}
        self.elapsed_s, self._since_s = 0.0, time.monotonic()
        self._generation_s = self._job_s = 0.0  # what the last generation took, and a run of it
        self._late = False
        self._began: dict[str, float] = {}  # validation of the beginning, known from the first one on
        self._warned: set[str] = set()
        self._read_references()

    @property
    def c(self) -> EvolutionTrainingConfig:
        """How it is trained."""
        found: EvolutionTrainingConfig = self.config.training
        return found

    @property
    def averaged(self) -> Tensor:
        """The published weights: the mean of the evolutions', flat."""
        return torch.stack([evolution.averaged for evolution in self.evolutions]).mean(0)

    @property
    def beside(self) -> dict[str, nn.Module]:
        """Every evolution's own result, where there are several."""
        if len(self.evolutions) == 1:
            return {}
        found = {f"seeds/{evolution.seed}": copy.deepcopy(self.optimizer) for evolution in self.evolutions}
        for optimizer, evolution in zip(found.values(), self.evolutions, strict=True):
            set_flat(optimizer, evolution.averaged)
        return found

    @property
    def progress(self) -> float:
        """Share of the run that is done, by generations or by time."""
        done = self.update / self.c.updates
        return max(done, self._seconds() / (60 * self.c.minutes)) if self.c.minutes else done

    @property
    def finished(self) -> bool:
        """Whether all generations are done, or the time left is too short for another one and the last validation.

        It changes in :meth:`step` alone, so that a run which ends is validated and saved.
        """
        return self.update >= self.c.updates or self._late

    def _too_late(self) -> bool:
        missing = sum(_name(key) not in self.references for key in self._validated())
        runs = self.c.validation_problems * len(self._validated_weights()) + len(REFERENCE_RATES) * missing
        last = self._job_s * runs
        return self.c.minutes > 0 and self._seconds() + self._generation_s + last >= 60 * self.c.minutes

    def step(self, measure: bool = False) -> dict[str, float]:
        """One generation of every evolution.

        Args:
            measure: Nothing more is measured; all is known.

        Returns:
            Numbers to log; ``meta_loss`` is the mean score of both of all pairs.

        Raises:
            DivergedError: ``max_skipped`` generations in a row told nothing.
        """
        begin_s, c, progress = time.perf_counter(), self.c, self.progress
        first, known_before, number = self.started, len(self.references), c.pairs * c.problems
        self.started += number
        problems: list[tuple[int, str, int]] = []
        signed: list[Tensor] = []
        asked = [evolution.asked(progress) for evolution in self.evolutions]
        for evolution, (noise, sigma) in zip(self.evolutions, asked, strict=True):
            problems += [self._key(evolution.seed, first + i) for i in range(number)]
            moved = self._directions(noise)
            signed += [
                evolution.mean + sign * sigma * moved[i // c.problems] for i in range(number) for sign in (1, -1)
            ]
        scores, outcomes = self._scores([key for key in problems for _ in range(2)], signed, self.disturbs)
        table = torch.tensor(scores, dtype=torch.float64).view(len(self.evolutions), c.pairs, c.problems, 2)
        differences, rate = (table[..., 0] - table[..., 1]).nanmean(-1), rate_share(progress, c.decay)
        norms = [
            evolution.told(self._directions(noise, seen), told, sigma, rate)
            for evolution, (noise, sigma), told, seen in zip(
                self.evolutions, asked, differences, self._seen(outcomes), strict=True
            )
        ]
        set_flat(self.optimizer, self.averaged)
        self.update += 1
        self.skipped_in_row = 0 if any(norms) else self.skipped_in_row + 1
        self.skipped += norms.count(0.0)
        if self.skipped_in_row >= c.max_skipped:
            raise DivergedError(f"{self.skipped_in_row} generations in a row told nothing (at {self.update})")
        self._generation_s = time.perf_counter() - begin_s
        new = len(self.references) - known_before
        self._job_s = self._generation_s / (2 * len(problems) + len(REFERENCE_RATES) * new)
        self._late = self._too_late()
        if not c.pool:
            self._forget()
        means = table.flatten(1).nanmean(-1).tolist()
        runs = [outcome for outcome in outcomes if outcome is not None]
        steps = sum(self.modules.sample(*key).horizon for key in problems) * 2
        return {
            "meta_loss": float(table.nanmean()),
            **(
                {f"meta_loss/{e.seed}": mean for e, mean in zip(self.evolutions, means, strict=True)}
                if len(means) > 1
                else {}
            ),
            "meta_gradient_norm": sum(norms) / len(norms),
            "skipped": float(self.skipped),
            "lost_trajectories": float(len(outcomes) - len(runs)),
            "not_finite": float(sum(not outcome.finite for outcome in runs)),
            "sigma": asked[0][1],
            "difference": float(differences.abs().nanmean()),
            "run_s": sum(outcome.seconds for outcome in runs) / max(1, len(runs)),
            "generation_s": self._generation_s,
            "ms_per_trajectory_step": 1e3 * self._generation_s / steps,
        }

    def _directions(self, noise: Tensor, seen: Tensor | None = None) -> Tensor:
        """Directions of the parameters ``[pairs, n]``, from those that are disturbed and what was seen meanwhile."""
        if not self.disturbs:
            return noise
        meta = cast("GeneralOptimizer", self.optimizer)
        return meta.lifted(noise, noise.new_zeros(len(noise), 0) if seen is None else seen.to(noise))

    def _seen(self, outcomes: list[Outcome | None]) -> list[Tensor | None]:
        """Of every evolution the mean of what was seen in the runs of each pair ``[pairs, numbers]``."""
        if not self.disturbs:
            return [None] * len(self.evolutions)
        known = [torch.tensor(o.seen if o is not None else ()) for o in outcomes]
        zeros = torch.zeros(max((len(k) for k in known), default=0))
        all_ = torch.stack([k if len(k) else zeros for k in known])  # the difference of a lost one counts nothing
        return list(all_.view(len(self.evolutions), self.c.pairs, -1, len(zeros)).mean(2))

    def validate(self) -> tuple[float, dict[Any, float]]:
        """Mean score on problems that are never trained on, and shares and medians behind it.

        The same is told of the beginning, and of every evolution on its own where there are several.
        """
        keys, weights = self._validated(), self._validated_weights()
        of = [theta for theta in weights.values() for _ in keys]
        scores, outcomes = self._scores(keys * len(weights), of)
        self._write_references()
        found: dict[str, dict[str, float]] = {}
        for i, name in enumerate(weights):
            part = slice(i * len(keys), (i + 1) * len(keys))
            found[name] = self._summary(keys, scores[part], outcomes[part])
        self._began = found.setdefault("beginning", self._began)
        ours = found.pop("")
        others = {f"{name}/{key}": value for name, summary in found.items() for key, value in summary.items()}
        return ours.pop("score"), {**ours, **others}

    def _validated_weights(self) -> dict[str, Tensor]:
        """Whose weights the next validation is of, by name; the published ones have none."""
        weights = {"": self.averaged}
        if len(self.evolutions) > 1:
            weights.update({f"seed_{evolution.seed}": evolution.averaged for evolution in self.evolutions})
        return weights if self._began else {**weights, "beginning": self.begin}

    def _summary(
        self, keys: list[tuple[int, str, int]], scores: list[float], outcomes: list[Outcome | None]
    ) -> dict[str, float]:
        pairs = [
            (ours, self.references[_name(key)])
            for key, ours in zip(keys, outcomes, strict=True)
            if ours is not None and _name(key) in self.references
        ]
        known = [value for value in scores if math.isfinite(value)]
        ratios = [ours.best / max(theirs.best, 1e-30) for ours, theirs in pairs if ours.finite and theirs.finite]
        return {
            "score": sum(known) / len(known) if known else math.inf,
            "fine": sum(fine(ours, theirs, self.c) for ours, theirs in pairs) / max(1, len(pairs)),
            "held_out_ratio": float(torch.tensor(ratios or [math.inf]).median()),
            "twice_adams": sum(ratio > 2 for ratio in ratios) / max(1, len(pairs)),
            "not_finite": float(sum(not ours.finite for ours, _ in pairs)),
            "lost": float(len(scores) - len(known)),
        }

    def shown(self, measured: dict[Any, float]) -> str:
        """The last validation, for whoever watches."""
        return "".join(f"  {name} {value:.3g}" for name, value in measured.items() if "/" not in name)

    def gradients(self) -> Tensor:
        """None are taken."""
        return torch.zeros(0)

    def close(self) -> None:
        """End the workers."""
        self.workers.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on to the same bits."""
        return {
            "format": 1,
            "config": to_dict(self.config),
            "evolutions": [evolution.state_dict() for evolution in self.evolutions],
            "began": self._began,
            "counters": [self.update, self.skipped, self.skipped_in_row, self.started],
            "best": self.best,
            "elapsed_s": self._seconds(),
            "late": self._late,
            "references": {name: plain(outcome) for name, outcome in self.references.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            CheckpointError: The state does not belong to this configuration.
        """
        try:
            for evolution, saved in zip(self.evolutions, state["evolutions"], strict=True):
                evolution.load_state_dict(saved)
            self._began = state["began"]
            self.update, self.skipped, self.skipped_in_row, self.started = state["counters"]
            self.best = state["best"]
            self._late = state["late"]
            self.elapsed_s, self._since_s = state["elapsed_s"], time.monotonic()
            self.references.update({name: from_plain(values) for name, values in state["references"].items()})
            set_flat(self.optimizer, self.averaged)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"the training state does not fit its configuration: {error}") from error

    def _seconds(self) -> float:
        return self.elapsed_s + time.monotonic() - self._since_s

    def _validated(self) -> list[tuple[int, str, int]]:
        return [(_SHARED_SEED, "validation", i) for i in range(self.c.validation_problems)]

    def _key(self, seed: int, number: int) -> tuple[int, str, int]:
        """A seed's training problem of a number: a new one, or one of the pool, each once in every round."""
        if not self.c.pool:
            return seed, "train", number
        turn, place = divmod(number, self.c.pool)
        g = torch.Generator().manual_seed(1000 * seed + turn)
        return _SHARED_SEED, "train", int(torch.randperm(self.c.pool, generator=g)[place])

    def _scores(
        self, keys: list[tuple[int, str, int]], parameters: list[Tensor], notes: bool = False
    ) -> tuple[list[float], list[Outcome | None]]:
        """Score and outcome of a run for each problem and parameters; NaN and none for one that was lost."""
        missing = [key for key in dict.fromkeys(keys) if _name(key) not in self.references]
        jobs = [Job(key, None) for key in missing]
        jobs += [Job(key, theta.tolist(), notes) for key, theta in zip(keys, parameters, strict=True)]
        costs = {key: self.modules.sample(*key).cost_ms for key in dict.fromkeys(keys)}
        order = sorted(range(len(jobs)), key=lambda i: -costs[jobs[i].problem])
        answers: dict[int, Any] = dict(zip(order, self.workers.answers([jobs[i] for i in order]), strict=True))
        outcomes = [self._outcome(answers[i]) for i in range(len(jobs))]
        for key, found in zip(missing, outcomes, strict=False):
            if found is not None:
                self.references[_name(key)] = found
        ours = outcomes[len(missing) :]
        scores = [
            math.nan
            if outcome is None or _name(key) not in self.references
            else score(outcome, self.references[_name(key)], self.c)
            for key, outcome in zip(keys, ours, strict=True)
        ]
        return scores, ours

    def _outcome(self, answer: Any) -> Outcome | None:
        if not isinstance(answer, Lost):
            return from_plain(answer)
        if answer.reason not in self._warned:
            self._warned.add(answer.reason)
            warnings.warn(f"an inner run was lost: {answer.reason}", stacklevel=2)
        return None

    def _forget(self) -> None:
        """Adam's runs on problems that never come again."""
        self.references = {name: found for name, found in self.references.items() if not name.startswith("train")}

    # --- Adam's runs in a file

    def _label(self) -> str:
        return json.dumps([_REFERENCES, list(REFERENCE_RATES), to_dict(self.config.task)], sort_keys=True)

    def _read_references(self) -> None:
        path = Path(self.c.references)
        if not self.c.references or not path.exists():
            return
        try:
            stored = json.loads(path.read_text("utf-8"))
            found = {name: from_plain(values) for name, values in stored.get(self._label(), {}).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"references must be a file of earlier runs, and {path} cannot be read") from error
        self.references = {**found, **self.references}

    def _write_references(self) -> None:
        if not self.c.references:
            return
        path = Path(self.c.references)
        stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
        ours = {
            name: plain(found) for name, found in self.references.items() if name.split("/")[1] == str(_SHARED_SEED)
        }
        stored[self._label()] = {**stored.get(self._label(), {}), **ours}
        write_atomically(path, json.dumps(stored).encode())


def _name(key: tuple[int, str, int]) -> str:
    seed, stream, index = key
    return f"{stream}/{seed}/{index}"


class GeneralTrainer(EvolutionTrainer):
    """Meta-training of the general family, whose inner runs are those of ``LearnedOptimizer(model)``.

    Args:
        config: What to train and how.
        device: Where published weights lie.
        processes: One alone.
    """

    def __init__(
        self, config: GeneralRunConfig, device: torch.device | str = "cpu", processes: Processes | None = None
    ) -> None:
        build = partial(_built, config)
        super().__init__(config, device, processes or Processes(), build, _stepped)


def _built(config: GeneralRunConfig) -> nn.Module:
    meta = cast("GeneralOptimizer", learned_family("general").build(config.method, config.task, config.seed))
    meta.repeated.load_state_dict(load(named_checkpoint("transfer")).optimizer.state_dict())
    return meta


def _stepped(meta: Any, model: nn.Module, total_steps: int | None) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {} if total_steps is None else {"total_steps": total_steps}
    return LearnedOptimizer(model, meta, **settings)
