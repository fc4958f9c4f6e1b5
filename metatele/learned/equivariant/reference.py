r"""The equivariant step in plain formulas, for one network: slow and short, to read and to test the fast one against.

Nothing is kept from step to step but what the formulas name; every matrix is dense. When the controller looks, and
when moments and spectra are taken, is part of the algorithm and is here too: the averages A and B, A and B as they were
when spectra were due, the controls, and the limit on ‖D‖² are kept between two looks. All else is computed anew in each
step.

**Notation**, for one layer: h ``[i, n]`` its inputs (a last row of ones for a bias), δ ``[o, n]`` the errors,
``z = W h``, G = ∂L/∂W ``[o, i]``, ‖·‖ the Frobenius norm, τ = 1e-38.

1. **Moments** (:func:`moments`). ``S = hhᵀ/n``, ``T = δδᵀ/tr(δδᵀ)``; averages ``A ← (1-s) A + s S``, ``B`` likewise,
   with ``s = 1`` for a batch that is the last one again, else ``s = max(0.05 w, 1/m)``, w = min(1, n/32), m the
   number of batches so far. An average that is not finite is left out (:func:`average`).
2. **Powers** (:func:`power`). ``P(M, λ, p) = ((M/m̄ + λI)/(1 + λ))^-p``, m̄ the mean eigenvalue of M, from M as it was
   when its spectrum was due; M that is zero or not finite counts as the identity (:func:`even`).
3. **Controls** (:func:`sees`, :func:`sets`). An LSTM reads 16 numbers and sets the change of the log of the step size,
   λ and p of inputs and errors, momentum β and Nesterov's share ν.
4. **Direction and length** (:func:`length`). ``D = P(B, λ_δ, p_δ) G P(A, λ_h, p_h)/m̄_A``. The unit u is fixed at the
   first D: ``u = √(o (mean z² + 0.01) / tr(D A Dᵀ))``. ``log η ← log η + growth``, at most ``log(1/(u r))`` with r the
   relative change of pre-activations by D; the step is ``η u w D``.
5. **Step** (:func:`step`). ``V' = βV - ηD``, ``ΔW = V' + ν(βV - ηD - V) = aV' + bD``, ``a = 1 - ν + νβ``, ``b = -νη``.
   Between two looks η, β, ν, λ, p stay, and D is cut to twice its length at the look.
6. **Guard** (:func:`guarded`). Where the loss has grown too much by the last change C, or D is not finite,
   ``ΔW = -0.9 C``, V' = 0.1 C, and η becomes a tenth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metatele.learned.equivariant.controller import GROWN, LEAST
from metatele.learned.equivariant.optimizer import EquivariantOptimizer
from metatele.network.use import TINY, is_same_batch
from metatele.perceptron.losses import kind, level


@dataclass
class Seen:
    """What a pass tells of one network, nothing reduced.

    Attributes:
        weights: W of each layer ``[o, i]``, a bias as last column.
        gradients: G of each.
        inputs: h of each, ``[i, n]``, with a row of ones for a bias.
        errors: δ of each, ``[o, n]``, up to a factor that all share.
        outputs: z of each, ``[o, n]``.
        data: h of the first layer, without the row of ones.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    inputs: list[Tensor]
    errors: list[Tensor]
    outputs: list[Tensor]
    data: Tensor


@dataclass
class Layer:
    """What is remembered of a layer.

    Attributes:
        V: Velocity.
        D: Last direction.
        C: Last change of its weights.
        A: Average of S.
        B: Average of T.
        A_due: A when its spectrum was due.
        B_due: B likewise.
        renew: Age at which they are due again.
        log_rate: Log η.
        unit: u; 0 until a gradient has come.
        beta: β in use.
        rate: η u w in use.
        a: Share of V' in a change.
        b: Share of D.
        bend: λ_h, λ_δ, p_h, p_δ in use.
        reach: Log of the relative change of pre-activations by the last step.
        stretch: The same by D of length 1.
        limit: ‖D‖² that is not cut.
        slope: ⟨G, D⟩ where D was made.
        size: ‖C‖² as it was last measured.
        length: Log ‖G‖² likewise.
        hidden: The controller's memory.
        cell: The same.
    """

    V: Tensor
    D: Tensor
    C: Tensor
    log_rate: Tensor
    hidden: Tensor
    cell: Tensor
    A: Tensor
    B: Tensor
    A_due: Tensor
    B_due: Tensor
    unit: Tensor
    beta: Tensor
    rate: Tensor
    a: Tensor
    b: Tensor
    reach: Tensor
    stretch: Tensor
    limit: Tensor
    slope: Tensor
    size: Tensor
    length: Tensor
    bend: tuple[Tensor, ...] = ()
    renew: int = 0

    @staticmethod
    def of(optimizer: EquivariantOptimizer, G: Tensor) -> Layer:
        """Before the first step."""
        zero, memory = G.new_zeros(()), G.new_zeros(optimizer.config.hidden)
        start = G.new_tensor(optimizer.config.start)
        return Layer(0 * G, 0 * G, 0 * G, start, memory, memory, *(zero,) * 15)


