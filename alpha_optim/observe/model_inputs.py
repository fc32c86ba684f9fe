"""Sees the model's output: how many samples a pass has, and where a backward pass enters the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alpha_optim.observe.backward_passes import PassLog
from alpha_optim.observe.hooks import Hook, tensors_in


class ModelTap:
    """A hook on the model that anchors backward passes at its output, for losses that are not seen."""

    def __init__(self, model: nn.Module | None, log: PassLog) -> None:
        """Prepare; nothing is hooked before `attach`."""
        self._model = model
        self._log = log
        self._handle: RemovableHandle | None = None

    def attach(self) -> None:
        """Hook the model."""
        # Hooks on a model that was compiled in place would be compiled with it.
        if self._model is not None and self._handle is None and self._model._compiled_call_impl is None:
            hook = Hook(self._called, owner=self._model)
            self._handle = self._model.register_forward_hook(hook, with_kwargs=True)

    def detach(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _called(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        batched = [tensor for tensor in tensors if tensor.dim() > 0]
        batched += [tensor for tensor in tensors_in((args, kwargs)) if tensor.dim() > 0]
        samples = batched[0].shape[0] if batched else None
        self._log.forward_started(samples)
        self._log.inputs |= {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}

        def arrived(_gradient: Tensor) -> None:
            if self._handle is not None:
                self._log.anchor(samples=samples)

        for tensor in tensors:
            _register_first(tensor, arrived)


def _register_first(tensor: Tensor, hook: Any) -> None:
    """Register a tensor hook before those that are there: a layer may have returned this very tensor."""
    handle = tensor.register_hook(hook)
    hooks: Any = tensor._backward_hooks
    first, others = hooks.pop(handle.id), list(hooks.items())
    hooks.clear()
    hooks.update([(handle.id, first), *others])
