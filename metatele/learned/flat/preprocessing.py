"""What a flat meta-optimizer sees of a gradient whose entries span many decades."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from metatele.errors import ConfigError

_LOG_RANGE = 10.0  # log-sign resolves magnitudes down to exp(-10), as Andrychowicz et al. (2016)


def raw(gradient: Tensor) -> Tensor:
    """The gradient ``[..., P]`` itself, as in the paper; 10⁴ and more saturates an LSTM's gates."""
    return gradient


def asinh(gradient: Tensor) -> Tensor:
    """``asinh(g)``: linear near zero, logarithmic far out, keeps the sign.

    Written with ``log1p``, which is vectorised on a CPU where ``torch.asinh`` is not, and as accurate
    up to the square root of the largest number.

    Example:
        >>> asinh(torch.tensor([0.0, -1e-6, 1.0, 1e6]))
        tensor([ 0.0000e+00, -1.0000e-06,  8.8137e-01,  1.4509e+01])
    """
    size = gradient.abs()
    return torch.copysign(torch.log1p(size + size * (size / (1 + (1 + size * size).sqrt()))), gradient)


def log_sign(gradient: Tensor) -> Tensor:
    """Two channels, ``(log|g|/p, sign g)`` or ``(-1, eᵖ g)`` where ``|g| < e⁻ᵖ``, p = 10.

    Example:
        >>> log_sign(torch.tensor([[0.0, -1.0]]))
        tensor([[-1.,  0.,  0., -1.]])
    """
    magnitude = gradient.abs()
    large = magnitude >= math.exp(-_LOG_RANGE)
    logarithm = torch.where(large, magnitude.clamp_min(math.exp(-_LOG_RANGE)).log() / _LOG_RANGE, -1.0)
    sign = torch.where(large, gradient.sign(), gradient * math.exp(_LOG_RANGE))
    return torch.cat([logarithm, sign], -1)


_CHANNELS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "raw": (raw, 1),
    "asinh": (asinh, 1),
    "log-sign": (log_sign, 2),
}


def preprocessing(name: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """Function by name, and how many inputs it makes of each gradient entry.

    Raises:
        ConfigError: There is none of that name.

    Example:
        >>> function, channels = preprocessing("log-sign")
        >>> function(torch.ones(2, 5)).shape, channels
        (torch.Size([2, 10]), 2)
    """
    if name not in _CHANNELS:
        raise ConfigError(f"preprocessing must be one of {', '.join(_CHANNELS)}, got {name!r}")
    return _CHANNELS[name]
