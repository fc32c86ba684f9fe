"""State of the random number generators: seen before a pass, replayed, and always left as found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the random number generators that a call may use.

    Attributes:
        cpu: That of the CPU.
        own: Those of the devices of CUDA, by device.
    """

    cpu: Tensor
    own: dict[torch.device, Tensor]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> RandomState:
        """The state now, on the CPU and on further devices; nothing is waited for."""
        cuda = [device for device in devices if device.type == "cuda"]
        return cls(torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in cuda})

    def has_moved(self) -> bool:
        """Whether random numbers were drawn since."""
        now = RandomState.now(self.own)
        return not torch.equal(now.cpu, self.cpu) or any(
            not torch.equal(state, self.own[device]) for device, state in now.own.items()
        )

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same random numbers again, and leave the generators as they were."""
        with untouched(self.own):
            torch.set_rng_state(self.cpu)
            for device, state in self.own.items():
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def untouched(devices: Iterable[torch.device], seed: int | None = None) -> Iterator[None]:
    """Leave the generators as they were; inside they start from a seed of ours if one is given."""
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        if seed is not None:  # torch.manual_seed would seed every device there is
            torch.default_generator.manual_seed(seed)
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield
