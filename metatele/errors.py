"""The named errors of the package; each message is one sentence a user can act on, and may name a page that helps."""

from __future__ import annotations


def with_page(message: str, page: str) -> str:
    """A message that ends with the page to read, for warnings and for errors of Python's own.

    Args:
        message: One sentence, without its full stop.
        page: From the root of the repository, with the anchor of a heading: a link that works in a clone.

    Example:
        >>> with_page("sparse gradients are refused", "docs/learned-optimizer.md#when-not-to-use-it")
        'sparse gradients are refused (see docs/learned-optimizer.md#when-not-to-use-it)'
    """
    return f"{message} (see {page})"


class MetateleError(Exception):
    """Base class of every error this package raises on purpose.

    Args:
        message: One sentence.
        page: Where to read more, as in :func:`with_page`; the message then ends with it.
    """

    def __init__(self, message: str = "", *, page: str | None = None) -> None:
        super().__init__(message if page is None else with_page(message, page))


class ConfigError(MetateleError, ValueError):
    """A setting has a value that cannot be used."""


class ShapeMismatchError(MetateleError, ValueError):
    """A model, gradient or tensor does not have the shape that was expected."""


class UnsupportedModelError(MetateleError, TypeError):
    """A module holds a layer that the symmetry does not cover."""


class NotExactError(MetateleError, ValueError):
    """An exact action was asked for where no exact action exists."""


class SingularInputError(MetateleError, ValueError):
    """The layer inputs are (numerically) rank deficient, so the exact action is undefined."""


class CheckpointError(MetateleError, ValueError):
    """A checkpoint is missing, damaged, foreign, or written by a newer format."""


class RunFolderError(MetateleError, ValueError):
    """An output folder cannot be used as asked."""


class DivergedError(MetateleError, RuntimeError):
    """Training produced too many non-finite updates in a row."""


class PeerLostError(MetateleError, RuntimeError):
    """Another process of the same run is gone."""


class SaveError(MetateleError, OSError):
    """A file could not be written; the file it would have replaced is untouched."""


class DataError(MetateleError, ValueError):
    """An image set is unknown, missing or damaged."""


class MissingExtraError(MetateleError, ImportError):
    """A package that only some parts need is not installed."""
