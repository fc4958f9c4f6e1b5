"""A learned optimizer for any module: whitened momentum, whose settings a small network makes from what it sees."""

from metatele.learned.general.optimizer import GeneralOptimizer

__all__ = ["GeneralOptimizer"]
