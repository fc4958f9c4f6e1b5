"""Configuration: frozen, validated when built, saved in every checkpoint. Imports no torch.

Each class is the settings of one part of one family; a :class:`RunConfig` is what ``train_meta.py`` runs. Every
field is a command-line flag; its ``help`` says the unit or the reason of the default. A family's settings are one
entry of the registry (:func:`register_family`); those of another family are refused by name.
"""

from metatele.config.base import from_dict, to_dict
from metatele.config.equivariant import SENSES, EquivariantConfig, MixtureConfig
from metatele.config.families import (
    FamilyConfig,
    RunConfig,
    families,
    family_named,
    family_with,
    preset,
    register_family,
    stored_config,
)
from metatele.config.flat import METHODS, MethodConfig, TaskConfig
from metatele.config.general import GeneralConfig
from metatele.config.general_training import KINDS, EvolutionTrainingConfig, ModulesConfig
from metatele.config.presets import (
    GENERAL,
    PRESETS,
    TRANSFER,
    EquivariantRunConfig,
    FlatRunConfig,
    GeneralRunConfig,
    transfer,
)
from metatele.config.training import CommonTrainingConfig, FlatTrainingConfig, GroupTrainingConfig, TrainingConfig

__all__ = [
    "GENERAL",
    "KINDS",
    "METHODS",
    "PRESETS",
    "SENSES",
    "TRANSFER",
    "CommonTrainingConfig",
    "EquivariantConfig",
    "EquivariantRunConfig",
    "EvolutionTrainingConfig",
    "FamilyConfig",
    "FlatRunConfig",
    "FlatTrainingConfig",
    "GeneralConfig",
    "GeneralRunConfig",
    "GroupTrainingConfig",
    "MethodConfig",
    "MixtureConfig",
    "ModulesConfig",
    "RunConfig",
    "TaskConfig",
    "TrainingConfig",
    "families",
    "family_named",
    "family_with",
    "from_dict",
    "preset",
    "register_family",
    "stored_config",
    "to_dict",
    "transfer",
]
