"""Calls of the model in the training loop: how many samples, what was returned, what came back.

The hook sits on the model as a whole, outside of whatever `torch.compile` or a data-parallel wrapper does
inside, and on no layer. In most iterations it only counts samples, finds the loss among what the model
returned, and notes when a backward pass enters through its output. When slopes of samples are due it also
keeps what a repetition of the call needs, and the gradients that reach the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, is_dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alpha_optim.observe.hooks import (
    Hook,
    harmless,
    inside_functorch,
    map_tensors,
    of_gradient,
    tensors_in,
    versions_of,
)
from alpha_optim.observe.model_inputs import detached, samples_of
from alpha_optim.observe.random_state import RandomState


@dataclass(frozen=True)
class Autocast:
    """Whether and how autocast was on."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> Autocast:
        """As it is now for the accelerator among some devices, or for the CPU."""
        kind = next((device.type for device in devices if device.type != "cpu"), "cpu")
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> torch.autocast:
        """A context in which it is so again; casts of parameters are not kept from one pass to another."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


class Run(NamedTuple):
    """What is always noted of a call of the model.

    Attributes:
        number: Which one it is, of all calls.
        samples: Number of samples N, None if no tensor tells.
        made_by_others: Whether the model was called with what another network has made, whose parameters are trained.
        frozen: Whether no parameter of the model was.
    """

    number: int
    samples: int | None
    made_by_others: bool = False
    frozen: bool = False


@dataclass(eq=False)
class ModelCall:
    """One call of the model, with what its repetition needs.

    Attributes:
        args: Positional arguments, detached.
        kwargs: Keyword arguments, detached.
        versions: Versions of the tensors among the arguments at the call.
        samples: Number of samples N, None if no tensor tells.
        random: State of the random number generators before the call.
        drew: Whether the call drew random numbers.
        autocast: Whether it ran under autocast.
        training: Training flag of every module of the model.
        parameters: Versions of the model's parameters before the call.
        writes: Whether the call wrote to parameters.
        shapes: Shapes of the tensors in its output.
        loss: The loss among them ``[]``, detached; None if there is none.
        loss_place: Which of the tensors it is.
        outputs: The tensors in its output with their graph, until the backward pass begins; only where the
            loss is to be followed back to them.
        output_versions: Their versions when they were returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: tuple[int, ...]
    samples: int | None
    random: RandomState
    drew: bool
    autocast: Autocast
    training: tuple[bool, ...]
    parameters: tuple[int, ...]
    writes: bool
    shapes: tuple[torch.Size, ...]
    loss: Tensor | None
    loss_place: int | None
    outputs: list[Tensor] = field(default_factory=list)
    output_versions: list[int] = field(default_factory=list)

    def unaltered(self) -> bool:
        """Whether nobody has written to the inputs since the call began."""
        return versions_of((self.args, self.kwargs)) == self.versions


def _parameter_versions(model: nn.Module) -> tuple[int, ...]:
    return tuple(param._version for param in innermost(model).parameters())


def innermost(model: nn.Module) -> nn.Module:
    """The module inside wrappers: `torch.compile`'s, data-parallel ones."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module) and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def returned_loss(output: Any) -> tuple[Tensor, int] | None:
    """The loss that a model returned with its output, and its place among the tensors; None if there is none."""
    if isinstance(output, Tensor) and output.dim() > 0:
        return None
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    tensors = list(tensors_in(output))
    if not isinstance(found, Tensor):
        single = [tensor for tensor in tensors if tensor.dim() == 0 and tensor.requires_grad]
        found = single[0] if len(single) == 1 and isinstance(output, (tuple, Tensor)) else None
        if found is not None and not _made_from(found, [tensor for tensor in tensors if tensor.requires_grad]):
            found = None
    if found is None or found.dim() > 0 or not found.requires_grad:
        return None
    places = [place for place, tensor in enumerate(tensors) if tensor is found]
    return (found, places[0]) if places else None


def returned_terms(output: Any) -> list[Tensor]:
    """The terms of the loss that a model returned in a dict of nothing else, as detectors do; the loop adds them up."""
    tensors = list(tensors_in(output)) if isinstance(output, Mapping) else []
    return tensors if all(tensor.dim() == 0 and tensor.requires_grad for tensor in tensors) else []


MEAN = 1
"""How torch's graph writes ``reduction="mean"``."""
NEAR = 200
"""So many operations a loss lies at most above what it is made from, and an input above a parameter."""


def _made_from(loss: Tensor, outputs: list[Tensor]) -> bool:
    """Whether one number among several outputs is made from what another one is made from, as a loss is.

    A temperature is not: all that it comes from is a parameter of its own, and others are made from it.
    """
    others = _operations([output.grad_fn for output in outputs if output is not loss])
    if loss.grad_fn in others:
        return False
    return not others or not others.isdisjoint(_operations([loss.grad_fn]))


