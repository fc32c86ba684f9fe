"""Gradients of single samples with respect to the parameters of one layer.

From BackPACK's layer derivatives where they cover the layer, else by ``torch.func.vmap`` over the
vector-Jacobian product of that one module. Works on a stand-in: the user's modules and parameters
get no attribute, and BackPACK's process-wide context is not needed.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from alpha_optim.observe.hooks import tensors_in
from alpha_optim.observe.module_copy import reparametrised, stand_in
from alpha_optim.slopes.layers import LayerCall, UnsupportedLayerError, has_rows
from alpha_optim.slopes.shares import batch_norm_shares

if TYPE_CHECKING:
    from backpack.core.derivatives.basederivatives import BaseParameterDerivatives

NEEDS_OUTPUT = (nn.RNN, nn.LSTM)
"""Layers for which BackPACK's rule uses the output."""


@lru_cache(maxsize=1)
def backpack_rules() -> dict[type[nn.Module], BaseParameterDerivatives]:
    """BackPACK's derivatives of the layers it covers."""
    from backpack.core.derivatives.batchnorm_nd import BatchNormNdDerivatives
    from backpack.core.derivatives.conv1d import Conv1DDerivatives
    from backpack.core.derivatives.conv2d import Conv2DDerivatives
    from backpack.core.derivatives.conv3d import Conv3DDerivatives
    from backpack.core.derivatives.conv_transpose1d import ConvTranspose1DDerivatives
    from backpack.core.derivatives.conv_transpose2d import ConvTranspose2DDerivatives
    from backpack.core.derivatives.conv_transpose3d import ConvTranspose3DDerivatives
    from backpack.core.derivatives.linear import LinearDerivatives
    from backpack.core.derivatives.lstm import LSTMDerivatives
    from backpack.core.derivatives.rnn import RNNDerivatives

    # Not Embedding: BackPACK loops over the vocabulary there, and knows float32 only.
    batch_norm = BatchNormNdDerivatives()
    return {
        nn.Linear: LinearDerivatives(),
        nn.Conv1d: Conv1DDerivatives(),
        nn.Conv2d: Conv2DDerivatives(),
        nn.Conv3d: Conv3DDerivatives(),
        nn.ConvTranspose1d: ConvTranspose1DDerivatives(),
        nn.ConvTranspose2d: ConvTranspose2DDerivatives(),
        nn.ConvTranspose3d: ConvTranspose3DDerivatives(),
        nn.BatchNorm1d: batch_norm,
        nn.BatchNorm2d: batch_norm,
        nn.BatchNorm3d: batch_norm,
        nn.RNN: RNNDerivatives(),
        nn.LSTM: LSTMDerivatives(),
    }


def backpack_covers(module: nn.Module) -> bool:
    """Whether BackPACK's derivatives (with our rule for BatchNorm in training) cover a layer."""
    if type(module) not in backpack_rules() or reparametrised(module):
        return False
    if isinstance(module, (nn.RNN, nn.LSTM)):
        return (
            module.batch_first
            and module.num_layers == 1
            and bool(module.bias)
            and not module.bidirectional
            and module.proj_size == 0
            and getattr(module, "nonlinearity", "tanh") == "tanh"
        )
    plain_padding = not isinstance(getattr(module, "padding", 0), str)
    return getattr(module, "padding_mode", "zeros") == "zeros" and plain_padding


@torch.no_grad()
def individual_gradients(call: LayerCall, samples: int, first: int) -> dict[str, Tensor]:
    """Compute the gradients of single samples for one call of a layer.

    Args:
        call: Call of a layer with the gradient of its output.
        samples: Number of samples N of the batch; dimension 0 of the layer's output is N or k N, then
            k consecutive rows belong to one sample.
        first: Compute only those of the first n samples.

    Returns:
        Parameter name -> gradients ``[n, *param.shape]`` of what was sent backward, split over the
        samples (they sum to the layer's gradient if n = N).

    Raises:
        UnsupportedLayerError: If they cannot be had; the text says why.
    """
    module = call.layer.module
    call.check_unaltered()
    per_sample = call.rows_per_sample(samples)
    rows = min(first, samples) * per_sample
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        per_row = batch_norm_shares(call, rows)
    elif backpack_covers(module) and call.output_index == 0 and not call.kwargs:
        per_row = _from_backpack(call, rows, per_sample)
        per_sample = 1 if isinstance(module, nn.Linear) else per_sample
    else:
        per_row = _from_vmap(call, rows)
    if per_sample == 1:
        return per_row
    return {name: value.reshape(-1, per_sample, *value.shape[1:]).sum(1) for name, value in per_row.items()}


