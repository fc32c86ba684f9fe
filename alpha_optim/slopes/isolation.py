"""Runs a model once more without a trace: hooks, attributes, buffers, random numbers, kernels, compilers.

The user's own modules run, not copies of them: forwards may be bound to a module (Accelerate's autocast wrapper),
modules may hold each other in lists, and a structural copy would go wrong there. What a forward pass may
change on a module is put back afterwards: attributes that were rebound, contents of lists, dictionaries and sets,
tensors held as attributes. Buffers are handed over as clones by the caller.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torch_module
from torch.utils import checkpoint as torch_checkpoint

from alpha_optim.observe.model_calls import ModelCall
from alpha_optim.observe.snapshot import Snapshot, other_random_numbers_untouched, put_back

PROCESS_WIDE = threading.RLock()
"""Kernel flags, global hooks and the dual level are process-wide."""
if hasattr(os, "register_at_fork"):
    # Else a child inherits what another thread has set, and a lock that nobody releases.
    os.register_at_fork(
        before=PROCESS_WIDE.acquire, after_in_parent=PROCESS_WIDE.release, after_in_child=PROCESS_WIDE.release
    )
_OWN = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_is_full_backward_hook",
    "_compiled_call_impl",
    "forward",
    "_flat_weights",
    "_flat_weight_refs",
)
"""What torch keeps on a module; it is put back as a whole, or is no state."""
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@contextmanager
def as_in_its_call(model: nn.Module, call: ModelCall, plain_kernels: bool) -> Iterator[None]:
    """Inside, ``model`` may be called as in an earlier call, and nothing is left of it.

    Args:
        model: The innermost module.
        call: The earlier call: its training flags and autocast are used.
        plain_kernels: Whether attention and recurrent layers run by plain products, and checkpointed parts as if they
            were not; these are settings of the whole process, which other threads see as well.
    """
    with PROCESS_WIDE, ExitStack() as stack:
        stack.enter_context(other_random_numbers_untouched())
        stack.enter_context(_modules_as_found(model, call))
        if plain_kernels:
            stack.enter_context(_plain_kernels())
            stack.enter_context(_without_checkpoints())
        stack.enter_context(call.autocast.again())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what there is to say of the model was said in the user's own pass
        yield


@contextmanager
def _modules_as_found(model: nn.Module, call: ModelCall) -> Iterator[None]:
    modules = list(model.modules())
    snapshot = Snapshot()
    for module in modules:
        snapshot._seen.add(id(module))
    snapshot.keep((call.args, call.kwargs))
    found: list[tuple[nn.Module, dict[str, Any]]] = []

    def keep(module: nn.Module) -> None:
        attributes = dict(module.__dict__)
        found.append((module, attributes))
        snapshot.keep_class(type(module))
        snapshot.keep(snapshot.keep_slots(module))
        for name, value in attributes.items():
            if name not in _OWN and not isinstance(value, Tensor):
                snapshot.keep(value)

    for module in modules:
        keep(module)
    for module in snapshot.modules:  # held without being registered; the list grows
        for inner in module.modules():
            if all(inner is not known for known, _ in found):
                keep(inner)
                snapshot.keep([*inner._parameters.values(), *inner._buffers.values()])
    hooks = {name: getattr(torch_module, name) for name in _GLOBAL_HOOKS}
    kept = {name: list(hook.items()) for name, hook in hooks.items()}
    try:
        for name in _GLOBAL_HOOKS:
            hooks[name].clear()
        training = dict(zip(map(id, modules), call.training, strict=len(call.training) == len(modules)))
        for module, _ in found:
            _prepare(module, training.get(id(module), module.training))
        yield
    finally:
        for module, attributes in found:
            put_back(module.__dict__, attributes)
        snapshot.restore()
        for name in _GLOBAL_HOOKS:
            hooks[name].clear()
            hooks[name].update(kept[name])


def _prepare(module: nn.Module, training: bool) -> None:
    """Take the user's hooks off, but for those that make parameters, and replace tensors held as attributes."""
    attributes = module.__dict__
    for name in _HOOKS:
        attributes[name] = OrderedDict()
    attributes["_forward_pre_hooks"] = OrderedDict(
        (key, hook) for key, hook in module._forward_pre_hooks.items() if makes_parameters(hook)
    )
    attributes["_compiled_call_impl"] = None
    attributes["training"] = training
    # functional_call exchanges entries of these.
    attributes["_parameters"] = module._parameters.copy()
    attributes["_buffers"] = module._buffers.copy()
    for name, value in list(attributes.items()):
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            attributes[name] = value.detach().clone()


def makes_parameters(hook: Any) -> bool:
    """Whether a hook that runs before the forward pass makes a weight from other parameters."""
    kind = type(hook)
    return (
        kind.__module__.startswith(("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"))
        or kind.__module__ == "torch.nn.utils.prune"
    )


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention and recurrent layers by plain products: the fused kernels have no forward derivative."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Its own flags() also sets, and warns of, precisions that this machine may not have.
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Checkpointed parts keep what they compute.

    A backward pass would compute it anew, but of the module's own parameters instead of those it was given; a reentrant
    checkpoint has no forward derivative, before torch 2.7 none has. Both are what `torch.utils.checkpoint.checkpoint`
    calls, and private; under a torch that has others nothing is exchanged, and the checks notice.
    """
    with ExitStack() as stack:
        for name, plain in (
            ("_checkpoint_without_reentrant_generator", _around_nothing),
            ("_checkpoint_without_reentrant_generator_impl", _around_nothing),  # the same, from torch 2.14 on
            ("CheckpointFunction", _CheckpointedAsItIs),
        ):
            if hasattr(torch_checkpoint, name):
                stack.callback(setattr, torch_checkpoint, name, getattr(torch_checkpoint, name))
                setattr(torch_checkpoint, name, plain)
        yield


def _around_nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Run before and after a checkpointed part."""
    yield


class _CheckpointedAsItIs:
    """Stands in for torch's function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Call the part."""
        return function(*args)
