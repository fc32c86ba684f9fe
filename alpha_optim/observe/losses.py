"""Sees the loss of the training loop, and the factor between it and what was sent backward.

A loss function with reduction "mean" or "sum" returns one number, and that number is used. Losses of the samples
are needed for a variance only now and then; they come from evaluating a copy of the loss function with reduction
"none", without touching random numbers or buffers, at the moment of the user's own call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alpha_optim.observe.backward_passes import BackwardPass, BackwardPasses, LossCall
from alpha_optim.observe.hooks import Hook, of_gradient, weakly
from alpha_optim.observe.inner_products import at_least_float32
from alpha_optim.observe.model_calls import ModelCall
from alpha_optim.observe.model_inputs import fits, folded
from alpha_optim.observe.module_copy import stand_in
from alpha_optim.observe.numbers import read
from alpha_optim.observe.random_state import untouched
from alpha_optim.observe.snapshot import Snapshot, other_random_numbers_untouched
from alpha_optim.user_warning import warn_user

_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
UNLIKELY = 5
"""So many batches in a row whose losses are left out by size, by chance, are not expected of a mask."""


@dataclass(frozen=True)
class Rows:
    """Losses of the rows that a loss function was called with.

    Attributes:
        values: Losses with their weights in them ``[R, ...]``.
        total: What the mean divides by: the total weight of the rows; None: the number of samples.
        reduced: A mean of unknown make that has to come out, whatever it divides by; else None.
    """

    values: Tensor
    total: Tensor | float | None
    reduced: Tensor | None = None

    def of_samples(self, samples: int, sample_dim: int) -> Tensor | None:
        """Losses of the samples ``[N]``, whose mean is the mean loss; None if the rows do not fit."""
        sums = folded(self.values, samples, sample_dim)
        if sums is None:
            return None
        if self.reduced is not None:
            mean = sums.detach().mean()
            return torch.where(mean == 0, sums, sums * (self.reduced.to(sums.dtype) / mean))
        if self.total is None or (isinstance(self.total, float) and self.total == samples):
            return sums
        total = self.total.double() if isinstance(self.total, Tensor) else self.total
        return sums.double() * (samples / _not_zero(total))


class LossHooks:
    """Hooks on one loss function; reports each call when its backward pass starts."""

    def __init__(self, loss_fn: nn.Module | None, sample_dim: int, iteration: Callable[[], Any]) -> None:
        """Prepare; nothing is hooked before `attach`.

        Args:
            loss_fn: The loss function, or None if losses are only handed over.
            sample_dim: Dimension along which samples lie.
            iteration: Returns the iteration in progress: its ``passes`` take the calls, ``calls`` are those of
                the model that were kept, ``wants_losses`` says whether losses of single samples are wanted,
                ``watched_outputs()`` gives outputs of the model, ``losses_declined`` is set where a call was seen and
                not used.
        """
        self._loss_fn, self._sample_dim, self._iteration = loss_fn, sample_dim, iteration
        self._removal: weakref.finalize[..., LossHooks] | None = None  # of the hook, with us at the latest
        self._warned = self._uneven = False
        self.subset_told = False
        """Whether the user was told that the loss is one of some samples only."""
        self._mask_seen, self._by_size = False, 0  # see `_evenly`
        self._calls = 0

    def attach(self) -> None:
        """Hook the loss function."""
        if self._loss_fn is not None and self._removal is None:
            # A loss function often outlives the run.
            hook = Hook(weakly(self._seen), self._loss_fn, weakly(self._failed))
            handle = self._loss_fn.register_forward_hook(hook, with_kwargs=True)
            self._removal = weakref.finalize(self, handle.remove)

    def detach(self) -> None:
        """Remove the hook."""
        if self._removal is not None:
            self._removal()
            self._removal = None

    def _failed(self, error: BaseException) -> None:
        self._iteration().passes.failed(error)

    def _on_backward(self, loss: Tensor, call: Callable[[LossHooks, Tensor], None]) -> None:
        """Call a function with these hooks and the gradient that reaches a loss.

        A loss often outlives the run, too: one that kept these hooks would hand them on to the next run, whose loss
        function is the same.
        """
        alive = weakref.ref(self)

        def run(gradient: Tensor) -> None:
            hooks = alive()
            if hooks is not None:
                call(hooks, gradient)

        loss.register_hook(of_gradient(run, weakly(self._failed)))

    # ---------------------------------------------------------------- losses handed over, or of reduction "none"

    def announce(self, losses: Tensor, mean: Tensor) -> None:
        """The backward pass of the mean of ``losses`` is about to run: report it when it starts."""
        call = self._call_of(losses, losses.detach().mean(), torch.ones_like(mean), explicit=True)
        call = replace(call, seen_at_output=self._followed(losses, mean), model_calls=len(self._iteration().calls))
        self._on_backward(mean, lambda hooks, _gradient: hooks._report(call))

    def hand_over(self, losses: Tensor) -> LossCall:
        """Return handed over losses as a call; reports their factor to the backward pass, if it comes."""
        values = losses.detach()
        if values.dim() == 0:
            call = LossCall(values.clone(), None, None, explicit=True, complete=False)
            if losses.requires_grad:
                self._on_backward(losses, lambda hooks, g: hooks._report(replace(call, gamma=g.detach())))
            return call
        if losses.requires_grad:
            self.watch(losses, explicit=True)
        return self._call_of(losses, values.mean(), None, explicit=True)

    def watch(self, losses: Tensor, explicit: bool, prediction: Any = None, counts: Tensor | None = None) -> None:
        """Report ``losses`` (``[N]`` or ``[N, ...]`` with graph) when its backward pass starts.

        Args:
            losses: The losses.
            explicit: Whether they were handed over.
            prediction: What made the prediction that they judge.
            counts: How much each of them counts in the mean, weights that are in the losses already; None: all alike.
        """
        values = losses.detach().clone()  # the loop may scale them in place
        self._calls += 1
        order, sample_dim = self._calls, self._sample_dim
        samples, fitting = self._samples_of(values.shape)
        self._followed(losses, None)

        def weighted(hooks: LossHooks, weights: Tensor) -> None:
            total = weights.sum() if counts is None else (weights * counts).sum()
            products = weights * values
            individual = folded(products, samples, sample_dim) if fitting else None
            if individual is not None:
                individual = individual * (samples / total)
            if not explicit and not hooks._evenly(weights, values):
                hooks._iteration().losses_declined = True  # what is sent backward is a function of them nobody has seen
                return
            call = LossCall(products.sum() / total, individual, samples, total, explicit, order, fitting, not fitting)
            hooks._report(call.judging(prediction))

        self._on_backward(losses, weighted)

    def _evenly(self, weights: Tensor, values: Tensor) -> bool:
        """Whether what is sent backward is a mean over the losses that count; read where that waits for nothing.

        What leaves out losses by their size (see `_left_out`) is taken for a clamp until a batch shows a mask.
        """
        if not weights.is_cpu and not self._iteration().wants_losses:
            return not self._uneven
        size = weights.abs()
        uneven = ((size > 0) & ((size - size.max()).abs() > 1e-5 * size.max())).any() | (weights.sum() == 0)
        uneven_, left_out, at_a_level = map(bool, read([uneven, *_left_out(weights, values)]))
        self._mask_seen = self._mask_seen or (left_out and not at_a_level)
        by_size = left_out and not self._mask_seen
        self._by_size = self._by_size + 1 if by_size else 0
        if (uneven_ or self._by_size == UNLIKELY) and not self._uneven:
            self._uneven = True
            warn_user(
                "losses of reduction 'none' do not weigh the same in what is sent backward, or only those below "
                "or above some level count (clamped, or the hardest picked), so alpha uses the slopes only. For "
                "weights of samples hand the weighted losses over: optimizer.backward(w * losses)."
            )
        self._uneven = self._uneven and (uneven_ or by_size)
        return not (uneven_ or by_size)

    def _call_of(self, losses: Tensor, mean: Tensor, gamma: Tensor | None, explicit: bool) -> LossCall:
        """Losses in which every entry weighs the same, as a call."""
        values = losses.detach().clone()
        samples, fitting = self._samples_of(values.shape)
        individual = folded(values, samples, self._sample_dim) if fitting else None
        if individual is not None and values.numel() != samples:
            individual = individual * (samples / values.numel())
        return LossCall(
            mean,
            individual,
            samples,
            gamma,
            explicit,
            complete=individual is not None,
            subset=individual is None,
        )

    def _samples_of(self, rows: torch.Size) -> tuple[int, bool]:
        """Number of samples that rows of losses of a shape belong to, and whether they fit."""
        passes: BackwardPasses = self._iteration().passes
        fewest = rows[1 if self._sample_dim == 1 and len(rows) > 1 and rows[1] in passes.forwards else 0]
        samples = passes.samples_for(fewest)
        if fewest < samples:  # pooled, or a subset picked by a mask
            outputs = self._iteration().output_rows()
            return (fewest, True) if not outputs or fewest in outputs else (samples, False)
        return samples, fits(rows, samples, self._sample_dim)

    # ---------------------------------------------------------------- calls of the loss function

    def _seen(self, loss_fn: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        iteration = self._iteration()
        iteration.passes.forward_started()
        first = args[0] if args else next(iter(kwargs.values()), None)
        prediction = _made_by(first)  # held until the backward pass, so that nothing else gets its id
        if output.dim() > 0:
            counts = None
            if isinstance(loss_fn, _CLASSES):
                counts = weights_of_rows(args, kwargs, loss_fn.ignore_index, loss_fn.weight)
            self.watch(output, False, prediction, counts if counts is None or counts.shape == output.shape else None)
            return
        samples, fitting = None, False
        shape = shape_of_rows(loss_fn, first)
        has_rows = shape is not None
        if shape is not None:
            samples, fitting = self._samples_of(shape)
        scale = self._scale(loss_fn, args, kwargs, samples)
        mean = output.detach().clone() if scale is None else output.detach() / _not_zero(scale)  # no alias of it
        individual, complete = None, fitting and known_reduction(loss_fn)
        seen_at_output = None
        if complete and (iteration.wants_losses or iteration.follows_losses):
            assert samples is not None
            rows = rows_of(loss_fn, args, kwargs, mean)
            individual = None if rows is None else rows.of_samples(samples, self._sample_dim)
            if individual is not None and not _same(
                [individual.mean().to(mean.dtype).nan_to_num()], [mean.nan_to_num()]
            ):
                individual = None  # a mean of another kind, by the lengths of targets, say
            complete = individual is not None
            if complete and iteration.follows_losses:
                with torch.enable_grad():
                    whole = output if scale is None else output / _not_zero(scale)
                seen_at_output = self._followed_module(loss_fn, args, kwargs, whole, samples)
        interact = not complete and iteration.follows_losses and self._couples(output)
        subset = has_rows and not fitting
        worth_a_word = (
            samples != 0
            and not complete
            and not interact
            and (not fitting or not known_reduction(loss_fn) or iteration.wants_losses)
        )
        self._calls += 1
        order, model_calls = self._calls, len(iteration.calls)

        def start(hooks: LossHooks, gradient: Tensor) -> None:
            gamma = gradient.detach() if scale is None else gradient.detach() * scale
            call = LossCall(mean, individual, samples, gamma, False, order, complete, subset)
            call = replace(call, seen_at_output=seen_at_output, model_calls=model_calls, worth_a_word=worth_a_word)
            hooks._report(call.judging(prediction))

        self._on_backward(output, start)

    def _scale(self, loss_fn: nn.Module, args: Any, kwargs: Any, samples: int | None) -> Tensor | float | None:
        """What a sum has to be divided by to be a mean; None for a mean."""
        if getattr(loss_fn, "reduction", None) != "sum":
            return None
        if isinstance(loss_fn, _CLASSES):
            return total_weight(args, kwargs, loss_fn.ignore_index, loss_fn.weight)
        return float(samples) if samples else None

    def warn_of(self, passes: Sequence[BackwardPass]) -> None:
        """Say of which losses that were sent backward those of samples cannot be had; others may be another model's."""
        incomplete = [call for entry in passes for call in entry.calls if call.worth_a_word]
        if self._warned or not incomplete:
            return
        self._warned = True
        name, subset = type(self._loss_fn).__name__, incomplete[0].subset
        self.subset_told = subset
        if subset:
            warn_user(
                f"{name} was called with rows that are neither the samples of the model's batch nor a multiple of "
                "them, so alpha uses the slopes only. Of a subset picked by a mask: give ignored targets "
                "ignore_index, or weigh the losses with 0, instead of leaving rows out. Of pairs or triplets in one "
                "batch: give the model each part in a call of its own, as far as it takes them."
            )
        else:
            warn_user(
                f"{name} gives no losses of single samples (it needs an attribute "
                "'reduction' that accepts 'none'), so alpha does without the losses. Use "
                "optimizer.backward(losses) with losses of shape [N] for the full fit."
            )

    def _report(self, call: LossCall) -> None:
        passes = self._iteration().passes
        if not passes.muted:
            passes.anchor(call)

    # ---------------------------------------------------------------- back to the outputs of the model

    def _followed_module(
        self, loss_fn: nn.Module, args: Any, kwargs: Any, output: Tensor, samples: int
    ) -> dict[tuple[int, int], Tensor] | None:
        """Follow the losses of one call back to the model's outputs; see `_followed`."""
        with torch.enable_grad():
            rows = rows_of(loss_fn, args, kwargs, output.detach(), graph=True)
        single = None if rows is None else rows.of_samples(samples, self._sample_dim)
        return None if single is None else self._followed(single, output, sums=True)

    def _couples(self, loss: Tensor) -> bool:
        """Whether a loss that tells nothing of single samples couples them; tells the iteration if it does.

        The loss is a sum over samples if the gradient at one sample's output does not change with another's output.
        Where it cannot be differentiated twice nothing is known.
        """
        iteration = self._iteration()
        watched: list[tuple[int, int, Tensor]] = iteration.watched_outputs()
        tensors = [tensor for _, _, tensor in watched]
        if not tensors or tensors[0].dim() == 0 or not _may_be_walked(loss, None):
            return False
        samples, fitting = self._samples_of(tensors[0].shape)
        if not fitting or samples < 2:
            return False
        iteration.passes.muted = True
        try:
            chosen = (torch.arange(samples, device=loss.device) % 2).to(loss.dtype)
            with torch.enable_grad():
                first = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
                folds = [folded(_unevenly(slope), samples, self._sample_dim) for slope in first if slope is not None]
                picked = [(fold * chosen).sum() for fold in folds if fold is not None and fold.requires_grad]
                if not picked:
                    return False
                second = torch.autograd.grad(torch.stack(picked).sum(), tensors, retain_graph=True, allow_unused=True)
            if _only_at(second, chosen, self._sample_dim):
                return False
        except Exception:  # nothing is known, nothing is claimed
            return False
        finally:
            iteration.passes.muted = False
        self._warned = True  # that they are coupled is told elsewhere, and is the reason
        iteration.samples_interact()
        return True

    def _followed(
        self, losses: Tensor, mean: Tensor | None, sums: bool = False
    ) -> dict[tuple[int, int], Tensor] | None:
        """Look whether every sample's loss comes from its own part of the model's output.

        Tells the iteration where it does not.

        Args:
            losses: Losses of samples or rows with their graph.
            mean: The loss that is going to be sent backward, or a multiple of it, with its graph.
            sums: Whether ``losses`` are those of the samples already.

        Returns:
            Gradients of ``mean`` at the outputs, by number of the call and place in its output; None if they
            were not looked at.
        """
        iteration = self._iteration()
        watched: list[tuple[int, int, Tensor]] = iteration.watched_outputs() if iteration.follows_losses else []
        if not watched or not losses.requires_grad or not _may_be_walked(losses, mean):
            return None
        samples, fitting = (losses.shape[0], True) if sums else self._samples_of(losses.shape)
        if not fitting:
            return None
        tensors = [tensor for _, _, tensor in watched]
        iteration.passes.muted = True
        try:
            single = losses if sums else folded(losses, samples, self._sample_dim)
            assert single is not None
            chosen = (torch.arange(samples, device=single.device) % 2).to(single.dtype)
            signs = 1.0 + torch.arange(samples, device=single.device, dtype=single.dtype) / samples
            reached = torch.autograd.grad(
                (single * chosen * signs).sum(), tensors, retain_graph=True, allow_unused=True
            )
            if not _only_at(reached, chosen, self._sample_dim):
                iteration.samples_interact()
            if mean is None:
                return None
            whole = torch.autograd.grad(mean, tensors, retain_graph=True, allow_unused=True)
            if sums:
                together = torch.autograd.grad(losses.mean(), tensors, retain_graph=True, allow_unused=True)
                if not _same(whole, together):  # their mean is not the loss, whatever it is scaled to
                    iteration.samples_interact()
        except Exception:  # a graph that cannot be walked twice: nothing is known, nothing is claimed
            return None
        finally:
            iteration.passes.muted = False
        return {
            (call, place): torch.zeros_like(tensor) if gradient is None else gradient.detach()
            for (call, place, tensor), gradient in zip(watched, whole, strict=True)
        }


