"""Numbers that stay on the device until somebody reads them.

A measurement collects tensors of one element. Reading one from an accelerator waits for all work that is queued
there, so all of them are read together, once, when the history is read; the arithmetic is done in floats then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor
"""A float, or a tensor ``[]``."""
Truth = bool | Tensor
"""A bool, or a bool tensor ``[]``."""


def free_to_read(device: torch.device) -> bool:
    """Whether reading a number from a device waits for nothing."""
    return device.type == "cpu"


def read(values: Sequence[Number | Truth | None]) -> list[Any]:
    """Fetch numbers in one transfer per device.

    Args:
        values: Tensors ``[]`` of any precision on any devices, numbers, and None.

    Returns:
        Floats where there were tensors; everything else as it was.
    """
    found: list[Any] = []
    waiting: dict[torch.device, dict[torch.dtype, list[int]]] = {}
    for place, value in enumerate(values):
        if not isinstance(value, Tensor):
            found.append(value)
        elif value.is_cpu:
            # tolist reads memory; item() would be counted (and on an accelerator wait) as a synchronisation.
            found.append(value.tolist())
        else:
            waiting.setdefault(value.device, {}).setdefault(value.dtype, []).append(place)
            found.append(value)
    for kinds in waiting.values():
        # Converted together: a kernel for each of thousands of measurements would take longer than reading them.
        parts = [torch.stack([found[place].detach() for place in places]).double() for places in kinds.values()]
        together = (parts[0] if len(parts) == 1 else torch.cat(parts)).tolist()
        for place, value in zip((place for places in kinds.values() for place in places), together, strict=True):
            found[place] = value
    return found


def saved(value: Any) -> Any:
    """A number for a state dict: tensors become plain numbers."""
    return read([value])[0]
