"""The only file that knows `torch.distributed`: which processes train one model together, and sums over them.

Ranks talk once per step, in one all-reduce of a few float64 numbers (`Ranks.sum`). Everything that decides something
is computed from such sums, which are the same bits on every rank; so ranks cannot come to different decisions. Where no
process group of two or more ranks is initialised, `Ranks.found` returns None and nothing else is called.
"""

from __future__ import annotations

import base64
import gc
import io
import struct
import sys
import weakref
import zlib
from collections.abc import Sequence
from operator import is_ as is_same
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

USUAL = (Tensor, nn.Parameter)
"""Types of tensors that lie on one rank as a whole; nearly all are of these."""
_STEERED = 1 << 36
"""Added to a fingerprint: sums of the rest stay below it."""
SAME_MODEL = 1e-6
"""Relative difference of the sums of parameters up to which ranks hold the same model."""


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: of a DTensor its shard, of any other tensor the tensor itself."""
    return tensor if type(tensor) in USUAL else getattr(tensor, "_local_tensor", tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return type(tensor) not in USUAL and hasattr(tensor, "_local_tensor")


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
        self._params = list(params)
        self.sharded = any(map(is_sharded, params))
        self.batches = batches
        self._exchanges = 0
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None
        self._looked_for = False  # whether a wrapper was looked for
        self._take(group)

    def _take(self, group: Any) -> None:
        self._group = group
        self.size: int = torch.distributed.get_world_size(group)
        self.rank: int = torch.distributed.get_rank(group)
        weights = [1.0 / self._copies(param) for param in self._params]
        self.factor = weights[0] if len(set(weights)) == 1 else 1.0
        self.weights = None if len(set(weights)) <= 1 else weights

    def _find_wrapper(self) -> DistributedDataParallel | None:
        """The `DistributedDataParallel` that averages the gradients, whatever of it was given; looked for once."""
        if not self._looked_for and not self.sharded:
            self._looked_for = True
            mine = set(map(id, self._params))
            # It may have been made after the optimizer, and nothing in a model points to it.
            for thing in gc.get_objects():
                if DistributedDataParallel in type(thing).__mro__ and mine & set(map(id, thing.parameters())):
                    self._wrapper = weakref.ref(thing)
                    self._take(thing.process_group)
                    break
        return None if self._wrapper is None else self._wrapper()

    def leave_early(self) -> bool:
        """Whether ranks may leave the loop one after the other (``with model.join()``), so that nobody can be asked.

        That such a context was left again is not told.
        """
        wrapper = self._find_wrapper()
        if wrapper is None:
            return False
        config = wrapper._join_config
        return bool(config.enable) and not config.throw_on_early_termination

    def train(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that they train."""
        return len(params) == len(self._params) and all(map(is_same, params, self._params))

    @classmethod
    def found(cls, model: nn.Module | None, params: Sequence[Tensor]) -> Ranks | None:
        """Find the ranks that train a model; None if this process is alone.

        They are those of the mesh of its parameters if these are DTensors, and else all; until a
        `DistributedDataParallel` around the model is found, at the first step.

        Args:
            model: The model, if it was given.
            params: The parameters of the optimizer.

        Raises:
            ValueError: If parameters lie on a mesh that is neither all ranks nor a row of them.
        """
        if not params or not several():
            return None
        group, batches = None, 1
        meshes = {param.device_mesh for param in params if is_sharded(param)}  # type: ignore[attr-defined] # - DTensor
        if meshes:
            largest = max(meshes, key=lambda mesh: mesh.size())
            part = largest.size() < torch.distributed.get_world_size()
            if part and largest.ndim > 1:
                raise ValueError(
                    f"parameters lie on a mesh of shape {tuple(largest.shape)} that is only a part of the "
                    f"{torch.distributed.get_world_size()} processes; AlphaGuided needs a mesh of all of them, or of "
                    "one dimension"
                )
            group = largest.get_group() if part else None
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
        """Say whether ranks hold different parameters, so that they do not train one model; looked at now and then.

        Args:
            params: The parameters.

        Returns:
            What is wrong; None if nothing is. All ranks get an answer, or none.
        """
        count, self._exchanges = self._exchanges, self._exchanges + 1
        # At 0, 1, 2, 3, 4, 5, 8, 9, 16, 17, ...: models that are averaged now and then are equal right after that.
        if self.sharded or all(number & (number - 1) for number in (count, count - 1)):
            return None
        total = sum(float(param.detach().double().abs().sum()) for param in params)
        seen = self.gather((total, sum(param.numel() for param in params)))
        totals, counts = [entry[0] for entry in seen], {entry[1] for entry in seen}
        # False where they are not finite.
        if len(counts) == 1 and not max(totals) - min(totals) > SAME_MODEL * max(totals):
            return None
        other = next((rank for rank, entry in enumerate(seen) if entry != seen[self.rank]), self.rank)
        return (
            f"rank {self.rank} and rank {other} hold different parameters, so they do not train one model: sums of "
            f"magnitudes {total:.9g} and {totals[other]:.9g}. Wrap the model in DistributedDataParallel (it sends the "
            "parameters of rank 0 to all, and averages gradients), or, where processes train models of their own, "
            "start them without a common process group"
        )

    def check_rates(self, summed: float, rates: Sequence[Any] | None) -> None:
        """Make sure that all ranks have the same learning rates.

        Args:
            summed: Sum of `fingerprint` over ranks.
            rates: Learning rates of this rank; None if no scheduler steers it.

        Raises:
            RuntimeError: On every rank, naming those that deviate.
        """
        if summed == self.size * fingerprint(rates):
            return
        steered = int(summed) // _STEERED
        if steered not in (0, self.size):
            raise RuntimeError(
                f"{steered} of {self.size} ranks have an AlphaScheduler, rank {self.rank} has "
                f"{'none' if rates is None else 'one'}: every rank needs one, since each writes its own rates"
            )
        seen = self.gather([float(rate) for rate in rates or ()])
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


