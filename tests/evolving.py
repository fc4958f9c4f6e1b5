"""A stand-in for a learned optimizer, whose few parameters evolution can find: Adam with its rate and betas."""

import math
import os
import signal
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from metatele.config import EvolutionTrainingConfig, FamilyConfig, ModulesConfig, RunConfig, families, register_family
from metatele.config.base import setting
from metatele.learned import LearnedFamily, register_learned
from metatele.training.families import register_trainer
from metatele.training.general import EvolutionTrainer


@dataclass(frozen=True)
class AdamConfig:
    """Where it begins."""

    begin: float = setting(1e-4, "the rate before training")

    @property
    def title(self):
        return "Adam(evolved)"


@dataclass(frozen=True)
class EvolvedRunConfig(RunConfig):
    """A run of this family."""

    preset: str = "evolved"
    seed: int = 0
    task: ModulesConfig = field(default_factory=ModulesConfig)
    method: AdamConfig = field(default_factory=AdamConfig)
    training: EvolutionTrainingConfig = field(default_factory=EvolutionTrainingConfig)


class AdamMeta(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.log_rate = nn.Parameter(torch.tensor([math.log(config.begin)]))
        self.betas = nn.Parameter(torch.tensor([2.2, 6.9]))  # logits of 0.9 and 0.999

    def optimizer(self, model):
        betas = self.betas.sigmoid().tolist()
        return torch.optim.Adam(model.parameters(), float(self.log_rate.exp()), betas=betas)


def made(meta, model, total_steps):
    return meta.optimizer(model)


def trainer(config, device="cpu", processes=None):
    from metatele.training.processes import Processes

    return EvolutionTrainer(config, device, processes or Processes(), partial(AdamMeta, config.method), made)


def register():
    """Once in a process."""
    if "evolved" in [family.name for family in families()]:
        return
    register_family(FamilyConfig("evolved", "Adam, evolved", EvolvedRunConfig, ("evolved",), lambda *_: {}))
    build = lambda method, task, seed: AdamMeta(method)  # noqa: E731
    register_learned(LearnedFamily("evolved", AdamMeta, build, None))
    register_trainer("evolved", trainer)


def square(offset):
    """Work for workers: squares; a negative number ends its process, and a hundred takes too long."""

    def work(job):
        if job == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if job == -2:
            raise ValueError("no square")
        if job == 100:
            time.sleep(60)
        return job * job + offset

    return work
