"""Configuration: frozen, validated when built, saved in every checkpoint. Imports no torch.

Each class is the settings of one part; :class:`RunConfig` is what ``train_meta.py`` runs. Every
field is a command-line flag; its ``help`` says the unit or the reason of the default.
"""

from metatele.config.base import from_dict, to_dict
from metatele.config.equivariant import SENSES, EquivariantConfig, MixtureConfig
from metatele.config.flat import METHODS, MethodConfig, TaskConfig
from metatele.config.presets import PRESETS, TRANSFER, RunConfig, TransferConfig, preset, stored_config, transfer
from metatele.config.training import TrainingConfig

__all__ = [
    "METHODS",
    "PRESETS",
    "SENSES",
    "TRANSFER",
    "EquivariantConfig",
    "MethodConfig",
    "MixtureConfig",
    "RunConfig",
    "TaskConfig",
    "TrainingConfig",
    "TransferConfig",
    "from_dict",
    "preset",
    "stored_config",
    "to_dict",
    "transfer",
]
