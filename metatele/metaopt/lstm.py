r"""Stacked LSTM cells and a linear head, batched over trajectories, built for unrolling.

Against ``nn.LSTMCell`` three things are different, and only for speed:

* a layer's two products with its input and its hidden state are one product;
* the cell's elementwise arithmetic is one autograd node with a hand-written derivative;
* inside :meth:`StackedLSTM.window` the gradients of the weights are not formed step by step: the
  operands are kept, and one product over the whole window forms them when the context closes. For
  K steps and batch B this turns K products with inner dimension B, and K sums over all weights,
  into one product with inner dimension K·B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, ShapeMismatchError

PRECISIONS = ("float32", "tf32", "bf16")
_BLOCK = 10  # steps whose inputs lie in one piece of memory; the paper's window


class LSTMState(NamedTuple):
    """Memory of a stack: for each layer, hidden and cell state ``[B, hidden]``."""

    hidden: tuple[Tensor, ...]
    cell: tuple[Tensor, ...]


class _Rows:
    """Matrices ``[B, width]`` of the steps of a window, side by side in memory where one product reads them."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def row(self, step: int, batch: int, width: int, like: Tensor) -> Tensor:
        """Memory for a step, in the dtype of ``like``."""
        while len(self._blocks) * _BLOCK <= step:
            self._blocks.append(like.new_empty(_BLOCK, batch, width))
        if self._blocks[0].shape[1] != batch:
            raise ShapeMismatchError(f"a window began with batch {self._blocks[0].shape[1]}, got {batch}")
        return self._blocks[step // _BLOCK][step % _BLOCK]

    def joined(self, steps: list[int]) -> Tensor:
        """The given steps, one after another, ``[steps · B, width]``."""
        if len(self._blocks) == 1 and steps == list(range(len(steps))):
            return self._blocks[0][: len(steps)].flatten(0, 1)  # no copy
        return torch.cat([self._blocks[step // _BLOCK][step % _BLOCK] for step in steps])


class _Tape:
    """Operands of one weight's products over a window, and the weight as rounded for them.

    Both operands are written where the window's one product reads them. Backward passes meet the steps in any
    order and may leave some out, so each brings its number.
    """

    def __init__(self) -> None:
        self.rounded: Tensor | None = None
        self.inputs, self.output_gradients = _Rows(), _Rows()
        self.steps = 0
        self.met: set[int] = set()
        self.bias_gradient: Tensor | None = None

    def input(self, batch: int, weight: Tensor) -> tuple[int, Tensor]:
        """Number of the next step, and memory for its inputs."""
        self.steps += 1
        return self.steps - 1, self.inputs.row(self.steps - 1, batch, weight.shape[1], weight)

    def keep(self, step: int, grad: Tensor, like: Tensor) -> Tensor:
        """Take in a step's output gradient ``[B, outputs]``; returns it in the dtype of ``like``."""
        row = self.output_gradients.row(step, grad.shape[0], grad.shape[1], like)
        if step in self.met:  # of an earlier backward pass, say
            row.add_(grad)
            low = grad.to(like.dtype)
        else:
            low = row.copy_(grad)
        self.met.add(step)
        total = grad.sum(0)
        self.bias_gradient = total if self.bias_gradient is None else self.bias_gradient.add_(total)
        return low


class _Affine(torch.autograd.Function):
    """``[x, h] Wᵀ + b``; gradients of W and b go to the tape if there is one."""

    @staticmethod
    def forward(ctx, x, h, weight, bias, cast_weight, tape, tf32):  # type: ignore[no-untyped-def]
        # Side by side, in the products' dtype and where the window reads them: one pass over memory.
        if tape is not None:
            ctx.step, joined = tape.input(x.shape[0], cast_weight)
        else:
            joined = torch.empty(x.shape[0], cast_weight.shape[1], dtype=cast_weight.dtype, device=x.device)
        joined[:, : x.shape[1]].copy_(x)
        if h is not None:
            joined[:, x.shape[1] :].copy_(h)
        ctx.save_for_backward(cast_weight)
        ctx.joined = joined  # ours alone; rows written later in the same block must not count as a change
        ctx.tape, ctx.split, ctx.tf32 = tape, x.shape[-1], tf32
        if cast_weight.dtype == bias.dtype:
            with _tf32(tf32):
                return torch.addmm(bias, joined, cast_weight.t())
        return (joined @ cast_weight.t()).to(bias.dtype).add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (weight,) = ctx.saved_tensors
        joined = ctx.joined
        low = grad.to(weight.dtype) if ctx.tape is None else ctx.tape.keep(ctx.step, grad, weight)
        needs_x, needs_h, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        x_grad = h_grad = weight_grad = bias_grad = None
        with _tf32(ctx.tf32):
            if needs_x and needs_h:
                x_grad, h_grad = (low @ weight).to(grad.dtype).split([ctx.split, weight.shape[1] - ctx.split], -1)
            elif needs_x:
                x_grad = (low @ weight[:, : ctx.split]).to(grad.dtype)
            elif needs_h:
                h_grad = (low @ weight[:, ctx.split :]).to(grad.dtype)
            if ctx.tape is None and needs_weight:
                weight_grad = (low.t() @ joined).to(grad.dtype)
        if ctx.tape is None and needs_bias:
            bias_grad = grad.sum(0)
        return x_grad, h_grad, weight_grad, bias_grad, None, None, None


@contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    """Products on a GPU round their operands to 10 bits inside; a CPU takes no notice."""
    before = torch.backends.cuda.matmul.allow_tf32
    if before or not wanted:
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _tanh(x: Tensor) -> Tensor:
    """``2 sigmoid(2x) - 1``; torch's sigmoid is several times faster than its tanh on a CPU."""
    return (x + x).sigmoid_().mul_(2).sub_(1)


def _cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden state, cell, activated gates (written over the gates) and the squashed cell."""
    i, f, o, candidate = gates.chunk(4, -1)
    candidate.mul_(2)
    activated = gates.sigmoid_()
    candidate.mul_(2).sub_(1)  # its tanh, as below
    new_cell = torch.addcmul(f * cell, i, candidate)
    squashed = _tanh(new_cell)
    return o * squashed, new_cell, activated, squashed


class _Cell(torch.autograd.Function):
    """Elementwise part of an LSTM cell; gate order input, forget, output, candidate."""

    @staticmethod
    def forward(ctx, gates, cell):  # type: ignore[no-untyped-def]
        hidden, new_cell, activated, squashed = _cell(gates, cell)
        ctx.save_for_backward(activated, cell, squashed)
        return hidden, new_cell

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_hidden, grad_cell):  # type: ignore[no-untyped-def]
        activated, cell, squashed = ctx.saved_tensors
        size = cell.shape[-1]
        i, f, o, candidate = activated.chunk(4, -1)
        through = torch.ops.aten.tanh_backward(grad_hidden * o, squashed).add_(grad_cell)
        grad = torch.empty_like(activated)
        torch.mul(through, candidate, out=grad[:, :size])
        torch.mul(through, cell, out=grad[:, size : 2 * size])
        torch.mul(grad_hidden, squashed, out=grad[:, 2 * size : 3 * size])
        torch.mul(through, i, out=grad[:, 3 * size :])
        sigmoids, tanhs = grad[:, : 3 * size], grad[:, 3 * size :]
        torch.ops.aten.sigmoid_backward.grad_input(sigmoids, activated[:, : 3 * size], grad_input=sigmoids)
        torch.ops.aten.tanh_backward.grad_input(tanhs, candidate, grad_input=tanhs)
        return grad, through.mul_(f)


class StackedLSTM(nn.Module):
    """LSTM cells in a row, then a linear head.

    Args:
        inputs: Input size.
        hidden: Size of each cell.
        outputs: Size of the head's output.
        layers: Number of cells.
        generator: For the initial weights, uniform on ``±1/√hidden`` as in ``nn.LSTM``.
        precision: ``"bf16"`` rounds the operands of the matrix products, and nothing else; so does ``"tf32"`` on a
            GPU, while on a CPU it is ``"float32"``.

    Example:
        >>> lstm = StackedLSTM(3, 4, 2, layers=2, generator=torch.Generator().manual_seed(0))
        >>> output, state = lstm(torch.ones(5, 3), lstm.initial_state(5))
        >>> output.shape, state.cell[1].shape
        (torch.Size([5, 2]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        layers: int,
        generator: torch.Generator,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.inputs, self.hidden, self.outputs, self.layers = inputs, hidden, outputs, layers
        bound = 1 / math.sqrt(hidden)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)

        widths = [inputs] + [hidden] * (layers - 1)
        self.weights = nn.ParameterList(uniform(4 * hidden, width + hidden) for width in widths)
        self.biases = nn.ParameterList(uniform(4 * hidden) for _ in widths)
        self.head_weight = uniform(outputs, hidden)
        self.head_bias = uniform(outputs)
        self.precision = precision
        self._tapes: dict[Tensor, _Tape] | None = None

    @property
    def precision(self) -> str:
        """Precision of the matrix products, ``"float32"`` (the parameters' own), ``"tf32"`` or ``"bf16"``."""
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        if value not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {value!r}")
        self._precision = value

    def initial_state(self, batch: int) -> LSTMState:
        """All zeros."""
        zeros = self.head_bias.new_zeros(batch, self.hidden)
        return LSTMState((zeros,) * self.layers, (zeros,) * self.layers)

    def forward(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """One step for inputs ``[B, inputs]``: output ``[B, outputs]`` and the next state."""
        if x.ndim != 2 or x.shape[-1] != self.inputs:
            raise ShapeMismatchError(f"expected inputs of shape [batch, {self.inputs}], got {tuple(x.shape)}")
        hidden: list[Tensor] = []
        cell: list[Tensor] = []
        for weight, bias, h, c in zip(self.weights, self.biases, state.hidden, state.cell, strict=True):
            gates = self._affine(x, h, weight, bias)
            x, c = _Cell.apply(gates, c) if torch.is_grad_enabled() else _cell(gates, c)[:2]
            hidden.append(x)
            cell.append(c)
        return self._affine(x, None, self.head_weight, self.head_bias), LSTMState(tuple(hidden), tuple(cell))

    def _affine(self, x: Tensor, h: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        if self._precision != "bf16" and not torch.is_grad_enabled():
            with _tf32(self._precision == "tf32"):
                return torch.addmm(bias, x if h is None else torch.cat([x, h], -1), weight.t())
        tape = None if self._tapes is None else self._tapes[weight]
        return _Affine.apply(x, h, weight, bias, self._cast(weight), tape, self._precision == "tf32")

    def _cast(self, weight: Tensor) -> Tensor:
        """The weight as the products take it; within a window it is rounded once."""
        if self._precision != "bf16":
            return weight.detach()
        if self._tapes is None:
            return weight.detach().bfloat16()
        tape = self._tapes[weight]
        if tape.rounded is None:
            tape.rounded = weight.detach().bfloat16()
        return tape.rounded

    @contextmanager
    def window(self) -> Iterator[None]:
        """Unroll and call ``backward`` inside; ``.grad`` of the weights is complete on leaving.

        Example:
            >>> lstm = StackedLSTM(3, 4, 2, layers=1, generator=torch.Generator().manual_seed(0))
            >>> with lstm.window():
            ...     output, _ = lstm(torch.ones(5, 3), lstm.initial_state(5))
            ...     output.sum().backward()
            >>> lstm.head_bias.grad
            tensor([5., 5.])
        """
        pairs = [*zip(self.weights, self.biases, strict=True), (self.head_weight, self.head_bias)]
        self._tapes = {weight: _Tape() for weight, _ in pairs}
        try:
            yield
            for weight, bias in pairs:
                tape = self._tapes[weight]
                if tape.bias_gradient is not None:
                    steps = sorted(tape.met)
                    grad, inputs = tape.output_gradients.joined(steps), tape.inputs.joined(steps)
                    with _tf32(self._precision == "tf32"):
                        _accumulate(weight, (grad.t() @ inputs).to(weight.dtype))
                    _accumulate(bias, tape.bias_gradient)
        finally:
            self._tapes = None

    def __getstate__(self) -> dict[str, object]:
        """Everything but an open window, so that copies and pickles carry parameters alone."""
        return {**self.__dict__, "_tapes": None}


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