def _unevenly(slopes: Tensor) -> Tensor:
    """Gradients with unlike weights for unlike outputs: those of a softmax would add up to 0."""
    if slopes.dim() < 2:
        return slopes
    weights = torch.linspace(1.0, 2.0, slopes[0].numel(), device=slopes.device, dtype=slopes.dtype)
    return slopes * weights.reshape(slopes.shape[1:])


def _may_be_walked(losses: Tensor, mean: Tensor | None) -> bool:
    """Whether a walk through the graph of a loss leaves no trace: no functions and no hooks of the user's in it."""
    if _saved_tensors_are_hooked():
        return False
    if any(tensor is not None and (tensor.retains_grad or tensor._backward_hooks) for tensor in (losses, mean)):
        return False
    waiting: list[Any] = [tensor.grad_fn for tensor in (losses, mean) if tensor is not None]
    seen: set[Any] = set()
    while waiting and len(seen) < 1000:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return False
        if len(seen) < 50:  # the loss itself and what lies between it and the model's output
            waiting.extend(entry for entry, _ in node.next_functions)
    return True


def _saved_tensors_are_hooked() -> bool:
    """Whether a graph made now saves its tensors by hooks (`torch.autograd.graph.saved_tensors_hooks`)."""
    top: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None:
        return top(True) is not None
    # Before torch 2.7 nobody tells, but what such hooks have saved takes no others.
    with torch.enable_grad():
        node: Any = torch.ones((), requires_grad=True).exp().grad_fn
    try:
        node._raw_saved_result.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
    except RuntimeError:
        return True
    return False