@dataclass
class Memory:
    """What is remembered of a network.

    Attributes:
        layers: Of each layer.
        age: Steps done.
        until: Age of the controller's next look.
        averaged: m.
        kind: Of the loss.
        fingerprint: Of the last batch compared.
        same: Whether the last batch looked at was the one before it.
        start: Log of the loss at the beginning.
        kept: Log of the loss at the last look at a point that was kept.
        lowest: Log of the lowest one, slowly forgotten.
        predicted: ⟨∇L, C⟩ of the last step, for all layers.
        shortened: Whether the last step was shortened.
    """

    layers: list[Layer]
    age: int = 0
    until: int = 0
    averaged: int = 0
    kind: str | None = None
    fingerprint: Tensor | None = None
    same: bool = False
    start: Tensor = field(default_factory=lambda: torch.zeros(()))
    kept: Tensor = field(default_factory=lambda: torch.zeros(()))
    lowest: Tensor = field(default_factory=lambda: torch.zeros(()))
    predicted: Tensor = field(default_factory=lambda: torch.zeros(()))
    shortened: bool = False


def fingerprint(x: Tensor) -> Tensor:
    """``Σr/√(n Σr²)`` and ``log Σr²`` over samples, for r = Σᵢ xᵢ and r = Σᵢ tᵢ xᵢ, t from -1 to 1."""
    t = torch.linspace(-1, 1, len(x), dtype=x.dtype)
    rows = torch.stack([x.sum(0), t @ x])
    squares = rows.square().sum(1)
    share = rows.sum(1) / (x.shape[1] * squares).sqrt().clamp_min(TINY)
    return torch.cat([share, log(squares)]).nan_to_num(0.0, 0.0, 0.0)


def log(x: Tensor) -> Tensor:
    """Log of x, and of τ where x is smaller."""
    return x.clamp_min(TINY).log()


def clamped(number: Tensor, factor: float, low: float, high: float) -> Tensor:
    """``factor · number`` between two numbers; 0 if it is not finite."""
    return (factor * number).nan_to_num(0.0, 0.0, 0.0).clamp(low, high)


def zeroed(G: Tensor) -> Tensor:
    """G with zeros in place of what is not finite, as every G is read at a look and at the step before it."""
    return G.nan_to_num(0.0, 0.0, 0.0)


def average(A: Tensor, S: Tensor, s: float) -> Tensor:
    """``(1-s) A + s S``; if that is not finite the first of S, A that is, and A if none is."""
    if s == 1:
        return S
    return next((M for M in ((1 - s) * A + s * S, S) if bool(torch.isfinite(M.trace()))), A)


def waiting(optimizer: EquivariantOptimizer, averaged: int) -> int:
    """Steps to the next look: 1, and ``hold`` after more than ``warm`` batches that differ."""
    return optimizer.config.hold if averaged > optimizer.config.warm else 1


