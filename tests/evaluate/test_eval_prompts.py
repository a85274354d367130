"""Questions, tiles and what is taken out of an answer: as the original's functions wrote them, and where those end."""
import json

import pytest
from conftest import shared

from minivl.limits import InputError
from weights_tools.evaluate.benchmarks import BENCHMARKS, of
from weights_tools.evaluate.prompts import after, build, tiles, upscaled, uses_mpo

LETTER = "Answer with the option's letter from the given choices directly."


def golden(name: str):
    return json.loads(shared(f"golden/evaluate/{name}.json").read_text("utf-8"))


def ask(row, dataset="MMStar", images=1, mpo_prompt=False, cot=False) -> str:
    return build(row, dataset, images=images, mpo_prompt=mpo_prompt, cot=cot)[0]


def test_questions_as_the_original():
    cases = golden("prompts")
    assert len(cases) >= 29
    for case in cases:
        wanted = case["expected"]
        found = build(case["row"], case["dataset"], images=case["num_images"], mpo_prompt=case["use_mpo_prompt"],
                      cot=case["env_use_cot"])
        assert found == (wanted["chat_question"], wanted["max_num"])
        assert upscaled(case["dataset"]) == (wanted["upscaled_images"] == [0])


def test_tiles_as_the_original():
    for dataset, most in golden("max_num").items():
        assert tiles(dataset) == most
    assert tiles("OCRBench_v2") == 24           # by a part of the name
    assert [tiles("MMMU_DEV_VAL", n) for n in (5, 6, 32, 64, 200)] == [12, 10, 2, 1, 1]


def test_answers_as_the_original():
    cases = golden("mpo_post_processing")
    for case in cases:
        assert after(case["text"], case["dataset"], True) == case["expected"]
        assert after(case["text"], case["dataset"], False) == case["text"]


@pytest.mark.parametrize("text, found", [
    ("Answer: A\nFinal answer: B", "A"),                # the first one, though it is not the final one
    ("The final ANSWER:\n\n  (C) a hill \nSure.", "(C) a hill"),
    ("Final answer:", ""),
    ("  I do not know. ", "I do not know."),
    ("回答 Answer:　是", "是")])                         # an ideographic space is white too
def test_what_is_taken_out(text, found):
    assert after(text, "AI2D_TEST", True) == found
    assert after(text, "MathVista_MINI", True) == text


def test_chinese_anywhere_in_the_text_so_far():
    plain = {"question": "Which?", "A": "one", "B": "two"}
    assert ask(plain).endswith(LETTER)
    for change in ({"A": "一"}, {"hint": "看"}, {"question": "哪个?"}, {"Z": "\u9fff"}):
        assert ask({**plain, **change}).endswith("\n请直接回答选项字母。")
    assert ask({"question": "哪个?"}).endswith("哪个?\n请直接回答问题。")
    for other in ("\u4dff", "\ua000", "\u3041", "\uac00", "\uff21"):       # beside the range; kana, hangul, a wide A
        assert ask({**plain, "A": other}).endswith(LETTER)


def test_only_the_english_line_makes_way_for_the_box():
    boxed = ask({"question": "Which?", "A": "1", "B": "2"}, cot=True)
    assert "B. 2\nAnswer the preceding multiple choice question." in boxed
    assert LETTER not in boxed
    assert "\n请直接回答选项字母。\nAnswer the preceding" in ask({"question": "哪个?", "A": "1"}, cot=True)
    assert "\nAnswer the question directly.\nAnswer the preceding" in ask({"question": "Which?"}, cot=True)
    assert ask({"question": f"{LETTER} Now: which?", "A": "1"}, cot=True).startswith("<image>\nNow: which?\nA. 1\nAns")


def test_options_keep_their_letters():
    assert "Which?\nB. two\nD. 0.50\nY. last\n" in ask({"question": "Which?", "A": None, "B": "two", "C": None,
                                                        "D": "0.50", "Y": "last", "hint": None})


def test_braces_are_text():
    for mpo_prompt in (False, True):
        for dataset in ("MMStar", "MathVista_MINI"):
            assert "{question} {0} {" in ask({"question": "{question} {0} {"}, dataset, 1, mpo_prompt, True)


def test_when_the_mpo_prompt_is_used():
    used = {(name, cot) for b in BENCHMARKS.values() for name in b.datasets for cot in (False, True)
            if uses_mpo(name, True, cot)}
    assert {name for name, cot in used if not cot} == {"MMStar", "HallusionBench", "OCRBench"}
    assert {b.name for b in BENCHMARKS.values()} - {of(name).name for name, cot in used if cot} == {"MMVet"}
    assert not uses_mpo("NanoMMStar", True, True)
    assert not any(uses_mpo(name, False, cot) for name, cot in used)


def test_the_mpo_prompt_has_no_space_around_it():
    assert ask({"question": " Why? "}, "MMStar", 1, True).endswith("\n\nQuestion:\n\n Why?")


def test_what_cannot_be_asked():
    with pytest.raises(InputError, match="OCRBench has 0 pictures; it needs at least 1"):
        ask({"question": "?"}, "OCRBench", images=0)
    with pytest.raises(InputError, match="'MMBench' is none of the datasets known here: MMBench_DEV_EN_V11, .*MMVet;"):
        ask({"question": "?"}, "MMBench")
