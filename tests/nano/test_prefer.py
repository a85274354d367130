"""Nano's own answers, learned from: where a reasoning goes wrong, what a description adds, the whole command, small."""
from dataclasses import replace

import pytest
from here import Here

from weights_tools.nano import asked, evaluate, prefer, world
from weights_tools.nano.draw import Scene, Thing

TRUTH = ("The star is on the left. The other shapes are at the top and on the right. Two are right of it."
         "\nFinal Answer: 2")


def item(truth=TRUTH):
    scene = Scene((Thing("star", "red", 1, 0), Thing("ring", "blue", 0, 1)))
    return world.Example((scene,), (world.Turn("<image>\nHow many?", truth, "reason"),))


@pytest.mark.parametrize(("answer", "kind"), [
    (TRUTH, None),
    (TRUTH.replace("on the left", "at the top"), None),                                 # right by luck
    (TRUTH.replace("on the left", "at the top").replace(": 2", ": 1"), "sees"),
    (TRUTH.replace("and on the right", "and below").replace(": 2", ": 1"), "sees"),
    (TRUTH.replace("Two are", "One is").replace(": 2", ": 1"), "concludes"),
    (TRUTH.replace(": 2", ": 1"), "concludes"),
    ("Final Answer: 1", "sees"),
    (TRUTH.rsplit("\n", 1)[0], "other")])
def test_blame(answer, kind):
    assert prefer.blame([item()], [answer]) == {**dict.fromkeys(("sees", "concludes", "other"), 0),
                                                **({kind: 1} if kind else {})}


def test_digits_are_seen_in_one_sentence():
    truth = "The number is 33. 3 plus 3 is 6.\nFinal Answer: 6"
    wrong = truth.replace("is 6", "is 8").replace(": 6", ": 8")
    assert prefer.blame([item(truth)], [wrong])["concludes"] == 1


def test_a_description_comes_before_the_question():
    told = prefer.with_words(item())
    assert [turn.question for turn in told.turns] == ["<image>\nDescribe the picture.", "How many?"]
    assert told.turns[0].answer == "At the top there is a large blue ring and on the left a large red star."
    assert told.turns[1].answer == TRUTH


@pytest.mark.slow
def test_the_whole_command(tmp_path, monkeypatch, capsys):
    for module in (prefer, evaluate):
        monkeypatch.setattr(module, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(prefer, "MIX", {"reason": 1})
    small = {way: replace(plan, steps=1, batch=2, micro=2) for way, plan in prefer.WAYS.items()}
    monkeypatch.setattr(prefer, "WAYS", {"mpo": small["mpo"]})
    monkeypatch.setattr(evaluate, "TARGETS", {"colour": 0.97, "reason": 0.6})
    out = tmp_path / "out"
    assert prefer.main([str(out), "--questions", "8", "-n", "2"]) == 0
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert "| task | aim | nano | mpo |" in table
    assert "| mpo | " in table.splitlines()[-1]
    first, second = (asked.Rows(out / f"questions-{i}.jsonl", lambda row: None) for i in (1, 2))
    assert list(first) != list(second)
    monkeypatch.setattr(prefer, "train", None)          # goes on: nothing is made again
    assert prefer.learn(out, "mpo", 8, 0) == out / "mpo-2"
