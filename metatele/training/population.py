"""Many networks trained by plain SGD on the same mini-batches in one program.

The networks differ in their initial weights alone, so they share every product with the data. Over a window of
mini-batches the first layer's matrix W is not touched: with the errors ``E_i`` of the steps so far,

    W_j X_j = W_0 X_j - η Σ_{i<j} E_i (X_iᵀ X_j),        W_s = W_0 - η Σ_i E_i X_iᵀ,

so a window needs two products as large as the layer instead of two a step, of a shape that runs near the
machine's peak, and nothing as large as the layer is written in between. The same steps to rounding.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from metatele.data import ImageSet
from metatele.errors import ConfigError, RunFolderError
from metatele.files import write_atomically
from metatele.geometry import Landscape
from metatele.perceptron.mlp import MLP
from metatele.random import generator
from metatele.training.networks import Networks
from metatele.training.static import captured, replayable


class Population(Networks):
    """Networks ``[m]`` with weights uniform on ``±1/√fan_in``.

    Args:
        images: The data.
        mlp: Shape of every network; its input fits the images.
        seeds: One network for each.
        lr: Learning rate η.
        train_samples: Use the first so many training images; all if zero.
        batch_size: Of a training step.
        device: Where.
        window: Mini-batches over which the first layer is not touched. With s samples in a window the products with
            the errors so far are ``s/(4 d)`` of the work on d features: of 10 batches of 20 images of MNIST 6 %, and
            the other products are wide enough to run near the peak.
        graph: Make the steps of a window in one launch, as a CUDA graph: the same to rounding. ``None``: on a GPU.

    Raises:
        ConfigError: A setting cannot be used, or they do not fit each other.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.data import load_images
        >>> population = Population(load_images(), MLP((64, 16, 10), LeakyReLU(0.1)), range(3), lr=0.1)
        >>> before, _ = population.measured("test")
        >>> population.train(epochs=2)
        >>> bool((population.measured("test")[0] < before).all())
        True
    """

    def __init__(
        self,
        images: ImageSet,
        mlp: MLP,
        seeds: Sequence[int],
        lr: float,
        train_samples: int = 0,
        batch_size: int = 20,
        device: torch.device | str = "cpu",
        window: int = 10,
        graph: bool | None = None,
    ) -> None:
        if window < 1:
            raise ConfigError(f"window must be at least 1, got {window}")
        if not mlp.hidden_widths:
            raise ConfigError("the networks need a hidden layer")
        if not lr > 0:
            raise ConfigError(f"lr must be positive, got {lr}")
        super().__init__(images, mlp, seeds, train_samples, batch_size, device)
        self.lr, self.window, self.graph = lr, window, graph
        self._samples = torch.zeros(window * batch_size, dtype=torch.int64, device=self.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.epochs = 0
        self.seconds = 0.0
        self.weights = self.initial()

    @property
    def flat(self) -> Tensor:
        """All weights ``[m, P]``."""
        return self.mlp.flatten(self.weights)

    @torch.no_grad()
    def train(self, epochs: int, progress: Callable[[int], None] | None = None, state: Path | None = None) -> None:
        """Go on until ``epochs`` passes over the training samples are done.

        Args:
            epochs: In all, those of a loaded state included.
            progress: Called after each epoch with the number done.
            state: File to keep the state in after each epoch, written atomically; an earlier one is gone on from.

        Raises:
            RunFolderError: The file holds the state of other networks, or cannot be read.
        """
        if state is not None and state.exists():
            self._load(state, epochs)
        while self.epochs < epochs:
            begin_s = time.perf_counter()
            order = torch.randperm(len(self.train_labels), generator=generator(0, "train", self.epochs))
            whole = len(order) // self.batch_size * self.batch_size
            for window in order[:whole].to(self.device).split(self.window * self.batch_size):
                self._launched(window)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the seconds are those of the steps
            self.epochs += 1
            self.seconds += time.perf_counter() - begin_s
            if state is not None:
                self._save(state)
            if progress is not None:
                progress(self.epochs)

    def _launched(self, samples: Tensor) -> None:
        """A window, on samples whose numbers lie where a graph finds them."""
        if not (replayable(self.device) if self.graph is None else self.graph):
            return self._window(samples)
        there = self._samples[: len(samples)]
        run = partial(self._window, there)
        if replayable(self.device) and len(samples) not in self._graphs:
            graph = captured(run, [t for part in self.weights for t in part if t is not None])
            if graph is None:
                self.graph = False
                return self._window(samples)
            self._graphs[len(samples)] = graph
        there.copy_(samples)
        return self._graphs[len(samples)].replay() if self._graphs else run()

    def _window(self, samples: Tensor) -> None:
        inputs, labels = self.train_images[samples].T, self.train_labels[samples]
        W, b = self.weights.matrices[0], self.weights.biases[0]
        networks, k, d = W.shape
        rows = W.view(networks * k, d)
        pre, gram = rows @ inputs, inputs.T @ inputs
        errors = torch.empty_like(pre)
        for begin in range(0, len(samples), self.batch_size):
            now = slice(begin, begin + self.batch_size)
            z = pre[:, now]
            if begin:
                z = torch.addmm(z, errors[:, :begin], gram[:begin, now], alpha=-self.lr)
            z = z.view(networks, k, -1)
            error = self._step(z if b is None else z + b.unsqueeze(-1), labels[now])
            if b is not None:
                b.sub_(error.sum(-1), alpha=self.lr)
            errors[:, now] = error.view(networks * k, -1)
        rows.addmm_(errors, inputs.T, alpha=-self.lr)

    def _step(self, z: Tensor, labels: Tensor) -> Tensor:
        """One step of all layers behind the first; returns the error ``∂L/∂z`` of the first."""
        activations, matrices, biases = self.mlp.activations, self.weights.matrices, self.weights.biases
        pre, hidden = [z], []
        for layer in range(1, len(matrices)):
            hidden.append(activations[layer - 1](pre[-1]))
            bias = biases[layer]
            product = matrices[layer] @ hidden[-1]
            pre.append(product if bias is None else product + bias.unsqueeze(-1))
        error = self.loss.gradient(pre[-1], labels.unsqueeze(0))
        for layer in reversed(range(1, len(matrices))):
            back = matrices[layer].mT @ error
            matrices[layer].baddbmm_(error, hidden[layer - 1].mT, alpha=-self.lr)
            bias = biases[layer]
            if bias is not None:
                bias.sub_(error.sum(-1), alpha=self.lr)
            error = back * activations[layer - 1].derivative(pre[layer - 1])
        return error

    def measured(self, split: str) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy ``[m]`` on the ``train`` or ``test`` samples."""
        return self.evaluated(self.weights, split)

    def landscape(self, samples: Tensor) -> Landscape:
        """The loss of all networks on some training samples."""
        index = samples.to(self.device)
        return Landscape(self.mlp, self.train_images[index].T[None], self.train_labels[index][None], self.loss)

    def _identity(self) -> list[float]:
        sizes = (*self.mlp.widths, *self.seeds, self.lr, self.batch_size, len(self.train_labels))
        return [float(v) for v in sizes] + [float(byte) for byte in bytes.fromhex(self.sha256)]

    def _save(self, path: Path) -> None:
        buffer = io.BytesIO()
        kept = {"of": self._identity(), "flat": self.flat, "epochs": self.epochs, "seconds": self.seconds}
        torch.save(kept, buffer)
        write_atomically(path, buffer.getvalue())

    def _load(self, path: Path, most: int) -> None:
        try:
            kept = torch.load(path, map_location=self.device, weights_only=True)
            of, flat, epochs, seconds = kept["of"], kept["flat"], kept["epochs"], kept["seconds"]
            readable = flat.shape == self.flat.shape and flat.dtype == self.flat.dtype and type(epochs) is int
            readable = readable and epochs >= 0 and 0 <= seconds < float("inf")
        except Exception as error:  # torch raises many kinds for damaged files
            raise RunFolderError(f"{path} is not a readable state; delete it to begin anew") from error
        if of != self._identity():
            raise RunFolderError(f"{path} is the state of other networks, data or settings; delete it to begin anew")
        if not readable:
            raise RunFolderError(f"{path} is not a readable state; delete it to begin anew")
        if epochs > most:
            raise RunFolderError(
                f"{path} has {epochs} epochs behind it, more than the {most} asked; delete it to begin anew"
            )
        self.epochs, self.seconds = epochs, float(seconds)
        for old, new in zip(self.weights, self.mlp.unflatten(flat), strict=True):
            for target, source in zip(old, new, strict=True):
                if target is not None and source is not None:
                    target.copy_(source)
