"""What a piece of code asks the device for, counted as it runs."""

from __future__ import annotations

import collections
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
ASKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")


class Asked(TorchDispatchMode):
    """Counts what makes the host wait for the device: values read, copies to the CPU, shapes that depend on values.

    On a CPU it counts what would. ``tolist`` is no operation there, and is counted by itself.

    Attributes:
        operations: All that were dispatched.
        found: By operation and the line of the package that it came from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.found: collections.Counter[tuple[str, str]] = collections.Counter()

    @property
    def count(self) -> int:
        """Of all that waits."""
        return sum(self.found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        kwargs = kwargs or {}
        self.operations += 1
        name = func.name().split(".")[0]
        masked = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        where = kwargs.get("device")
        down = (
            name == "aten::_to_copy"
            and where is not None
            and torch.device(where).type == "cpu"
            and args[0].device.type != "cpu"
        )
        if name in ASKS or masked or down:
            self.found[name, _line()] += 1
        return func(*args, **kwargs)

    def __enter__(self) -> Asked:
        """Begin."""
        mode, before = self, torch.Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            if tensor.device.type == "cpu":  # elsewhere the copy is counted
                mode.found["tolist", _line()] += 1
            return before(tensor)

        self.before = before
        torch.Tensor.tolist = tolist  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        torch.Tensor.tolist = self.before  # type: ignore[method-assign]
        super().__exit__(*error)


def _line() -> str:
    """The innermost line of the package."""
    package = str(ROOT / "metatele")
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(package):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "elsewhere"
