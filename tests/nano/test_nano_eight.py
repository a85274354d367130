"""Nano's own eight benchmarks: the same files from the same seed, true to the world, fair to who answers."""
import ast
import base64
import csv
import io
import random
import re

import pytest
from PIL import Image

from minivl.limits import InputError
from weights_tools.evaluate.benchmarks import NANO, Row
from weights_tools.evaluate.prompts import after, build
from weights_tools.evaluate.score import infer_option, numbers, verdicts
from weights_tools.nano import choices, eight, evaluate, recipe, twins, world
from weights_tools.nano.draw import COLOURS, SHAPES, SIZES, Scene, Thing

N = 48
csv.field_size_limit(10 ** 8)
PARTS = {"MMStar": eight.MMSTAR, "MMMU": eight.MMMU, "AI2D": eight.AI2D, "MathVista": eight.MATH,
         "MMBench": eight.MMBENCH, "OCRBench": eight.OCR, "MMVet": eight.VET}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("eight")
    assert eight.main([str(out), "-n", str(N)]) == 0
    return out


@pytest.fixture(scope="module")
def tables(folder):
    return {name: table(folder / f"{name}.tsv") for name in NANO}


@pytest.fixture(scope="module")
def sentences(tables):
    """Say for each row of each table what the world answers."""
    found = {}
    for name in NANO:
        short = name.removeprefix("Nano").removesuffix("_V11")
        if short == "HallusionBench":
            found[name] = [f"The star is red, so {row['answer'].lower()}." for row in tables[name]]
            continue
        asked = [one for _, _, one, *_ in eight.questions(short, PARTS[short], len(tables[name]), 0, short not in (
            "OCRBench", "MMVet"))]
        number = (lambda row: int(row["index"]) % eight.COPY - 1) if short == "MMBench" else \
            (lambda row: int(row["index"].removeprefix("nano_")))
        found[name] = [asked[number(row)].sentence for row in tables[name]]
    return found


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def rows_of(table):
    rows = []
    for line, cells in enumerate(table, start=2):
        fields = {name: cell or None for name, cell in cells.items() if name not in ("index", "image")}
        index = int(cells["index"]) if cells["index"].isdigit() else cells["index"]
        rows.append(Row(index, fields, list, line))
    return rows


def scores(name, table, said):
    rows = rows_of(table)
    said = [after(text, name, False) for text in said]
    return numbers(NANO[name], rows, verdicts(NANO[name], rows, said))


def letters(row):
    return {letter: row[letter] for letter in eight.ABCD if row[letter]}


# ---- the files ------------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_files(folder, tmp_path, capsys):
    eight.main([str(tmp_path / "again"), "-n", str(N)])
    eight.main([str(tmp_path / "other"), "-n", str(N), "--seed", "1"])
    for name in NANO:
        file = f"{name}.tsv"
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
        first, other = table(folder / file), table(tmp_path / "other" / file)
        assert [row["image"] for row in first] != [row["image"] for row in other]
    assert f"NanoMMStar.tsv: {N} rows" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["MMStar", "HallusionBench"])
def test_fewer_questions_are_the_first_of_many(name):
    _, rows = eight.BENCHMARKS[name]
    assert list(rows(8, 3)) == list(rows(16, 3))[:8]


def test_all_columns_are_there_and_filled(tables):
    optional = {"hint", *eight.ABCD, "choices", "answer_option"}
    for name, benchmark in NANO.items():
        assert {"index", "image", "question", *benchmark.columns} <= set(tables[name][0])
        assert len({row["index"] for row in tables[name]}) == len(tables[name])
        for row in tables[name]:
            assert all(cell for column, cell in row.items() if column not in optional), row["index"]
            assert None not in row.values() and None not in row


