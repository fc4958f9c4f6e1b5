r"""A learned optimizer for perceptrons of any shape: teleport, step, pull back.

Layer l computes ``z = W h`` (a bias is a column of W, for an input that is always 1) and receives the error
``δ = ∂L/∂z``. Two teleports turn its coordinates, ``g_h`` made of the second moments of h and ``g_δ`` of those of δ
(:class:`~metatele.learned.equivariant.spectrum.Spectrum`), a step is made there and pulled back:

.. math::
    D = (g_δ^T g_δ)\, ∇W\, (g_h^T g_h), \qquad
    V ← β V - η D, \qquad W ← W + V + ν β (V - V_{\text{before}}) \;\text{(Nesterov)}

How far the moments are followed (their damping λ and exponent p), the step size η, the momentum β and the share
ν of Nesterov's correction come from a small LSTM, one and the same for every layer, that reads numbers about
the layer: none of them depends on the units of the loss, and none changes when hidden units change places. So
a step commutes with permutations of hidden units, and the loss may be multiplied by any constant.

On mini-batches the LSTM pauses: its outputs, and the matrices ``gᵀg`` made with them, serve several steps.

Before the first step the network itself is moved once along its symmetry
(:class:`~metatele.learned.equivariant.opening.Opening`).

The parts: :mod:`~metatele.learned.equivariant.moments`, :mod:`~metatele.learned.equivariant.controller`,
:mod:`~metatele.learned.equivariant.direction`, :mod:`~metatele.learned.equivariant.guard`, joined in
:mod:`~metatele.learned.equivariant.step`. The same in plain formulas, slow and short:
:mod:`~metatele.learned.equivariant.reference`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metatele.config import EquivariantConfig
from metatele.learned.equivariant.controller import SEEN, SET, Controls, Sight, Tables, controls, seen_of
from metatele.learned.equivariant.observation import Observation
from metatele.learned.equivariant.opening import Opening
from metatele.learned.equivariant.states import Bend, EquivariantStates
from metatele.learned.equivariant.step import EquivariantStep, advance
from metatele.learned.lstm import LSTMState, StackedLSTM
from metatele.network.use import ONE_BATCH
from metatele.perceptron.mlp import MLP, Pass
from metatele.random import generator


class EquivariantOptimizer(nn.Module):
    """See the module; works on every :class:`~metatele.perceptron.mlp.MLP`.

    Args:
        config: Sizes, constants of the algorithm, and what is learned.
        seed: For the initial meta-parameters.

    Attributes:
        opening: The teleport before the first step.

    Example:
        >>> from metatele.perceptron.activations import Tanh
        >>> from metatele.perceptron.losses import MeanSquaredError
        >>> from metatele.learned.equivariant.observation import parted
        >>> from metatele.perceptron.mlp import MLP, Pass
        >>> _ = torch.manual_seed(0)
        >>> optimizer, mlp = EquivariantOptimizer(EquivariantConfig()), MLP((3, 8, 2), Tanh(), True)
        >>> w, x, y, states = torch.randn(5, mlp.num_parameters), torch.randn(3, 9), torch.randn(2, 9), None
        >>> for _ in range(2):
        ...     done = Pass(mlp, mlp.unflatten(w), x)
        ...     done.backward(y, MeanSquaredError())
        ...     changes, states, _ = optimizer.step(Observation.of(done), states)
        ...     w = w + mlp.flatten(parted(changes, mlp.biases))
        >>> w.shape, states.age
        (torch.Size([5, 50]), 2)
    """

    _squash: Tensor
    _visible: Tensor
    _measures: Tensor

    def __init__(self, config: EquivariantConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.lstm = StackedLSTM(len(SEEN) + hidden, hidden, len(SET), 1, generator(seed, "initialisation"))
        with torch.no_grad():
            self.lstm.head_weight.mul_(config.head)
            self.lstm.head_bias.zero_()
        # What the outputs take from the numbers directly: at first, a step that could have been longer makes the
        # next one longer.
        direct = torch.zeros(len(SET), len(SEEN))
        direct[0, :2] = config.follow
        self.direct = nn.Parameter(direct)
        self.opening = Opening(config)
        for name, table in Tables.of(config)._asdict().items():
            self.register_buffer(f"_{name}", table, persistent=False)

    @property
    def tables(self) -> Tables:
        """What the controller's numbers are scaled by, where the meta-parameters are."""
        return Tables(self._measures, self._visible, self._squash)

    def opens(self, mlp: MLP) -> bool:
        """Whether the first step on such a network is a teleport."""
        return self.config.opening and any(k <= self.config.dense for k in mlp.hidden_widths)

    def observed(self, done: Pass) -> Observation:
        """What :meth:`step` is given of a pass."""
        return Observation.of(done, self.config.dense, self.config.rank)

    def state_bytes(self, mlp: MLP) -> int:
        """Memory of one trajectory's states in float32, at most.

        Velocity and direction are as large as the weights; for the inputs and the errors of each layer there are a
        matrix of second moments, its eigenvectors, of which wide layers as a rule keep less than half, and between
        looks on mini-batches a matrix made of them. Of a side wider than ``dense`` of the configuration each has
        at most ``2 rank`` columns.

        Example:
            >>> from metatele.perceptron.activations import ReLU
            >>> mlp, optimizer = MLP((100, 100, 100), ReLU()), EquivariantOptimizer(EquivariantConfig())
            >>> optimizer.state_bytes(mlp) / mlp.num_parameters
            32.0
        """

        def side(k: int) -> int:
            return k * (k if k <= self.config.dense else ONE_BATCH * self.config.rank)

        rows = [d + b for d, b in zip(mlp.widths, mlp.biases, strict=False)]
        return 4 * sum(2 * i * o + 3 * (side(i) + side(o)) for i, o in zip(rows, mlp.widths[1:], strict=True))

    def step(
        self, seen: Observation, states: EquivariantStates | None, pauses: bool = True, spend: bool = False
    ) -> EquivariantStep:
        """The change of the weights after a pass at them; ``None`` in place of states at the beginning.

        On mini-batches, after the first 16 (``warm``), the controller looks at every 16th step alone (``hold`` of the
        configuration); those between cost a few products of matrices. Differentiable in the meta-parameters, and
        through the states in those of earlier steps; what was seen is a constant.

        Args:
            seen: In the pass.
            states: Memories.
            pauses: Whether it may skip looks. Without, as in meta-training, more is learned from each step.
            spend: Whether the memories given may be written over, which saves the time to find new memory. Without
                derivatives only.
        """

        def memory() -> LSTMState:
            return self.lstm.initial_state(len(seen.gradients) * len(seen.gradients[0]))

        return advance(seen, states, self.control, memory, self.config, pauses, spend)

    def control(self, sight: Sight) -> tuple[Controls, LSTMState]:
        """What the controller sets for each layer, and its next memory; the one thing that may be replaced."""
        numbers = seen_of(sight, self.tables, self.config)
        return controls(numbers, sight.states.control.memory, self.lstm, self.direct, self.tables, self.config)


class ConstantOptimizer(EquivariantOptimizer):
    """The same step with settings that nothing learned: whitening by conjugation, and gradient descent.

    Args:
        rate: η, in units of the first step's change that would make pre-activations as large as they are.
        damping: λ of the inputs' moments, whose exponent is 1; errors and velocities play no part.

    Example:
        >>> from metatele.tasks.held_out import REGRESSIONS
        >>> from metatele.unroll import losses_of
        >>> problems = REGRESSIONS["narrow"].sample(0, "tuning", 2)
        >>> losses = losses_of(ConstantOptimizer(0.1, 0.01), problems, 5)
        >>> bool((losses[-1] < losses[0]).all())
        True
    """

    def __init__(self, rate: float, damping: float) -> None:
        super().__init__(EquivariantConfig(opening=False, errors=False))
        self.rate, self.damping = rate, damping

    def control(self, sight: Sight) -> tuple[Controls, LSTMState]:
        """The same for every layer and step."""
        one = torch.ones_like(sight.weights)
        growth = math.log(self.rate) - sight.states.control.log_rate
        bend = Bend(self.damping * one, one, one, 0 * one)
        return Controls(growth, bend, 0 * one, 0 * one), sight.states.control.memory
