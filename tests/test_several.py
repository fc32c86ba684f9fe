"""Several optimizers of one model as one."""

import copy
import io

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from tests.problems import for_matrices
from tests.test_transparency import equal_states


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    params = list(model.parameters())
    optimizers = [
        for_matrices(params),
        torch.optim.AdamW([p for p in params if p.dim() == 1], lr=0.01),
    ]
    return model, optimizers


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(24, 6, generator=generator)
        yield x, x[:, :3].argmax(1)


def train(model, loss_fn, optimizer, data, scheduler=None):
    for x, y in data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.compatibility("torch.optim", "several on one model (Muon for matrices, AdamW for the rest), as one")
def test_a_step_is_a_step_of_each_bit_for_bit():
    bare_model, bare = make()
    loss_fn = nn.CrossEntropyLoss()
    for x, y in batches(12):
        for optimizer in bare:
            optimizer.zero_grad()
        loss_fn(bare_model(x), y).backward()
        for optimizer in bare:
            optimizer.step()
    model, optimizers = make()
    guided = AlphaGuided(optimizers, model, loss_fn)
    train(model, loss_fn, guided, batches(12))
    assert equal_states(bare_model.state_dict(), model.state_dict())
    assert {m.information for m in guided.alpha_history} == {"full"}
    assert [len(m.lr) for m in guided.alpha_history] == [2] * 11
    assert guided.param_groups[0] is optimizers[0].param_groups[0]
    assert len(guided.state) == 4


def test_alpha_is_that_of_the_step_of_all():
    """The slopes, against the parameter change and the gradients of the whole model."""
    model, optimizers = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(optimizers, model, loss_fn, backend="gradients")
    slopes = []
    for x, y in batches(5):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        gradients = [p.grad.clone() for p in model.parameters()]
        guided.step()
        changes = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        length = torch.stack([c.norm() for c in changes]).norm()
        slopes.append(float(sum((c * g).sum() for c, g in zip(changes, gradients, strict=True)) / length))
    assert [m.slope_start for m in guided.alpha_history] == pytest.approx(slopes[:4], rel=1e-4)