def test_pictures_are_there_or_referred_to(tables):
    several = 0
    for name in NANO:
        by_index = {row["index"]: row["image"] for row in tables[name]}
        for image in by_index.values():
            if len(image) <= 64:
                image = by_index[image]     # of another row, which has one of its own
            found = ast.literal_eval(image) if image[0] == "[" else [image]
            several += len(found) > 1
            for one in found:
                picture = Image.open(io.BytesIO(base64.b64decode(one, validate=True)))
                assert picture.format == "PNG"
                assert picture.mode == "RGB"
    assert several >= N // 2


def test_no_column_of_digits_alone(tables):
    """A reader of tables would take 007 for 7."""
    for name in NANO:
        for column in (*eight.ABCD, "answer", "choices"):
            cells = [row.get(column) for row in tables[name]]
            assert not any(cells) or not (cells[0] or "0").isdigit()


def test_how_many(tables):
    assert len(tables["NanoMMStar"]) == len(tables["NanoHallusionBench"]) == N
    assert [row["split"] for row in tables["NanoMMMU"]].count("validation") == N
    assert {row["split"] for row in tables["NanoMMMU"]} == {"validation", "dev"}
    assert {int(row["index"]) % eight.COPY for row in tables["NanoMMBench_V11"]} == set(range(1, N + 1))


@pytest.mark.parametrize("argv", [["-n", "0"], ["-n", "-3"]])
def test_no_questions_are_refused(tmp_path, argv):
    with pytest.raises(InputError, match="at least one question"):
        eight.main([str(tmp_path), *argv])


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError, match="cannot be written"):
        eight.main([str(tmp_path / "out")])
    assert (tmp_path / "out").read_text() == "mine"


def test_only_held_out_pictures(monkeypatch):
    """No seed is one of a training, whose words begin with its own number."""
    seeds = set()
    example, seeded = world.example, random.Random

    def seen(seed=None):
        seeds.add(seed)
        return seeded(seed)

    monkeypatch.setattr(world, "example", lambda seed, *rest: seeds.add(seed) or example(seed, *rest))
    monkeypatch.setattr(random, "Random", seen)
    for _, rows in eight.BENCHMARKS.values():
        list(rows(8, 0))
    assert len(seeds) > 30
    assert all(str(seed).startswith(f"{evaluate.HELD_OUT} ") for seed in seeds)
    assert not any(stage.name.startswith(evaluate.HELD_OUT) for stage in recipe.STAGES)


# ---- true -----------------------------------------------------------------------------------------------------------

def meant(one):
    """Find the things that a question names, by its words alone."""
    words = one.question.lower()
    things = one.scenes[0].shapes + one.scenes[0].texts
    wanted = [("kind", (*SHAPES, "word", "number")), ("colour", COLOURS), ("size", SIZES)]
    for name, values in wanted:
        said = [value for value in values if re.search(rf"\b{value}\b", words)]
        if said and not (name == "size" and one.task == "size"):
            things = [thing for thing in things if getattr(thing, name) in said]
    if re.search(r"\b(shape|shapes)\b", words):
        things = [thing for thing in things if not thing.is_text]
    said = [place for place in choices.PLACES if place in words]
    return [thing for thing in things if not said or world.place(thing) == said[0]]


SEES = {"colour": lambda thing: thing.colour, "shape": lambda thing: thing.kind, "place": world.place,
        "size": lambda thing: thing.size, "read words": lambda thing: thing.text,
        "read numbers": lambda thing: thing.text}


@pytest.mark.parametrize("name", ["MMBench", "MMStar", "AI2D"])
def test_the_truth_is_what_the_picture_shows(name):
    checked = 0
    for _, part, one, options, right in eight.questions(name, PARTS[name], 4 * N, 0, closed=True):
        if part.task in SEES:
            found = {SEES[part.task](thing) for thing in meant(one)}
            if part.task.startswith("read"):
                found &= set(options.values())      # "Read the text." may mean any
            assert options[right] in found, one
            if not part.task.startswith("read"):
                assert found & set(options.values()) == {options[right]}, one
            checked += 1
    assert checked > N


