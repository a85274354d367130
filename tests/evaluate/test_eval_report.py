"""The report of a run: the card's rows, what differs from its setting, and files that say the same when read again."""
import json
import re
from dataclasses import replace

import pytest
from conftest import shared
from runs import SETTINGS, answer, eight, result

from minivl import InputError
from weights_tools.evaluate import differences, intervals, report, results, score
from weights_tools.evaluate.benchmarks import BENCHMARKS, Broken


def said(of, **settings):
    """All that is said to differ, in one text."""
    settings = {**SETTINGS, **settings}
    return "\n".join([*differences.of_run([of], settings), *differences.of_result(of, settings)])


# ---- the card -------------------------------------------------------------------------------------------------------

def test_the_card_is_copied_right():
    text = shared("MODEL_CARD.md").read_text("utf-8")
    rows = re.findall(r"^\| (Model|InternVL2-5-[\w-]+) \| (.*) \|$", text, re.M)
    assert rows[0][1].split(" | ") == ["Avg.", *report.COLUMNS]
    assert {name: tuple(map(float, cells.split(" | "))) for name, cells in rows[1:]} == report.CARD


def test_means_of_the_card():
    """All but one are the mean of their row."""
    other = [name for name, (mean, *numbers) in report.CARD.items() if abs(sum(numbers) / 8 - mean) > 0.0501]
    assert other == ["InternVL2-5-8B"] and sum(report.CARD[other[0]][1:]) / 8 == pytest.approx(68.1, abs=0.05)


@pytest.mark.parametrize("name, rows", [
    ("OpenGVLab/InternVL2_5-4B-MPO-AWQ", ["4B-MPO", "4B"]), ("/data/InternVL2_5-78B/", ["78B"]),
    ("4b-mpo-awq", ["4B-MPO", "4B"]), ("8b-awq", ["8B"]), ("InternVL2-5-38B-MPO-lora", ["38B-MPO", "38B"]),
    ("internvl2_5-1b-tempo", ["1B"]), ("nano", []), ("InternVL2_5-40B", []), ("InternVL2_5-4Beta", []),
    ("mine/4b-mpo-awq-2", []), ("/hub/models--OpenGVLab--InternVL2_5-4B-MPO/snapshots/0123abcd", ["4B-MPO", "4B"]),
    ("InternVL3-8B", [])])
def test_the_rows_of_a_checkpoint(name, rows):
    assert [row.removeprefix("InternVL2-5-") for row in report.card_rows(name)] == rows


# ---- the table ------------------------------------------------------------------------------------------------------

def numbers_in(cell):
    return [float(x) for x in re.findall(r"-?[\d.]+", cell)]


def test_table():
    of = eight(n=40)
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")]
             for line in report.table([*of, result("MMStar", 40, setting="cot")], SETTINGS).splitlines()]
    assert lines[0] == ["", "Avg.", *report.COLUMNS] and set(lines[1]) == {"---"}
    assert [line[0] for line in lines[2:]] == ["this run, default", "this run, cot", "card, InternVL2-5-4B-MPO",
                                               "card, InternVL2-5-4B"]
    for one, cell in zip(of, lines[2][2:]):
        number, low, high = numbers_in(cell)
        assert number == round(one.numbers["score"], 1) and low <= number <= high and high - low > 5
    assert numbers_in(lines[2][1])[0] == round(sum(one.score for one in of) / 8, 1)
    assert lines[3] == ["this run, cot", "", "", lines[2][3], "", "", "", "", "", ""]
    assert lines[4][1:] == [f"{x:.1f}" for x in report.CARD["InternVL2-5-4B-MPO"]]


def test_a_table_of_a_part_has_no_mean_and_no_other_columns():
    table = report.table([result("OCRBench"), result("MMStar")], SETTINGS)
    assert table.startswith("|  | Avg. | MMStar | OCRBench |\n")
    assert "| card, InternVL2-5-4B |  | 58.7 | 82.0 |" in table


def test_what_the_card_has_not_stands_beside_nothing_of_it():
    of = result("MMStar")
    of = replace(of, benchmark=replace(of.benchmark, name="NanoMMStar", datasets=("NanoMMStar",)))
    table = report.table([of], SETTINGS)
    assert "no judge was given (--judge).\n" in said(of) + "\n"
    assert "NanoMMStar" in table and "card" not in table and "The card has no number of these" in said(of)
    assert "USE_COT" not in said(of)


def test_without_a_truth_there_is_no_number():
    def forget(rows, answers):
        for row in rows:
            row.fields["answer"] = None
    of = result("MMBench_V11", change=forget)
    assert of.score is None and of.interval is None
    assert "unknown" in report.table([of], SETTINGS)
    assert "holds no true answer, so that they are in no number" in said(of)
    assert report.average([*eight()[1:], of]) is None


