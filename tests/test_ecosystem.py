"""What else a torch program does to an optimizer."""

import threading

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler
from tests.test_transparency import equal_states, make_model, train


def guided_run(seed, results):
    """One run of its own, made of nothing that another thread uses."""
    generator, loss_fn = torch.Generator().manual_seed(seed), nn.CrossEntropyLoss()
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        for param in model.parameters():  # without torch's own generator, which threads share
            param.copy_(0.3 * torch.randn(param.shape, generator=generator))
    optimizer = AlphaGuided(torch.optim.Adam(model.parameters(), lr=0.01), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, total_steps=40)
    for _ in range(40):
        x, y = torch.randn(10, 6, generator=generator), torch.randint(0, 3, (10,), generator=generator)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    results[seed] = (model.state_dict(), repr(list(optimizer.alpha_history)))


@pytest.mark.compatibility("Process", "several runs in threads of one process")
def test_threads_do_not_see_each_other():
    def runs(parallel):
        results = {}
        threads = [threading.Thread(target=guided_run, args=(seed, results)) for seed in range(4)]
        for thread in threads:
            thread.start()
            if not parallel:
                thread.join()
        for thread in threads:
            thread.join()
        return results

    one, other = runs(parallel=False), runs(parallel=True)
    for seed in range(4):
        assert equal_states(one[seed][0], other[seed][0])
        assert one[seed][1] == other[seed][1]


@pytest.mark.compatibility("Process", "distributed checkpoint's get/set_optimizer_state_dict, in one process")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_distributed_checkpoint_reads_and_writes_the_wrapped_optimizer():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = make_model()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.01), model, nn.CrossEntropyLoss())
    state = get_optimizer_state_dict(model, guided)  # it makes a step at rate 0 to fill an empty state
    assert guided.param_groups[0]["lr"] == 0.01
    assert set(state) == {"state", "param_groups"}
    train(model, guided, steps=5)
    assert len(guided.alpha_history) >= 3
    trained = get_optimizer_state_dict(model, guided)
    other_model = make_model()
    other = AlphaGuided(torch.optim.AdamW(other_model.parameters(), lr=0.01), other_model)
    set_optimizer_state_dict(other_model, other, trained)
    assert equal_states(guided.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"])


@pytest.mark.compatibility("Loops", "parameters of a group replaced by others (FSDP2, tensor parallelism)")
def test_replaced_parameters():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
    train(model, guided, steps=4)
    count = len(guided.alpha_history)
    replaced = nn.Parameter(model[0].weight.detach().clone())
    model[0].weight = replaced
    guided.param_groups[0]["params"][0] = replaced
    before = replaced.detach().clone()
    train(model, guided, steps=4)
    assert not torch.equal(before, replaced)
    assert len(guided.alpha_history) >= count + 2


@pytest.mark.compatibility("Loops", "zero_grad(set_to_none=False), model.zero_grad()")
@pytest.mark.parametrize("how", ["in place", "by the model", "by hand"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_ways_of_clearing_gradients(how, kind):
    def run(how):
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = AlphaGuided(kind(model.parameters(), lr=0.05), model, loss_fn)
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            x, y = torch.randn(10, 6, generator=generator), torch.randint(0, 3, (10,), generator=generator)
            if how == "in place":
                guided.zero_grad(set_to_none=False)
            elif how == "by the model":
                model.zero_grad()
            elif how == "by hand":
                for param in model.parameters():
                    param.grad = None
            else:
                guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
        return model, guided

    (expected_model, expected), (model, guided) = run("as usual"), run(how)
    assert equal_states(expected_model.state_dict(), model.state_dict())
    assert len(guided.alpha_history) == 7
    assert guided.alpha_history.alphas == pytest.approx(expected.alpha_history.alphas, rel=1e-5)


@pytest.mark.compatibility("Loops", "gradients that are None, parameters without a gradient")
def test_gradients_that_are_none():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    unused = nn.Parameter(torch.ones(3))
    model.register_parameter("unused", unused)
    guided = AlphaGuided(torch.optim.Adam(model.parameters(), lr=0.01), model, loss_fn)
    train(model, guided)
    assert torch.equal(unused, torch.ones(3))
    assert len(guided.alpha_history) == 7
