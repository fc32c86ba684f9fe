"""Measure the normalized step length alpha of any torch optimizer, and set learning rates by it.

Names are loaded when they are asked for first: the command line looks at files of runs without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; a test holds `_HOME` to it
    from alpha_optim.alpha.diagnosis import Diagnosis
    from alpha_optim.alpha.history import AlphaHistory
    from alpha_optim.alpha.measurement import AlphaMeasurement, measure_alpha
    from alpha_optim.alpha.quadratic_fit import fit_quadratic
    from alpha_optim.alpha.records import AlphaStatus, GuardEvent, Observation, QuadraticFit
    from alpha_optim.optimizer import AlphaGuided
    from alpha_optim.policies import (
        Bounded,
        CalibrateThenAnneal,
        Hold,
        OvershootBackoff,
        TargetAlpha,
        WithWarmup,
    )
    from alpha_optim.range_test import Finding, find_lr
    from alpha_optim.scheduler import AlphaScheduler

__version__ = "0.2.0"

__all__ = [
    "AlphaGuided",
    "AlphaHistory",
    "AlphaMeasurement",
    "AlphaScheduler",
    "AlphaStatus",
    "Bounded",
    "CalibrateThenAnneal",
    "Diagnosis",
    "Finding",
    "GuardEvent",
    "Hold",
    "Observation",
    "OvershootBackoff",
    "QuadraticFit",
    "TargetAlpha",
    "WithWarmup",
    "__version__",
    "find_lr",
    "fit_quadratic",
    "measure_alpha",
]

_HOME = {
    "AlphaGuided": "optimizer",
    "AlphaHistory": "alpha.history",
    "AlphaMeasurement": "alpha.measurement",
    "AlphaScheduler": "scheduler",
    "AlphaStatus": "alpha.records",
    "Bounded": "policies",
    "CalibrateThenAnneal": "policies",
    "Diagnosis": "alpha.diagnosis",
    "Finding": "range_test",
    "GuardEvent": "alpha.records",
    "Hold": "policies",
    "Observation": "alpha.records",
    "OvershootBackoff": "policies",
    "QuadraticFit": "alpha.records",
    "TargetAlpha": "policies",
    "WithWarmup": "policies",
    "find_lr": "range_test",
    "fit_quadratic": "alpha.quadratic_fit",
    "measure_alpha": "alpha.measurement",
}
_FOLDERS = ("integrations", "policies", "report")
"""What can be written ``alpha_optim.policies``, ..., without importing it first."""


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})
