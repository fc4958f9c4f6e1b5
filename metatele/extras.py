"""Packages that only some parts need: named before anything is computed, with the command that installs them.

Imports none of them.
"""

from __future__ import annotations

import importlib.util

from metatele.errors import MissingExtraError, with_page

# Module to the extra of this package that brings it; the names that pip knows where they differ from the module's.
EXTRAS = {
    "tqdm": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "sklearn": "train",
    "scipy": "train",
    "higher": "higher",
}
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def is_there(module: str) -> bool:
    """Whether a module can be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def missing_message(what: str, *modules: str) -> str:
    """One sentence: what needs these modules, and how to install them."""
    names = " and ".join(_DISTRIBUTIONS.get(module, module) for module in modules)
    extras = ",".join(dict.fromkeys(EXTRAS[module] for module in modules))
    return with_page(f"{what} needs {names}: pip install 'metatele[{extras}]'", "README.md#install")


def require_modules(what: str, *modules: str) -> None:
    """Refuse to begin what cannot be finished.

    Args:
        what: Begins the sentence, as "the figure".
        modules: Those that it imports, keys of :data:`EXTRAS`.

    Raises:
        MissingExtraError: Some of them are not installed; all such are named.

    Example:
        >>> require_modules("the figure", "matplotlib")
    """
    if missing := [module for module in modules if not is_there(module)]:
        raise MissingExtraError(missing_message(what, *missing))
