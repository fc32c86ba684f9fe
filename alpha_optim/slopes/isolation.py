"""Runs a model once more without a trace: hooks, attributes, buffers, random numbers, kernels, compilers.

The user's own modules run, not copies of them: forwards may be bound to a module (Accelerate's autocast wrapper),
modules may hold each other in lists, and a structural copy would go wrong there. What a forward pass may
change on a module is put back afterwards: attributes that were rebound, contents of lists, dictionaries and sets,
tensors held as attributes. Buffers are handed over as clones by the caller.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torch_module

from alpha_optim.observe.model_calls import ModelCall

PROCESS_WIDE = threading.RLock()
"""Kernel flags, global hooks and the dual level are process-wide."""
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
        plain_kernels: Whether attention and recurrent layers run by plain products; that is a setting of the whole
            process, which other threads see as well.
    """
    with PROCESS_WIDE, ExitStack() as stack:
        stack.enter_context(_modules_as_found(model, call.training))
        if plain_kernels:
            stack.enter_context(_plain_kernels())
        stack.enter_context(call.autocast.again())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what there is to say of the model was said in the user's own pass
        yield


@contextmanager
def _modules_as_found(model: nn.Module, training: tuple[bool, ...]) -> Iterator[None]:
    modules = list(model.modules())
    found = [dict(module.__dict__) for module in modules]
    contents = [_contents(attributes) for attributes in found]
    hooks = {name: getattr(torch_module, name) for name in _GLOBAL_HOOKS}
    kept = {name: list(hook.items()) for name, hook in hooks.items()}
    try:
        for name in _GLOBAL_HOOKS:
            hooks[name].clear()
        for module, flag in zip(modules, training, strict=len(training) == len(modules)):
            _prepare(module, flag)
        yield
    finally:
        for module, attributes, values in zip(modules, found, contents, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            _restore(values)
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


def _contents(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Containers among the attributes of a module, each with a copy of what it holds."""
    return [
        (value, (dict if isinstance(value, dict) else set if isinstance(value, set) else list)(value))
        for name, value in attributes.items()
        if isinstance(value, (list, dict, set, deque)) and name not in ("_parameters", "_buffers", "_modules")
    ]


def _restore(values: list[tuple[Any, Any]]) -> None:
    for container, copy in values:
        if isinstance(container, list):
            container[:] = copy
        elif isinstance(container, deque):
            container.clear()
            container.extend(copy)
        else:
            container.clear()
            container.update(copy)


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
