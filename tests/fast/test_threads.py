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

def run(chooser: Pace, seconds: dict, steps: int, shape=(1, 1)) -> tuple:
    """Take steps that need so many seconds with so many threads -> (mean seconds, threads of each step)."""
    total, taken = 0.0, []
    for _ in range(steps):
        taken.append(chooser.now)
        total += seconds[chooser.now]
        chooser.took(seconds[chooser.now], chooser.now, shape)
    return total / steps, taken


def test_an_idle_machine_keeps_all_threads_and_loses_little():
    mean, taken = run(Pace(2, True), {1: 1.9, 2: 1.0}, 200)
    assert mean < 1.03
    assert taken.count(1) == 2                  # they were tried


def test_beside_others_one_is_found_and_then_all_again():
    chooser = Pace(2, True)
    mean, taken = run(chooser, {1: 1.7, 2: 30}, 500)
    assert taken[3:10] == [1] * 7
    assert mean < 2.4
    mean, taken = run(chooser, {1: 1.7, 2: 1.0}, 600)
    assert taken[-1] == 2
    assert mean < 1.4
    assert run(chooser, {1: 1.7, 2: 30}, 5)[1] == [2, 2, 1, 1, 1]      # two slow steps are enough


def test_many_cores_a_part_of_which_is_free():
    costs = {16: 9, 8: 8, 4: 1.2, 2: 1.5, 1: 2.5}
    mean, taken = run(Pace(16, True), costs, 300)
    assert taken[-100:].count(4) > 90
    assert mean < 1.7


def test_steps_of_another_shape_are_not_compared():
    chooser = Pace(2, True)
    run(chooser, {1: 1.7, 2: 1.0}, 20)
    taken = []
    for i in range(40):                         # lookup: now one row, now nine
        rows = 1 + 8 * (i % 2)
        taken.append(chooser.now)
        chooser.took(1.0 * rows, chooser.now, (1, rows))
    assert taken == [2] * 40


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
def test_a_large_model_reads_with_all_and_tries_one_for_a_token(monkeypatch):
    pipe = minivl.pipeline("nano")
    monkeypatch.setattr(fast, "LARGE", 0)
    question = ("describe this image", str(SHIPPED["nano"].parent / "samples" / "shapes.png"))
    tower, decoder, between = threads_during(pipe, question)
    assert set(tower) == {2}
    assert decoder[:6] == [2, 2, 2, 2, 1, 1] or decoder[:5] == [2, 2, 2, 2, 1]      # the prompt, three, the trial
    assert pace(pipe.model).most == 2
    torch.set_num_threads(1)                    # the reader's word counts
    assert pace(pipe.model).most == 1
