"""Every bad input is refused at once, says what to do, and changes nothing."""

import math

import pytest
import torch
from torch import nn

from alpha_optim import (
    AlphaGuided,
    AlphaHistory,
    AlphaScheduler,
    Bounded,
    CalibrateThenAnneal,
    OvershootBackoff,
    TargetAlpha,
    WithWarmup,
)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


@pytest.fixture
def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules()) + sum(
        len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()
    )


@pytest.mark.parametrize("wrong", [None, 3, torch.optim.SGD])
def test_not_an_optimizer(wrong):
    with pytest.raises(TypeError, match=r"must be an instance of torch.optim.Optimizer, got .*for example AlphaGuided"):
        AlphaGuided(wrong)


@pytest.mark.compatibility("Process", "AlphaGuided around AlphaGuided", "refused")
def test_already_wrapped(model, sgd):
    guided = AlphaGuided(sgd, model)
    inside = torch.optim.SGD(model.parameters(), lr=0.1)
    inside.base_optimizer = guided  # as Lookahead and SAM have theirs
    for nested in (guided, [guided], [torch.optim.SGD(model.parameters(), lr=0.1), guided], inside):
        with pytest.raises(ValueError, match=r"already wrapped in AlphaGuided, or has one inside; wrap once"):
            AlphaGuided(nested, model)


@pytest.mark.compatibility("Process", "parameters that are not the model's", "refused")
def test_model_whose_parameters_are_not_the_optimizers(model, sgd):
    other = nn.Linear(4, 2)
    with pytest.raises(
        ValueError, match=r"belong neither to model \(Linear\) nor to loss_fn: parameter 0 of shape \[5, 4\]"
    ):
        AlphaGuided(sgd, other)
    assert hooks(model) == hooks(other) == 0


def test_parameters_that_are_not_the_models_are_named_as_the_optimizer_was_told():
    whole = nn.ModuleDict({"trunk": nn.Linear(4, 3), "head": nn.Linear(3, 2)})
    with pytest.raises(ValueError, match=r"to loss_fn: head.weight of shape \[2, 3\], head.bias of shape \[2\]\."):
        AlphaGuided(torch.optim.SGD(whole.named_parameters(), lr=0.1), whole["trunk"])


def test_a_new_group_with_foreign_parameters(model, sgd):
    guided = AlphaGuided(sgd, model)
    with pytest.raises(ValueError, match=r"the new group has parameters .* shape \[3, 3\]"):
        guided.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
    assert len(guided.param_groups) == 1


@pytest.mark.parametrize(("argument", "value"), [("model", "net"), ("loss_fn", nn.functional.cross_entropy)])
def test_model_and_loss_must_be_modules(model, sgd, argument, value):
    arguments = {"model": model, "loss_fn": nn.CrossEntropyLoss(), argument: value}
    with pytest.raises(TypeError, match=rf"{argument} must be a torch.nn.Module"):
        AlphaGuided(sgd, **arguments)
    assert hooks(model) == 0


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every(model, sgd, every):
    with pytest.raises(ValueError, match=r"every must be a whole number of at least 1, a function n -> bool, or None"):
        AlphaGuided(sgd, model, every=every)
    assert hooks(model) == 0


def test_variance(model, sgd):
    with pytest.raises(ValueError, match=r"variance must be 'exact' or 'sampled', got 'all'"):
        AlphaGuided(sgd, model, variance="all")


def test_backend_unknown(model, sgd):
    with pytest.raises(
        ValueError,
        match=r"unknown backend 'fast'. Known backends: 'backpack', 'layerwise', 'cached', 'gradients', 'auto'",
    ):
        AlphaGuided(sgd, model, backend="fast")


def test_backend_impossible_for_the_optimizer(model):
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(
        ValueError,
        match=r"needs plain torch.optim.SGD .* These work: 'layerwise', 'cached', 'gradients', or 'auto'",
    ):
        AlphaGuided(adam, model, backend="backpack")
    assert hooks(model) == 0


def test_backend_impossible_for_the_model():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"does not cover these layers: 1 \(LayerNorm\). These work: 'layerwise', 'cached'"
    ):
        AlphaGuided(sgd, net, backend="backpack")


