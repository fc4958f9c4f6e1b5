"""Settings of the general family's inner problems, on modules of any kind, and of its meta-training by evolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metatele.config.base import check_types, require, require_positive, setting
from metatele.config.training import CommonTrainingConfig

# Kinds of inner problems.
KINDS = (
    *("regression", "classification", "images", "tokens", "signals", "autoencoder"),
    *("prototypes", "language", "patches"),  # small image sets, small GPTs, small ViTs
)


@dataclass(frozen=True)
class ModulesConfig:
    """The distribution of inner problems on modules of any kind, as people have them; all data are synthetic.

    Example:
        >>> ModulesConfig(kinds=("images",)).kinds
        ('images',)
    """

    kinds: tuple[str, ...] = setting(
        (*2 * ("regression",), *3 * ("classification",), *2 * ("images",), *2 * ("tokens",), *KINDS[4:]),
        f"kinds of problems, drawn evenly: {', '.join(KINDS)}; tables come first in what people do",
    )
    shortest: int = setting(20, "least steps of a run; they are log-uniform")
    longest: int = setting(2000, "most steps of a run")
    budget_ms: float = setting(
        500.0, "estimated time of a run with Adam at which it ends: many short runs teach more than few long ones"
    )
    fewest_samples: int = setting(60, "least training samples; they are log-uniform")
    most_samples: int = setting(10_000, "most training samples")
    broadest: int = setting(256, "largest width; widths are log-uniform from 8")
    deepest: int = setting(16, "most layers of a perceptron")
    fresh_share: float = setting(
        0.2, "share of problems whose batches never repeat; 3.5 times it of those with a language"
    )
    whole_share: float = setting(0.1, "share of problems whose batch is the whole training set")
    event_share: float = setting(0.15, "share of problems in which something changes in mid-run")
    trained_share: float = setting(0.1, "share of problems that go on from a state that Adam has trained")
    held_out_samples: int = setting(384, "held-out samples by which a run is judged")

    def __post_init__(self) -> None:
        """Check sizes and shares."""
        check_types(self)
        require(len(self.kinds) > 0, "kinds", "at least one", self.kinds)  # their names: where problems are drawn
        require_positive(self, "shortest", "budget_ms", "deepest", "held_out_samples")
        require(self.shortest <= self.longest, "longest", f"at least shortest ({self.shortest})", self.longest)
        require(self.fewest_samples >= 4, "fewest_samples", "at least 4", self.fewest_samples)
        least = self.fewest_samples
        require(least <= self.most_samples, "most_samples", f"at least fewest_samples ({least})", self.most_samples)
        require(self.broadest >= 8, "broadest", "at least 8", self.broadest)
        for name in ("fresh_share", "whole_share", "event_share", "trained_share"):
            require(0 <= getattr(self, name) <= 1, name, "from 0 to 1", getattr(self, name))


@dataclass(frozen=True)
class EvolutionTrainingConfig(CommonTrainingConfig):
    """Meta-training by evolution strategies: whole inner runs, in antithetic pairs, scored beside Adam.

    The score of a run is a sum of logarithms of our loss over Adam's; lower is better, 0 is Adam.

    Example:
        >>> EvolutionTrainingConfig(generations=5).updates
        5
    """

    # the strategy
    meta_seeds: int = setting(
        1, "evolutions side by side, each with directions of its own; the mean of their weights is the checkpoint"
    )
    generations: int = setting(1000, "meta-updates, one of every evolution each, unless minutes end the run before")
    minutes: float = setting(
        0.0, "wall time within which all of it ends, its last validation included; 0: by generations alone"
    )
    pairs: int = setting(12, "antithetic pairs in a generation, each on problems of its own")
    problems: int = setting(1, "problems of a pair; more pairs tell more than more problems of each")
    disturb: str = setting(
        "weights",
        "what is disturbed: the weights, or what the controller asks for, by which a run tells what each setting is "
        "worth where such numbers are seen",
        ("weights", "settings"),
    )
    step: str = setting("adam", "how the estimated gradient is followed", ("adam", "momentum"))
    sigma: float = setting(0.1, "standard deviation of what is added to the parameters")
    sigma_end: float = setting(0.03, "the same at the end: smaller steps see finer differences")
    meta_lr: float = setting(0.02, "Adam's rate on the estimated gradient")
    normalise: str = setting(
        "rank", "of the pairs' differences: by rank, by their root mean square (z), or none", ("rank", "z", "none")
    )
    decay: str = setting("cosine", "of the meta learning rate over the run", ("constant", "cosine"))
    average: float = setting(0.95, "decay of the averaged weights that are evaluated and saved; 0: none")
    workers: int = setting(0, "processes of one thread that run inner problems; 0: this process does")
    timeout_s: float = setting(60.0, "time after which an inner run is given up; a usual one takes a second")
    pool: int = setting(
        0, "different training problems, the same for all seeds, so that Adam runs once on each; 0: always new ones"
    )
    references: str = setting("", "JSON file of Adam's runs to read first and to add to")

    # the score of a run
    held_best_weight: float = setting(1.0, "of the log of our least held-out loss over Adam's: what a user is after")
    end_weight: float = setting(0.3, "of the same of training loss at the end")
    held_end_weight: float = setting(
        0.3, "of the same of held-out loss at the end: a run should not need to be stopped early"
    )
    harm: float = setting(1.05, "ratio of least held-out losses from which ours counts as worse than Adam's")
    harm_weight: float = setting(2.0, "of the log of what exceeds it: no worse anywhere comes before better somewhere")
    limit: float = setting(3.0, "largest log of a ratio, so that no problem outweighs twenty others")
    gain: float = setting(1.0, "largest gain that counts in losses at the end: fitting noise further is worth nothing")
    least_train: float = setting(1e-3, "training loss of Adam below which being lower earns nothing")
    least_held: float = setting(1e-4, "share of the first held-out loss that is added to all: below it none counts")
    lost_score: float = setting(6.0, "score of a run that is not finite; above any other in practice")

    validation_problems: int = setting(48, "held-out problems that choose the checkpoint, the same for all seeds")

    def __post_init__(self) -> None:
        """Check sizes and ranges."""
        super().__post_init__()
        require_positive(
            self, "meta_seeds", "generations", "pairs", "problems", "sigma", "sigma_end", "meta_lr", "timeout_s"
        )
        require_positive(self, "validation_problems", "limit", "lost_score", "least_train")
        require(0 <= self.average < 1, "average", "in [0, 1)", self.average)
        require(1 <= self.harm < math.inf, "harm", "at least 1", self.harm)
        for name in (
            "minutes",
            "workers",
            "pool",
            "held_best_weight",
            "end_weight",
            "held_end_weight",
            "harm_weight",
            "least_held",
        ):
            require(0 <= getattr(self, name) < math.inf, name, "zero or positive", getattr(self, name))

    @property
    def updates(self) -> int:
        """Meta-updates: generations."""
        return self.generations
