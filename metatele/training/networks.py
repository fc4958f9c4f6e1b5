"""What networks that train at the same time on one image set have in common: samples, first weights, evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metatele.data import ImageSet
from metatele.errors import ConfigError
from metatele.perceptron.losses import CrossEntropy
from metatele.perceptron.mlp import MLP, Weights
from metatele.random import generator

_CHUNK_BYTES = 64 << 20  # of one layer's outputs in one evaluation pass


class Networks:
    """Samples on a device, seeds, and the loss.

    Args:
        images: The data.
        mlp: Shape of every network; its input fits the images.
        seeds: Of the initial weights.
        train_samples: Use the first so many training images; all if zero.
        batch_size: Of a training step.
        device: Where.

    Raises:
        ConfigError: Network, samples and batches do not fit each other.
    """

    def __init__(
        self,
        images: ImageSet,
        mlp: MLP,
        seeds: Sequence[int],
        train_samples: int,
        batch_size: int,
        device: torch.device | str,
    ) -> None:
        if mlp.widths[0] != images.features:
            raise ConfigError(f"{images.name} has {images.features} features, the network takes {mlp.widths[0]}")
        count = train_samples or len(images.train_labels)
        if not 0 < batch_size <= count <= len(images.train_labels):
            raise ConfigError(
                f"train_samples must lie between the batch size ({batch_size}) and {len(images.train_labels)}, "
                f"got {count}"
            )
        if not len(seeds):
            raise ConfigError("seeds must name at least one network")
        if mlp.widths[-1] < images.classes:
            raise ConfigError(f"{images.name} has {images.classes} classes, the network gives {mlp.widths[-1]} outputs")
        self.mlp, self.seeds, self.batch_size = mlp, list(seeds), batch_size
        self.device = torch.device(device)
        self.train_images = images.train_images[:count].to(self.device)
        self.train_labels = images.train_labels[:count].to(self.device)
        self.test_images, self.test_labels = images.test_images.to(self.device), images.test_labels.to(self.device)
        self.sha256, self.loss = images.sha256, CrossEntropy()

    def initial(self) -> Weights:
        """Weights uniform on ``±1/√fan_in``, ``[seeds, ...]``, of the images' dtype."""
        draws = [
            torch.rand(self.mlp.num_parameters, generator=generator(seed, "initialisation")) for seed in self.seeds
        ]
        return self.mlp.usual_weights(torch.stack(draws).to(self.train_images))

    @torch.no_grad()
    def evaluated(self, weights: Weights, split: str) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy on all samples of a split.

        Args:
            weights: Of networks ``[m, ...]``.
            split: ``train`` or ``test``.

        Returns:
            Both ``[m]``; the losses in float64.

        Raises:
            ConfigError: There is no such split.
        """
        if split not in ("train", "test"):
            raise ConfigError(f"split must be train or test, got {split!r}")
        images, labels = (
            (self.train_images, self.train_labels) if split == "train" else (self.test_images, self.test_labels)
        )
        units = len(weights.matrices[0]) * max(self.mlp.widths[1:])
        chunk = max(1, _CHUNK_BYTES // (units * images.element_size()))
        total = correct = torch.zeros((), dtype=torch.float64, device=self.device)
        # One more dimension, in which the data are shared: one product for all networks.
        together = Weights(
            tuple(W.unsqueeze(0) for W in weights.matrices),
            tuple(None if b is None else b.unsqueeze(0) for b in weights.biases),
        )
        for x, y in zip(images.split(chunk), labels.split(chunk), strict=True):
            outputs = self.mlp.forward(together, x.T[None, None])[0]
            total = total + self.loss.value(outputs, y.unsqueeze(0)).double() * len(y)
            correct = correct + (outputs.argmax(-2) == y).sum(-1)
        return total / len(labels), correct / len(labels)
