"""Inner problems of every kind a perceptron is trained on, for a meta-optimizer that takes any shape."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metatele.config import MixtureConfig
from metatele.perceptron.activations import Activation, LeakyReLU, ReLU, Sigmoid, Softplus, Tanh
from metatele.perceptron.losses import CrossEntropy, Loss, MeanSquaredError, SquaredError
from metatele.perceptron.mlp import MLP, Pass
from metatele.random import generator


@dataclass(frozen=True)
class Fitting:
    r"""``[B]`` problems of one shape: fit targets, on all samples at once or on mini-batches.

    .. math:: \min_w \; \text{loss}(f(X; w), Y)

    Attributes:
        mlp: Shape of the networks.
        inputs: ``[B, d, n]``, or ``[d, n]`` if all see the same; one column per sample.
        targets: ``[B, o, n]``, or class indices ``[B, n]``; without B as above.
        initial: Initial flat weights ``[B, P]``.
        loss: Of the outputs.
        batch_size: Samples of a mini-batch; 0 takes all.
        seed: Of the order of the samples.

    Example:
        >>> mlp = MLP((2, 3, 1), Tanh())
        >>> X, Y, w = torch.randn(5, 2, 12), torch.randn(5, 1, 12), torch.randn(5, mlp.num_parameters)
        >>> problems = Fitting(mlp, X, Y, w, MeanSquaredError(), batch_size=4)
        >>> problems.batches, problems.batch(0)[0].shape, problems.loss_and_gradient(w)[0].shape
        (3, torch.Size([5, 2, 4]), torch.Size([5]))
    """

    mlp: MLP
    inputs: Tensor
    targets: Tensor
    initial: Tensor
    loss: Loss
    batch_size: int = 0
    seed: int = 0

    def __len__(self) -> int:
        """Number of problems."""
        return self.initial.shape[0]

    @property
    def batches(self) -> int:
        """Mini-batches in an epoch; a last one that would be short is left out."""
        return self.inputs.shape[-1] // self.batch_size if self.batch_size else 1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, counted from 0; each epoch has its own order."""
        if not self.batch_size or self.batch_size >= self.inputs.shape[-1]:
            return self.inputs, self.targets
        epoch, number = divmod(step, self.batches)
        order = torch.randperm(self.inputs.shape[-1], generator=generator(self.seed, "train", epoch))
        chosen = order[number * self.batch_size : (number + 1) * self.batch_size].to(self.inputs.device)
        return self.inputs[..., chosen], self.targets[..., chosen]

    def visit(self, flat: Tensor, step: int) -> tuple[Tensor, Pass]:
        """Loss ``[B]`` of flat weights ``[B, P]`` on the batch of a step, and the pass, backwards too; all detached."""
        inputs, targets = self.batch(step)
        done = Pass(self.mlp, self.mlp.unflatten(flat.detach()), inputs)
        done.backward(targets, self.loss)
        return self.loss.value(done.pre[-1], targets), done

    def loss_and_gradient(self, flat: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """Loss ``[B]`` on the batch of a step and its gradient ``[B, P]``, both detached."""
        loss, done = self.visit(flat, step)
        return loss, self.mlp.flatten(done.gradient())

    def fitting(self) -> Fitting:
        """These; problems of other kinds say here what they are as these."""
        return self

    def repeat(self, times: int) -> Fitting:
        """``times`` copies in a row, for instance one for each learning rate of a grid."""
        inputs, targets = self.inputs, self.targets
        if inputs.dim() == 3:
            inputs, targets = (t.repeat(times, *(1,) * (t.dim() - 1)) for t in (inputs, targets))
        return replace(self, inputs=inputs, targets=targets, initial=self.initial.repeat(times, 1))

    def part(self, which: slice) -> Fitting:
        """Some of the problems."""
        inputs, targets = self.inputs, self.targets
        if inputs.dim() == 3:
            inputs, targets = inputs[which], targets[which]
        return replace(self, inputs=inputs, targets=targets, initial=self.initial[which])

    def to(self, device: torch.device | str) -> Fitting:
        """The same problems elsewhere."""
        moved = {name: getattr(self, name).to(device) for name in ("inputs", "targets", "initial")}
        return replace(self, **moved)


def usual_weights(mlp: MLP, count: int, draws: torch.Generator) -> Tensor:
    """Flat weights ``[count, P]`` as ``nn.Linear`` begins with."""
    return mlp.flatten(mlp.usual_weights(torch.rand(count, mlp.num_parameters, generator=draws)))


def image_like(
    draws: torch.Generator,
    sizes: tuple[int, int, int, int],
    fall: float = 0.5,
    level: float | None = -0.5,
    decades: float = 1.0,
    root_mean_square: float = 0.33,
) -> tuple[Tensor, Tensor]:
    """Data like images: many features of low rank, of unlike size, some hardly ever not zero; a teacher's classes.

    Args:
        draws: Where randomness comes from.
        sizes: Features d, rank, classes, samples n.
        fall: The latent coordinates' standard deviations go like ``1/k^fall``.
        level: Before features are cut off at zero this is added to them all; ``None``: they are not cut off.
        decades: How far features differ in size.
        root_mean_square: Of all entries.

    Returns:
        Inputs ``[d, n]`` and labels ``[n]``.

    Example:
        >>> X, labels = image_like(torch.Generator().manual_seed(0), (100, 20, 10, 50))
        >>> X.shape, labels.shape
        (torch.Size([100, 50]), torch.Size([50]))
    """
    d, rank, classes, n = sizes
    latent = torch.randn(rank, n, generator=draws) * (1 + torch.arange(rank)).pow(-fall)[:, None]
    mix = torch.randn(d, rank, generator=draws)
    X = mix @ (latent / latent.square().sum(0).mean().sqrt()) + 0.1 * torch.randn(d, n, generator=draws)
    if level is not None:
        X = (X + level + torch.randn(d, 1, generator=draws)).clamp_min(0)
    X = X * 10 ** (-decades * torch.rand(d, 1, generator=draws))
    X = X / X.square().mean().sqrt() * root_mean_square
    teacher = MLP((rank, 30, classes), Tanh(), True)
    Y = teacher.forward(teacher.unflatten(4 * usual_weights(teacher, 1, draws)[0]), latent)
    return X, (Y - Y.mean(-1, keepdim=True) + 0.05 * torch.randn(Y.shape, generator=draws)).argmax(-2)


# SiLU is left out, to see what is made of an activation that was never met.
_ACTIVATIONS: tuple[Activation, ...] = (LeakyReLU(0.1), LeakyReLU(0.1), ReLU(), Tanh(), Softplus(), Sigmoid())


@dataclass(frozen=True)
class Mixture:
    """A distribution of fitting problems: widths, depths, activations, data, losses, initial weights, batches.

    Attributes:
        config: Sizes.

    Example:
        >>> problems = Mixture(MixtureConfig()).sample(0, "train", index=3, count=4)
        >>> len(problems), problems.initial.shape[-1] == problems.mlp.num_parameters
        (4, True)
    """

    config: MixtureConfig

    def sample(self, seed: int, stream: str, index: int, count: int) -> Fitting:
        """``count`` problems of one shape; number ``index`` of a stream, the same on every machine.

        Args:
            seed: Of all streams.
            stream: ``"train"``, ``"validation"`` and so on; two streams never meet.
            index: Which draw of shape, data and loss.
            count: Problems of that shape.
        """
        draws = generator(seed, stream, index)
        choose = random.Random(int(torch.randint(2**62, (), generator=draws)))
        kind = choose.choices(("paper", "random", "teacher", "classes", "digits", "wide"), (3, 3, 2, 2, 2, 3))[0]
        if kind == "paper":
            return self._paper(choose, draws, count)
        if kind == "digits":
            return self._digits(choose, draws, count)
        if kind == "wide":
            return self._wide(choose, draws, count)
        return self._synthetic(kind, choose, draws, count)

    def _width(self, choose: random.Random) -> int:
        return round(math.exp(choose.uniform(math.log(self.config.narrowest), math.log(self.config.widest))))

    def _hidden(self, choose: random.Random) -> list[int]:
        hidden = [self._width(choose) for _ in range(choose.choice(self.config.depths) - 1)]
        return hidden[:1] * len(hidden) if choose.random() < 0.4 else hidden

    def _paper(self, choose: random.Random, draws: torch.Generator, count: int) -> Fitting:
        """Like the paper's task: everything uniform on [0, 1], one hidden layer, all samples at once."""
        k = self._width(choose)
        d, o, n = (k, k, k) if choose.random() < 0.5 else (self._width(choose) for _ in range(3))
        mlp = MLP((d, k, o), choose.choice(_ACTIVATIONS[:3]))
        X, Y = torch.rand(count, d, n, generator=draws), torch.rand(count, o, n, generator=draws)
        w = torch.rand(count, mlp.num_parameters, generator=draws)
        return Fitting(mlp, X, Y, w, SquaredError())

    def _batching(self, choose: random.Random, width: int) -> tuple[int, int]:
        """Number of samples and of those in a mini-batch, 0 for all."""
        if choose.random() < 0.6:
            return max(4, round(width * math.exp(choose.uniform(math.log(0.5), math.log(5))))), 0
        size = choose.choice((32, 64, 100, 200))
        return size * choose.randint(3, 40), size

    def _synthetic(self, kind: str, choose: random.Random, draws: torch.Generator, count: int) -> Fitting:
        hidden = self._hidden(choose)
        d = hidden[0] if choose.random() < 0.3 else self._width(choose)
        o = self._width(choose) if kind == "random" else choose.randint(1, 12)
        if kind == "classes":
            o = max(2, o)
        mlp = MLP((d, *hidden, o), choose.choice(_ACTIVATIONS), choose.random() < 0.6)
        n, size = self._batching(choose, min(hidden))
        X = self._inputs(choose, draws, (count, d, n))
        if kind == "random":
            Y = torch.rand(count, o, n, generator=draws)
            if choose.random() < 0.5:
                Y = torch.randn(count, o, n, generator=draws) * math.exp(choose.gauss(0, 0.5))
        else:
            teacher = MLP((d, choose.randint(5, 40), o), Tanh(), True)
            scale = X.square().mean((-2, -1), keepdim=True).sqrt()
            Y = teacher.forward(teacher.unflatten(3 * usual_weights(teacher, count, draws)), X / scale)
        loss: Loss = choose.choice((SquaredError(), MeanSquaredError()))
        if kind == "classes":
            noisy = Y - Y.mean(-1, keepdim=True) + 0.1 * torch.randn(Y.shape, generator=draws)
            Y, loss = noisy.argmax(-2), CrossEntropy()
        w = usual_weights(mlp, count, draws) * math.exp(choose.gauss(0, 0.3))
        return Fitting(mlp, X, Y, w, loss, size, choose.getrandbits(30))

    @staticmethod
    def _inputs(choose: random.Random, draws: torch.Generator, shape: tuple[int, int, int]) -> Tensor:
        """Uniform, normal, or with a spectrum that falls over two decades and perhaps a mean."""
        kind = choose.choice(("uniform", "normal", "correlated"))
        X = torch.rand(shape, generator=draws) if kind == "uniform" else torch.randn(shape, generator=draws)
        if kind == "correlated":
            d = shape[1]
            mix = torch.randn(shape[0], d, d, generator=draws) * torch.logspace(0, -2, d)
            X = mix @ X / mix.square().sum(-1).mean(-1).sqrt()[:, None, None]
            X = X + choose.choice((0.0, 1.0))
        return X * math.exp(choose.gauss(0, 0.7))

    def _digits(self, choose: random.Random, draws: torch.Generator, count: int) -> Fitting:
        """Classification of the digits' training images."""
        from metatele.data import load_images

        images = load_images("digits")
        mlp = MLP((images.features, *self._hidden(choose), 10), choose.choice(_ACTIVATIONS), choose.random() < 0.6)
        size = choose.choice((32, 64, 100, 200))
        w = usual_weights(mlp, count, draws)
        return Fitting(mlp, images.train_images.T, images.train_labels, w, CrossEntropy(), size, choose.getrandbits(30))

    def _wide(self, choose: random.Random, draws: torch.Generator, count: int) -> Fitting:
        """Classification of :func:`image_like` data."""
        d = round(math.exp(choose.uniform(math.log(64), math.log(800))))
        rank, classes = choose.randint(10, 60), choose.randint(2, 10)
        size = choose.choice((50, 100, 200))
        n, fall = size * choose.randint(8, 40), choose.uniform(0, 1)
        level = choose.uniform(-2, 1) if choose.random() < 0.75 else None
        decades, root_mean_square = choose.uniform(0, 2), choose.uniform(0.2, 1)
        X, labels = image_like(draws, (d, rank, classes, n), fall, level, decades, root_mean_square)
        mlp = MLP((d, *self._hidden(choose), classes), choose.choice(_ACTIVATIONS), choose.random() < 0.6)
        w = usual_weights(mlp, count, draws)
        return Fitting(mlp, X, labels, w, CrossEntropy(), size, choose.getrandbits(30))