def fingerprint(rates: Sequence[Any] | None) -> float:
    """A whole number that tells learning rates apart, and says that a scheduler writes them; 0 without (None).

    Rates that are tensors do not enter. Sums of it over fewer than 2^17 ranks are exact.
    """
    if rates is None:
        return 0.0
    plain = [rate for rate in rates if isinstance(rate, float)]
    return float(_STEERED + zlib.crc32(struct.pack(f"{len(plain)}d", *plain)) % (1 << 19))


def several() -> bool:
    """Whether there is a process group of two or more ranks."""
    return initialised() and torch.distributed.get_world_size() > 1


def unsummed(param: Tensor, gradient: Tensor) -> float:
    """By what the product with a gradient counts more than ``param`` does: a DTensor's gradient may wait to be summed.

    That is so for parameters that all ranks hold and each sees a part of the inputs of (sequence parallelism).
    """
    if not is_sharded(gradient) or not is_sharded(param):
        return 1.0
    mesh, factor = gradient.device_mesh, 1.0  # type: ignore[attr-defined] # - a DTensor
    places = zip(param.placements, gradient.placements, strict=True)  # type: ignore[attr-defined] # - a DTensor
    for dimension, (of_param, of_gradient) in enumerate(places):
        if of_gradient.is_partial() and of_param.is_replicate():
            factor *= mesh.size(dimension)
    return factor


def asked_by_checkpoint() -> bool:
    """Whether `torch.distributed.checkpoint` asks for a state dict, or steps to fill an empty state.

    It gives no other sign of itself: it calls `state_dict` and `step` as anybody does.
    """
    frame = sys._getframe(1)
    for _ in range(12):
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def as_text(state: dict[str, Any]) -> str:
    """A state as text, which distributed checkpoints keep in a param group."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return base64.b85encode(zlib.compress(stream.getvalue())).decode("ascii")


def from_text(text: str) -> Any:
    """The state again; nothing but tensors and plain values is built from it.

    Raises:
        ValueError: If the text is none that `as_text` made.
    """
    try:
        return torch.load(io.BytesIO(zlib.decompress(base64.b85decode(text))), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the text in a param group is no state that alpha_optim wrote ({type(error).__name__}: was the checkpoint "
            "cut off or changed?); nothing was changed"
        ) from error


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
