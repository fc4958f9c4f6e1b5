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
_FEW = 4  # trajectories for which one slow function is faster than several fast ones
_BLOCK = 10  # steps whose inputs lie in one piece of memory; the paper's window


class LSTMState(NamedTuple):
    """Memory of a stack: for each layer, hidden and cell state ``[B, hidden]``."""

    hidden: tuple[Tensor, ...]
    cell: tuple[Tensor, ...]


class _Rows:
    """Matrices ``[B, width]`` of the steps of a window, side by side in memory where one product reads them."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._parts: dict[tuple[int, tuple[int, ...]], tuple[Tensor, ...]] = {}

    def begin(self, batch: int, width: int, like: Tensor) -> None:
        """Keep the memory of the window before if it fits: fresh memory costs as much as what is done with it."""
        if self._blocks:
            old = self._blocks[0]
            if (old.shape[1:], old.dtype, old.device) != ((batch, width), like.dtype, like.device):
                self._blocks, self._rows, self._parts = [], [], {}

    def row(self, step: int, batch: int, width: int, like: Tensor) -> Tensor:
        """Memory for a step, in the dtype of ``like``."""
        while len(self._rows) <= step:
            self._blocks.append(like.new_empty(_BLOCK, batch, width))
            self._rows.extend(self._blocks[-1].unbind())
        if self._blocks[0].shape[1] != batch:
            raise ShapeMismatchError(f"a window began with batch {self._blocks[0].shape[1]}, got {batch}")
        return self._rows[step]

    def parts(self, step: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Columns of a step's memory."""
        found = self._parts.get((step, sizes))
        if found is None:
            found = self._parts[step, sizes] = self._rows[step].split(list(sizes), -1)
        return found

    def joined(self, steps: list[int]) -> Tensor:
        """The given steps, one after another, ``[steps · B, width]``."""
        if len(steps) <= _BLOCK and steps == list(range(len(steps))):
            return self._blocks[0][: len(steps)].flatten(0, 1)  # no copy
        return torch.cat([self._rows[step] for step in steps])


class _Tape:
    """Operands of one weight's products over a window, and the weight as rounded for them.

    Both operands are written where the window's one product reads them. Backward passes meet the steps in any
    order and may leave some out, so each brings its number.
    """

    def __init__(self, earlier: _Tape | None) -> None:
        self.rounded: Tensor | None = None
        self.inputs: _Rows = _Rows() if earlier is None else earlier.inputs
        self.output_gradients: _Rows = _Rows() if earlier is None else earlier.output_gradients
        self.steps = 0
        self.closed = False
        self.met: set[int] = set()
        self.bias_gradient: Tensor | None = None

    def input(self, batch: int, weight: Tensor) -> tuple[int, Tensor]:
        """Number of the next step, and memory for its inputs."""
        if not self.steps:
            self.inputs.begin(batch, weight.shape[1], weight)
            self.output_gradients.begin(batch, weight.shape[0], weight)
        self.steps += 1
        return self.steps - 1, self.inputs.row(self.steps - 1, batch, weight.shape[1], weight)

    def keep(self, step: int, grad: Tensor, like: Tensor) -> Tensor:
        """Take in a step's output gradient ``[B, outputs]``; returns it in the dtype of ``like``."""
        if self.closed:
            raise RuntimeError("backward belongs inside the window that the steps were made in")
        row = self.output_gradients.row(step, grad.shape[0], grad.shape[1], like)
        if row.data_ptr() == grad.data_ptr():  # written there
            low = row
        elif step in self.met:  # of an earlier backward pass, say
            row.add_(grad)
            low = grad.to(like.dtype)
        else:
            low = row.copy_(grad)
        self.met.add(step)
        total = grad.sum(0)
        self.bias_gradient = total if self.bias_gradient is None else self.bias_gradient.add_(total)
        return low