def moments(optimizer: EquivariantOptimizer, seen: Seen, memory: Memory, same: bool, pauses: bool) -> None:
    """1. Averages of S and T, where the batch is taken in, and as they are where spectra are due."""
    c, age, n = optimizer.config, memory.age, seen.inputs[0].shape[-1]
    w = min(1.0, n / c.fewest)
    alone = age == 0 or c.averaging == 0
    expected = 1 if memory.same or alone else memory.averaged + 1  # batches, before it is known what this one is
    averaged = 1 if same or alone else memory.averaged + 1
    s = 1.0 if same or age == 0 else max((1 - c.averaging) * w, 1 / averaged)
    for layer, h, e in zip(memory.layers, seen.inputs, seen.errors, strict=True):

        def period(rest: int, widest: int = min(max(len(h), len(e)), c.dense)) -> int:
            return max(c.slow, c.slow_looks * rest, math.ceil((widest / c.small) ** 2))

        rest, due = waiting(optimizer, expected), age >= layer.renew
        young = c.young if max(len(h), len(e)) <= c.dense else c.young_wide
        stride = max(1, min(period(rest) // c.between, c.stride, age // young) // rest) * rest
        stay = rest if pauses else 1
        chosen = not memory.same and (age - (c.warm if rest > 1 else 0)) % stride < stay
        if due or (chosen and not same):
            S, T = h @ h.mT / n, e @ e.mT
            T = T / T.trace().clamp_min(TINY)
            layer.A, layer.B = average(layer.A, S, s), average(layer.B, T, s)
        if due:
            layer.A_due, layer.B_due = layer.A, layer.B
            layer.renew = age + min(period(waiting(optimizer, averaged)), age // c.young + 1)
    memory.averaged, memory.same = averaged, same


def even(M: Tensor) -> tuple[Tensor, Tensor]:
    """``M/m̄`` and m̄; I and 1 for M that is zero or not finite."""
    mean = M.trace() / len(M)
    if mean > 0 and bool(torch.isfinite(mean)):
        return M / mean, mean
    return torch.eye(len(M), dtype=M.dtype), torch.ones_like(mean)


def power(M: Tensor, damping: Tensor, exponent: Tensor) -> Tensor:
    """2. ``P = ((M/m̄ + λI)/(1 + λ))^-p``, by the eigenvectors of M."""
    values, vectors = torch.linalg.eigh(even(M)[0])
    return vectors @ (((values.clamp_min(0) + damping) / (1 + damping)) ** -exponent).diag() @ vectors.mT


def participation(M: Tensor) -> Tensor:
    """``(tr M)²/(k tr M²)``."""
    return len(M) / even(M)[0].square().sum()


def best(after: Tensor, before: Tensor) -> Tensor:
    """Log of where the parabola with slopes ``before`` at 0 and ``after`` at 1 is lowest, at most log 10."""
    return -log((1 - after / (before if before != 0 else TINY)).clamp_min(LEAST))


# Kinds of the 16 numbers in their order, by which some may be hidden.
SENSES = (
    *["slopes"] * 2,
    "cosine",
    *["loss"] * 2,
    *["spectra"] * 2,
    *["sizes"] * 3,
    "clock",
    "data",
    "data",
    *["place"] * 3,
)


def sees(
    optimizer: EquivariantOptimizer, seen: Seen, gradients: list[Tensor], memory: Memory, now: Tensor, same: bool
) -> Tensor:
    """3a. The 16 numbers of every layer, ``[layers, 16]``; those measured have a factor and bounds.

    Those of a kind that the controller is blind to are zero.
    """
    layers = memory.layers
    ahead = [(G * x.C).sum() for G, x in zip(gradients, layers, strict=True)]
    of_change = best(torch.stack(ahead).sum(), memory.predicted)
    since_look, since_start = ((now - then).nan_to_num(GROWN, GROWN, GROWN) for then in (memory.kept, memory.start))
    rows = []
    for number, (x, G, W, h) in enumerate(zip(layers, gradients, seen.weights, seen.inputs, strict=True)):
        length, size = log(G.square().sum()), log(x.size)
        measured = [
            clamped(best((G * x.D).sum(), x.slope), 1, -2, 2),
            clamped(of_change, 1, -2, 2),
            clamped(ahead[number] / ((length + size) / 2).exp().clamp_min(TINY), 1, -1, 1),
            clamped(since_look, 1, -3, 3),
            clamped(since_start, 1 / 8, -5, 1.25),
            clamped(log(participation(x.A_due)), 1 / 2, -5, 0),
            clamped(log(participation(x.B_due)), 1 / 2, -5, 0),
            clamped((size - log(W.square().sum())) / 2, 1 / 4, -5, 0.75),
            clamped(x.reach, 1 / 4, -5, 1.25),
            clamped((length - x.length) / 2, 1 / 2, -2.5, 2.5),
        ]
        age, ratio = math.log(memory.age + 1) / 3, math.log(h.shape[-1] / h.shape[-2]) / 2
        place = [float(number == 0), float(number == len(layers) - 1), len(layers) - 3.0]
        rows.append(torch.stack([*measured, *now.new_tensor([age, float(same), ratio, *place])]))
    visible = now.new_tensor([float(name not in optimizer.config.blind) for name in SENSES])
    return torch.stack(rows) * visible


def sets(optimizer: EquivariantOptimizer, numbers: Tensor, memory: Memory) -> list[Tensor]:
    """3b. An LSTM cell and two linear maps: 7 outputs of every layer, ``[layers]`` each.

    With x = (numbers, mean of the layers' hidden states, hidden state): gates ``i, f, o, g = K x + k``,
    ``cell ← σ(f) cell + σ(i) tanh(g)``, ``hidden ← σ(o) tanh(cell)``, ``y = R hidden + r + Q numbers``, and each output
    is ``middle + half tanh((y + offset)/2)``.
    """
    lstm, c = optimizer.lstm, optimizer.config
    hidden, cell = (torch.stack([getattr(x, name) for x in memory.layers]) for name in ("hidden", "cell"))
    others = hidden.mean(0).expand_as(hidden)
    gates = torch.cat([numbers, others, hidden], -1) @ lstm.weights[0].mT + lstm.biases[0]
    i, f, o, g = gates.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    for x, h, m in zip(memory.layers, hidden, cell, strict=True):
        x.hidden, x.cell = h, m
    y = (hidden @ lstm.head_weight.mT + lstm.head_bias + numbers @ optimizer.direct.mT).unbind(-1)
    table = [(0, 2, 0), (0.7, 9, -5.3), (0.7, 9, -5.3), (2, 0.5, 0.5), (0, 0.5, 0.5), (1.4, 0.5, 0.5), (0, 0.5, 0.5)]
    ranges = torch.tensor(table).to(numbers)  # by way of single precision, in which the fast step's table is
    growth, lam_h, lam_e, p_h, p_e, beta, nu = (
        middle + half * torch.tanh((v + offset) / 2) for v, (offset, half, middle) in zip(y, ranges, strict=True)
    )
    return [growth, lam_h.exp(), lam_e.exp(), p_h * c.inputs, p_e * c.errors, beta, nu]


def direction(x: Layer, G: Tensor) -> Tensor:
    """4a. ``D = P(B, λ_δ, p_δ) G P(A, λ_h, p_h)/m̄_A``."""
    lam_h, lam_e, p_h, p_e = x.bend
    return power(x.B_due, lam_e, p_e) @ G @ power(x.A_due, lam_h, p_h) / even(x.A_due)[1]


def length(optimizer: EquivariantOptimizer, x: Layer, D: Tensor, z: Tensor, growth: Tensor, w: float) -> None:
    """4b. Step size of a layer, and what its step does to the pre-activations."""
    c = optimizer.config
    (A, mean), square = even(x.A_due), z.square().mean().nan_to_num(1.0, 1.0, 1.0)
    change = log(mean * (D @ A @ D.mT).trace() / (len(D) * (square + c.floor))).div(2).exp()
    sound = bool(torch.isfinite(change)) and bool(change > 2 * TINY**0.5)
    if x.unit <= 0:
        x.unit = 1 / change if sound else torch.zeros_like(change)
        x.log_rate = torch.full_like(change, c.start)
    relative = log(x.unit * change if sound else torch.zeros_like(change))
    x.log_rate = torch.minimum(x.log_rate + growth, math.log(c.reach) - relative).clamp(max=c.fastest)
    x.rate = x.log_rate.exp() * x.unit * w
    x.reach = relative + x.log_rate
    x.stretch, x.limit = relative - log(D.square().sum()) / 2, c.far * D.square().sum()


def guarded(optimizer: EquivariantOptimizer, memory: Memory, now: Tensor, same: bool, n: int) -> tuple[bool, bool]:
    """6a. Whether the loss has leapt by the last step, or crept up by many on the same batch.

    Leapt: ``log L - log L_kept > log 2``; on mini-batches ``4 log 2 - log w``.
    Crept: ``log L - log L_lowest > log 10``.
    """
    c = optimizer.config
    most = math.log(c.growth) if same else 4 * math.log(c.growth) - math.log(min(1.0, n / c.fewest))
    return not bool(now - memory.kept <= most), same and bool(now - memory.lowest > math.log(c.crept))


def taken_back(optimizer: EquivariantOptimizer, x: Layer, old: Layer) -> Tensor:
    """6b. ``ΔW = -0.9 C``; what is left of C is the velocity, and the change that is remembered."""
    left = optimizer.config.shorten
    x.V = x.C = left * old.C
    x.D, x.slope, x.length = old.D, old.slope, old.length
    x.size = left**2 * old.C.square().sum()
    x.log_rate, x.reach = old.log_rate + math.log(left), old.reach + math.log(left)
    x.beta, x.rate, x.a, x.b = old.beta, left * old.rate, old.a, left * old.b
    return (left - 1) * old.C


def step(
    optimizer: EquivariantOptimizer, seen: Seen, memory: Memory | None, pauses: bool = True
) -> tuple[list[Tensor], Memory]:
    """5. Changes ΔW of the weights, and the memory after them.

    Args:
        optimizer: Meta-parameters and settings.
        seen: In the pass.
        memory: ``None`` at the beginning.
        pauses: Whether looks may be skipped.

    Example:
        >>> from metatele.config import EquivariantConfig
        >>> optimizer, h = EquivariantOptimizer(EquivariantConfig()).requires_grad_(False), torch.eye(2)
        >>> W, target = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> memory = None
        >>> for _ in range(30):
        ...     error = W @ h - target
        ...     (change,), memory = step(optimizer, Seen([W], [error @ h.T], [h], [error], [W @ h], h), memory)
        ...     W = W + change
        >>> bool((W - target).norm() < 0.1 * target.norm())
        True
    """
    c, n = optimizer.config, seen.inputs[0].shape[-1]
    before = Memory([Layer.of(optimizer, G) for G in seen.gradients]) if memory is None else memory
    memory = replace(before, layers=[replace(x) for x in before.layers])
    age, looks = memory.age, memory.age >= memory.until
    closely = looks or age + 1 == memory.until
    gradients = [zeroed(G) if closely else G for G in seen.gradients]

    same = False
    if closely:
        numbers = fingerprint(seen.data)
        same = looks and memory.fingerprint is not None and is_same_batch(numbers, memory.fingerprint)
        memory.fingerprint = numbers
    if looks:
        moments(optimizer, seen, memory, same, pauses)
        wait = waiting(optimizer, memory.averaged) if pauses else 1
        memory.until = age + wait
        if age % c.recognise < wait:
            memory.kind = kind(seen.outputs[-1], seen.errors[-1])
    now = level(seen.outputs[-1], seen.errors[-1], memory.kind)
    if age == 0:
        memory.start = memory.kept = memory.lowest = now
        for x, G in zip(memory.layers, gradients, strict=True):
            x.length = log(G.square().sum())
    leapt, crept = guarded(optimizer, memory, now, same, n)

    if looks:
        growth, *bend, beta, nu = sets(optimizer, sees(optimizer, seen, gradients, memory, now, same), memory)
        for number, (x, G, z) in enumerate(zip(memory.layers, gradients, seen.outputs, strict=True)):
            x.bend = tuple(b[number] for b in bend)
            x.D = direction(x, G)
            leapt = leapt or not bool(torch.isfinite(x.D.square().sum()))
            length(optimizer, x, x.D, z, growth[number], min(1.0, n / c.fewest) if age and not same else 1.0)
            x.beta, x.a, x.b = beta[number], 1 - nu[number] + nu[number] * beta[number], -nu[number] * x.rate
    else:
        for x, G in zip(memory.layers, gradients, strict=True):
            D = direction(x, G)
            square = D.square().sum()
            leapt = leapt or not bool(torch.isfinite(square))
            x.D = D * (x.limit / square).sqrt() if square > x.limit else D

    for x in memory.layers:
        x.V = x.beta * x.V - x.rate * x.D
        x.C = x.a * x.V + x.b * x.D
    changes = [x.C for x in memory.layers]
    if closely:  # what the next look will ask about
        memory.predicted = torch.stack([(G * C).sum() for G, C in zip(gradients, changes, strict=True)]).sum()
        for x, G in zip(memory.layers, gradients, strict=True):
            x.slope, x.size, x.length = (G * x.D).sum(), x.C.square().sum(), log(G.square().sum())
            if not looks:
                x.reach = x.stretch + log(x.D.square().sum()) / 2 + x.log_rate
        memory.kept = now if looks else memory.kept
        slowly = now - math.log(c.crept) / 2 if crept else torch.minimum(now, memory.lowest + c.leak)
        memory.lowest = slowly if same else now
    memory.age, memory.shortened = age + 1, age > 0 and (leapt or crept)
    if memory.shortened:
        changes = [taken_back(optimizer, x, old) for x, old in zip(memory.layers, before.layers, strict=True)]
        memory.predicted = c.shorten * before.predicted
        # On another batch the loss is another. A rise right after a step that was shortened was not by that step.
        granted = before.kept + (math.log(c.forgive) if before.shortened else 0)
        memory.kept = granted if (leapt if same else not bool(torch.isfinite(now))) else now
        memory.lowest = before.lowest if leapt else memory.lowest
    return changes, memory