def _from_backpack(call: LayerCall, rows: int, per_sample: int) -> dict[str, Tensor]:
    module = call.layer.module
    dtype = _working_dtype(next(iter(call.layer.params.values())).dtype)
    standin = copy.copy(module)
    layer_input: Tensor = call.args[0][:rows].to(dtype)
    gradient = call.output_gradient[:rows].to(dtype)
    if isinstance(module, nn.Linear) and per_sample > 1:  # rows of a sample are summed on the way
        layer_input = layer_input.reshape(-1, per_sample, *layer_input.shape[1:])
        gradient = gradient.reshape(-1, per_sample, *gradient.shape[1:])
    standin.input0 = layer_input
    standin.output = gradient if call.output is None else call.output[:rows].to(dtype)
    rule = backpack_rules()[type(module)]
    try:
        return {
            name: rule.param_mjp(name, standin, (), (gradient,), gradient, sum_batch=False) for name in _wanted(call)
        }
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UnsupportedLayerError(f"BackPACK has no individual gradients for it ({error})") from error


def _wanted(call: LayerCall) -> list[str]:
    """Names of the parameters that get a gradient."""
    return [name for name, param in call.layer.params.items() if param.requires_grad]


def _from_vmap(call: LayerCall, rows: int) -> dict[str, Tensor]:
    """Individual gradients by ``torch.func.vmap`` over one module.

    Raises:
        UnsupportedLayerError: If vmap cannot.
    """
    module, batch = call.layer.module, call.output_gradient.shape[0]
    params = {name: call.layer.params[name].detach() for name in _wanted(call)}
    standin = stand_in(module)
    leaves: list[Tensor] = []
    args = tuple(_split(value, batch, rows, leaves) for value in call.args)
    kwargs = {name: _split(value, batch, rows, leaves) for name, value in call.kwargs.items()}

    def one_sample(gradient: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        def forward(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
            rebuilt_args = tuple(_rebuild(value, inputs) for value in args)
            rebuilt_kwargs = {name: _rebuild(value, inputs) for name, value in kwargs.items()}
            output = torch.func.functional_call(standin, values, rebuilt_args, rebuilt_kwargs)
            return tuple(tensors_in(output))

        vjp: Any = torch.func.vjp(forward, params)  # torch's annotation covers both of its forms
        outputs, pull_back = vjp
        seeds = tuple(
            gradient.unsqueeze(0).to(value.dtype) if index == call.output_index else torch.zeros_like(value)
            for index, value in enumerate(outputs)
        )
        pulled: dict[str, Tensor] = pull_back(seeds)[0]
        return pulled

    try:
        # A module that draws random numbers would draw others here: vmap raises, and so do we.
        # Attention by plain matrix products: the fused kernels have no rule for vmap.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(one_sample, randomness="error")(call.output_gradient[:rows], *leaves)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedLayerError(f"torch.func.vmap cannot differentiate it per sample ({reason})") from error


class _Slot:
    """Stands for a batched tensor among the arguments."""

    def __init__(self, index: int) -> None:
        self.index = index


def _split(value: Any, batch: int, rows: int, leaves: list[Tensor]) -> Any:
    """Replace tensors with one row per sample by slots and collect their rows."""
    if has_rows(value, batch):
        leaves.append(value[:rows])
        return _Slot(len(leaves) - 1)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_split(entry, batch, rows, leaves) for entry in value)
    return value


def _rebuild(value: Any, inputs: tuple[Tensor, ...]) -> Any:
    if isinstance(value, _Slot):
        return inputs[value.index].unsqueeze(0)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_rebuild(entry, inputs) for entry in value)
    return value


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