# ---- intervals ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BENCHMARKS)
def test_pieces_give_the_score(name):
    def some(rows, answers):
        answers[0] = answer(rows[0], None, refused="no picture")
        rows[3].fields["answer" if name != "MathVista" else "answer_option"] = None
    for seed in range(5):
        of = result(name, 30, share=0.6, seed=seed, change=some)
        assert intervals.value(of.pieces.sum(0)).item() == pytest.approx(of.score, abs=1e-9)
        assert of.numbers == score.numbers(of.benchmark, of.rows, of.verdicts)


def test_pieces_share_nothing():
    of = result("HallusionBench", 40)
    for piece in (pieces := intervals.apart(of.benchmark, of.rows)):
        assert len({str(of.rows[i].index).split("_")[3] for i in piece}) == 1 and len(piece) == 4
    assert sorted(i for piece in pieces for i in piece) == list(range(40))
    of = result("MMBench_V11", 12)
    assert len(of.pieces) == 12 < len(of.rows)


# ---- what differs ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, words", [
    ({"dtype": "float32"}, "float32; VLMEvalKit computes in bfloat16"), ({"dtype": None}, "precision not known"),
    ({"precision": "fast"}, "--precision fast"), ({"limit_tiles": 1}, "Most tiles of a picture: 1;"),
    ({"max_new_tokens": 64}, "at most 64 tokens"), ({"n": 50, "seed": 7}, "look: 50 questions.*seed 7"),
    ({"scorers": "head"}, "--scorers head"), ({"mpo_prompt": False}, "without the prompt of MPO"),
    ({"checkpoint": "InternVL2_5-4B"}, "with the prompt of MPO"), ({"lora": "mine"}, "what --lora mine has learned")])
def test_each_setting_is_said(settings, words):
    of = result("AI2D", 40)
    assert re.search(words, said(of, **settings)) and not re.search(words, said(of))


def test_a_limit_that_changes_nothing_is_no_difference():
    of = result("AI2D", 40)
    assert "Most tiles" in said(of, limit_tiles=23) and said(of, limit_tiles=24) == said(of)


def test_int4_is_said_whatever_the_name():
    of = result("AI2D", 40)
    for name, int4 in (("mine", True), ("InternVL2_5-4B-AWQ", True), ("mine", False), ("drawqueen", False)):
        assert ("is in int4 (AWQ)" in said(of, checkpoint=name, int4=int4)) == int4


def test_what_is_said_of_the_answers():
    def spoil(rows, answers):
        answers[0] = answer(rows[0], None, refused="row 3: no picture")
        answers[1] = answer(rows[1], "It is", finish_reason="length")
    of = result("AI2D", 40, share=1, change=spoil, differences=["The md5 is another one."],
                broken=[Broken(None, 9, "it has 3 cells")])
    text = said(of)
    assert "could not be asked, which count as wrong: 1 (0: row 3: no picture)." in text
    assert "no rule could read, which count as wrong: 1 of 40; no judge was given (--judge); VLMEvalKit asks" in text
    assert "token limit cut before they ended: 1." in text and "The md5 is another one." in text
    assert f"as wrong ones would make it about {95 * 40 / 41:.1f}: 1 (line 9: it has 3 cells)." in text
    noted = replace(of, verdicts=[replace(one, note="the judge said 'hm'") for one in of.verdicts])
    assert "1 of 40; the judge gave no verdict either (1: the judge said 'hm'); VLMEvalKit" in said(
        noted, judge="http://x", judge_model="m")


def test_judges_are_said():
    vet = result("MMVet")
    text = said(vet, judge="http://x", judge_model="mine")
    assert "Judged by mine with our own instruction: 8 of 8 answers; VLMEvalKit asks gpt-4-1106-preview" in text
    alone = replace(vet, verdicts=score.verdicts(vet.benchmark, vet.rows, ["x"] * 8), numbers={})
    assert "no judge was given (--judge): there is no number" in said(alone) and "no true answer" not in said(alone)


def test_which_file_is_said():
    of = result("AI2D", 40)
    assert "40 questions were asked; of the released file it is 3,088" in said(of)
    assert "3,088" not in said(of, n=40)        # which is said of all
    assert "3,088" not in said(replace(of, dataset="AI2D_TEST_NO_MASK"))
    assert "MMBench_DEV_EN_V11; the card's number is of the test" in said(result("MMBench_V11"))
    assert "Only 8 questions, or groups of them, are" in said(result("AI2D"))
    assert "Only 1 question, or group of them, is" in said(result("AI2D", 1)) and "Only" not in said(result("AI2D", 40))


