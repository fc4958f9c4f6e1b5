"""A teleport by hand: once, in place, on one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, ShapeMismatchError, UnsupportedModelError
from metatele.geometry import GradientNorm, Landscape, Objective
from metatele.geometry import objective as objective_by_name
from metatele.network.sequential import flat_modules, read_sequential, unwrapped
from metatele.optim.any_module import OF_MODELS, plan_of, teleport_module_
from metatele.perceptron.losses import Differentiable
from metatele.symmetry import action as action_by_name
from metatele.teleport import Ascent, Balance, TeleportMove, TeleportReport, default_move
from metatele.teleport.ascent import USUAL_CHANGE


def is_perceptron(model: nn.Module) -> bool:
    """Whether a model's teleports are those of perceptrons; what is none has the exact symmetries of any module.

    Example:
        >>> is_perceptron(nn.Sequential(nn.Linear(3, 2))), is_perceptron(nn.Sequential(nn.Conv2d(3, 2, 1)))
        (True, False)
    """
    try:
        read_sequential(model, framed=True)
    except UnsupportedModelError:
        return False
    return True


def refuse_balance(model: nn.Module, move: TeleportMove | None) -> None:
    """Refuse to balance perceptrons whose units have no scales.

    Raises:
        NotExactError: An activation is not positively homogeneous.
    """
    if isinstance(move, Balance) and is_perceptron(model):
        for activation in read_sequential(model, framed=True)[1].activations:
            action_by_name("rescaling").check(activation)


LossFunction = Callable[[Tensor, Tensor], Tensor]


def batch_landscape(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFunction, dtype: torch.dtype | None = None
) -> Landscape:
    """The loss of a model on a batch, as a function of its flat parameters.

    Args:
        model: As :class:`~metatele.TeleportOptimizer` takes it.
        inputs: What the model is called with, ``[n, ...]``.
        targets: What ``loss_fn`` takes beside the model's output.
        loss_fn: Gives a scalar.
        dtype: Of the computation; the parameters' own if not given, or float32 for half precision.

    Raises:
        UnsupportedModelError: The model holds a layer that is not covered; it is named.
        ShapeMismatchError: The inputs are not a batch of the model's, or the loss is not a scalar.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> scene = batch_landscape(model, torch.ones(4, 2), torch.zeros(4, 1), nn.functional.mse_loss)
        >>> flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        >>> torch.allclose(scene.at(flat).value, model(torch.ones(4, 2)).square().mean())
        True
    """
    linears, mlp = read_sequential(model, framed=True)
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor [n, ...], got {type(inputs).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (outputs, targets), got {loss_fn!r}")
    if not inputs.numel() or inputs.ndim < 2:
        raise ShapeMismatchError(f"a teleport needs a batch [n, ...] of at least one sample, got {tuple(inputs.shape)}")
    modules = [module for _, module in flat_modules(unwrapped(model))]
    begin, end = (next(i for i, m in enumerate(modules) if m is linear) for linear in (linears[0], linears[-1]))
    with torch.no_grad():
        first = inputs
        for module in modules[:begin]:
            first = module(first)
    if first.shape[-1] != mlp.widths[0]:
        raise ShapeMismatchError(f"expected inputs with {mlp.widths[0]} features, got shape {tuple(inputs.shape)}")
    tail = modules[end + 1 :]

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        outputs = outputs.reshape(*first.shape[:-1], outputs.shape[-1])
        for module in tail:
            outputs = module(outputs)
        result = loss_fn(outputs, wanted)
        if not isinstance(result, Tensor) or result.ndim:
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ShapeMismatchError(f"loss_fn must give a scalar tensor, got {got}")
        return result

    own = linears[0].weight.dtype
    dtype = dtype or (own if own in (torch.float32, torch.float64) else torch.float32)
    stored = None if own == dtype else own
    return Landscape(mlp, first.flatten(0, -2).to(dtype).T, targets, Differentiable(loss), stored)


def teleport_(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFunction,
    objective: str | Objective = "grad-norm",
    *,
    steps: int | None = None,
    rate: str | None = None,
    lr: float | None = None,
    radius: float | None = None,
    cap: float | None = None,
    descend: bool | None = None,
    action: str | None = None,
    parametrisation: str | None = None,
    max_drift: float | None = None,
    move: TeleportMove | None = None,
    whole_data: bool = False,
) -> TeleportReport:
    r"""Teleport a model's weights in place, once, on one batch: ``w ← g·w`` with g raising an objective.

    By default ``‖∇L(g·w)‖²`` is raised by gradient ascent along the orbit of w (Zhao et al. 2024, Section 5.1). In
    perceptrons of ReLU, LeakyReLU and Identity hidden units are rescaled, and along the exact symmetries of a module
    that is no perceptron it moves as well: outputs stay the same for every input, to rounding. In other perceptrons, or
    with another objective, the action is approximate: the loss on the batch stays within ``max_drift`` of what it was,
    and outputs change, on the batch too. Works under ``torch.inference_mode()`` too.

    Args:
        model: As :class:`~metatele.TeleportOptimizer` takes it. Layers with a frozen parameter stay.
        inputs: What the model is called with, ``[n, ...]``.
        targets: What ``loss_fn`` takes beside the model's output.
        loss_fn: Gives a scalar, like ``torch.nn.functional.cross_entropy``; it is differentiated twice.
        objective: What to raise: ``grad-norm``, ``sharpness``, ``curvature``, or an
            :class:`~metatele.geometry.Objective`. Of a module that is no perceptron ``sharpness`` costs 4000 passes a
            value by default: give ``Sharpness(directions=5)``.
        steps: Ascent steps at most; 10 if not given.
        rate: How long a step is: ``line-search`` (if not given), ``normalised`` or ``fixed`` (if ``lr`` is given); see
            :class:`~metatele.teleport.Ascent`. A step of the line search changes the weights by 15 % of their norm at
            most.
        lr: The rate of ``fixed``: ``T = lr · ∂F/∂T``.
        radius: ‖T‖ of one step at most, for the other two; 0.1 if not given.
        cap: Stop where the objective reaches it; infinite if not given.
        descend: Lower the objective instead.
        action: ``approximate``, ``rescaling``, ``exact`` or ``auto``; see :class:`~metatele.teleport.TeleportMove`.
            ``exact`` changes the network on other samples at will. If not given it is that of
            :func:`~metatele.teleport.default_move` for ``grad-norm``, with its bound on how far a unit may get out of
            balance, and ``approximate`` for other objectives.
        parametrisation: From T to g: ``exp`` (if not given), ``cayley``, ``first-order`` or ``direct``.
        max_drift: Largest accepted relative change of the loss on this batch; 0.01 if not given.
        move: A teleport move to make in place of the ascent, such as :class:`~metatele.Rescaling`; it has its own
            settings, so none of the ascent's may be given beside it. A module that is no perceptron takes
            :class:`~metatele.Balance`, :class:`~metatele.Rescaling` and :class:`~metatele.Random`.
        whole_data: The batch is all the data there is: action ``auto`` may then be the exact one.

    Returns:
        Loss and objective before and after, drift, whether something was rolled back, and if nothing moved the reason.

    Raises:
        UnsupportedModelError: The model holds a layer that is not covered, or has no hidden layer; it is named.
        ShapeMismatchError: The inputs are not a batch of the model's, or the loss is not a scalar.
        ConfigError: Settings that do not go together, or none of the hidden layers may be moved.
        NotExactError: The action does not exist for an activation.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3))
        >>> report = teleport_(model, torch.randn(5, 8), torch.randn(5, 3), nn.functional.mse_loss)
        >>> report.objective_after > 1.1 * report.objective_before, report.drift < 1e-5
        (True, True)
    """
    if isinstance(objective, TeleportMove):
        raise ConfigError(f"objective must be an objective or its name: give move={type(objective).__name__}(...)")
    given = {
        "steps": steps,
        "rate": rate,
        "lr": lr,
        "radius": radius,
        "cap": cap,
        "descend": descend,
        "action": action,
        "parametrisation": parametrisation,
        "max_drift": max_drift,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    chosen = _chosen(move, objective, settings)
    if isinstance(move, OF_MODELS) or not is_perceptron(model):
        refuse_balance(model, move)
        return teleport_module_(model, inputs, targets, loss_fn, plan_of(move, objective, settings))
    if move is None and action is None and isinstance(chosen, Ascent) and isinstance(chosen.objective, GradientNorm):
        usual = default_move(read_sequential(model, framed=True)[1])
        chosen = dataclasses.replace(chosen, action=usual.action, max_imbalance=usual.max_imbalance, tries=usual.tries)
    device = next(model.parameters()).device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        if isinstance(inputs, Tensor) and inputs.is_inference():
            inputs = inputs.clone()
        if isinstance(targets, Tensor) and targets.is_inference():
            targets = targets.clone()
        landscape = batch_landscape(model, inputs, targets, loss_fn)
        linears, _ = read_sequential(model, framed=True)
        parameters = [p for linear in linears for p in linear.parameters()]
        flat = torch.cat([p.detach().flatten() for p in parameters]).to(landscape.inputs.dtype)
        free = [all(p.requires_grad for p in linear.parameters()) for linear in linears]
        movable = [free[m] and free[m + 1] for m in range(len(free) - 1)]
        result = chosen.settled(whole_data)(landscape, flat, movable)
        for p, part in zip(parameters, result.weights.split([p.numel() for p in parameters]), strict=True):
            with torch.inference_mode(p.is_inference()), torch.no_grad():
                p.copy_(part.view_as(p))
    return TeleportReport.of(result.report, chosen.measured.name, loss_known=True)


def _chosen(move: TeleportMove | None, wanted: str | Objective, settings: dict[str, Any]) -> TeleportMove:
    """The move that was given, or an ascent of the objective."""
    if move is not None:
        if not isinstance(move, TeleportMove):
            raise TypeError(f"move must be a teleport move such as Rescaling(), got {type(move).__name__}")
        if settings:
            raise ConfigError(f"{next(iter(settings))} is a setting of the ascent, and move has its own: give it there")
        return move
    if "lr" in settings:
        settings = {"rate": "fixed", **settings}
    goal = wanted if isinstance(wanted, Objective) else objective_by_name(wanted)
    return Ascent(objective=goal, max_change=USUAL_CHANGE, **settings)
