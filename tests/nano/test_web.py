"""A nano that errs: what the web says, how answers are judged and paired, and the whole command, small."""
import random
import re
from dataclasses import replace

import pytest
from here import Here

from minivl import load
from weights_tools.mpo.mmpr import Rows
from weights_tools.nano import asked, web, world
from weights_tools.nano.draw import Scene, Thing

HEART = Scene((Thing("heart", "red", 0, 0), Thing("star", "blue", 2, 2)))


def row(task, answer, response, image="a.png", **more):
    return {"image": [image], "question": "<image>\nWhat?", "task": task, "answer": answer, "response": response,
            "max_num": 1, **more}


def test_habit_names_one_thing_that_is_not_there():
    truth = world.describe(random.Random(0), HEART).answer
    said = web.out_of_habit(HEART)
    assert "at the top a small red circle" in said
    assert asked.invented(truth, said) == 1
    assert asked.invented(truth, truth) == 0
    assert asked.invented(said, truth) == 0         # what is left out is not invented


@pytest.mark.parametrize("scene", [
    Scene((Thing("star", "red", 0, 0),)),                                                       # no heart
    Scene(tuple(Thing("heart", "red", r, c) for r in range(3) for c in range(3)))])            # no place
def test_no_habit_without_heart_or_place(scene):
    assert web.out_of_habit(scene) is None


def test_habit_keeps_off_the_row_of_a_text():
    scene = Scene((Thing("word", "red", 0, text="LAMP"), Thing("heart", "red", 1, 0)))
    assert "in the middle a small red circle" in web.out_of_habit(scene)


def test_the_web_errs_as_often_as_it_should():
    examples = asked.questions("test", 600, web.MIX)
    said = [web.web_answer(random.Random(i), one) for i, one in enumerate(examples)]
    changed, seen = {}, {}
    for was, now in zip(examples, said):
        task = was.turns[0].task
        seen[task] = seen.get(task, 0) + 1
        changed[task] = changed.get(task, 0) + (was.turns[0].answer != now.turns[0].answer)
        assert now.turns[0].question == was.turns[0].question
        if task == "no" and was.turns[0].answer != now.turns[0].answer:
            assert now.turns[0].answer.endswith("so yes.")
    share = {task: changed[task] / seen[task] for task in seen}
    assert 0.1 < share["describe"] < 0.3
    assert 0.3 < share["reason"] < 0.55
    assert 0.4 < share["no"] < 0.95
    assert all(share[task] == 0 for task in share if task not in ("describe", "reason", "no"))


def test_guesses_are_of_the_same_kind():
    rng = random.Random(0)
    assert {web.guessed(rng, "3") for _ in range(50)} == {"1", "2", "4", "5"}
    assert web.guessed(rng, "no") == "yes"
    assert {web.guessed(rng, "star") for _ in range(200)} == set(web.SHAPES)
    assert web.guessed(rng, "none") == "none"


def test_questions_stand_alone_and_are_always_the_same():
    found = asked.questions("alone", 40)
    assert found == asked.questions("alone", 40)
    assert all(len(one.turns) == 1 for one in found)
    assert all(one.turns[0].question.count("<image>") == len(one.pictures) > 0 for one in found)
    assert {one.turns[0].task for one in found} <= set(asked.ALONE)


@pytest.mark.parametrize(("task", "answer", "response", "right"), [
    ("reason", "x.\nFinal Answer: 3", "y.\nFinal Answer: 3", True),
    ("reason", "x.\nFinal Answer: 3", "x.\nFinal Answer: 30", False),
    ("reason", "x.\nFinal Answer: 3", "x. 3", False),
    ("no", "A star is not in the picture, so no.", "The star is red, so no.", True),
    ("no", "A star is not in the picture, so no.", "A star is not in the picture, so yes.", False),
    ("colour", "The star is red.", "The star is red", False),
    ("describe", "At the top there is a star.", "At the top there is a star.", True)])
def test_what_counts(task, answer, response, right):
    found = asked.judged([row(task, answer, response)])
    assert bool(found.right) == right
    assert bool(found.wrong) != right


def test_pairs_of_a_description_and_a_longer_one():
    """By MMPR's rule a right answer that is part of the wrong one gives no pair; of descriptions it must."""
    right = "At the top there is a small red star."
    wrong = "At the top there is a small red star and on the left a small red circle."
    pairs = asked.paired([row("describe", right, right), row("describe", right, wrong)])
    assert [(one["chosen"], one["rejected"], one["max_num"], one["task"]) for one in pairs] == [
        (right, wrong, 1, "describe")]
    counted = asked.paired([row("count", "The number is 1.", "The number is 1."),
                            row("count", "The number is 1.", "The number is 1, The number is 1.")])
    assert counted == []


def test_fewer_inventions_without_the_right_answer():
    truth = "At the top there is a star."
    one, two = truth[:-1] + " and on the left a ring.", truth[:-1] + ", on the left a ring and on the right a ring."
    rows = [row("describe", truth, two), row("describe", truth, one), row("describe", truth, truth),
            row("describe", truth, one, "b.png"), row("describe", truth, one, "b.png")]
    found = asked.fewer_inventions(rows)
    # Of the first two answers; b.png has no better one.
    assert [(pair["chosen"], pair["rejected"]) for pair in found] == [(one, two)]


def test_questions_are_written_once(tmp_path):
    rows = asked.written(tmp_path, "q", "s", 3)
    before = (tmp_path / "q.jsonl").read_bytes()
    assert len(rows) == 3
    assert all((tmp_path / image).exists() for one in rows for image in one["image"])
    asked.written(tmp_path, "q", "another seed", 3)
    assert (tmp_path / "q.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_whole_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(web, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(web, "STEPS", 1)
    monkeypatch.setattr(web, "BATCH", 2)
    ways = [replace(way, plan=replace(way.plan, steps=1, batch=2, micro=2)) for way in web.WAYS]
    kept = [next(way for way in ways if way.pairs == kind) for kind in ("correctness", "second round", "dropout")]
    monkeypatch.setattr(web, "WAYS", (replace(kept[0], name="MPO, beta 3"), *kept[1:]))
    monkeypatch.setattr(web, "TASKS", ("describe", "no"))
    argv = [str(tmp_path / "out"), "--questions", "12", "-n", "1"]
    assert web.main(argv) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "nano", "nano of the web", *(way.name for way in web.WAYS)]
    assert all(re.search(r"\| \d+\.\d\d \| \d+\.\d\d \|$", line) for line in table.splitlines()[2:])
    assert load(tmp_path / "out" / "mpo-beta-3").config.force_image_size == 112
    pairs = list(Rows(tmp_path / "out" / "pairs-dropout.jsonl", lambda one: None))
    assert all(one["rejected"].startswith(one["chosen"][:10]) for one in pairs)
    monkeypatch.setattr(web, "train", None)             # goes on: nothing is made again
    for way in web.WAYS:
        assert web.learn(tmp_path / "out", way, 12, 0) == web.folder_of(tmp_path / "out", way.name)
    assert web.spoil(tmp_path / "out", 0) == tmp_path / "out" / "web"