def _operations(nodes: list[Any]) -> set[Any]:
    """The nearest operations that a graph consists of from some on, without parameters."""
    return {node for node in _nearest(nodes) if not hasattr(node, "variable")}


def _nearest(nodes: Iterable[Any], through: Callable[[Any], bool] = lambda _: True) -> Iterator[Any]:
    """The nearest nodes of a graph from some on, breadth first.

    Args:
        nodes: Where it begins; None stands for no graph.
        through: Whether to go on behind a node.
    """
    waiting = [node for node in nodes if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop(0)
        yield node
        if len(seen) < NEAR and through(node):
            following = {entry for entry, _ in node.next_functions if entry is not None} - seen
            seen |= following
            waiting.extend(following)


def is_mean(loss: Tensor) -> bool:
    """Whether a loss is the mean of one of torch's loss functions, as its graph tells, and not made from one.

    Many models take ``num_items_in_batch`` and do not divide by it: the loss of a micro-batch is a mean of its own.
    """
    # What is multiplied or divided is a share that the model has made of it.
    whole = _nearest([loss.grad_fn], through=lambda node: not node.name().startswith(("Mul", "Div")))
    return next((node._saved_reduction == MEAN for node in whole if hasattr(node, "_saved_reduction")), False)


def made_by_others(inputs: Any, model: nn.Module) -> bool:
    """Whether parameters that are not the model's have made what it is called with, and gradients go on to them."""
    made = [tensor.grad_fn for tensor in tensors_in(inputs) if tensor.grad_fn is not None]
    if not made:
        return False
    own = {id(param) for param in model.parameters()}
    leaves = (getattr(node, "variable", None) for node in _nearest(made))  # the nearest layer has some
    return any(isinstance(leaf, nn.Parameter) and id(leaf) not in own for leaf in leaves)


def apart(output: Any) -> Any:
    """The same output with views in place of its tensors, if several of them can be differentiated; else None.

    One tensor may have been made from another (what a decoder made of a code, both returned). The gradient that arrives
    at the view of the code is what the loss alone sends there, without what comes through the decoder.
    """
    tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if len(tensors) < 2 or any(tensor.is_leaf or tensor.layout != torch.strided for tensor in tensors):
        return None

    def viewed(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor) if tensor.requires_grad else tensor

    if type(output) in (tuple, list, dict) or hasattr(output, "_fields"):
        return map_tensors(viewed, output)
    if isinstance(output, MutableMapping):  # an output of Transformers
        try:
            for name, value in list(output.items()):
                output[name] = map_tensors(viewed, value)
        except Exception:  # it does not let itself be changed
            return None
        return output
    if is_dataclass(output) or isinstance(output, SimpleNamespace):
        try:
            found = {name: map_tensors(viewed, value) for name, value in vars(output).items()}
            for name, value in found.items():
                setattr(output, name, value)
        except Exception:  # a frozen one, or one with slots
            return None
        return output
    return None


class Reports:
    """What `ModelHooks` tells; the iteration in progress implements it."""

    records: bool
    """Whether calls are to be kept for a repetition."""
    follows_losses: bool
    """Whether the outputs are to be kept with their graph until the backward pass begins."""

    def forward_starts(self) -> None:
        """The model is about to be called."""

    def model_called(self, samples: int | None, inputs: Any, shapes: list[torch.Size], call: ModelCall | None) -> None:
        """The model was called under autograd."""

    def loss_returned(self, loss: Tensor, samples: int | None, share: bool) -> None:
        """It returned a loss, not detached; perhaps a share of one mean over several micro-batches."""

    def output_reached(self, run: Run, call: ModelCall | None, place: int, gradient: Tensor) -> None:
        """A backward pass has reached one of the outputs of a call."""


class ModelHooks:
    """The hooks on one model."""

    def __init__(self, model: nn.Module | None, sample_dim: int, iteration: Callable[[], Any]) -> None:
        """Prepare; nothing is hooked before `attach`.

        Args:
            model: The model that the loop calls, if it was given.
            sample_dim: Dimension along which samples lie.
            iteration: Returns the iteration in progress, which implements `Reports`.
        """
        self._model, self._sample_dim, self._iteration = model, sample_dim, iteration
        self._handles: list[RemovableHandle] = []
        self._compiled_call: Callable[..., Any] | None = None
        self._before: list[tuple[RandomState, tuple[int, ...], tuple[int, ...]]] = []
        self._runs = 0  # calls under autograd so far

    @property
    def attached(self) -> bool:
        """Whether calls are seen."""
        return bool(self._handles) or self._compiled_call is not None

    def attach(self) -> None:
        """Hook the model."""
        model = self._model
        if model is None or self.attached or isinstance(model, torch.jit.ScriptModule):
            return
        if model._compiled_call_impl is not None:
            # Hooks on a module that was compiled in place would be compiled with it.
            self._compiled_call = model._compiled_call_impl
            model._compiled_call_impl = _CompiledCall(self, model, self._compiled_call)
            return
        self._handles = [
            model.register_forward_pre_hook(Hook(self._starts, model, self._failed), with_kwargs=True),
            model.register_forward_hook(Hook(self._called, model, self._failed), with_kwargs=True),
        ]

    def _failed(self, error: BaseException) -> None:
        self._iteration().passes.failed(error)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        if self._compiled_call is not None and self._model is not None:
            self._model._compiled_call_impl = self._compiled_call
        self._handles, self._compiled_call, self._before = [], None, []

    def _starts(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._iteration().forward_starts()
        if self._iteration().records and torch.is_grad_enabled():
            inputs = versions_of((args, kwargs))
            self._before.append((RandomState.now(_devices_of(model)), inputs, _parameter_versions(model)))

    def _called(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        iteration: Reports = self._iteration()
        if not torch.is_grad_enabled():
            return None
        samples = samples_of(args, kwargs, self._sample_dim)
        self._runs += 1
        run = Run(self._runs, samples)
        if made_by_others((args, kwargs), model):
            run = Run(self._runs, samples, True, not any(param.requires_grad for param in model.parameters()))
        loss = returned_loss(output)
        call, replaced = None, None
        if iteration.records and self._before and loss is None:
            replaced = apart(output)
            output = output if replaced is None else replaced
        tensors = list(tensors_in(output))
        differentiable = [(place, tensor) for place, tensor in enumerate(tensors) if tensor.requires_grad]
        if iteration.records and self._before:
            random, inputs, parameters = self._before.pop()
            call = ModelCall(
                detached(tuple(args)),
                {name: detached(value) for name, value in kwargs.items()},
                inputs,
                samples,
                random,
                random.has_moved(),
                Autocast.now(_devices_of(model)),
                tuple(module.training for module in innermost(model).modules()),
                parameters,
                parameters != _parameter_versions(model),
                tuple(tensor.shape for tensor in tensors),
                None if loss is None else loss[0].detach(),
                None if loss is None else loss[1],
                tensors if iteration.follows_losses else [],
                [tensor._version for tensor in tensors] if iteration.follows_losses else [],
            )
        iteration.model_called(samples, (args, kwargs), [tensor.shape for tensor in tensors], call)
        told = kwargs.get("num_items_in_batch") is not None
        for term in returned_terms(output) if loss is None else [loss[0]]:
            iteration.loss_returned(term, samples, share=told and not is_mean(term))
        for place, tensor in differentiable:
            _register_first(tensor, _arrival(self, run, call, place))
        return replaced

    def arrived(self, run: Run, call: ModelCall | None, place: int, gradient: Tensor) -> None:
        """A gradient has reached an output."""
        if self.attached:
            self._iteration().output_reached(run, call, place, gradient)


def _devices_of(model: nn.Module) -> set[torch.device]:
    """Where a model is now; it may be moved after it was hooked, and a part of it may never be loaded."""
    return {param.device for param in model.parameters() if not param.is_meta}


class _CompiledCall:
    """Stands in for the compiled call of a model that was compiled in place, and sees it from outside."""

    def __init__(self, hooks: ModelHooks, model: nn.Module, call: Callable[..., Any]) -> None:
        self._model, self._call = model, call
        self._starts = harmless(hooks._starts, hooks._failed)
        self._called = harmless(hooks._called, hooks._failed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or inside_functorch():
            return self._call(*args, **kwargs)
        self._starts(self._model, args, kwargs)
        output = self._call(*args, **kwargs)
        replaced = self._called(self._model, args, kwargs, output)
        return output if replaced is None else replaced


def _arrival(hooks: ModelHooks, run: Run, call: ModelCall | None, place: int) -> Any:
    def arrived(gradient: Tensor) -> None:
        hooks.arrived(run, call, place, gradient)

    return of_gradient(arrived, hooks._failed)


def _register_first(tensor: Tensor, hook: Any) -> None:
    """Register a tensor hook before those that are there: a layer may have returned this very tensor."""
    handle = tensor.register_hook(hook)
    hooks: Any = tensor._backward_hooks
    first, others = hooks.pop(handle.id), list(hooks.items())
    hooks.clear()
    hooks.update([(handle.id, first), *others])