def test_steered_they_have_one_scale_and_go_back_together():
    model, optimizers = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(optimizers, model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    train(model, loss_fn, guided, batches(10), scheduler)
    before = copy.deepcopy(model.state_dict())
    train(model, loss_fn, guided, [next(batches(1, 1))], scheduler)
    train(model, loss_fn, guided, [(x * float("nan"), y) for x, y in batches(2, 2)], scheduler)
    assert equal_states(before, model.state_dict())
    assert [group["lr"] for group in guided.param_groups] == pytest.approx([0.01, 0.005])


def test_a_resumed_run_ends_bit_for_bit_alike():
    loss_fn = nn.CrossEntropyLoss()
    data = list(batches(20))

    def build():
        model, optimizers = make()
        guided = AlphaGuided(optimizers, model, loss_fn)
        return model, guided, AlphaScheduler(guided, Hold())

    model, guided, scheduler = build()
    train(model, loss_fn, guided, data[:9], scheduler)
    file = io.BytesIO()
    torch.save([model.state_dict(), guided.state_dict(), scheduler.state_dict()], file)
    train(model, loss_fn, guided, data[9:], scheduler)
    file.seek(0)
    other, other_guided, other_scheduler = build()
    for part, state in zip((other, other_guided, other_scheduler), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(other, loss_fn, other_guided, data[9:], other_scheduler)
    assert equal_states(model.state_dict(), other.state_dict())
    assert repr(list(guided.alpha_history)) == repr(list(other_guided.alpha_history))


def test_copies_are_independent():
    model, optimizers = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(optimizers, model, loss_fn)
    train(model, loss_fn, guided, batches(3))
    other_model, other_loss_fn, other = copy.deepcopy((model, loss_fn, guided))
    train(model, loss_fn, guided, batches(3, 1))
    train(other_model, other_loss_fn, other, batches(3, 1))
    assert equal_states(model.state_dict(), other_model.state_dict())


def test_bad_lists_are_refused_at_once():
    model, optimizers = make()
    with pytest.raises(ValueError, match="empty"):
        AlphaGuided([])
    with pytest.raises(TypeError, match="torch optimizers only, got Linear"):
        AlphaGuided([model[0]])
    with pytest.raises(ValueError, match="more than one of the optimizers"):
        AlphaGuided([optimizers[0], optimizers[0]])
    with pytest.raises(ValueError, match="Call add_param_group of the optimizer itself"):
        AlphaGuided(optimizers, model).add_param_group({"params": [next(iter(model.parameters()))]})


def test_a_group_added_to_one_of_them_is_seen():
    model, optimizers = make()
    extra = nn.Linear(3, 3)
    whole, loss_fn = nn.Sequential(model, extra), nn.CrossEntropyLoss()
    guided = AlphaGuided(optimizers, whole, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    train(whole, loss_fn, guided, batches(3), scheduler)
    optimizers[1].add_param_group({"params": list(extra.parameters()), "lr": 0.003})
    train(whole, loss_fn, guided, batches(3), scheduler)
    assert [group["lr"] for group in guided.param_groups] == [0.02, 0.01, 0.003]


@pytest.mark.compatibility("Schedules", "two steered optimizers on one model, one by one", "refused")
def test_steering_two_wrappers_of_one_model_is_refused_with_the_recipe():
    model, optimizers = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = [AlphaGuided(optimizer, model, loss_fn) for optimizer in optimizers]  # each watched along its own step
    with pytest.warns(UserWarning, match="another optimizer has moved parameters of the model.*wrap both as one"):
        for x, y in batches(4):
            for one in guided:
                one.zero_grad()
            loss_fn(model(x), y).backward()
            for one in guided:
                one.step()
    assert {m.information for m in guided[0].alpha_history} == {"full"}
    assert "slopes" in {m.information for m in guided[1].alpha_history}
    scheduler = AlphaScheduler(guided[0], Hold())
    with pytest.raises(ValueError, match=r"AlphaGuided\(\[(muon|sgd), adamw\], model, loss_fn\)"):
        AlphaScheduler(guided[1], Hold())
    del scheduler
    guided[0].detach()
    AlphaScheduler(guided[1], Hold())


def test_a_new_run_on_the_same_parameters_is_steered_as_ever():
    model = make()[0]
    kept = [AlphaScheduler(AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model), Hold()) for _ in range(2)]
    assert len(kept) == 2


class _Nobody:
    """Stands in for a scheduler where there is none yet."""

    def step(self):
        pass


@pytest.mark.compatibility("Schedules", "GANs steered: no rate is searched, a warning says so")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("watched", [0, 5])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("toggled", [False, True])
@pytest.mark.parametrize("critic_first", [False, True])
def test_networks_that_play_against_each_other_are_watched_and_no_rate_is_searched(
    watched, shared, toggled, critic_first
):
    """However the loop is written: one loss function or two, the critic frozen in the generator's turn or not."""
    torch.manual_seed(0)
    generator, critic = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), nn.Linear(2, 1)
    loss_fns = [nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()]
    loss_fns[1] = loss_fns[shared - 1]
    guided = [
        AlphaGuided(torch.optim.Adam(net.parameters(), lr=1e-3), net, loss_fn)
        for net, loss_fn in zip((generator, critic), loss_fns, strict=True)
    ]
    schedulers = [_Nobody(), _Nobody()]
    ones, zeros = torch.ones(16, 1), torch.zeros(16, 1)

    def critics_turn(fake):
        guided[1].zero_grad()
        (loss_fns[1](critic(torch.randn(16, 2)), ones) + loss_fns[1](critic(fake.detach()), zeros)).backward()
        guided[1].step()
        schedulers[1].step()

    def generators_turn(fake):
        critic.requires_grad_(not toggled)
        guided[0].zero_grad()
        loss_fns[0](critic(fake), ones).backward()
        guided[0].step()
        schedulers[0].step()
        critic.requires_grad_(True)

    def play(steps):
        for _ in range(steps):
            fake = generator(torch.randn(16, 4))
            for turn in (critics_turn, generators_turn)[:: 1 if critic_first else -1]:
                turn(fake)

    play(watched)
    schedulers[:] = [AlphaScheduler(one, total_steps=400) for one in guided]
    with pytest.warns(
        UserWarning, match=r"the network of Adam and another one are trained apart.*\(a GAN\?\)"
    ) as caught:
        play(30)
    assert len(caught) == 2  # of both
    assert all(len(str(warning.message)) < 500 for warning in caught)
    assert [one.param_groups[0]["lr"] for one in guided] == [pytest.approx(1e-3)] * 2
    assert len(guided[0].alpha_history) > 20


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("other", ["a disturbance of the input", "an encoder that is trained with it"])
def test_what_no_other_network_plays_is_searched(other):
    """A pass whose gradients are thrown away, or that goes on to another network, is not yet an opponent's."""
    torch.manual_seed(0)
    encoder, model, loss_fn = nn.Linear(4, 4), nn.Linear(4, 2), nn.CrossEntropyLoss()
    guided = [
        AlphaGuided(torch.optim.SGD(net.parameters(), lr=1e-3), net, loss_fn)
        for net in ((model,) if other == "a disturbance of the input" else (encoder, model))
    ]
    schedulers = [AlphaScheduler(one, total_steps=400) for one in guided]
    for _ in range(60):
        x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
        if len(guided) == 1:
            disturbance = torch.zeros_like(x, requires_grad=True)
            loss_fn(model(x + disturbance), y).backward()  # projected gradients
            x = x + 0.1 * disturbance.grad.sign()
        else:
            x = encoder(x)
        for one in guided:
            one.zero_grad()
        loss_fn(model(x), y).backward()
        for one, scheduler in zip(guided, schedulers, strict=True):
            one.step()
            scheduler.step()
    assert all(scheduler.policy.calibrated is False or "rate given" not in str(scheduler) for scheduler in schedulers)


@pytest.mark.compatibility("Loops", "a guard with optimizers stepped inside the backward pass", "refused")
def test_a_guard_inside_the_backward_pass_is_refused_by_name():
    model, loss_fn = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), nn.CrossEntropyLoss()

    def stepped(guard):
        handles = []
        for param in model.parameters():
            guided = AlphaGuided(torch.optim.SGD([param], lr=0.1))
            scheduler = AlphaScheduler(guided, Hold(), guard=guard)

            def hook(_param, guided=guided, scheduler=scheduler):
                guided.step()
                guided.zero_grad()
                scheduler.step()

            handles.append(param.register_post_accumulate_grad_hook(hook))
        try:
            for _ in range(3):
                loss_fn(model(torch.randn(8, 4)), torch.randint(0, 2, (8,))).backward()
        finally:
            for handle in handles:
                handle.remove()

    with pytest.raises(RuntimeError, match=r"inside the backward pass.*guard=False"):
        stepped(True)
    model.zero_grad()
    stepped(False)


def test_groups_and_state_are_the_same_objects_every_time():
    model, optimizers = make()
    guided = AlphaGuided(optimizers, model)
    assert guided.param_groups is guided.param_groups
    assert guided.state is guided.state
    held = guided.param_groups
    extra = nn.Parameter(torch.zeros(2))
    model.register_parameter("extra", extra)
    optimizers[1].add_param_group({"params": [extra]})
    assert guided.param_groups is held
    assert [id(group) for group in held] == [id(group) for part in optimizers for group in part.param_groups]
