"""Which pairs of iterations are measured."""

from torch import nn

from tests.loops import check_same, make_batches, make_model, plain_run, wrap


def test_every_third_pair_has_the_values_it_has_when_every_pair_is_measured():
    dense, sparse = plain_run("adam", make_batches(9)), plain_run("adam", make_batches(9), every=3)
    assert sparse.alpha_history.iterations.tolist() == [0, 3, 6]
    check_same(sparse.alpha_history, [dense.alpha_history[n] for n in (0, 3, 6)])


def test_every_may_be_a_function_asked_once_per_iteration_before_its_forward_pass():
    asked = []

    def question(n):
        asked.append(n)
        return n in (1, 2)

    guided = plain_run(every=question)
    assert guided.alpha_history.iterations.tolist() == [1, 2]
    assert asked == list(range(7))


def test_iterations_in_no_pair_run_without_hooks():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = wrap(model, loss_fn, every=4)
    hooked = []
    for x, y in make_batches(6):
        guided.zero_grad()
        hooked.append(
            bool(model[0]._forward_hooks or loss_fn._forward_hooks or model[0].weight._post_accumulate_grad_hooks)
        )
        loss_fn(model(x), y).backward()
        guided.step()
    assert hooked == [True, True, False, False, True, True]


def test_there_are_at_most_k_minus_one_measurements_after_k_steps():
    guided = plain_run()
    assert guided.iteration == 6
    assert guided.alpha_history.iterations.tolist() == [0, 1, 2, 3, 4]
    assert guided.alpha_history.dropped == {}
