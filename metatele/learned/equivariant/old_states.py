"""States as earlier code stored them, which packed several numbers into one tensor."""

from __future__ import annotations

from torch import Tensor

from metatele.learned.equivariant.moments import LayerMoments
from metatele.learned.equivariant.spectrum import Spectrum
from metatele.learned.equivariant.states import (
    Bend,
    Change,
    Control,
    EquivariantStates,
    Level,
    Measured,
    Motion,
    Pace,
    Spread,
)
from metatele.learned.lstm import LSTMState
from metatele.network.use import RANK, WIDEST, Moment
from metatele.perceptron.losses import KINDS


def read_old(found: dict[str, Tensor], dense: int = WIDEST, rank: int = RANK) -> EquivariantStates:
    """States from such tensors; earlier code kept all moments whole.

    Args:
        found: ``counters, pace, bent, last, level, spread, velocity_0, inputs_0_values, ...``.
        dense: Rows up to which they stay so.
        rank: Columns of the factors that others become, and of their spectra.

    Raises:
        KeyError: Something is missing.
    """
    age, until, averaged, kind, *renew = map(int, found["counters"].tolist())
    layers = range(found["log_rate"].shape[-1])
    beta, less, a, b = found["pace"].unbind(-1)

    def spectrum(name: str) -> Spectrum:
        spectrum = Spectrum(*(found[f"{name}_{field}"] for field in Spectrum._fields))
        return spectrum.cut(rank) if spectrum.vectors.shape[-2] > dense else spectrum

    def moment(name: str) -> Moment:
        whole = Moment(found[name])
        return whole.factored(rank) if whole.rows > dense else whole

    input_damping, error_damping, input_power, error_power = found["bent"].unbind(-1)
    return EquivariantStates(
        age=age,
        until=until,
        averaged=averaged,
        kind=None if kind < 0 else KINDS[kind],
        same=False,  # which was not kept: more than needed is asked for once
        renew=renew[: len(layers)],
        fingerprint=found["fingerprint"],
        motion=Motion(*([found[f"{name}_{i}"] for i in layers] for name in ("velocity", "direction"))),
        last=Change(*found["last"].unbind(-1)),
        level=Level(*found["level"].unbind(-1)),
        measured=Measured(*(found[name] for name in Measured._fields)),
        predicted=found["predicted"],
        control=Control(
            LSTMState((found["lstm_hidden"],), (found["lstm_cell"],)),
            found["log_rate"],
            found["unit"],
            Pace(beta, -less, a, b),
            Bend(input_damping, error_damping, input_power, error_power),
            found["stretch"],
            found["limit"],
        ),
        moments=[
            LayerMoments(
                moment(f"input_moments_{i}"),
                moment(f"error_moments_{i}"),
                spectrum(f"inputs_{i}"),
                spectrum(f"errors_{i}"),
            )
            for i in layers
        ],
        spread=Spread(*found["spread"].unbind(-1)),
    )
