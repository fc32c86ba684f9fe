"""What a module's output does when its parameters move: forward-mode differentiation of one call.

``torch.func.jvp`` where all operations of the module have a forward derivative; else two reverse passes,
the second through the first. Fused attention and recurrent kernels have neither, so they are switched
off for the repetition.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from alpha_optim.observe.hooks import tensors_in
from alpha_optim.observe.module_copy import compiled, mixes_samples, stand_in, without_running_statistics
from alpha_optim.observe.step_direction import at_least_float32
from alpha_optim.slopes.layers import LayerCall, UnsupportedLayerError, map_tensors

Values = dict[str, Tensor]
_FAILURES = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)


class ForwardMode:
    """One call of a module, to be differentiated along changes of its parameters."""

    def __init__(self, call: LayerCall, rows: int) -> None:
        """Keep what the repetition needs.

        Args:
            call: The call, whole.
            rows: How many rows are wanted; all are computed where they depend on each other.
        """
        self._rows = rows
        whole = call.random is not None or mixes_samples(call.layer.module)
        self._call = call if whole else call.first(rows)

    @torch.no_grad()
    def along(self, changes: Values, made: float | Tensor = 0.0) -> Tensor:
        """<output gradient, derivative of the output> for every row, float64 ``[rows]``.

        Args:
            changes: Changes by local name of the parameter.
            made: By which multiple of the changes the parameters have moved since the call.

        Returns:
            One number per row.

        Raises:
            UnsupportedLayerError: If the module cannot be differentiated twice or forward.
        """
        call = self._call
        call.check_unaltered()
        names = _once(call.layer.params, changes)
        params = {name: at_least_float32(call.layer.params[name].detach()) for name in names}
        tangents = {name: changes[name].to(params[name].dtype) for name in names}
        if isinstance(made, Tensor) or made != 0.0:  # back to where they were at the call
            params = {name: value - made * tangents[name] for name, value in params.items()}
        replay = nullcontext() if call.random is None else call.random.replayed()
        with replay, _plain_kernels(call.output_gradient.device):
            try:
                derivative = _forward(_repetition(call), params, tangents)
            except _FAILURES:
                derivative = self._twice_backward(call, params, tangents)
        rows = at_least_float32(derivative) * call.output_gradient
        return rows[: self._rows].flatten(1).double().sum(1) if rows.dim() > 1 else rows[: self._rows].double()

    def _twice_backward(self, call: LayerCall, params: Values, tangents: Values) -> Tensor:
        replay = nullcontext() if call.random is None else call.random.replayed()
        try:
            with replay:
                return _twice_backward(_repetition(call), params, tangents)
        except _FAILURES as error:
            reason = str(error).strip().split("\n")[0]
            raise UnsupportedLayerError(f"it cannot be differentiated along a step ({reason})") from error


def _repetition(call: LayerCall) -> Callable[[Values], Tensor]:
    """The call as a function of the module's parameters, in at least float32 and without autocast."""
    module = call.layer.module
    standin = stand_in(compiled(module) or module)
    without_running_statistics(standin)
    args, kwargs = map_tensors(at_least_float32, call.args), map_tensors(at_least_float32, dict(call.kwargs))
    held = [*standin.named_parameters(), *standin.named_buffers()]
    wide = {name: at_least_float32(tensor.detach()) for name, tensor in held}

    def forward(values: Values) -> Tensor:
        output: Any = torch.func.functional_call(standin, {**wide, **values}, args, kwargs)
        return list(tensors_in(output))[call.output_index]

    return forward


@lru_cache(maxsize=1)
def _load_forward_rules() -> None:
    """Import what torch imports at the first jvp; it warns there of something of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _forward(function: Callable[[Values], Tensor], params: Values, tangents: Values) -> Tensor:
    _load_forward_rules()
    jvp: Any = torch.func.jvp(function, (params,), (tangents,))  # torch's annotation covers both of its forms
    derivative: Tensor = jvp[1]
    return derivative


def _twice_backward(function: Callable[[Values], Tensor], params: Values, tangents: Values) -> Tensor:
    """J d as the derivative of <J^T u, d>, which is linear in u."""
    with torch.enable_grad():
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        output = function(leaves)
        seed = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, list(leaves.values()), seed, create_graph=True, allow_unused=True)
        along = [
            (gradient * tangents[name]).sum()
            for name, gradient in zip(leaves, pulled, strict=True)
            if gradient is not None
        ]
        return torch.autograd.grad(torch.stack(along).sum(), seed)[0]


def _once(params: Values, changes: Values) -> list[str]:
    """Names of the parameters that move; one name for a parameter that has several."""
    names: dict[int, str] = {}
    for name in changes:
        names.setdefault(id(params[name]), name)
    return list(names.values())


@contextmanager
def _plain_kernels(device: torch.device) -> Iterator[None]:
    """Attention and recurrent layers by plain products: the fused kernels have no forward derivative."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Its own flags() also sets, and warns of, precisions that this machine may not have.
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