def _made_by(value: Any) -> Any:
    """What made a tensor, or the one that it is a view of all of, in the graph; None if nothing did, or it is none."""
    if not isinstance(value, Tensor):
        return None
    base = value._base
    return value.grad_fn if base is None or base.numel() != value.numel() else base.grad_fn


def _same(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    """Whether two lists of gradients are the same up to rounding."""
    for one, other in zip(first, second, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
            continue
        if _differ(one, other):
            return False
    return True


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two gradients differ by more than rounding; nan says nothing."""
    size = torch.maximum(one.abs().max(), other.abs().max())
    tolerance = 3e-2 if one.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool(read([(one - other).abs().max() > tolerance * size])[0])


def _only_at(gradients: Sequence[Tensor | None], chosen: Tensor, sample_dim: int) -> bool:
    """Whether gradients at outputs vanish for the samples that were not chosen."""
    there = [gradient.detach().abs().double() for gradient in gradients if gradient is not None]
    if len(there) > 1 and sum(len(gradient) for gradient in there if gradient.dim() > 0) == len(chosen):
        there = [torch.cat([gradient.flatten(1).sum(1) for gradient in there])]  # samples of several calls
    for gradient in there:
        sizes = folded(gradient, len(chosen), sample_dim)
        if sizes is None:  # an output without samples that the loss depends on
            if read([gradient.any()])[0]:
                return False
        elif read([(sizes * (1.0 - chosen.double())).max() > 1e-6 * sizes.max()])[0]:  # nan says nothing
            return False
    return True


def matches_loss(entry: BackwardPass, calls: list[ModelCall]) -> bool:
    """Whether the losses seen are all that reached the model's outputs in a backward pass; True if not known."""
    seen = [call for call in entry.calls if call.seen_at_output is not None and call.gamma is not None]
    if not seen or len(seen) != len(entry.calls):
        return True
    numbers = {id(call): number for number, call in enumerate(calls)}
    for call, place, gradient in entry.outputs:
        key = (numbers.get(id(call), -1), place)
        later = all(loss.model_calls <= key[0] for loss in seen)
        if not later and not any(key in (loss.seen_at_output or {}) for loss in seen):
            continue  # not looked at
        expected = torch.zeros_like(gradient)
        for loss in seen:
            assert loss.seen_at_output is not None
            assert loss.gamma is not None
            if key in loss.seen_at_output:
                expected = expected + loss.seen_at_output[key] * loss.gamma
        if _differ(gradient, expected):
            return False
    return True


def shape_of_rows(loss_fn: nn.Module, first: Any) -> torch.Size | None:
    """Shape of the losses of the rows, given the first argument of a call; None if there are no rows."""
    if not isinstance(first, Tensor) or first.dim() == 0:
        return None
    if isinstance(loss_fn, nn.CTCLoss):  # time first, and classes last
        return first.shape[1:2] if first.dim() == 3 else None
    # One entry per row: the dimension of the classes is none of rows.
    per_class = isinstance(loss_fn, _CLASSES) and first.dim() > 1
    return torch.Size((first.shape[0], *first.shape[2:])) if per_class else first.shape


def known_reduction(loss_fn: nn.Module) -> bool:
    """Whether a loss function says how it reduces the losses of its rows."""
    return getattr(loss_fn, "reduction", None) in ("mean", "sum", "batchmean")


def rows_of(loss_fn: nn.Module, args: Any, kwargs: Any, reduced: Tensor, graph: bool = False) -> Rows | None:
    """Evaluate the losses of the rows for one call of a loss function.

    Args:
        loss_fn: Loss function that has just returned one number.
        args: Positional arguments of that call.
        kwargs: Keyword arguments of that call.
        reduced: The mean that it returned ``[]``.
        graph: Whether to keep the graph.

    Returns:
        The losses; None if the function cannot give them.
    """
    reduction = getattr(loss_fn, "reduction", None)
    if not known_reduction(loss_fn) or not (args or kwargs):
        return None
    first = args[0] if args else next(iter(kwargs.values()))
    shape = shape_of_rows(loss_fn, first)
    if not isinstance(first, Tensor) or shape is None:
        return None
    single = _unreduced(loss_fn)
    ours = not type(loss_fn).__module__.startswith("torch.nn.")
    try:
        with torch.set_grad_enabled(graph):
            if ours:
                snapshot = Snapshot()
                for module in single.modules():
                    snapshot.keep_class(type(module))
                    snapshot.keep(
                        [value for name, value in module.__dict__.items() if name not in ("_parameters", "_modules")]
                    )
                with untouched([first.device]), other_random_numbers_untouched(), _put_back(snapshot):
                    values = single.forward(*args, **kwargs)
            else:
                values = single.forward(*args, **kwargs)  # torch's own losses draw no random numbers
    except Exception:  # whatever a loss raises that knows no "none"; told once by the caller
        return None
    if not isinstance(values, Tensor) or values.dim() == 0 or values.shape[0] != shape[0]:
        return None
    values = at_least_float32(values)
    if type(loss_fn) is nn.CTCLoss and reduction == "mean":
        lengths = args[3] if len(args) > 3 else kwargs["target_lengths"]
        values = values / torch.as_tensor(lengths, device=values.device).clamp_min(1)
    if type(loss_fn) in _CLASSES:  # a subclass may divide by something else
        return Rows(values, total_weight(args, kwargs, loss_fn.ignore_index, loss_fn.weight, values.numel()))
    if reduction == "sum":
        return Rows(values, None, reduced if isinstance(loss_fn, _CLASSES) else None)
    if reduction == "batchmean":
        return Rows(values, float(values.shape[0]))
    if not ours:
        return Rows(values, float(values.numel()))
    return Rows(values, float(values.numel()), reduced)


@contextmanager
def _put_back(snapshot: Snapshot) -> Iterator[None]:
    try:
        yield
    finally:
        snapshot.restore()


def _unreduced(loss_fn: nn.Module) -> nn.Module:
    """The loss function with reduction "none"; the user's own is not touched."""
    if type(loss_fn).__module__.startswith("torch.nn.") and not loss_fn._modules:
        single: nn.Module = object.__new__(type(loss_fn))  # its buffers are read only
        single.__dict__ = dict(loss_fn.__dict__)
    else:
        single = stand_in(loss_fn)
    vars(single)["reduction"] = "none"
    return single


def total_weight(args: Any, kwargs: Any, ignore_index: Any, weight: Any, elements: int | None = None) -> Tensor | float:
    """What the mean of (weighted) cross entropy divides by.

    Args:
        args: Positional arguments of the call: logits, targets.
        kwargs: Its keyword arguments.
        ignore_index: Target that does not count.
        weight: Weights of the classes, or None.
        elements: Number of losses, where targets are probabilities.
    """
    counts = weights_of_rows(args, kwargs, ignore_index, weight)
    if counts is not None:
        return counts.sum()
    if elements is None:
        first = args[0] if args else kwargs["input"]
        elements = first.numel() // first.shape[1] if first.dim() > 1 else 1
    return float(elements)


def weights_of_rows(args: Any, kwargs: Any, ignore_index: Any, weight: Any) -> Tensor | None:
    """How much each target counts in (weighted) cross entropy; None where targets are probabilities."""
    target = args[1] if len(args) > 1 else kwargs.get("target")
    if not isinstance(target, Tensor) or target.is_floating_point():
        return None
    kept = torch.ne(target, ignore_index)
    if not isinstance(weight, Tensor):
        return kept
    return weight[target.clamp_min(0).clamp_max(len(weight) - 1)] * kept


def _not_zero(total: Tensor | float) -> Tensor | float:
    """What a sum is divided by: 1 where no target counts, for the sum is 0 then."""
    if isinstance(total, Tensor):
        return torch.where(total == 0, torch.ones_like(total), total)
    return total or 1.0


def _left_out(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Whether losses have no weight, and whether those are just the ones above or below some level; truths ``[]``.

    A mask leaves out losses of any size. A clamp, or picking the hardest samples, leaves out losses by their size:
    then what is sent backward is no mean over samples. Losses of 0 tell nothing about it.
    """
    out, kept = (weights == 0) & (values != 0), weights != 0
    limit = torch.finfo(values.dtype).max
    lowest_out, highest_out = values.masked_fill(~out, limit).amin(), values.masked_fill(~out, -limit).amax()
    lowest_kept, highest_kept = values.masked_fill(~kept, limit).amin(), values.masked_fill(~kept, -limit).amax()
    return out.any(), (lowest_out >= highest_kept) | (highest_out <= lowest_kept)
