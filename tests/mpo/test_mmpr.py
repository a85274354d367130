"""MMPR's files: what is read, in which order, what is written, and what is wrong told with file and line."""
import json
import os
from collections import Counter

import pytest
from conftest import shared
from PIL import Image

from minivl import InputError
from weights_tools.mpo.mmpr import Dataset, Rows, check, check_answer, pictures, read_meta, write_meta, write_rows
from weights_tools.mpo.shuffle import shuffle

PAIR = {"question": "Is it red?", "chosen": "Yes.", "rejected": "No."}


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / "pictures" / name)
    return tmp_path


def meta(folder, **change):
    entry = {"root": "pictures", "annotation": "pairs.jsonl", "data_augment": False, "repeat_time": 1, **change}
    path = folder / "meta.json"
    path.write_text(json.dumps({"mine": {key: value for key, value in entry.items() if value is not ...}}), "utf-8")
    return path


# ---- the original's data --------------------------------------------------------------------------------------------

def test_order_of_the_original():
    folder = shared("golden/mmpr/train")
    want = json.loads((folder / "expected.json").read_text("utf-8"))["order"]
    found = read_meta(folder / "meta.json")
    assert [one.name for one in found] == list(want)
    for one in found:
        assert one.number == want[one.name]["seed"]
        assert one.order(5) == want[one.name]["row_index_order"]
    assert [one.max_dynamic_patch for one in found] == [6, None]


def test_rows_of_the_original():
    rows = Rows(shared("golden/mmpr/train/pairs.jsonl"), lambda row: check(row, shared("images")))
    assert len(rows) == 5 and [len(pictures(row)) for row in rows] == [1, 1, 2, 0, 0]
    assert rows[2]["question"] == "Compare <image> with <image>." and rows[-1] == list(rows)[4]


# ---- without the golden data ----------------------------------------------------------------------------------------

def test_shuffle():
    """As numpy's default_rng(seed).shuffle(list(range(12))), computed with numpy 2."""
    items = list(range(12))
    shuffle(items, 2**31 + 7)
    assert items == [5, 11, 3, 1, 2, 10, 9, 8, 7, 6, 0, 4]
    assert Counter(items) == Counter(range(12))
    for short in ([], [1]):
        shuffle(short, 0)
        assert short in ([], [1])


@pytest.mark.parametrize("repeat, times", [(0, 0), (1, 1), (1.9, 1), (2, 2), (3.5, 3)])
def test_how_often_a_row_comes(repeat, times, tmp_path):
    order = Dataset("x", 3, tmp_path, tmp_path, repeat).order(10)
    assert Counter(order) == Counter(list(range(10)) * times)
    assert len(order) < 2 or order != sorted(order)


def test_a_share_of_the_rows(tmp_path):
    one = Dataset("x", 3, tmp_path, tmp_path, 0.39)
    order = one.order(10)
    assert len(order) == len(set(order)) == 3 and set(order) < set(range(10)) and order == one.order(10)
    assert order != Dataset("x", 4, tmp_path, tmp_path, 0.39).order(10)


def test_what_is_written_is_read(folder):
    rows = [{**PAIR, "image": "a.png", "answer_gt": "yes", "chosen_meta": {"中": "\ud800"}}, PAIR,
            {**PAIR, "question": "<image> or <image>?", "image": ["a.png", "b.png"]}]
    assert write_rows(folder / "pairs.jsonl", iter(rows)) == 3
    path = folder / "meta.json"
    made = [Dataset("one", 0, folder / "pictures", folder / "pairs.jsonl", 0.5),
            Dataset("中", 1, folder / "pictures", folder / "pairs.jsonl", 2, True, 6)]
    write_meta(path, made)
    assert read_meta(path) == made
    assert list(made[0].rows()) == rows and made[0].rows()[1] == PAIR
    assert json.loads(path.read_text("utf-8"))["one"]["length"] == 3
    with pytest.raises(InputError, match="2 datasets have 1 names"):
        write_meta(path, [made[0], made[0]])
    assert read_meta(path) == made


def test_blank_lines_and_line_numbers(folder):
    rows = Rows(lines(folder / "x.jsonl", "", PAIR, " ", "", {**PAIR, "chosen": "Si."}))
    assert [row["chosen"] for row in rows] == ["Yes.", "Si."] == [rows[i]["chosen"] for i in range(2)]
    assert list(rows.lines) == [2, 5]


def test_paths_begin_at_the_working_folder_or_at_the_file(folder, monkeypatch):
    lines(folder / "pairs.jsonl", PAIR)
    (found,) = read_meta(meta(folder))
    assert found.annotation == folder / "pairs.jsonl" and found.root == folder / "pictures"
    (found,) = read_meta(meta(folder, annotation=f"{folder.name}/pairs.jsonl"))       # as MMPR's own
    assert os.path.samefile(found.annotation, folder / "pairs.jsonl")
    monkeypatch.chdir(folder)
    assert str(read_meta(meta(folder))[0].annotation) == "pairs.jsonl"