def test_counts_are_counted():
    for _, part, one, options, right in eight.questions("MMBench", eight.MMBENCH, 4 * N, 0, closed=True):
        if part.task == "count":
            words = one.question.lower()
            said = [value for value in (*COLOURS, *SIZES) if value in words.split()]
            things = [t for t in one.scenes[0].shapes if ("shapes" in words or world.PLURALS[t.kind] in words)
                      and all(value in (t.colour, t.size) for value in said)]
            assert options[right] == world.NUMBERS[len(things)], one


def test_sums_are_added():
    seen = 0
    for _, _, one, _, _ in eight.questions("MathVista", eight.MATH, 4 * N, 0, closed=True):
        shapes = one.scenes[0].shapes
        pair = re.fullmatch(r"how many (\w+) and (\w+) are there together\??", one.question.lower())
        if pair:
            assert int(one.right) == sum(world.PLURALS[thing.kind] in pair.groups() for thing in shapes)
        elif one.question.lower().startswith("what is the sum of the digits"):
            assert int(one.right) == sum(map(int, one.scenes[0].texts[0].text))
        seen += bool(pair) or "sum" in one.question
        assert "step" not in one.question
    assert seen > 10


def test_only_one_change_is_true():
    moved = 0
    for _, part, one, options, right in eight.questions("MMMU", eight.MMMU, 8 * N, 0, closed=True):
        if part.category == "changes":
            then, now = ({world.place(thing): thing for thing in scene.shapes} for scene in one.scenes)
            places = [place for place in choices.PLACES if then.get(place) != now.get(place)]
            true = {world.changed(then.get(place), now.get(place), place) for place in places} or {"Nothing changed"}
            if len(places) == 2:
                moved += 1
                true |= {f"{gone}, it is now {place}" for gone in true for place in places if place in now}
            assert [letter for letter, text in options.items() if text in true] == [right], one
    assert moved


def test_that_a_moved_thing_appeared_is_no_wrong_option():
    first = Scene((Thing("star", "red", 0, 0), Thing("ring", "blue", 2, 2)))
    second = Scene((Thing("star", "red", 1, 1), Thing("ring", "blue", 2, 2)))
    said = {text for seed in range(400) for text in choices.other_changes(random.Random(seed), first, second)}
    assert "In the middle a red star appeared" not in said
    assert {"In the middle a blue star appeared", "At the top a red star appeared", "Nothing changed"} <= said


def so(scene: Scene, question: str) -> bool:
    """Tell from a scene alone whether a question is to be answered with yes."""
    kind = next((kind for kind in SHAPES if re.search(rf"\b{kind}\b", question)), None)
    colour = next((colour for colour in COLOURS if re.search(rf"\b{colour}\b", question)), None)
    place = next((place for place in choices.PLACES if place in question), None)
    if '"' in question:
        return question.split('"')[1] in [thing.text for thing in scene.texts]
    if "shape" in question:
        return world.NUMBERS[len(scene.shapes)] in question
    return any(thing.kind == kind and colour in (None, thing.colour) and place in (None, world.place(thing))
               for thing in scene.shapes)


@pytest.mark.parametrize("sort", twins.SORTS)
def test_twins_differ_in_what_is_asked(sort):
    for seed in range(30):
        pair = twins.twins(random.Random(seed), sort)
        assert pair == twins.twins(random.Random(seed), sort)
        for question, *truth in pair.questions:
            assert [so(scene, question) for scene in pair.scenes] == truth
            assert truth == [True, False] or sort != "premise"
        first, second = (set(scene.things) for scene in pair.scenes)
        assert len(first - second) == 1
        assert len(second - first) == (sort not in ("count", "premise"))


# ---- fair -----------------------------------------------------------------------------------------------------------

def test_options_stand_apart(tables):
    for name in ("NanoMMBench_V11", "NanoMMStar", "NanoMMMU", "NanoAI2D"):
        for row in tables[name]:
            texts = list(letters(row).values())
            assert len(texts) != 1
            assert all(choices.apart(a, b) for a in texts for b in texts if a is not b), texts
            assert not {text.upper() for text in texts} & set(choices.MISSING)


