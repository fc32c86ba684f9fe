"""Measure the normalized step length alpha of any torch optimizer, and set learning rates by it."""

from alpha_optim.alpha.diagnosis import Diagnosis
from alpha_optim.alpha.history import AlphaHistory
from alpha_optim.alpha.measurement import AlphaMeasurement, measure_alpha
from alpha_optim.alpha.quadratic_fit import fit_quadratic
from alpha_optim.alpha.records import AlphaStatus, GuardEvent, Observation, QuadraticFit
from alpha_optim.find_lr import Finding, find_lr
from alpha_optim.optimizer import AlphaGuided
from alpha_optim.policies import (
    Bounded,
    CalibrateThenAnneal,
    Hold,
    OvershootBackoff,
    TargetAlpha,
    WithWarmup,
)
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