@pytest.mark.parametrize("backend", ["backpack", "cached"])
def test_backend_without_model(sgd, backend):
    with pytest.raises(ValueError, match=r"it needs the model: .* These work: 'gradients', or 'auto'"):
        AlphaGuided(sgd, backend=backend)


def test_losses_without_graph(model, sgd):
    guided = AlphaGuided(sgd, model)
    with pytest.raises(ValueError, match=r"needs losses with a graph.*Use record_losses"):
        guided.backward(torch.rand(4))
    assert all(p.grad is None for p in model.parameters())


def test_losses_that_are_one_number(model, sgd):
    guided = AlphaGuided(sgd, model)
    with pytest.raises(ValueError, match=r"needs one loss per sample.*Use reduction='none'"):
        guided.backward(model(torch.randn(3, 4)).sum())


@pytest.mark.parametrize("method", ["backward", "record_losses"])
def test_losses_of_the_wrong_length(model, sgd, method):
    guided = AlphaGuided(sgd, model)
    losses = model(torch.randn(6, 4)).square().reshape(-1)[:9]
    with pytest.raises(ValueError, match=r"got 9 losses, but the model's batch has 6 samples; expected shape \[6\]"):
        getattr(guided, method)(losses)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["backward", "record_losses"])
def test_losses_that_are_empty_or_no_tensor(model, sgd, method):
    guided = AlphaGuided(sgd, model)
    with pytest.raises(ValueError, match=r"got no losses \(shape \[0\]\)"):
        getattr(guided, method)(torch.zeros(0))
    with pytest.raises(TypeError, match=r"takes a tensor of shape \[N\], got list"):
        getattr(guided, method)([1.0])


