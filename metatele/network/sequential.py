"""Reading an ordinary ``nn.Sequential`` as the perceptron the mathematics knows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from metatele.errors import UnsupportedModelError
from metatele.perceptron.activations import (
    Activation,
    Identity,
    LeakyReLU,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)
from metatele.perceptron.mlp import MLP


def activation_of(module: nn.Module) -> Activation | None:
    """The activation a module computes, or ``None`` if it is none of ours."""
    if type(module) is nn.LeakyReLU:
        return LeakyReLU(float(module.negative_slope)) if module.negative_slope else ReLU()
    if type(module) is nn.Softplus:
        return Softplus() if module.beta == 1 and module.threshold >= 20 else None
    for kind, ours in (
        (nn.Identity, Identity),
        (nn.ReLU, ReLU),
        (nn.Tanh, Tanh),
        (nn.Sigmoid, Sigmoid),
        (nn.SiLU, SiLU),
    ):
        if type(module) is kind:  # a subclass may compute anything
            return ours()
    return None


def _is_plain_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def flat_modules(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Path and module of everything in nested Sequentials, in the order of a pass."""
    modules: list[tuple[str, nn.Module]] = []
    for name, module in model._modules.items():  # named_children would skip a module used twice
        assert module is not None
        path = f"{prefix}{name}"
        modules += flat_modules(module, path + ".") if _is_plain_sequential(module) else [(path, module)]
    return modules


_REASONS: dict[type[nn.Module], str] = {
    nn.Dropout: "its random mask makes another function of every pass",
    nn.BatchNorm1d: "its statistics belong to the batch and to the units as they were",
    nn.LayerNorm: "it mixes the hidden units, which the group then cannot",
}
_ENDS = (nn.Softmax, nn.LogSoftmax)


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain ``nn.Sequential`` in a module that holds all of the module's parameters, or else the module itself.

    Compiled models, ``DataParallel``, ``DistributedDataParallel``, Fabric's and Accelerate's wrappers and modules of
    one's own may lie around it.

    Raises:
        TypeError: It is no module.

    Example:
        >>> inside = nn.Sequential(nn.Linear(3, 2))
        >>> unwrapped(nn.DataParallel(inside)) is inside
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    own = {id(p) for p in model.parameters()}
    for module in model.modules():  # from outside to inside
        if _is_plain_sequential(module) and {id(p) for p in module.parameters()} == own:
            return module
    return model


def parameters_of(linears: Sequence[nn.Linear]) -> list[nn.Parameter]:
    """Weight and bias of each layer, in the order of a pass.

    Raises:
        UnsupportedModelError: A weight is no parameter any more: pruning or a parametrisation computes it.
    """
    found: list[nn.Parameter] = []
    for layer, linear in enumerate(linears):
        known = linear._parameters
        if set(known) != {"weight", "bias"}:
            raise UnsupportedModelError(
                f"the weight or bias of Linear number {layer} is computed from others since the optimizer was made "
                f"(it holds {', '.join(known)}), as pruning and parametrisations do: make that permanent, with "
                "torch.nn.utils.prune.remove for instance, and then the optimizer anew"
            )
        found += [p for p in (known["weight"], known["bias"]) if p is not None]
    return found


def read_sequential(model: nn.Module, framed: bool = False) -> tuple[list[nn.Linear], MLP]:
    """The linear layers of an ``nn.Sequential`` (nested or not) and its shape.

    Args:
        model: ``Linear`` layers with one activation between each two; modules around it are looked through
            (:func:`unwrapped`).
        framed: Also take ``Flatten`` before the first Linear, and an activation or (log-)softmax after the
            last; they are no part of the perceptron.

    Raises:
        UnsupportedModelError: Anything else; the layer is named.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> read_sequential(model)[1].widths
        (3, 4, 2)
    """
    model = unwrapped(model)
    if not _is_plain_sequential(model):
        raise UnsupportedModelError(
            f"model must be an nn.Sequential of Linear and activations, got {type(model).__name__}"
        )
    modules = flat_modules(model)
    if framed:
        modules = _without_frame(modules)
    linears: list[nn.Linear] = []
    paths: dict[int, str] = {}
    between: list[Activation] = []
    for path, module in modules:
        found = activation_of(module)
        if type(module) is nn.Linear:  # not a subclass, which parametrised layers are
            if linears and len(between) < len(linears):
                raise UnsupportedModelError(f"layer {path!r} follows another Linear without an activation")
            if set(module._parameters) != {"weight", "bias"}:  # pruned or normalised by hooks, say
                raise UnsupportedModelError(
                    f"layer {path!r} is not a plain Linear: its weight is computed from others; make that permanent "
                    "first, by torch.nn.utils.prune.remove for instance"
                )
            if id(module.weight) in paths:
                raise UnsupportedModelError(f"layers {paths[id(module.weight)]!r} and {path!r} share a weight")
            paths[id(module.weight)] = path
            if module.bias is not None and any(module.bias is other.bias for other in linears):
                raise UnsupportedModelError(f"layer {path!r} shares its bias with another layer")
            linears.append(module)
        elif found is None:
            reason = next((f": {why}" for kind, why in _REASONS.items() if isinstance(module, kind)), "")
            what = repr(module) if type(module) is nn.Softplus else type(module).__name__  # its settings are the reason
            raise UnsupportedModelError(
                f"layer {path!r} ({what}) is not supported{reason}; Linear, Identity, LeakyReLU, ReLU, Tanh, Sigmoid, "
                "Softplus() and SiLU are"
            )
        elif len(between) != len(linears) - 1:
            raise UnsupportedModelError(f"activation {path!r} must stand between two Linear layers, one at a time")
        else:
            between.append(found)
    if not linears:
        raise UnsupportedModelError("model holds no Linear layer")
    if len(between) == len(linears):
        raise UnsupportedModelError("the last layer must be Linear, without an activation after it")
    widths = (linears[0].in_features, *(linear.out_features for linear in linears))
    return linears, MLP(widths, between, [linear.bias is not None for linear in linears])


def _without_frame(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    begin, end = 0, len(modules)
    while begin < end and type(modules[begin][1]) is nn.Flatten:
        begin += 1
    while end > begin and (type(modules[end - 1][1]) in _ENDS or activation_of(modules[end - 1][1]) is not None):
        end -= 1
    return modules[begin:end]


def describe(mlp: MLP) -> str:
    """Shape in words, for messages."""
    widths = "-".join(map(str, mlp.widths))
    activations = " ".join(dict.fromkeys(a.describe() for a in mlp.activations)) or "linear"
    biases = "with" if all(mlp.biases) else "without" if not any(mlp.biases) else "with some"
    return f"{widths} {activations} {biases} bias"
