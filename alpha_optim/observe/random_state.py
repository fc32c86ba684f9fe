"""State of the random number generators: seen before a pass, replayed, and always left as found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the random number generators that a call may use."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The state now, on the CPU and on one more device."""
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), own)

    def has_moved(self) -> bool:
        """Whether random numbers were drawn since."""
        now = RandomState.now(self.device)
        same = torch.equal(now.cpu, self.cpu)
        if self.own is not None and now.own is not None:
            same = same and torch.equal(now.own, self.own)
        return not same

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same random numbers again, and leave the generators as they were."""
        with untouched(self.device):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.cuda.set_rng_state(self.own, self.device)
            yield


@contextmanager
def untouched(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leave the generators as they were; inside they start from a seed of ours if one is given."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is not None:
            torch.random.manual_seed(seed)
        yield