@pytest.mark.parametrize("factor", [math.nan, 0.0, -1.0, math.inf, None, "2"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_policy_returning_nonsense(model, sgd, factor, wrapped):
    def policy(m):
        return factor

    guided, loss_fn = AlphaGuided(sgd, model), nn.CrossEntropyLoss()
    scheduler = AlphaScheduler(guided, Bounded(policy) if wrapped else policy)
    with pytest.raises(ValueError, match=r"policy policy returned .* for iteration 0; expected a finite factor > 0"):
        for _ in range(3):
            guided.zero_grad()
            loss_fn(model(torch.randn(4, 4)), torch.tensor([0, 1, 0, 1])).backward()
            guided.step()
            scheduler.step()
    assert guided.param_groups[0]["lr"] == 0.1


def test_total_steps_together_with_a_policy(model, sgd):
    with pytest.raises(ValueError, match=r"give either a policy or total_steps"):
        AlphaScheduler(AlphaGuided(sgd, model), TargetAlpha(), total_steps=10)


def test_scheduler_on_a_bare_optimizer(sgd):
    with pytest.raises(TypeError, match=r"needs an AlphaGuided optimizer, got SGD; wrap it first"):
        AlphaScheduler(sgd)


@pytest.mark.parametrize("policy", [0.5, TargetAlpha])
def test_policy_that_is_no_policy(model, sgd, policy):
    with pytest.raises(TypeError, match=r"policy must be callable"):
        AlphaScheduler(AlphaGuided(sgd, model), policy)


@pytest.mark.compatibility("Schedules", "two AlphaSchedulers on one optimizer", "refused")
def test_a_second_scheduler(model, sgd):
    guided = AlphaGuided(sgd, model)
    AlphaScheduler(guided)
    with pytest.raises(ValueError, match=r"already has an AlphaScheduler, and only one can set its rates"):
        AlphaScheduler(guided)


def test_a_schedule_of_another_optimizer(model, sgd):
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"schedule belongs to another optimizer \(SGD\); build it on this"):
        AlphaScheduler(AlphaGuided(sgd, model), schedule=torch.optim.lr_scheduler.StepLR(other, 3))


def test_model_and_loss_in_the_wrong_order(model, sgd):
    with pytest.raises(ValueError, match=r"the order is AlphaGuided\(optimizer, model, loss_fn\)"):
        AlphaGuided(sgd, nn.CrossEntropyLoss(), model)


def test_an_attribute_that_neither_has_is_missed_on_the_wrapper(model, sgd):
    with pytest.raises(AttributeError, match=r"'AlphaGuided' object has no attribute 'information'"):
        _ = AlphaGuided(sgd, model).information


def test_scheduler_arguments(model, sgd):
    guided = AlphaGuided(sgd, model)
    with pytest.raises(TypeError, match=r"schedule must be a torch learning rate scheduler, got int"):
        AlphaScheduler(guided, schedule=3)
    with pytest.raises(ValueError, match=r"expected 0 <= min_lr <= max_lr and max_lr > 0, got min_lr=1.0, max_lr=0.1"):
        AlphaScheduler(guided, min_lr=1.0, max_lr=0.1)
    with pytest.raises(TypeError, match="max_lr must be a learning rate, got 'high'"):
        AlphaScheduler(guided, max_lr="high")
    with pytest.raises(ValueError, match=r'guard must be True, False or "cpu" .*, got \'gpu\''):
        AlphaScheduler(guided, guard="gpu")
    with pytest.raises(ValueError, match=r"max_lr > 0, got min_lr=0.0, max_lr=0"):
        AlphaScheduler(guided, max_lr=0)
    with pytest.raises(TypeError, match=r"an accepted hook must be callable"):
        guided.register_accepted_hook(3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TargetAlpha(3.0), "target must lie between -0.5 and 1"),
        (lambda: TargetAlpha(gain=0.0), "gain must be > 0"),
        (lambda: TargetAlpha(window=0), "window must be a whole number of at least 1"),
        (lambda: TargetAlpha(window=2.5), "window must be a whole number of at least 1, got 2.5"),
        (lambda: OvershootBackoff(limit=math.nan), "limit must be > 0"),
        (lambda: OvershootBackoff(certainty=math.nan), "certainty must be >= 0"),
        (lambda: OvershootBackoff(limit=-1.0), "limit must be > 0"),
        (lambda: OvershootBackoff(factor=1.0), "factor must lie strictly between 0 and 1"),
        (lambda: OvershootBackoff(window=1), "window must be a whole number of at least 2"),
        (lambda: OvershootBackoff(certainty=-1.0), "certainty must be >= 0"),
        (lambda: Bounded(TargetAlpha(), lowest=2.0), "bounds must contain 1"),
        (lambda: WithWarmup(TargetAlpha(), steps=0), "steps must be a whole number of at least 1"),
        (lambda: WithWarmup(TargetAlpha(), steps=math.nan), "steps must be a whole number of at least 1, got nan"),
        (lambda: WithWarmup(TargetAlpha(), steps=True), "steps must be a whole number of at least 1, got True"),
        (lambda: CalibrateThenAnneal(300, trial_steps=20.5), "trial_steps must be a whole number"),
        (lambda: CalibrateThenAnneal(300, trial_steps="a"), "trial_steps must be a whole number"),
        (lambda: CalibrateThenAnneal(0), "total_steps must be a whole number of at least 1"),
        (lambda: CalibrateThenAnneal(10.5), "total_steps must be a whole number of at least 1"),
        (lambda: CalibrateThenAnneal(1000, trial_steps=9), "trial_steps must be a whole number of at least 10"),
        (lambda: CalibrateThenAnneal(1000, trial_steps=300), "at most a quarter of total_steps=1000"),
        (lambda: AlphaHistory(maxlen=0), "maxlen must be an integer of at least 1"),
        (lambda: AlphaHistory().windowed(0), "a window needs at least 1 measurement"),
    ],
)
def test_settings_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("steps", ["10", None, math.nan, math.inf, 10.7, True, 0])
def test_cooling_down_over_what_is_no_number_of_steps(model, sgd, steps):
    scheduler = AlphaScheduler(AlphaGuided(sgd, model), TargetAlpha())
    with pytest.raises(ValueError, match="steps of cool_down must be a whole number of at least 1"):
        scheduler.cool_down(steps)


@pytest.mark.parametrize("flag", ["anneal", "around"])
def test_a_switch_that_is_none(flag):
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got 'no'"):
        CalibrateThenAnneal(300, **{flag: "no"})


