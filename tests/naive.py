"""Algorithm 1 as one would first write it: one trajectory, ``nn.LSTMCell``, autograd everywhere.

The yardstick for correctness (tests) and for speed (benchmarks). It shares nothing with the package
but the meta-parameters, which it copies from a ``MetaOptimizer``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metatele.learned import MetaOptimizer, StackedLSTM


class NaiveLSTM(nn.Module):
    """Two (or more) LSTM cells and a linear head."""

    def __init__(self, source: StackedLSTM) -> None:
        super().__init__()
        widths = [source.inputs] + [source.hidden] * (source.layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(width, source.hidden) for width in widths)
        self.head = nn.Linear(source.hidden, source.outputs)
        self.to(source.head_bias)  # its device and dtype
        with torch.no_grad():
            for cell, weight, bias, width in zip(self.cells, source.weights, source.biases, widths, strict=True):
                cell.weight_ih.copy_(torch_gate_order(weight[:, :width]))
                cell.weight_hh.copy_(torch_gate_order(weight[:, width:]))
                cell.bias_ih.copy_(torch_gate_order(bias))
                cell.bias_hh.zero_()
            self.head.weight.copy_(source.head_weight)
            self.head.bias.copy_(source.head_bias)

    def forward(self, x: Tensor, state: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        new_state = []
        for cell, memory in zip(self.cells, state, strict=True):
            x, c = cell(x, memory)
            new_state.append((x, c))
        return self.head(x), new_state

    def initial_state(self) -> list[tuple[Tensor, Tensor]]:
        zero = self.head.bias.new_zeros(1, self.cells[0].hidden_size)
        return [(zero, zero) for _ in self.cells]


def torch_gate_order(t: Tensor) -> Tensor:
    """Rows from the package's order (input, forget, output, candidate) to torch's."""
    i, f, o, g = t.chunk(4)
    return torch.cat([i, f, g, o])


class NaiveLearner:
    """``w ← g·(w + f)`` on one problem: ``½‖Y - W₂ σ(W₁X)‖²`` with σ = LeakyReLU(0.1)."""

    def __init__(self, source: MetaOptimizer) -> None:
        self.config = source.config
        self.local = NaiveLSTM(source.local.lstm)
        self.teleport = None if source.teleport is None else NaiveLSTM(source.teleport.lstm)
        self.sizes = list(source.task.widths)

    def parameters(self) -> list[nn.Parameter]:
        modules = [self.local] + ([] if self.teleport is None else [self.teleport])
        return [p for m in modules for p in m.parameters()]

    def split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        d, k, o = self.sizes
        return w[: k * d].view(k, d), w[k * d :].view(o, k)

    def loss(self, w: Tensor, X: Tensor, Y: Tensor) -> Tensor:
        W1, W2 = self.split(w)
        return 0.5 * (Y - W2 @ F.leaky_relu(W1 @ X, 0.1)).square().sum()

    def rate(self, output: Tensor) -> Tensor:
        low, high = self.config.rate_low, self.config.rate_high
        if self.config.rate_output == "clamp":
            return output.clamp(low, high)
        return low ** (1 - torch.sigmoid(output)) * high ** torch.sigmoid(output)

    def update(self, gradient: Tensor, output: Tensor) -> Tensor:
        if self.config.method == "lr-tele":
            return -self.rate(output[0]) * gradient
        n = gradient.numel()
        f = self.config.update_scale * output[:n]
        if self.config.gradient_rates:
            eta = self.rate(output[n + 1 :])
            d, k, o = self.sizes
            f = torch.sigmoid(output[n]) * f - torch.cat([eta[0].expand(k * d), eta[1].expand(o * k)]) * gradient
        return f

    def cap(self, gradient: Tensor, smallest: list[float]) -> Tensor:
        """Gradients no longer than a multiple of the shortest so far; ``smallest`` is kept up to date."""
        d, k, _ = self.sizes
        parts = [gradient] if self.config.method == "lr-tele" else [gradient[: k * d], gradient[k * d :]]
        capped = []
        for i, part in enumerate(parts):
            norm = part.norm().item()
            smallest[i] = min(smallest[i], norm)
            capped.append(part * min(1.0, self.config.gradient_cap * smallest[i] / norm))
        return torch.cat(capped)

    def group(self, output: Tensor, t: int) -> tuple[Tensor, Tensor]:
        k = self.sizes[1]
        T = output[: k * k].view(k, k)
        if self.config.norm == "fixed":
            T = self.config.radius * T / T.norm()
        elif self.config.norm == "learned":
            T = self.config.radius * 1000 ** (torch.sigmoid(output[k * k]) - 1) * T / T.norm()
        else:
            T = self.config.radius * T / (1 + T.square().sum()).sqrt()
        if self.config.radius_decay:
            T = T / (1 + t / self.config.radius_decay)
        if self.config.parametrisation == "first-order":
            eye = torch.eye(k, dtype=T.dtype, device=T.device)
            return eye + T, eye - T
        return torch.matrix_exp(T), torch.matrix_exp(-T)

    def run(self, w: Tensor, X: Tensor, Y: Tensor, num_steps: int) -> tuple[Tensor, list[Tensor]]:
        """Final weights, and the losses after each step, with history."""
        h1 = self.local.initial_state()
        h2 = None if self.teleport is None else self.teleport.initial_state()
        losses = []
        smallest = [float("inf")] * 2
        for t in range(num_steps):
            w_ = w.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(w_, X, Y), w_)
            seen = torch.asinh(gradient) if self.config.preprocessing == "asinh" else gradient
            if self.config.gradient_cap:
                gradient = self.cap(gradient, smallest)
            output, h1 = self.local(seen[None], h1)
            w = w + self.update(gradient, output[0])
            if self.teleport is not None:
                assert h2 is not None
                output, h2 = self.teleport(seen[None], h2)
                g, g_inverse = self.group(output[0], t)
                W1, W2 = self.split(w)
                Z = F.leaky_relu(g @ F.leaky_relu(W1 @ X, 0.1), 10.0)
                W1 = W1 + (Z - W1 @ X) @ torch.linalg.pinv(X)
                w = torch.cat([W1.flatten(), (W2 @ g_inverse).flatten()])
            losses.append(self.loss(w, X, Y))
        return w, losses
