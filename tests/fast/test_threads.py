"""Threads: small work keeps to one, a large model's steps take as many as are faster, and nobody else notices."""
import threading
import time

import pytest
import torch

import minivl
from minivl import fast
from minivl.fast import threads
from minivl.fast.threads import Pace, at_most, pace, threads_that_help
from minivl.files.find import SHIPPED

needs_openmp = pytest.mark.skipif(threads.openmp() is None, reason="torch's OpenMP cannot be asked here")


@pytest.fixture(autouse=True)
def two():
    """The process has two threads, as a user's would."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_openmp
def test_only_this_thread_and_only_inside():
    def elsewhere():
        seen.append(torch.get_num_threads())

    seen = []
    with at_most(1):
        with at_most(2):                        # never more than there were
            assert torch.get_num_threads() == 1
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
    with pytest.raises(KeyError), at_most(1):
        raise KeyError
    assert torch.get_num_threads() == 2
    after = threading.Thread(target=elsewhere)
    after.start()
    after.join()
    assert seen == [2, 2]


@needs_openmp
def test_products_are_really_computed_by_one():
    def share():
        """Processor time of the whole process over that of this thread, for some products."""
        mine, all_of_it = time.thread_time(), time.process_time()
        for _ in range(20):
            x @ x
            x.exp()
        return (time.process_time() - all_of_it) / (time.thread_time() - mine)

    x = torch.randn(700, 700) / 30
    share()
    with at_most(1):
        alone = min(share() for _ in range(3))
    assert alone < 1.2 < max(share() for _ in range(3))     # how the two share the processor is the system's affair


# ---- which number is chosen: with made-up seconds -------------------------------------------------------------------

class Clock:
    """Stands still but for made-up steps."""
    now = 0.0

    def __call__(self):
        return self.now


def chooser_of(most: int) -> Pace:
    return Pace(most, True, Clock())


def run(chooser: Pace, seconds: dict, steps: int, shape=(1, 1)) -> tuple:
    """Take steps that need so many seconds with so many threads -> (mean seconds, threads of each step)."""
    start, taken = chooser.clock.now, []
    for _ in range(steps):
        taken.append(chooser.now)
        with chooser.step(shape):
            chooser.clock.now += seconds[chooser.now]
    return (chooser.clock.now - start) / steps, taken


def test_an_idle_machine_keeps_all_threads_and_loses_little():
    mean, taken = run(chooser_of(2), {1: 1.9, 2: 1.0}, 300)
    assert mean < 1.015
    assert 1 <= taken.count(1) <= 4             # they were tried
    mean, taken = run(chooser_of(16), {16: 1.0, 8: 1.9, 4: 3.8, 2: 7.5, 1: 15}, 300)
    assert mean < 1.015
    assert {8, 16} == set(taken)                # and nothing hopeless


def test_beside_others_one_is_found_and_then_all_again():
    chooser = chooser_of(2)
    mean, taken = run(chooser, {1: 1.7, 2: 30}, 500)
    assert taken[3:10] == [1] * 7
    assert mean < 2.4
    mean, taken = run(chooser, {1: 1.7, 2: 1.0}, 600)
    assert taken[-1] == 2
    assert mean < 1.4


def test_one_very_slow_step_is_enough_and_two_slow_ones():
    for seconds, want in ((30, [2, 1, 1, 1, 1]), (2.2, [2, 2, 1, 1, 1])):
        chooser = chooser_of(2)
        run(chooser, {1: 1.7, 2: 1.0}, 20)
        assert run(chooser, {1: 1.7, 2: seconds}, 5)[1] == want


def test_the_slower_of_two_steps_counts():
    """Beside others all threads are fast as a rule, and now and then very slow."""
    chooser = chooser_of(2)
    assert run(chooser, {1: 1.7, 2: 1.5}, 1)[1] == run(chooser, {1: 1.7, 2: 12}, 1)[1] == [2]
    assert run(chooser, {1: 1.7, 2: 1.5}, 8)[1] == [1] * 8


def test_after_a_trial_that_cost_much_all_are_found_again():
    chooser = chooser_of(2)
    run(chooser, {1: 1.7, 2: 3000}, 50)
    taken = run(chooser, {1: 1.7, 2: 1.0}, 600)[1]
    assert taken[-1] == 2


def test_many_cores_a_part_of_which_is_free():
    costs = {16: 9, 8: 8, 4: 1.2, 2: 1.5, 1: 2.5}
    mean, taken = run(chooser_of(16), costs, 300)
    assert taken[-100:].count(4) > 90
    assert mean < 1.7


def test_steps_of_another_shape_are_not_compared():
    chooser = chooser_of(2)
    run(chooser, {1: 1.7, 2: 1.0}, 20)
    taken = []
    for i in range(40):                         # lookup: now one row, now nine
        rows = 1 + 8 * (i % 2)
        taken += run(chooser, {1: 1.7 * rows, 2: 1.0 * rows}, 1, (1, rows))[1]
    assert taken == [2] * 40


def test_a_prompt_of_another_length_is_tried_anew():
    chooser = chooser_of(2)
    assert set(run(chooser, {1: 1.7, 2: 6}, 36, (1, 64))[1][3:]) == {1}
    taken = run(chooser, {1: 2.2, 2: 1.3}, 36, (1, 80))[1] + run(chooser, {1: 2.3, 2: 1.4}, 36, (1, 82))[1]
    assert taken[:2] == [1, 1]
    assert taken[-20:] == [2] * 20


class Sleeps(torch.nn.Module):
    """A layer that takes so many seconds with so many threads."""

    def __init__(self, seconds: dict):
        super().__init__()
        self.seconds, self.taken = seconds, []

    def forward(self, x):
        self.taken.append(torch.get_num_threads())
        time.sleep(self.seconds[self.taken[-1]])
        return x


@needs_openmp
def test_each_layer_is_a_step_of_the_thread_that_asks():
    def elsewhere():
        other(torch.zeros(1, 64))

    layers = torch.nn.ModuleList(Sleeps({1: 0.002, 2: 0.02}) for _ in range(12))
    other = layers[5]
    chooser = Pace(2, True)
    with chooser.each(layers):
        for layer in layers:
            layer(torch.zeros(1, 64))
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert [n for layer in layers for n in layer.taken[:1]] == [2, 2] + [1] * 10
    assert other.taken == [1, 2]                # the other thread has all
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


@needs_openmp
def test_a_layer_that_fails_leaves_nothing_behind():
    layers = torch.nn.ModuleList([Sleeps({1: 0.001, 2: 0.001}), torch.nn.Linear(3, 3)])
    chooser = Pace(2, True)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shape"), chooser.each(layers):
            for layer in layers:
                layer(torch.zeros(1, 64))
    assert torch.get_num_threads() == 2
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    assert len(chooser.latest) <= 3             # of the layer that worked


@pytest.mark.parametrize(("cost", "wanted"), [({1: 0.01, 2: 0.002}, 2), ({1: 0.002, 2: 0.01}, 1)])
@needs_openmp
def test_as_many_as_help(cost, wanted):
    assert threads_that_help(lambda: time.sleep(cost[torch.get_num_threads()])) == wanted


# ---- where they are asked for ---------------------------------------------------------------------------------------

def threads_during(pipe, question) -> tuple:
    """Threads in the tower, in the decoder, and between the pieces of an answer."""
    tower, decoder, between = [], [], []
    handles = [pipe.model.vision_model.register_forward_hook(lambda *_: tower.append(torch.get_num_threads())),
               pipe.model.language_model.model.norm.register_forward_hook(
                   lambda *_: decoder.append(torch.get_num_threads()))]
    for _ in pipe.stream(question):
        between.append(torch.get_num_threads())
    for handle in handles:
        handle.remove()
    return tower, decoder, between


@needs_openmp
def test_nano_takes_one_and_the_caller_keeps_two():
    pipe = minivl.pipeline("nano")
    question = ("What colour is the heart?", str(SHIPPED["nano"].parent / "samples" / "shapes.png"))
    tower, decoder, between = threads_during(pipe, question)
    assert set(tower) == set(decoder) == {1}
    assert len(decoder) > 3
    assert set(between) == {2}
    assert torch.get_num_threads() == 2


@needs_openmp
def test_a_large_model_tries_one_in_tiles_in_the_prompt_and_for_tokens(monkeypatch):
    pipe = minivl.pipeline("nano")
    monkeypatch.setattr(fast, "LARGE", 0)
    question = ("describe this image", str(SHIPPED["nano"].parent / "samples" / "shapes.png"))
    layers = {"tiles": pipe.model.vision_model.encoder.layers, "prompt": pipe.model.language_model.layers}
    taken = {name: [] for name in layers}
    for name, found in layers.items():
        for layer in found:
            layer.register_forward_hook(lambda *_, name=name: taken[name].append(torch.get_num_threads()))
    list(pipe.stream(question))
    assert taken["tiles"][:3] == taken["prompt"][:3] == [2, 2, 1]
    tokens = taken["prompt"][len(layers["prompt"])::len(layers["prompt"])]
    assert tokens[:3] == [2, 2, 1]
    assert pace(pipe.model, "prompt").most == 2
    torch.set_num_threads(1)                    # the reader's word counts
    assert pace(pipe.model, "prompt").most == 1
