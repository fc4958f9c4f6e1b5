"""Hooks that see what the layers of a model receive and give, and that disturb nothing else that is done with it.

They are silent under ``torch.jit.trace``, ``torch.export``, ``torch.fx``, ``torch.func`` and inference mode; a compiled
model calls them between its graphs; a copied or saved model has nothing of them that would need this package.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import with_page

See = Callable[[int, Any, Any], None]


def _is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which some versions say in every graph that is compiled."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))  # from torch 2.7 on


def listen(layers: Iterable[nn.Module], see: See, owner: Any, whole: bool = False) -> None:
    """Call ``see(number, input, output)`` after each forward call of a layer, for as long as an owner lives.

    Args:
        layers: They are numbered in this order.
        see: What is called; not with outputs that are symbols, in a tracer or a transform.
        owner: When it is gone, the hooks are.
        whole: The input is all arguments, ``(positional, named)``, and the output may be anything.

    Example:
        >>> class Owner: ...
        >>> owner, layer = Owner(), nn.Linear(3, 2)
        >>> listen([layer], lambda number, given, output: print(number, given.shape, output.shape), owner)
        >>> _ = layer(torch.ones(5, 3))
        0 torch.Size([5, 3]) torch.Size([5, 2])
        >>> del owner
        >>> _ = layer(torch.ones(5, 3))
    """
    handles = []
    for number, layer in enumerate(layers):
        _tidy(layer)
        handles.append(layer.register_forward_hook(_Hook(see, number, whole), with_kwargs=True))
    weakref.finalize(owner, _remove, handles)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _tidy(layer: nn.Module) -> None:
    """Take away what hooks have left behind in a copied layer."""
    for number, hook in list(layer._forward_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), contextlib.nullcontext):
            for kept in (layer._forward_hooks, layer._forward_hooks_with_kwargs):
                kept.pop(number, None)


def is_ordinary(tensor: Any) -> bool:
    """Whether a tensor holds numbers: not inside a transform, a tracer or a compiler."""
    return (
        type(tensor) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._is_tracing()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
    )


def _look(see: See, layer: int, whole: bool, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
    if torch.is_inference_mode_enabled():
        return
    if whole:
        see(layer, (arguments, named), output)
    elif is_ordinary(output):
        see(layer, arguments[0] if arguments else next(iter(named.values())), output)


_UNCOMPILED: list[Callable[..., None]] = []  # the same, once something is compiled


def _see(*what: Any) -> None:
    if "torch._dynamo" in sys.modules:  # frames that run may be compiled
        if not _UNCOMPILED:
            _UNCOMPILED.append(torch.compiler.disable(_look))
        _UNCOMPILED[0](*what)
    else:
        _look(*what)


# A compiled model calls it between two of its graphs. The mark is the one that torch.compiler.disable sets, which takes
# more than a second to import where nothing is compiled.
_see._torchdynamo_disable = True  # type: ignore[attr-defined]
_see._torchdynamo_disable_msg = with_page(  # type: ignore[attr-defined]
    "metatele's optimizers look at the passes, so compile without fullgraph=True",
    "docs/learned-optimizer.md#what-works-with-it",
)


class _Hook:
    """The hook of one layer. It stays behind when its model is copied or saved: there it is one that does nothing."""

    __name__ = "metatele_capture"  # TorchScript asks every hook for its name

    def __init__(self, see: See, layer: int, whole: bool = False) -> None:
        self.see, self.layer, self.whole = see, layer, whole

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if not _is_exporting():
            _see(self.see, self.layer, self.whole, arguments, named, output)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, does nothing, needs no metatele

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__
