"""Whether a state that is to be loaded belongs to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from metatele.errors import ShapeMismatchError
from metatele.optim.moving import real


def own(
    state_dict: dict[str, Any], parameters: Mapping[Any, nn.Parameter], course: str, matrices: int
) -> dict[str, Any]:
    """A state of the general family, if it is one of this model.

    Args:
        state_dict: Of an optimizer.
        parameters: By their numbers there.
        course: Key of the first group, of what belongs to the network.
        matrices: Of the model.

    Raises:
        ShapeMismatchError: It is of another optimizer or model.
    """
    stored = state_dict["param_groups"][0].get(course) if state_dict["param_groups"] else None
    steps = [float(entry["step"]) for entry in state_dict["state"].values() if "step" in entry]
    if any(steps) and not stored:
        raise ShapeMismatchError(
            "the state counts steps and holds no memories of them: it is of another optimizer, or was read into "
            "the state of one that had made none; load it whole, by torch.load and load_state_dict"
        )
    if stored and len(stored["layouts"]) != matrices:
        raise ShapeMismatchError(
            f"the state does not belong to this model: expected {matrices} matrices, got {len(stored['layouts'])}"
        )
    for number, entry in state_dict["state"].items():
        momentum = entry.get("momentum")
        if number in parameters and momentum is not None and momentum.shape != real(parameters[number]).shape:
            raise ShapeMismatchError(
                f"the state does not belong to this model: expected momentum of shape "
                f"{tuple(parameters[number].shape)}, got {tuple(momentum.shape)}"
            )
    return state_dict