@pytest.mark.parametrize("row, message", [
    ("{", "not JSON; each line must hold one object"), ("[1]", "a list, not an object"), ("\ufffe", "not JSON"),
    ({"question": "q", "chosen": "a"}, "the row has no rejected; it needs question, chosen, rejected"),
    ({**PAIR, "chosen": 7}, "chosen is a int; it must be a text"),
    ({**PAIR, "chosen": " \n"}, "the chosen answer is empty; take the pair out"),
    ({**PAIR, "rejected": "Yes."}, "are the same, nothing is preferred; take the pair out"),
    ({**PAIR, "image": 3}, "image must be a path or a list of paths"),
    ({**PAIR, "image": ["a.png", ""]}, "image must be a path or a list of paths"),
    ({**PAIR, "image": "c.png"}, r"there is no picture .*pictures.c\.png; check image"),
    ({**PAIR, "image": "a\0.png"}, "there is no picture"),
    ({**PAIR, "question": "<image>", "image": ["a.png", "b.png"]}, "the question has 1 <image> for 2 pictures")])
def test_a_wrong_row_is_named(folder, row, message):
    lines(folder / "pairs.jsonl", PAIR, "", row, PAIR)
    with pytest.raises(InputError, match=rf"pairs\.jsonl, line 3: .*{message}"):
        read_meta(meta(folder))[0].rows()


def test_what_can_be_learned_from(folder):
    """An empty rejected answer; more marks than pictures, which stay text, as in the original."""
    rows = [{**PAIR, "rejected": ""}, {**PAIR, "question": "<image> <image>", "image": ["a.png"]}]
    assert list(Rows(lines(folder / "x.jsonl", *rows))) == rows


def test_files_that_are_not_there_or_empty(folder):
    with pytest.raises(InputError, match="there is no file .*x.jsonl; check the path"):
        Rows(folder / "x.jsonl")
    with pytest.raises(InputError, match="holds no rows"):
        Rows(lines(folder / "x.jsonl", ""))
    with pytest.raises(InputError, match="is a folder"):
        Rows(folder)


def test_sampled_answers(folder):
    row = {"question": "q", "answer": 7, "response": "7"}
    assert list(Rows(lines(folder / "x.jsonl", row), check_answer)) == [row]
    for wrong, message in (({**row, "answer": None}, "answer, the known one"), ({"question": "q"}, "no response"),
                           ({**row, "prompt_version": []}, "no prompt version"),
                           ({**row, "image": ["a.png"]}, "0 <image> for 1 pictures")):
        with pytest.raises(InputError, match=f"x.jsonl, line 2: .*{message}"):
            Rows(lines(folder / "x.jsonl", row, wrong), check_answer)


@pytest.mark.parametrize("change, message", [
    ({"root": ...}, "it has no root; each dataset needs root, annotation and repeat_time"),
    ({"repeat_time": ...}, "it has no repeat_time"), ({"annotation": 3}, "root and annotation must be paths"),
    ({"annotation": "pairs.json"}, "annotation is pairs.json; it must end in jsonl"),
    ({"repeat_time": -1}, "repeat_time is -1; it must be a number in 0..1000"),
    ({"repeat_time": True}, "repeat_time is True"), ({"repeat_time": float("inf")}, "repeat_time is inf"),
    ({"repeat_time": "2"}, "repeat_time is 2"), ({"data_augment": 1}, "data_augment is 1; it must be true or false"),
    ({"max_dynamic_patch": 0}, "max_dynamic_patch is 0"),
    ({"max_dynamic_patch": float("inf")}, "max_dynamic_patch is inf"),
    ({"max_dynamic_patch": 2.5}, "max_dynamic_patch is 2.5")])
def test_a_wrong_dataset_is_named(folder, change, message):
    with pytest.raises(InputError, match=f"meta.json, 'mine': {message}"):
        read_meta(meta(folder, **change))


@pytest.mark.parametrize("text, message", [
    ("[]", "holds a list, not an object"), ("{", "not valid JSON"), ("{}", "names no dataset"),
    ('{"x": []}', "'x': it is a list, not an object")])
def test_what_is_no_meta_json(folder, text, message):
    (folder / "meta.json").write_text(text, "utf-8")
    with pytest.raises(InputError, match=message):
        read_meta(folder / "meta.json")


def test_nothing_wrong_is_written(folder):
    path = folder / "pairs.jsonl"
    write_rows(path, [PAIR])
    with pytest.raises(InputError, match="row 2 of what was to be written to .*: the chosen answer is empty"):
        write_rows(path, [PAIR, {**PAIR, "chosen": ""}])
    assert list(Rows(path)) == [PAIR]
    with pytest.raises(InputError, match="must end in .jsonl"):
        write_rows(folder / "pairs.json", [PAIR])
    assert sorted(one.name for one in folder.iterdir()) == ["pairs.jsonl", "pictures"]
