"""The equivariant family steps a model of any shape: teleport, step, pull back."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ShapeMismatchError, UnsupportedModelError, with_page
from metatele.learned import EquivariantOptimizer, EquivariantStates, Observation
from metatele.learned.equivariant.observation import Wants, inner
from metatele.learned.equivariant.old_states import read_old
from metatele.network import bias
from metatele.network.use import Fingerprint, Moment, Use
from metatele.network.wanted import Wanted
from metatele.optim.steppers import Memory, SequentialStepper, Situation

_JUDGED = 4  # mini-batches, before it is said that most are small
_LARGE = 2**30  # bytes of state that are worth a warning
_MOTION = "motion."  # in the names of the records, where these two are
_SPLIT = ("velocity", "direction")  # have a column for a bias, which lies with the bias
NETWORK = "network"  # key of the first parameter group: what belongs to no single parameter


class EquivariantStepper(SequentialStepper):
    """Teleports, steps and pulls back; nothing drifts but at the teleport before the first step.

    What a layer remembers lies with its weight, its columns for a bias with that bias; plain numbers about the whole
    network lie in the first parameter group.
    """

    meta: EquivariantOptimizer
    defaults: Mapping[str, Any] = {"momentum": 1.0}

    def __init__(self, meta: EquivariantOptimizer, model: nn.Module) -> None:
        super().__init__(meta, model)
        self._states: EquivariantStates | None = None
        self._stored = True  # whether the optimizer's memory has them
        self._read = False  # whether they were looked for there
        self._warned, self._batches, self._small = False, 0, 0
        self._watch()
        needed = meta.state_bytes(self.mlp)
        if needed > _LARGE:
            warnings.warn(
                f"the optimizer's state will take {needed / 2**30:.1f} GiB, for second moments of the layers' "
                f"{max(self.mlp.widths)} inputs or outputs",
                stacklevel=4,
            )

    # --- a step

    def advance(self, at: Situation) -> bool:
        """Teleport, step, pull back."""
        if not self.capture.ended and self.capture.seen and self.capture.group is None:
            return False
        states = self._known(at)
        opened = bool((at.group.get(NETWORK) or {}).get("opened"))
        # Part of the way, or part of the layers, would not keep the outputs.
        if states is None and not opened and self.meta.opens(self.mlp) and all(rate == 1 for rate in at.rates):
            self._open(at)
            return True
        if states is not None and at.momentum != 1:
            motion = states.motion._replace(velocity=[at.momentum * v for v in states.motion.velocity])
            states = states.but(motion=motion)
        seen = self._seen(at, states)
        at.decay_()
        done = self.meta.step(seen, states, spend=True)
        if done.states.averaged > 1:  # batches differ
            self._judge(seen.samples)
        at.group["rolled_back"] += int(done.shortened)
        for parameters, rates, change in zip(
            self.by_layer(at.parameters), self.by_layer(at.rates), done.changes, strict=True
        ):
            for p, rate, part in zip(parameters, rates, bias.parted(change[0], len(parameters) == 2), strict=False):
                if rate and part is not None:
                    p.add_(part, alpha=rate)
        self._states, self._stored = done.states, False
        self._watch()
        return True

    def _judge(self, samples: int) -> None:
        """Warn once if most mini-batches are smaller than any that the family was trained on; a last one may be."""
        fewest = self.meta.config.fewest
        small = 2 * samples < fewest
        self._batches, self._small = self._batches + 1, self._small + small
        if small and self._batches >= _JUDGED and 2 * self._small > self._batches and not self._warned:
            self._warned = True
            said = (
                f"batches of {samples} samples are too noisy for a learned optimizer of this family, which may "
                f"come to stand still: take at least {fewest} samples, or step after several backward passes"
            )
            warnings.warn(with_page(said, "docs/transfer.md#where-it-is-weak"), stacklevel=9)

    def _open(self, at: Situation) -> None:
        """The teleport before the first step."""
        inputs = self.capture.inputs(at.dtype)
        if inputs is None:
            raise self.missing("a step")
        at.decay_()
        opened = self.meta.opening(self.mlp, at.weights[None], inputs)
        at.group["rolled_back"] += int(not opened.moved)
        at.write(opened.weights[0])
        at.group[NETWORK] = {"opened": True}
        self._watch()

    def _watch(self) -> None:
        """Say what the next passes are to be asked for."""
        states, config = self._states, self.meta.config
        wants = Wants.everything(len(self.mlp.biases)) if states is None else states.wants(config)
        self.capture.wanted = Wanted(
            data=states is None and self.meta.opens(self.mlp),
            ends=True,
            fingerprint=wants.fingerprint,
            moments=wants.layers,
            squares=wants.squares,
            dtype=next(self.meta.parameters()).dtype,
            widest=config.dense,
            rank=config.rank,
        )

    def _seen(self, at: Situation, states: EquivariantStates | None) -> Observation:
        """What the passes saw."""
        gradients = [bias.joined(g[0], g[1] if len(g) == 2 else None)[None] for g in self.by_layer(at.gradients)]
        ends = self.capture.ends(at.dtype)
        if ends is None:
            raise self.missing("a step")
        outputs, error = ends[0][None], at.signed(ends[1])[None]
        fingerprint = self.capture.fingerprint()

        def uses(wanted: Collection[int]) -> list[Use]:
            found = self.capture.uses()
            return [self._use(layer, use, states is None, outputs.shape[-1]) for layer, use in enumerate(found)]

        def known() -> Fingerprint:
            if fingerprint is None:  # a state was loaded since the pass: it was not asked for, and no batch is like it
                unknown = outputs.new_full((2,), torch.nan)
                return Fingerprint(unknown, unknown, 0)
            return fingerprint

        return Observation(gradients, outputs.shape[-1], known, outputs, error, uses, lambda: self._sizes(at))

    def _use(self, layer: int, use: Use, first: bool, samples: int) -> Use:
        """A use as of one trajectory; a layer that no gradient reached has seen nothing."""
        like = self.capture.linears[layer].weight.new_empty(0, dtype=self.capture.wanted.dtype)
        rows = (self.mlp.widths[layer] + self.mlp.biases[layer], self.mlp.widths[layer + 1])
        empty = [Moment.zero(k, like, self.meta.config.dense) if first else None for k in rows]
        inputs, errors = (
            old if found is None else found for found, old in zip((use.inputs, use.errors), empty, strict=True)
        )
        square = like.new_zeros(1) if use.square is None else use.square.reshape(1)
        return Use(
            None if inputs is None else inputs.map(lambda t: t[None]),
            None if errors is None else errors.map(lambda t: t[None]),
            square,
            use.columns or samples,
        )

    def _sizes(self, at: Situation) -> Tensor:
        """``‖W‖²`` of each layer with its bias, ``[1, layers]``."""
        weights = [p.to(at.dtype)[None] for p in at.parameters]
        squares = inner(weights, weights)[0]
        return torch.stack([torch.stack(s).sum() for s in self.by_layer(squares.unbind())])[None]

    # --- memories

    def _known(self, at: Situation) -> EquivariantStates | None:
        """The memories, on the parameters' device."""
        device = at.parameters[0].device
        if self._states is None and not self._read:
            self._states, self._read = self._from(at.memory, at.group), True
            # What is loaded between a pass and its step may ask for what was not kept of it.
            if self._states is not None and not self.capture.shows(*self._states.wants(self.meta.config)):
                self._states = self._states.but(until=max(self._states.until, self._states.age + 1))
        if self._states is not None and self._states.motion.velocity[0].device != device:
            self._states = self._states.map(lambda t: t.to(device))
        return self._states

    def store(self, memory: Memory, group: dict[str, Any]) -> None:
        """See the base class."""
        if self._stored or self._states is None:
            return
        self._stored = True
        group[NETWORK] = self._laid_out(self._states, memory)

    def _laid_out(self, states: EquivariantStates, homes: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
        """Put what belongs to a parameter into its entry; returns what belongs to the network, or has no entry."""
        network, layers = states.parts()
        elsewhere: dict[str, dict[str, Tensor]] = {}
        for number, (linear, layer) in enumerate(zip(self.capture.linears, layers, strict=True)):
            for p, name, found in self._spread(linear, layer):
                if p in homes:
                    homes[p].update(found)
                else:  # it is in no group
                    elsewhere[f"{number}.{name}"] = found
        return {**network, "elsewhere": elsewhere}

    @staticmethod
    def _spread(linear: nn.Linear, layer: dict[str, Tensor]) -> list[tuple[Tensor, str, dict[str, Tensor]]]:
        """What lies with each parameter of a layer."""
        biased = linear.bias is not None
        layer = {name.removeprefix(_MOTION): t for name, t in layer.items()}
        parts = {name: bias.parted(layer[name], biased) for name in _SPLIT}
        found: list[tuple[Tensor, str, dict[str, Tensor]]] = [
            (linear.weight, "weight", {**layer, **{name: W for name, (W, _) in parts.items()}})
        ]
        if biased:
            found.append((linear.bias, "bias", {name: b for name, (_, b) in parts.items() if b is not None}))
        return found

    def _from(self, memory: Memory, group: dict[str, Any]) -> EquivariantStates | None:
        """The inverse of :meth:`store`."""
        network = group.get(NETWORK)
        if not network or network.get("opened"):
            return None
        elsewhere = network.get("elsewhere", {})
        layers = []
        for number, linear in enumerate(self.capture.linears):
            weight = elsewhere.get(f"{number}.weight") or memory[linear.weight]
            layer = {name: t for name, t in weight.items() if name != "step"}
            if linear.bias is not None:
                beside = elsewhere.get(f"{number}.bias") or memory[linear.bias]
                layer |= {name: bias.joined(layer[name], beside[name]) for name in _SPLIT}
            layers.append({_MOTION + name if name in _SPLIT else name: t for name, t in layer.items()})
        device = self.capture.linears[0].weight.device
        layers = [{name: t.to(device) for name, t in layer.items()} for layer in layers]
        like = torch.empty(0, dtype=next(self.meta.parameters()).dtype, device=device)
        return EquivariantStates.from_parts({k: v for k, v in network.items() if k != "elsewhere"}, layers, like)

    def forget(self) -> None:
        """See the base class."""
        self._states, self._stored, self._read = None, True, False
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        """The memories travel as the optimizer's state."""
        return {**self.__dict__, "_states": None, "_stored": True, "_read": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()

    # --- states from files

    def checked(self, state_dict: dict[str, Any], parameters: Mapping[Any, nn.Parameter]) -> dict[str, Any]:
        """See the base class; what earlier versions kept with the first parameter is spread over all."""
        state = state_dict["state"]
        old = next((stored for stored in state.values() if "counters" in stored or "opened" in stored), None)
        if old is not None:
            return self._upgraded(state_dict, old, parameters)
        steps = [float(stored["step"]) for stored in state.values() if "step" in stored]
        if any(steps) and not state_dict["param_groups"][0].get(NETWORK):
            raise ShapeMismatchError(
                "the state counts steps and holds no memories of them, as when it was read into the state of an "
                "optimizer that had made none: load it whole, by torch.load and load_state_dict"
            )
        for number, stored in state.items():
            if number not in parameters:
                continue
            shape, found = tuple(parameters[number].shape), {k: v for k, v in stored.items() if k != "step"}
            velocity = found.get("velocity")
            if found and (velocity is None or tuple(velocity.shape) != shape):
                got = sorted(found)[:3] if velocity is None else tuple(velocity.shape)
                raise ShapeMismatchError(
                    f"the state does not belong to this model: expected velocity of shape {shape}, got {got}"
                )
        return state_dict

    def _upgraded(
        self, state_dict: dict[str, Any], old: dict[str, Tensor], parameters: Mapping[Any, nn.Parameter]
    ) -> dict[str, Any]:
        """A state of version 0.1 in today's form."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        state = {number: {k: v for k, v in s.items() if k == "step"} for number, s in state_dict["state"].items()}
        if "counters" not in old:
            groups[0][NETWORK] = {"opened": True}
            return {**state_dict, "state": state, "param_groups": groups}
        sizes = zip(self.mlp.widths[1:], self.mlp.widths, self.mlp.biases, strict=False)
        expected = {f"velocity_{i}": (1, o, d + b) for i, (o, d, b) in enumerate(sizes)}
        velocity = {name: tuple(t.shape) for name, t in old.items() if name.startswith("velocity_")}
        if velocity != expected:
            raise ShapeMismatchError(f"the state does not belong to this model: expected {expected}, got {velocity}")
        config = self.meta.config
        known = read_old({k: v for k, v in old.items() if k != "step"}, config.dense, config.rank)
        homes = {p: state.setdefault(number, {}) for number, p in parameters.items()}
        groups[0][NETWORK] = self._laid_out(known, homes)
        return {**state_dict, "state": state, "param_groups": groups}


def perceptrons(meta: EquivariantOptimizer, model: nn.Module) -> EquivariantStepper | None:
    """What steps a perceptron; ``None`` for any other model."""
    try:
        return EquivariantStepper(meta, model)
    except UnsupportedModelError:
        return None