class _Operands(NamedTuple):
    """What a product with a weight needs beside its input.

    Attributes:
        weight: As the products take it.
        tape: Of the window, if there is one.
        tf32: Whether a GPU may round the operands.
    """

    weight: Tensor
    tape: _Tape | None
    tf32: bool

    def joined(self, x: Tensor, h: Tensor | None) -> tuple[int, Tensor]:
        """``[x, h]`` in the products' dtype and where the window reads it, in one pass over memory; its step."""
        if self.tape is not None:
            step, joined = self.tape.input(x.shape[0], self.weight)
        else:
            step, joined = 0, self.weight.new_empty(x.shape[0], self.weight.shape[1])
        if h is None:
            joined.copy_(x)
        else:
            sizes = (x.shape[1], h.shape[1])
            left, right = self.tape.inputs.parts(step, sizes) if self.tape is not None else joined.split(sizes, -1)
            left.copy_(x)
            right.copy_(h)
        return step, joined

    def product(self, joined: Tensor, bias: Tensor) -> Tensor:
        """``[x, h] Wᵀ + b``."""
        if self.weight.dtype == bias.dtype:
            with _tf32(self.tf32):
                return torch.addmm(bias, joined, self.weight.t())
        return (joined @ self.weight.t()).to(bias.dtype).add_(bias)

    def product_alone(self, x: Tensor, h: Tensor | None, bias: Tensor) -> Tensor:
        """The same where nothing is kept for a derivative."""
        return self.product((x if h is None else torch.cat([x, h], -1)).to(self.weight.dtype), bias)

    def memory(self, step: int, like: Tensor) -> tuple[Tensor, ...]:
        """Where a step's output gradient ``[B, 4k]`` may be written before :meth:`backward` reads it.

        Returns:
            All of it, its quarters, and the first three of them together.
        """
        k = like.shape[1] // 4
        if self.tape is None or like.dtype != self.weight.dtype or step in self.tape.met:
            grad = torch.empty_like(like)
            return grad, *grad.split(k, -1), grad[:, : 3 * k]
        rows = self.tape.output_gradients
        grad = rows.row(step, like.shape[0], like.shape[1], like)
        return grad, *rows.parts(step, (k, k, k, k)), rows.parts(step, (3 * k, k))[0]

    def backward(
        self, step: int, grad: Tensor, joined: Tensor, split: int, needs: tuple[bool, bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, h, W and b where needed; those of W and b go to the tape if there is one."""
        weight, (needs_x, needs_h, needs_weight, needs_bias) = self.weight, needs
        low = grad.to(weight.dtype) if self.tape is None else self.tape.keep(step, grad, weight)
        x_grad = h_grad = weight_grad = bias_grad = None
        with _tf32(self.tf32):
            if needs_x and needs_h:
                x_grad, h_grad = (low @ weight).to(grad.dtype).split([split, weight.shape[1] - split], -1)
            elif needs_x:
                x_grad = (low @ weight[:, :split]).to(grad.dtype)
            elif needs_h:
                h_grad = (low @ weight[:, split:]).to(grad.dtype)
            if self.tape is None and needs_weight:
                weight_grad = (low.t() @ joined).to(grad.dtype)
        if self.tape is None and needs_bias:
            bias_grad = grad.sum(0)
        return x_grad, h_grad, weight_grad, bias_grad


class _Affine(torch.autograd.Function):
    """``x Wᵀ + b``."""

    @staticmethod
    def forward(ctx, x, weight, bias, operands):  # type: ignore[no-untyped-def]
        ctx.step, joined = operands.joined(x, None)
        ctx.joined = joined  # ours alone; rows written later in the same block must not count as a change
        ctx.operands = operands
        return operands.product(joined, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, bias, _ = ctx.needs_input_grad
        found = ctx.operands.backward(ctx.step, grad, ctx.joined, ctx.joined.shape[1], (x, False, weight, bias))
        return found[0], found[2], found[3], None


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
    """``2 sigmoid(2x) - 1`` where there is much; torch's sigmoid is several times faster than its tanh on a CPU."""
    if x.is_cuda or len(x) <= _FEW:  # there a pass over memory is what takes time
        return x.tanh()
    return (x + x).sigmoid_().mul_(2).sub_(1)


def _cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden state, cell, activated gates (written over the gates) and the squashed cell."""
    i, f, o, candidate = gates.chunk(4, -1)
    if gates.is_cuda or len(gates) <= _FEW:
        candidate.tanh_()
        gates[:, : 3 * cell.shape[1]].sigmoid_()
    else:
        candidate.mul_(2)
        gates.sigmoid_()
        candidate.mul_(2).sub_(1)  # its tanh, as above
    new_cell = torch.addcmul(f * cell, i, candidate)
    squashed = _tanh(new_cell)
    return o * squashed, new_cell, gates, squashed


class _Layer(torch.autograd.Function):
    """A cell on ``[x, h] Wᵀ + b``; gate order input, forget, output, candidate.

    Where products round their operands, the gates kept for the derivative are rounded too: what a window keeps is more
    than a processor's cache holds, and half of it takes half the time to write and read.
    """

    @staticmethod
    def forward(ctx, x, h, cell, weight, bias, operands):  # type: ignore[no-untyped-def]
        ctx.step, joined = operands.joined(x, h)
        hidden, new_cell, activated, squashed = _cell(operands.product(joined, bias), cell)
        ctx.save_for_backward(activated.to(operands.weight.dtype), cell, squashed)
        ctx.joined = joined  # as above
        ctx.operands, ctx.split = operands, x.shape[1]
        return hidden, new_cell

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_hidden, grad_cell):  # type: ignore[no-untyped-def]
        activated, cell, squashed = ctx.saved_tensors
        operands, size = ctx.operands, cell.shape[1]
        activated = activated.to(cell.dtype)
        i, f, o, candidate = activated.split(size, -1)
        through = torch.ops.aten.tanh_backward(grad_hidden * o, squashed).add_(grad_cell)
        grad, to_i, to_f, to_o, to_candidate, sigmoids = operands.memory(ctx.step, activated)
        torch.mul(through, candidate, out=to_i)
        torch.mul(through, cell, out=to_f)
        torch.mul(grad_hidden, squashed, out=to_o)
        torch.mul(through, i, out=to_candidate)
        torch.ops.aten.sigmoid_backward.grad_input(sigmoids, activated[:, : 3 * size], grad_input=sigmoids)
        torch.ops.aten.tanh_backward.grad_input(to_candidate, candidate, grad_input=to_candidate)
        x, h, to_cell, weight, bias, _ = ctx.needs_input_grad
        found = operands.backward(ctx.step, grad, ctx.joined, ctx.split, (x, h, weight, bias))
        return found[0], found[1], through.mul_(f) if to_cell else None, found[2], found[3], None


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
        self._earlier: dict[Tensor, _Tape] = {}  # for their memory

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
        """Hidden and cell states ``[batch, hidden]`` of every layer, all zero, where the parameters are."""
        zeros = self.head_bias.new_zeros(batch, self.hidden)
        return LSTMState((zeros,) * self.layers, (zeros,) * self.layers)

    def forward(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """One step for inputs ``[B, inputs]``: output ``[B, outputs]`` and the next state.

        Gates are ``i, f, o, g = K [x, h] + k``; ``c ← σ(f) c + σ(i) tanh(g)``, ``h ← σ(o) tanh(c)``; the output is
        linear in the last layer's h.

        Raises:
            ShapeMismatchError: The inputs are of another size.
        """
        if x.ndim != 2 or x.shape[-1] != self.inputs:
            raise ShapeMismatchError(f"expected inputs of shape [batch, {self.inputs}], got {tuple(x.shape)}")
        hidden: list[Tensor] = []
        cell: list[Tensor] = []
        for weight, bias, h, c in zip(self.weights, self.biases, state.hidden, state.cell, strict=True):
            if torch.is_grad_enabled():
                x, c = _Layer.apply(x, h, c, weight, bias, self._operands(weight))
            else:
                x, c = _cell(self._operands(weight).product_alone(x, h, bias), c)[:2]
            hidden.append(x)
            cell.append(c)
        operands, state = self._operands(self.head_weight), LSTMState(tuple(hidden), tuple(cell))
        if torch.is_grad_enabled():
            return _Affine.apply(x, self.head_weight, self.head_bias, operands), state
        return operands.product_alone(x, None, self.head_bias), state

    def _operands(self, weight: Tensor) -> _Operands:
        tape = None if self._tapes is None else self._tapes[weight]
        return _Operands(self._cast(weight), tape, self._precision == "tf32")

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
        # What a CUDA graph is captured with is its own from then on.
        captured = self.head_bias.is_cuda and torch.cuda.is_current_stream_capturing()
        earlier = {} if captured else self._earlier
        self._tapes = {weight: _Tape(earlier.get(weight)) for weight, _ in pairs}
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
            for tape in self._tapes.values():
                tape.closed = True
                tape.rounded = tape.bias_gradient = None
            if not captured:
                self._earlier = self._tapes
            self._tapes = None

    def __getstate__(self) -> dict[str, object]:
        """Everything but an open window, so that copies and pickles carry parameters alone."""
        return {**self.__dict__, "_tapes": None, "_earlier": {}}


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
