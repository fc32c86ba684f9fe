"""Runs tests on an accelerator: what tests and torch's modules create lies there, what the package creates does not.

ALPHA_OPTIM_TEST_DEVICE=cuda python -m pytest tests/test_today.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import alpha_optim

PACKAGE = str(Path(alpha_optim.__file__).parent)


class OnDevice(TorchFunctionMode):
    """Creates tensors on a device where no other was asked for; random ones are those of the CPU's generators."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.constructors = torch.device(device), _device_constructors()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.constructors or kwargs.get("device") is not None or "out" in kwargs or asked_by_package():
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        return made.detach().to(self.device).requires_grad_(made.requires_grad)


def asked_by_package() -> bool:
    """Whether a call comes from the package, and is not one that it only hands on."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)
