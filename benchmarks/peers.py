"""What breadth.py compares: optimizers as their users set them up, each with one rate to tune or none.

Every tuned one but schedule-free has 5 % of warm-up and a linear decay to 0; schedule-free has the warm-up alone, as
its authors advise. ``pytorch_optimizer`` is imported when one of its optimizers is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Settings = Mapping[str, float]

WARM_UP = 0.05


class UnavailableError(Exception):
    """A method that can't be built here, and why.

    Args:
        reason: A sentence.
        everywhere: Whether that holds for every task.
    """

    def __init__(self, reason: str, everywhere: bool = False) -> None:
        super().__init__(reason, everywhere)
        self.reason, self.everywhere = reason, everywhere


class FlatMuon(Optimizer):
    """torch's Muon, which takes matrices alone, with kernels of convolutions as matrices [out, in × height × width].

    The rest goes to AdamW at a rate of its own: embeddings, positions, the last layer, vectors.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, rest_lr: float) -> None:
        hidden, rest = divided(model)
        self.pairs = [(p, nn.Parameter(p.detach().flatten(1))) for p in hidden]  # each pair shares its memory
        matrices = [flat for _, flat in self.pairs]
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay) if matrices else None
        self.adamw = torch.optim.AdamW(rest, lr=rest_lr, weight_decay=weight_decay)
        super().__init__([*hidden, *rest], {})
        # A scheduler scales the rates that the two inner optimizers have.
        inner = [*(self.muon.param_groups if self.muon else []), *self.adamw.param_groups]
        self.param_groups = inner

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for p, flat in self.pairs:
            flat.grad = None if p.grad is None else p.grad.flatten(1)
        if self.muon is not None:
            self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        for p, _ in self.pairs:
            p.grad = None
        self.adamw.zero_grad(set_to_none)


OUTSIDE = ("embed", "token", "position", "head")


def divided(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices and kernels, and the rest: embeddings, positions, the head, vectors."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        outside = p.ndim < 2 or name.split(".")[0] in OUTSIDE
        (rest if outside else hidden).append(p)
    return hidden, rest


def _pytorch_optimizer(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise UnavailableError(f"{name} needs pytorch_optimizer: pip install 'metatele[benchmarks]'", True) from error
    return getattr(pytorch_optimizer, name)


def _adamw(model: nn.Module, steps: int, s: Settings) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"])


def _muon(model: nn.Module, steps: int, s: Settings) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise UnavailableError(f"Muon needs torch 2.9 or later, this is {torch.__version__}", True)
    return FlatMuon(model, s["lr"], s["weight_decay"], s["rest_lr"])


def _soap(model: nn.Module, steps: int, s: Settings) -> Optimizer:
    return _pytorch_optimizer("SOAP")(model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"])


def _shampoo(model: nn.Module, steps: int, s: Settings) -> Optimizer:
    """Roots every 10 steps like SOAP's, lengths of RMSProp: the defaults, 1000 and SGD's, suit long runs."""
    from_package = _pytorch_optimizer("ScalableShampoo")
    return from_package(
        model.parameters(),
        lr=s["lr"],
        weight_decay=s["weight_decay"],
        decoupled_weight_decay=True,
        betas=(0.9, 0.95),
        moving_average_for_momentum=True,
        start_preconditioning_step=10,
        preconditioning_compute_steps=10,
        graft_type=3,  # RMSProp
    )


def _schedule_free(model: nn.Module, steps: int, s: Settings) -> Optimizer:
    return _pytorch_optimizer("ScheduleFreeAdamW")(
        model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"], warmup_steps=round(WARM_UP * steps)
    )


def _prodigy(model: nn.Module, steps: int, s: Settings) -> Optimizer:
    return _pytorch_optimizer("Prodigy")(model.parameters())


def _ours(model: nn.Module, steps: int, s: Settings) -> Optimizer:
    import metatele
    from metatele.errors import MetateleError

    try:
        return metatele.LearnedOptimizer(model, total_steps=steps)
    except TypeError as error:
        if "total_steps" not in str(error):
            raise
        raise UnavailableError("this LearnedOptimizer does not take total_steps", True) from error
    except MetateleError as error:
        raise UnavailableError(f"LearnedOptimizer refuses the model: {error}") from error


def _ours_endless(model: nn.Module, steps: int, s: Settings) -> Optimizer:
    import metatele
    from metatele.errors import MetateleError

    try:
        return metatele.LearnedOptimizer(model)
    except MetateleError as error:
        raise UnavailableError(f"LearnedOptimizer refuses the model: {error}") from error


@dataclass(frozen=True)
class Method:
    """An optimizer of the comparison.

    Attributes:
        title: What tables and figures call it.
        make: Builds it, from the model, the number of steps and the settings.
        rates: The grid's first five; none for what has nothing to tune.
        scheduled: Whether the rate is warmed up and decays.
        averaged: Whether it is evaluated at other weights than it is trained at, with ``train()`` and ``eval()``.
        after: A method whose tuned rate is this one's ``rest_lr``.
    """

    title: str
    make: Callable[[nn.Module, int, Settings], Optimizer]
    rates: tuple[float, ...] = ()
    scheduled: bool = True
    averaged: bool = False
    after: str = ""


OURS = ("ours", "ours-endless")
METHODS: dict[str, Method] = {
    "adamw": Method("AdamW", _adamw, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)),
    "muon": Method("Muon + AdamW", _muon, (5e-3, 1e-2, 2e-2, 5e-2, 1e-1), after="adamw"),
    "soap": Method("SOAP", _soap, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)),
    "shampoo": Method("Shampoo", _shampoo, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)),
    "schedule-free": Method(
        "schedule-free AdamW", _schedule_free, (2e-3, 5e-3, 1e-2, 2e-2, 5e-2), scheduled=False, averaged=True
    ),
    "prodigy": Method("Prodigy", _prodigy, scheduled=False),
    "ours": Method("ours", _ours, scheduled=False),
    "ours-endless": Method("ours, steps not told", _ours_endless, scheduled=False),
}
GRID = tuple(m * 10.0**e for e in range(-6, 3) for m in (1.0, 2.0, 5.0))


def neighbour(rate: float, side: int) -> float | None:
    """The next rate of the series 1, 2, 5, 10, … below (-1) or above (1), if there is one.

    Example:
        >>> neighbour(0.02, 1), neighbour(0.01, -1)
        (0.05, 0.005)
    """
    place = min(range(len(GRID)), key=lambda i: abs(GRID[i] / rate - 1)) + side
    return round(GRID[place], 9) if 0 <= place < len(GRID) else None


def schedule(step: int, steps: int) -> float:
    """Factor of the rate: up over the first 5 % of the steps, then down to 0 in a line.

    Example:
        >>> [round(schedule(t, 100), 2) for t in (0, 4, 5, 52, 99)]
        [0.2, 1.0, 1.0, 0.51, 0.01]
    """
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, (steps - step) / (steps - warm))