@pytest.mark.parametrize(("right", "wrong"), [("at the top", ["AT", "at the top", "at the bottom"]),
                                              ("11", ["1", "12", "111"]), ("LAMP", ["amp", "LAMB", "lamp", "SAYS"])])
def test_options_that_contain_each_other_are_left_out(right, wrong):
    one = choices.Asked((), "?", f'It says "{right}".', right, tuple(wrong), "")
    options, letter = choices.options(random.Random(0), one)
    assert options[letter] == right
    assert sorted(options.values()) == sorted([right, {"at the top": "at the bottom", "11": "12"}.get(right, "LAMB")])


def test_a_word_that_a_table_reads_as_missing_is_no_option():
    one = choices.Asked((), "?", 'It says "NA".', "NA", ("LAMP", "ROSE"), "")
    assert choices.options(random.Random(0), one) is None


def test_who_answers_as_the_world_has_all_right(tables, sentences):
    for name in NANO:
        assert scores(name, tables[name], sentences[name])["score"] == 100, name


def test_who_says_the_letter_has_all_right(tables):
    for name in ("NanoMMBench_V11", "NanoMMStar", "NanoAI2D"):
        assert scores(name, tables[name], [row["answer"] for row in tables[name]])["score"] == 100


def test_who_always_says_a_letter_has_what_chance_gives(tables):
    for name in ("NanoMMStar", "NanoAI2D"):
        chance = 100 * sum(1 / len(letters(row)) for row in tables[name]) / N
        for letter in "AB":
            assert abs(scores(name, tables[name], [letter] * N)["score"] - chance) < 20     # three standard errors
    mmbench = tables["NanoMMBench_V11"]
    found = scores("NanoMMBench_V11", mmbench, ["A"] * len(mmbench))
    assert found["score"] == 0          # with the options in another order it is wrong
    assert found["vanilla"] == pytest.approx(100 * N / len(mmbench))


@pytest.mark.parametrize("answer", ["Yes", "No"])
def test_who_always_says_yes_has_half(tables, answer):
    found = scores("NanoHallusionBench", tables["NanoHallusionBench"], [f"{answer}."] * N)
    yes = [row["answer"] == answer for row in tables["NanoHallusionBench"]]
    assert found["aAcc"] == pytest.approx(100 * sum(yes) / N) == 50
    assert found["qAcc"] == 0
    assert found["fAcc"] < 10           # a picture with what is asked for, whose twin has it not


def test_who_cannot_tell_has_nothing(tables):
    for name in NANO:
        found = scores(name, tables[name], [world.UNKNOWN] * len(tables[name]))
        if name == "NanoMathVista":     # the rules find "no" inside of "cannot"
            truths = [row["answer"] == "no" for row in tables[name] if row["task"] == "yes or no"]
            assert found["yes or no"] == pytest.approx(100 * sum(truths) / len(truths))
            assert found["score"] == pytest.approx(100 * sum(truths) / N)
        else:
            assert found["score"] == 0, name


def test_who_names_everything_has_next_to_nothing(tables):
    everything = [f"{place} a {size} {colour} {kind}" for place in choices.PLACES for size in SIZES
                  for colour in COLOURS for kind in SHAPES]
    assert scores("NanoMMVet", tables["NanoMMVet"], [", ".join(everything)] * N)["score"] < 1


def test_steps_are_read_at_their_end(tables):
    row = {"question": "How many shapes are left of the star?"}
    assert build(row, "NanoMathVista", images=1, mpo_prompt=True, cot=True) == (f"<image>\n{row['question']}", 6)
    steps = "The star is at the top. Two are left of it.\nFinal Answer: 2"
    assert after(steps, "NanoMathVista", False) == "2"
    assert after(steps, "NanoMMStar", False) == steps


def test_a_single_word_is_enough(tables):
    """Who answers with the option's text alone is right too, whatever the harness's version."""
    for name in ("NanoMMStar", "NanoAI2D"):
        for row in tables[name]:
            assert infer_option(letters(row)[row["answer"]], letters(row)) == row["answer"]