def test_a_mean_of_few_is_said_to_be_too_narrow():
    """Of eight perfect scores of four questions every draw says 100."""
    few = eight(n=4, share=1)
    text = " ".join(differences.of_run(few, SETTINGS))
    assert "The interval of the mean is too narrow" in text and "independent in MMBench_DEV_EN_V11.default, " in text
    for of in (few[:7], eight(n=130)):
        assert "mean" not in " ".join(differences.of_run(of, SETTINGS))


# ---- files ----------------------------------------------------------------------------------------------------------

def test_what_is_written_is_read_again(tmp_path):
    of = [result("MMBench_V11", broken=(Broken("a", 3, "why"),)), result("MMVet"), result("MMVet", setting="cot")]
    report.write(tmp_path, of, SETTINGS)
    read, settings = results.read(tmp_path)
    assert settings == SETTINGS and [one.name for one in read] == [one.name for one in of]
    for one, other in zip(read, of):
        assert replace(one, rows=()) == replace(other, rows=())
        assert [(row.index, row.fields, row.line) for row in one.rows] == [
            (row.index, row.fields, row.line) for row in other.rows]
        with pytest.raises(InputError, match="pictures are not in"):
            one.rows[0].pictures()
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["results"][0]["score"] == of[0].score and numbers["results"][1]["judged_by"] == {"judge": 8}
    assert numbers["results"][0]["broken"] == [3] and list(numbers["card"]) == [*report.card_rows("4b-mpo-awq")]
    text = (tmp_path / "report.md").read_text("utf-8")
    assert report.table(of, SETTINGS) in text and "## MMVet, cot" in text and "| digest | 0123456789abcdef |" in text
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    report.write(tmp_path, of, SETTINGS)
    assert first == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}     # nothing is left to chance


def test_a_report_of_nothing_is_none(tmp_path):
    with pytest.raises(InputError, match="holds no report.json"):
        results.read(tmp_path)
    of = result("MMStar")
    report.write(tmp_path, [of], SETTINGS)
    path = results.path_of(tmp_path, of.name)
    whole = path.read_bytes()
    other = whole.replace(b'"index": 3', b'"index": 9', 1)
    for content in (b"", whole[:-9], whole.replace(b'"verdict"', b'"x"'), b"[]\n", other):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not what a run writes"):
            results.read(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=re.escape(str(path))):
        results.read(tmp_path)
    without = json.dumps({"results": [], "settings": {name: 0 for name in SETTINGS if name != "data"}})
    for content in ("{", "[]", '{"results": 3, "settings": {}}', without):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(InputError, match="is not what a run writes"):
            results.read(tmp_path)


def test_a_scoring_that_was_not_finished_is_none(tmp_path):
    """The files of each question are written first: a full disk then leaves the report of the rules before."""
    of = result("MMStar")
    report.write(tmp_path, [of], SETTINGS)
    results.write(tmp_path, replace(of, numbers={**of.numbers, "score": of.score + 1}))
    with pytest.raises(InputError, match="of a later scoring than .*report.json, which was not finished"):
        results.read(tmp_path)


def test_what_does_not_belong_together_is_not_written(tmp_path):
    of = result("MMStar")
    with pytest.raises(ValueError, match="8 rows, 8 answers and 7 verdicts"):
        report.write(tmp_path, [replace(of, verdicts=of.verdicts[:7])], SETTINGS)
    with pytest.raises(ValueError, match="settings lacks digest, judge"):
        report.write(tmp_path, [of], {k: v for k, v in SETTINGS.items() if k not in ("judge", "digest")})
    assert not list(tmp_path.iterdir())


ATTACK = "a|b\n# <script>alert(1)</script> [x](http://y) *z* `q` &lt; \u202e_w_ MMBench_V11 \ud800"


def test_strangers_texts_stay_texts_in_markdown(tmp_path):
    def attack(rows, answers):
        for row in rows:
            row.fields["category"] = ATTACK
    of = result("MMStar", change=attack, differences=[ATTACK], broken=[Broken(ATTACK, 2, ATTACK)])
    report.write(tmp_path, [replace(of, dataset="x")], {**SETTINGS, "checkpoint": ATTACK, "judge_model": ATTACK})
    text = (tmp_path / "report.md").read_text("utf-8")
    shown = r"a\|b \# \<script\>alert(1)\</script\> \[x\](http://y) \*z\* \`q\` \&lt;  \_w\_ MMBench_V11  "
    assert text.count(shown.strip()) >= 4
    assert text.splitlines()[0] == "# " + shown
    assert not re.search(r"(?<!\\)[<`]|\n#\s*<|\u202e|\ud800", text)
