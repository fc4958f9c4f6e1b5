"""Synthetic sequences: tokens with a rule, and signals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from metatele.tasks.modules.data import Data, flipped
from metatele.tasks.modules.draws import Draws, seeded

GAMES = ("language", "language", "language", "recall", "majority", "sort", "sum")


class _Sequences:
    """Sequences of tokens, with tokens as classes."""

    tokens: int
    length: int

    loss = "ce"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return (self.length,)

    @property
    def outputs(self) -> int:
        """Classes: the tokens."""
        return self.tokens


@dataclass(frozen=True)
class Tokens(_Sequences):
    """Sequences of tokens, and what is asked about them.

    Attributes:
        game: ``"language"`` (the next token of a random Markov chain of order 2), ``"recall"`` (the token some places
            before), ``"majority"`` (the most frequent one), ``"sort"`` (the sequence in order) or ``"sum"`` (of the
            first tokens, modulo their number).
        tokens: How many different ones.
        length: Of a sequence.
        reach: How far ``recall`` looks back, and how many tokens ``sum`` takes.
        flips: Share of targets that are drawn anew.
        seed: Of the chain.

    Example:
        >>> Tokens("sort", 5, 6, 2, 0.0, 0).draw(1, torch.Generator().manual_seed(0)).targets.diff().min() >= 0
        tensor(True)
    """

    game: str
    tokens: int
    length: int
    reach: int
    flips: float
    seed: int

    @property
    def positions(self) -> bool:
        """Whether every position has a target."""
        return self.game in ("language", "recall", "sort")

    def draw(self, count: int, generator: torch.Generator, clean: bool = False) -> Data:
        """New samples."""
        if self.game == "language":
            text = self._text(count, generator)
            return Data(text[:, :-1], text[:, 1:])
        x = torch.randint(self.tokens, (count, self.length), generator=generator)
        match self.game:
            case "recall":
                y = F.pad(x[:, : -self.reach], (self.reach, 0), value=-100)
            case "sort":
                y = x.sort(-1).values
            case "majority":
                y = F.one_hot(x, self.tokens).sum(1).argmax(-1)
            case _:
                y = x[:, : self.reach].sum(-1) % self.tokens
        if clean or not self.flips:
            return Data(x, y)
        return Data(x, torch.where(y >= 0, flipped(y, self.tokens, self.flips, generator), y))

    @cached_property
    def _chain(self) -> Tensor:
        draws = Draws(seeded(self.seed))
        sharpness = draws.uniform(1, 4)
        logits = sharpness * torch.randn(self.tokens, self.tokens, self.tokens, generator=draws.generator)
        return logits.softmax(-1).cumsum(-1)

    def _text(self, count: int, generator: torch.Generator) -> Tensor:
        text = [torch.randint(self.tokens, (count,), generator=generator) for _ in range(2)]
        for u in torch.rand(self.length - 1, count, 1, generator=generator):
            following = (self._chain[text[-2], text[-1]] < u).sum(-1)
            text.append(following.clamp(max=self.tokens - 1))
        return torch.stack(text, 1)


@dataclass(frozen=True)
class Language(_Sequences):
    """Text of a random language, whose next token is asked for at every position.

    Attributes:
        sort: ``"markov"`` (a token depends on the last one) or ``"induction"`` (such text that repeats itself, at a
            distance of its own for each sequence, so that looking back pays).
        tokens: How many different ones; some are frequent and most are rare.
        length: Of a sequence.
        seed: Of the language.

    Example:
        >>> data = Language("markov", 32, 16, 0).draw(3, torch.Generator().manual_seed(0))
        >>> bool((data.inputs[:, 1:] == data.targets[:, :-1]).all())
        True
    """

    sort: str
    tokens: int
    length: int
    seed: int

    positions = True

    @cached_property
    def _chain(self) -> Tensor:
        draws = Draws(seeded(self.seed))
        sharpness = draws.uniform(0.5, 3.0)
        rarity = draws.uniform(0.3, 1.2) * torch.arange(1, self.tokens + 1).log()  # Zipf's law
        logits = sharpness * torch.randn(self.tokens, self.tokens, generator=draws.generator) - rarity
        return logits.softmax(-1).cumsum(-1)

    def draw(self, count: int, generator: torch.Generator, clean: bool = False) -> Data:
        """New samples; none has noise of its own."""
        text = [torch.randint(self.tokens, (count,), generator=generator)]
        for u in torch.rand(self.length, count, 1, generator=generator):
            text.append((self._chain[text[-1]] < u).sum(-1).clamp(max=self.tokens - 1))
        if self.sort == "induction":
            near, far = max(2, self.length // 4), max(3, self.length // 2)
            back = torch.randint(near, far, (count,), generator=generator)
            rows = torch.arange(count)
            for t in range(near, self.length + 1):
                again = (back <= t) & (torch.rand(count, generator=generator) < 0.95)
                text[t] = torch.where(again, torch.stack(text, 1)[rows, (t - back).clamp_min(0)], text[t])
        whole = torch.stack(text, 1)
        return Data(whole[:, :-1], whole[:, 1:])


@dataclass(frozen=True)
class Signals:
    """Sums of waves in noise ``[length, channels]``: which class of frequency, or how they go on.

    Attributes:
        length: Of a sequence.
        channels: Series beside each other.
        outputs: Classes, or the series for a forecast.
        forecast: Whether every next value is asked for.
        noise: Standard deviation of the noise, where waves have about 0.7.
        unit: Factor on all inputs.

    Example:
        >>> Signals(12, 2, 3, False, 0.1, 1.0).draw(4, torch.Generator().manual_seed(0)).inputs.shape
        torch.Size([4, 12, 2])
    """

    length: int
    channels: int
    outputs: int
    forecast: bool
    noise: float
    unit: float

    tokens = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return (self.length, self.channels)

    @property
    def loss(self) -> str:
        """By which an output is judged."""
        return "mse" if self.forecast else "ce"

    @property
    def positions(self) -> bool:
        """Whether every position has a target."""
        return self.forecast

    def draw(self, count: int, generator: torch.Generator, clean: bool = False) -> Data:
        """New samples."""
        labels = torch.randint(self.outputs, (count,), generator=generator)
        time = torch.arange(self.length + 1)[None, :, None]
        spread = torch.rand(count, 1, self.channels, generator=generator)
        steps = (labels[:, None, None] + 0.5 + 0.8 * spread) / (self.outputs + 1)
        phase = 2 * math.pi * torch.rand(count, 1, self.channels, generator=generator)
        waves = (math.pi * 0.7 * steps * time + phase).sin()
        seen = waves + self.noise * torch.randn(waves.shape, generator=generator)
        if self.forecast:
            return Data(self.unit * seen[:, :-1], seen[:, 1:])
        return Data(self.unit * seen[:, :-1], labels)


def drawn_tokens(draws: Draws) -> Tokens:
    """Tokens with a rule."""
    game, length = draws.choice(GAMES), draws.choice((6, 8, 12, 16, 24, 32))
    tokens = draws.choice((8, 16, 32)) if game == "language" else draws.choice((3, 5, 8, 12))
    reach = min(draws.choice((1, 2, 3)), length - 1)
    flips = draws.choice((0.0, 0.0, draws.uniform(0, 0.4)))
    return Tokens(game, tokens, length, max(2, reach) if game == "sum" else reach, flips, draws.seed())


def drawn_language(draws: Draws) -> Language:
    """A language for a small GPT."""
    sort, tokens = draws.choice(("markov", "markov", "induction")), draws.choice((16, 24, 32, 48))
    return Language(sort, tokens, draws.choice((12, 16, 24, 32)), draws.seed())


def drawn_signals(draws: Draws) -> Signals:
    """Signals with a class, or to be forecast."""
    length, channels = draws.choice((8, 12, 16, 24, 32)), draws.choice((1, 1, 2, 4))
    forecast, unit = draws.chance(0.4), draws.choice((1.0, 1.0, 1.0, draws.log_uniform(0.01, 100)))
    outputs = channels if forecast else draws.choice((2, 3, 5))
    return Signals(length, channels, outputs, forecast, draws.choice((0.02, 0.1, 0.3, 1.0)), unit)
