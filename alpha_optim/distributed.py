"""The only file that knows `torch.distributed`: which processes train one model together, and sums over them.

Ranks talk once per step, in one all-reduce of a few float64 numbers (`Ranks.sum`). Everything that decides something
is computed from such sums, which are the same bits on every rank; so ranks cannot come to different decisions. Where no
process group of two or more ranks is initialised, `Ranks.found` returns None and nothing else is called.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Sequence
from operator import is_ as is_same
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_PLAIN = (Tensor, nn.Parameter)
SAME_MODEL = 1e-6
"""Relative difference of the sums of parameters up to which ranks hold the same model."""


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: of a DTensor its shard, of any other tensor the tensor itself."""
    return tensor if type(tensor) in _PLAIN else getattr(tensor, "_local_tensor", tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "_local_tensor")


def initialised() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Ranks:
    """The processes that train one model together.

    Attributes:
        size: How many there are.
        rank: Which of them this one is.
        sharded: Whether parameters are spread over them (FSDP2, tensor parallelism).
        factor: What this rank's inner products count for in a sum over ranks: 1 / size where every rank holds all
            parameters.
        weights: The same for every parameter, on top of ``factor``; None where all weigh the same.
        batches: How many ranks are fed the same batch (tensor parallelism); 1 where each has its own.
    """

    def __init__(self, group: Any, params: Sequence[Tensor], batches: int = 1) -> None:
        """Take the ranks of a process group.

        Args:
            group: The process group; None for all processes.
            params: The parameters that they train.
            batches: How many of them are fed the same batch.
        """
        self._group = group
        self.size: int = torch.distributed.get_world_size(group)
        self.rank: int = torch.distributed.get_rank(group)
        self.sharded = any(map(is_sharded, params))
        self.batches = batches
        weights = [1.0 / self._copies(param) for param in params]
        self.factor = weights[0] if len(set(weights)) == 1 else 1.0
        self.weights = None if len(set(weights)) <= 1 else weights
        self._params = list(params)
        self._compared = False

    def train(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that they train."""
        return len(params) == len(self._params) and all(map(is_same, params, self._params))

    @classmethod
    def found(cls, model: nn.Module | None, params: Sequence[Tensor]) -> Ranks | None:
        """Find the ranks that train a model; None if this process is alone.

        They are those of the model's own process group if it is a `DistributedDataParallel`, those of the mesh of its
        parameters if they are DTensors, and else all.

        Args:
            model: The model, if it was given.
            params: The parameters of the optimizer.

        Raises:
            ValueError: If parameters lie on a mesh that is neither all ranks nor a row of them.
        """
        if not params or not initialised() or torch.distributed.get_world_size() < 2:
            return None
        group, batches = _group_of(model), 1
        meshes = {param.device_mesh for param in params if is_sharded(param)}  # type: ignore[attr-defined] # - DTensor
        if meshes:
            largest = max(meshes, key=lambda mesh: mesh.size())
            if largest.size() == torch.distributed.get_world_size():
                group = None
            elif largest.ndim == 1:
                group = largest.get_group()
            else:
                raise ValueError(
                    f"parameters lie on a mesh of shape {tuple(largest.shape)} that is only a part of the "
                    f"{torch.distributed.get_world_size()} processes; AlphaGuided needs a mesh of all of them, or of "
                    "one dimension"
                )
            batches = max(1, largest.size() // _data_parallel(model, largest.size()))
        if torch.distributed.get_rank(group) < 0 or torch.distributed.get_world_size(group) < 2:
            return None
        return cls(group, params, batches)

    def _copies(self, param: Tensor) -> int:
        """On how many ranks the local part of a parameter lies."""
        if not is_sharded(param):
            return self.size
        mesh = param.device_mesh  # type: ignore[attr-defined] # - a DTensor
        copies = self.size // mesh.size()
        for dimension, placement in enumerate(param.placements):  # type: ignore[attr-defined] # - a DTensor
            copies *= mesh.size(dimension) if placement.is_replicate() else 1
        return int(copies)

    # ---------------------------------------------------------------- talking

    def sum(self, numbers: Tensor) -> Sum:
        """Begin to add up numbers ``[K]`` over all ranks, in place; the same bits on each.

        Raises:
            RuntimeError: If a rank does not answer.
        """
        try:
            return Sum(numbers, torch.distributed.all_reduce(numbers, group=self._group, async_op=True), self)
        except RuntimeError as error:
            raise self.lost(error) from error

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, a plain object, in the order of ranks.

        Raises:
            RuntimeError: If a rank does not answer.
        """
        found: list[Any] = [None] * self.size
        try:
            torch.distributed.all_gather_object(found, value, group=self._group)
        except RuntimeError as error:
            raise self.lost(error) from error
        return found

    def lost(self, error: RuntimeError) -> RuntimeError:
        """The error to raise where a rank does not answer."""
        return RuntimeError(
            f"rank {self.rank} of {self.size} did not get an answer from all others ({type(error).__name__}: "
            f"{str(error)[:200]}). A process has died, or has left the training loop early; every rank must call "
            "optimizer.step() equally often. Start the job again from the last checkpoint (torchrun --max-restarts)."
        )

    # ---------------------------------------------------------------- agreeing

    def compare_models(self, params: Sequence[Tensor]) -> str | None:
        """Say, once, whether ranks hold different parameters, so that they do not train one model.

        Args:
            params: The parameters.

        Returns:
            What is wrong; None if nothing is.
        """
        if self._compared or self.sharded:
            return None
        self._compared = True
        total = sum(float(param.detach().double().abs().sum()) for param in params)
        count = sum(param.numel() for param in params)
        seen = self.gather((total, count))
        apart = [rank for rank, (other, size) in enumerate(seen) if size != count or _far(other, total)]
        if not apart:
            return None
        return (
            f"rank {self.rank} and rank {apart[0]} hold different parameters, so they do not train one model: sums of "
            f"magnitudes {total:.6g} and {seen[apart[0]][0]:.6g}. Wrap the model in DistributedDataParallel (it sends "
            "the parameters of rank 0 to all), or, where processes train models of their own, start them without a "
            "common process group"
        )

    def check_rates(self, summed: float, rates: Sequence[Any]) -> None:
        """Make sure that all ranks have the same learning rates.

        Args:
            summed: Sum of `fingerprint` over ranks.
            rates: Learning rates of this rank.

        Raises:
            RuntimeError: On every rank, naming those that deviate.
        """
        if summed == self.size * fingerprint(rates):
            return
        seen = self.gather([float(rate) for rate in rates])
        usual = max(seen, key=seen.count)
        apart = [f"rank {rank}: {other}" for rank, other in enumerate(seen) if other != usual]
        raise RuntimeError(
            f"ranks have different learning rates, so their models drift apart: {', '.join(apart[:4])}; the others: "
            f"{usual}. Something wrote a rate on some ranks only, or a state was loaded on some ranks only."
        )


class Sum:
    """Numbers that are being added up over all ranks."""

    def __init__(self, numbers: Tensor, work: Any, ranks: Ranks) -> None:
        """Keep them.

        Args:
            numbers: What is added up, in place.
            work: What `torch.distributed` says that it is doing; None if it is done.
            ranks: Those who add.
        """
        self._numbers, self._work, self._ranks = numbers, work, ranks

    def read(self) -> list[float]:
        """Wait for all ranks and return the sums.

        Raises:
            RuntimeError: If a rank does not answer.
        """
        if self._work is not None:
            work, self._work = self._work, None
            try:
                work.wait()
            except RuntimeError as error:
                raise self._ranks.lost(error) from error
        numbers: list[float] = self._numbers.tolist()
        return numbers


def fingerprint(rates: Sequence[Any]) -> float:
    """A whole number below 2^32 that tells learning rates apart; rates that are tensors do not enter."""
    plain = [rate for rate in rates if isinstance(rate, float)]
    return float(zlib.crc32(struct.pack(f"{len(plain)}d", *plain)))


def as_text(state: dict[str, Any]) -> str:
    """A state as text, which distributed checkpoints keep in a param group."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return base64.b85encode(zlib.compress(stream.getvalue())).decode("ascii")


def from_text(text: str) -> Any:
    """The state again."""
    return torch.load(io.BytesIO(zlib.decompress(base64.b85decode(text))), weights_only=True)


def leaves_early(model: nn.Module | None) -> bool:
    """Whether ranks may leave the loop one after the other (``with model.join()``), so that nobody can be asked.

    That a context was left again is not told.
    """
    wrapper = _wrapper_of(model)
    if wrapper is None:
        return False
    config = wrapper._join_config
    return bool(config.enable) and not config.throw_on_early_termination


def _far(one: float, other: float) -> bool:
    return abs(one - other) > SAME_MODEL * (abs(one) + abs(other))  # False where they are not finite


def _wrapper_of(model: nn.Module | None) -> DistributedDataParallel | None:
    """The `DistributedDataParallel` that a model is, perhaps compiled."""
    while model is not None and not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        model = inner if isinstance(inner, nn.Module) else None
    return model


def _group_of(model: nn.Module | None) -> Any:
    """The process group of a `DistributedDataParallel`; None (all) elsewhere."""
    wrapper = _wrapper_of(model)
    return None if wrapper is None else wrapper.process_group


def _data_parallel(model: nn.Module | None, size: int) -> int:
    """Over how many ranks a model with sharded parameters spreads its batches: all those of FSDP, else one."""
    if model is None:
        return size
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        groups = () if state is None else getattr(state(), "_fsdp_param_groups", ()) or [state()._fsdp_param_group]
        sizes = [int(group.mesh_info.mesh.size()) for group in groups if group is not None]
        if sizes:
            return max(sizes)
    return 1
