"""Policies: measurement -> factor for the learning rate. One file per policy."""

from alpha_optim.policies.calibrate.calibrate_then_anneal import CalibrateThenAnneal
from alpha_optim.policies.hold import Hold
from alpha_optim.policies.overshoot_backoff import OvershootBackoff
from alpha_optim.policies.target_alpha import TargetAlpha
from alpha_optim.policies.wrappers import Bounded, WithWarmup

__all__ = ["Bounded", "CalibrateThenAnneal", "Hold", "OvershootBackoff", "TargetAlpha", "WithWarmup"]