@pytest.mark.parametrize("wrapper", [Bounded, lambda p: WithWarmup(p, 3)])
def test_wrapping_a_class_instead_of_a_policy(wrapper):
    with pytest.raises(TypeError, match="got the class TargetAlpha; give an instance"):
        wrapper(TargetAlpha)


@pytest.mark.parametrize("wrapper", [lambda p: Bounded(p), lambda p: WithWarmup(p, 3)])
def test_wrapping_what_is_no_policy(wrapper):
    with pytest.raises(TypeError, match=r"a policy must be callable \(measurement -> factor\), got float"):
        wrapper(0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a file written by AlphaHistory.save"),
        ("not json\n", "line 1: not a line of an alpha history"),
        ('{"format": "something else", "version": 1}\n', "line 1: .*the header must say format"),
        ('{"format": "alpha_optim.history", "version": 99}\n', "written by a newer alpha_optim"),
        (
            '{"format": "alpha_optim.history", "version": 1}\n{"iteration": 3}\n',
            "line 2: .*fields missing or unknown",
        ),
        (
            '{"format": "alpha_optim.history", "version": 1}\n{"iteration": 3, "alp',
            "line 2: .*killed while writing",
        ),
        ('{"format": "alpha_optim.history", "version": 1}\n[1]\n', "line 2: not a line"),
    ],
)
def test_a_broken_history_file(tmp_path, text, message):
    path = tmp_path / "history.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        AlphaHistory.load(path)


@pytest.mark.compatibility("Resume", "a state dict of a newer version", "refused")
def test_a_state_dict_of_a_newer_version(model, sgd):
    guided = AlphaGuided(sgd, model)
    state = guided.state_dict()
    state["alpha_guided"]["version"] = 99
    with pytest.raises(ValueError, match=r"has version 99.* update alpha_optim, or delete its key 'alpha_guided'"):
        guided.load_state_dict(state)
    scheduler = AlphaScheduler(guided)
    state = scheduler.state_dict()
    with pytest.raises(ValueError, match=r"this state of an AlphaScheduler has version 99"):
        scheduler.load_state_dict({**state, "version": 99})
    with pytest.raises(ValueError, match=r"is for 2 param groups, the optimizer has 1"):
        scheduler.load_state_dict({**state, "scheduled": [1.0, 2.0]})


def test_the_scheduler_state_of_another_policy(model, sgd):
    state = AlphaScheduler(AlphaGuided(sgd, model), TargetAlpha()).state_dict()
    scheduler = AlphaScheduler(AlphaGuided(sgd, model), OvershootBackoff())
    with pytest.raises(
        ValueError, match=r"is of the policy TargetAlpha, this scheduler has OvershootBackoff; build it with"
    ):
        scheduler.load_state_dict(state)


def test_no_rate_to_start_from(model):
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.0), model)
    with pytest.raises(ValueError, match=r"every learning rate is 0, .* give the optimizer any rate > 0"):
        AlphaScheduler(guided)


def test_a_warm_up_from_zero_is_not_mistaken_for_no_rate(model, sgd):
    guided = AlphaGuided(sgd, model)
    torch.optim.lr_scheduler.LambdaLR(guided, lambda n: n / 10)
    assert guided.param_groups[0]["lr"] == 0.0
    assert AlphaScheduler(guided).get_last_lr() == [0.0]


def test_the_last_alpha_before_there_is_one(model, sgd):
    with pytest.raises(IndexError, match=r"no alpha was measured yet: that of iteration n is there once"):
        AlphaGuided(sgd, model).alpha_history[-1]


def test_of_many_parameters_that_do_not_belong_there_a_few_are_named(sgd):
    other = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    with pytest.raises(ValueError, match=r"parameter 2 of shape \[3, 3\] and 37 more\. Pass the model") as caught:
        AlphaGuided(torch.optim.SGD(other.parameters(), lr=0.1), nn.Linear(2, 2))
    assert len(str(caught.value)) < 300


def test_the_schedulers_state_given_to_the_optimizer(model, sgd):
    guided = AlphaGuided(sgd, model)
    with pytest.raises(ValueError, match="no state of an optimizer, which has 'state' and 'param_groups'"):
        guided.load_state_dict(AlphaScheduler(guided).state_dict())
