"""Benchmarks' files: read as pandas reads them, in one row's memory, whatever is broken; pictures in every form."""
import base64
import io
import json
import os
import pickle
import random
import tracemalloc

import made
import pytest
from conftest import shared
from PIL import Image

from minivl.limits import InputError
from weights_tools.evaluate import tsv
from weights_tools.evaluate.benchmarks import BENCHMARKS, MISSING, Broken, Row

MMSTAR = BENCHMARKS["MMStar"]
PICTURE = made.base64_of(made.picture())
HEAD = ["index", "question", "image", "A", "B", "answer", "category", "l2-category"]


def row(index, question="q", image=PICTURE, a="x", b="y", answer="A", category="c", l2="l") -> dict:
    return dict(zip(HEAD, (index, question, image, a, b, answer, category, l2)))


def table(folder, rows, name="MMStar", benchmark=MMSTAR, **how) -> tsv.Table:
    return tsv.read(made.tsv(folder / f"{name}.tsv", rows, **how), benchmark)


def written(folder, text: str | bytes, name="MMStar", benchmark=MMSTAR) -> tsv.Table:
    (folder / f"{name}.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tsv.read(folder / f"{name}.tsv", benchmark)


def line(index, question="q", image=PICTURE, more="x\ty\tA\tc\tl") -> str:
    return f"{index}\t{question}\t{image}\t{more}\n"


HEADER = "\t".join(HEAD) + "\n"


def shown(image) -> bytes:
    """The pixels of what a model is shown: a JPEG file of Pillow's usual quality."""
    file = io.BytesIO()
    image.save(file, "JPEG")
    return Image.open(file).convert("RGB").tobytes()


def why(found) -> dict:
    return {one.line: one.why for one in found if isinstance(one, Broken)}


# ---- as pandas reads ------------------------------------------------------------------------------------------------

def test_cells_as_the_original(tmp_path):
    golden = json.loads(shared("golden/evaluate/tsv_reading.json").read_text("utf-8"))
    head, *lines = golden["tsv"].splitlines()
    text = f"{head}\timage\n" + "".join(f"{one}\t{PICTURE}\n" for one in lines)
    rows = list(written(tmp_path, text, "AI2D_TEST", BENCHMARKS["AI2D"]))
    assert [{"index": one.index, **one.fields} for one in rows] == golden["rows_as_read"]


# A column's cells -> what pandas 2.2.3 makes of them, as text.
@pytest.mark.parametrize("column, read", [
    (["0.50", "2", ""], ["0.5", "2.0", None]),
    (["007", " 7", "+7"], ["7", "7", "7"]),
    (["2", "NA", "3"], ["2.0", None, "3.0"]),               # a missing value makes decimals of whole numbers
    (["1.", "+.5", "1E05"], ["1.0", "0.5", "100000.0"]),
    (["-Infinity", "iNf", "2"], ["-inf", "inf", "2.0"]),
    (["1e400", "1e16", "1"], ["1e400", "1e16", "1"]),       # too large a number: all stay as they are
    (["1e16", "2.5e-5", "1"], ["1e+16", "2.5e-05", "1.0"]),
    (["1_0", "1", "2"], ["1_0", "1", "2"]),
    (["１", "1", "2"], ["１", "1", "2"]),                     # a full-width digit
    (["inf ", "1", "2"], ["inf ", "1", "2"]),
    (["1e", "1", "2"], ["1e", "1", "2"]),
    (["100000000000000000000", "7", "08"], ["100000000000000000000", "7", "08"]),
    (["true", "FALSE", "null"], ["True", "False", None]),
    (["true", "tRue", "1"], ["true", "tRue", "1"]),
    (["none", "NULL", "#N/A"], ["none", None, None]),
    (['"NA"', '" NA"', '""'], [None, " NA", None]),
    (['"a ""b"" c"', 'a "b" c', '"a" b'], ['a "b" c', 'a "b" c', "a b"]),
    (['"two\nlines"', '"a\tb"', "\\t"], ["two\nlines", "a\tb", "\\t"])])
def test_columns_as_pandas(tmp_path, column, read):
    text = HEADER + "".join(line(k, more=f"{cell}\ty\tA\tc\tl") for k, cell in enumerate(column))
    assert [one.fields["A"] for one in written(tmp_path, text)] == read


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_marks_and_blank_lines(tmp_path, end, mark):
    last = line(4, '"Zwei\nZeilen é"', more="x\ty\tA\tc\t")
    lines = [HEADER.strip(), "", line(3).strip(), "   ", last.strip("\n")]
    rows = list(written(tmp_path, (mark + end.join(lines)).encode()))
    assert [(one.index, one.line, one.fields["question"]) for one in rows] == [(3, 3, "q"), (4, 5, "Zwei\nZeilen é")]
    assert [one.fields["l2-category"] for one in rows] == ["l", None]
    assert set(rows[0].fields) == {"question", "A", "B", "answer", "category", "l2-category"}


def test_indexes_are_numbers_only_where_all_are(tmp_path):
    assert [one.index for one in table(tmp_path, [row("007"), row(8)])] == [7, 8]
    assert [one.index for one in table(tmp_path, [row("007"), row("x8")])] == ["007", "x8"]
    assert [one.index for one in table(tmp_path, [row(7), row("7.5")])] == ["7.0", "7.5"]
    # A row without an index is broken and makes no decimals of the others.
    assert [one.index for one in table(tmp_path, [row(7), row(None), row(8)])] == [7, None, 8]


# ---- whatever is broken ---------------------------------------------------------------------------------------------

def test_broken_rows_are_told_and_the_others_read(tmp_path):
    found = list(written(tmp_path, (HEADER + line(1) + "2\tfew\n" + line(3) + line(4, more="x\ty\tA\tc\tl\tmore")
                                    + line("") + line(6, "NA") + line(1) + line(8, image="99") + line(9)).encode()
                         + line(10, "\udcff").encode("utf-8", "surrogateescape") + line(11, "a\rb").encode()
                         + line(12).encode()))
    assert [one.index for one in found if isinstance(one, Row)] == [1, 3, 9, 12]
    assert why(found) == {
        3: "it has 2 cells, the header has 8", 5: "it has 9 cells, the header has 8", 6: "it has no index",
        7: "it has no question", 8: "its index 1 is that of line 2 too",
        9: "its image is '99', neither a picture in base64 nor an index that leads to one",
        11: "its question is not UTF-8", 12: "it holds a carriage return outside quotes, which ends a line"}
    assert [one.index for one in found if isinstance(one, Broken)] == [2, 4, None, 6, 1, 8, 10, 11]


@pytest.mark.parametrize("after", [
    "", line(9, '"in ""quotes"""'), line(9, '"in quotes"'), line(9, '"two\nlines"'),
    line(9, more='"x\ny"\ty\tA\tc\tl'), line(9, more='x\ty\tA\tc\t"l"')])
@pytest.mark.parametrize("broken", [line(2, '"never closed'), line(2, image='"' + PICTURE),
                                    line(2, more='"x\ty\tA\tc\tl'), line(2, more='x\ty\tA\tc\t"')])
def test_a_quote_that_is_never_closed_costs_its_row_alone(tmp_path, broken, after):
    found = list(written(tmp_path, HEADER + line(1) + broken + line(3) + line(4) + after + line(5)))
    assert [one.index for one in found if isinstance(one, Row)] == [1, 3, 4, *([9] if after else []), 5]
    assert list(why(found)) == [3]
    assert [len(one.pictures()) for one in found if isinstance(one, Row)] == [1] * (4 + bool(after))
    last = {one.line for one in found if isinstance(one, Row)}
    assert max(last) == 6 + (after.count("\n"))


def test_a_broken_row_without_a_picture_is_broken(tmp_path):
    found = written(tmp_path, HEADER + line(1) + "2\tq\t\tx\n" + line(3, image=""))
    assert list(why(found)) == [3] and found.dropped == 1


def test_no_broken_row_is_lost_behind_another(tmp_path):
    """Each has a quote that is never closed but seems to close in the next one; then a row that is too short."""
    found = list(written(tmp_path, HEADER + line(1) + line(2, '"a') + line(3, '"b') + line(4, '"c') + line(5) + "6\n"
                         + line(7, '"d') + line(8)))
    assert [(one.index, one.line, type(one)) for one in found] == [
        (k, k + 1, Row if k in (1, 5, 8) else Broken) for k in range(1, 9)]


def test_a_row_of_several_lines_with_too_few_cells_is_one(tmp_path):
    found = list(written(tmp_path, HEADER + '1\t"one\ntwo\nthree"\tfew\n' + line(2)))
    assert [(one.line, type(one)) for one in found] == [(2, Broken), (5, Row)]


def test_a_line_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("weights_tools.evaluate.cells.MOST_LINE", 3000)
    monkeypatch.setattr("weights_tools.evaluate.cells.MOST_TEXT", 700)
    found = list(written(tmp_path, HEADER + line(1, "q" * 9000) + line(2, '"' + "q\n" * 500 + '"') + line(3)))
    assert [(type(one), one.line) for one in found] == [(Broken, 2), (Broken, 3), (Row, 504)]
    assert list(why(found).values()) == ["the line has more than 3000 bytes", "a quote is not closed"]


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_give_rows_or_say_why(tmp_path, seed):
    draw = random.Random(seed)
    good = (HEADER + "".join(line(k, draw.choice(('"a\nb"', "a", '"a ""b"""'))) for k in range(6))).encode()
    for _ in range(15):
        data = bytearray(good)
        for _ in range(draw.choice((1, 3, 20))):
            at = draw.randrange(len(data))
            data[at:at + draw.randrange(3)] = draw.choice((b'"', b"\t", b"\n", b"\r", b"\xff", b"\0", b"7", b""))
        try:
            found = list(written(tmp_path, bytes(data)))
        except InputError:
            continue
        assert len({one.line for one in found}) == len(found)
        for one in found:
            if isinstance(one, Row):
                try:
                    assert len(one.pictures()) == 1
                except InputError as error:
                    assert f"index {one.index}" in str(error)


@pytest.mark.parametrize("text, says", [
    ("", "does not begin with a line of columns"), ("index\tquestion\n".encode("utf-16"), "does not begin"),
    (HEADER.replace("\n", "\r") + line(1), "does not begin"),
    (HEADER, "no row that can be read (it has only a header)"),
    (HEADER + line(1, image=""), "no row that can be read (1 without a picture)"),
    (HEADER + "1\n2\n", "no row that can be read (line 2: it has 1 cells, the header has 8)"),
    (HEADER.replace("category", "A"), "has the column A twice; take one out")])
def test_what_is_no_table(tmp_path, text, says):
    with pytest.raises(InputError) as error:
        written(tmp_path, text)
    assert says in str(error.value)


def test_columns_that_are_missing(tmp_path):
    path = made.write(tmp_path, ["MMVet"])["MMVet"]
    with pytest.raises(InputError, match="lacks the columns A, B, l2-category of MMStar and has index, question, "
                                         "answer, category, image; by its columns it may be (MMVet|OCRBench)$"):
        tsv.read(path, MMSTAR)
    with pytest.raises(InputError, match=r"lacks the columns image \(or image_path\) of MMVet and has .*; nearest is "
                                         r".*, for which it lacks image \(or image_path\)$"):
        written(tmp_path, "index\tquestion\tanswer\tcategory\n", "MMVet", BENCHMARKS["MMVet"])
    for text, says in (("index,question,image,A\n1,2,3,4\n", "image,A; write it with tabs between the cells$"),
                       ("Index\tquestion\timage\tA\tB\tanswer\tcategory\tl2-category\n",
                        "lacks the columns index of MMStar and has .*; take the file as released$")):
        with pytest.raises(InputError, match=says):
            written(tmp_path, text, "MMStar", MMSTAR)
    with pytest.raises(InputError, match="AI2D.tsv is not there"):
        tsv.read(tmp_path / "AI2D.tsv", BENCHMARKS["AI2D"])


# ---- memory ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("broken", [False, True])
def test_a_large_file_takes_the_memory_of_a_row(tmp_path, broken):
    """24 MB in rows of 200 kB; with a quote near its beginning that would take the whole of it."""
    picture = made.base64_of(made.picture()) + "A" * 200_000
    with open(tmp_path / "MMStar.tsv", "w") as file:
        file.write(HEADER + (line("x", '"never closed') if broken else ""))
        for k in range(120):
            file.write(line(k, image=picture))
    tracemalloc.start()
    found = tsv.read(tmp_path / "MMStar.tsv", MMSTAR)
    count = sum(isinstance(one, Row) for one in found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 120 and len(found) == 120 + broken
    assert peak < (1 + 3 * broken) * 2**20, peak        # MOST_TEXT is searched for the quote


def test_rows_travel_light_to_other_processes(tmp_path):
    found = list(table(tmp_path, [row(k) for k in range(200)]))
    assert len(pickle.dumps(found[7])) < 2000
    assert pickle.loads(pickle.dumps(found[7])).pictures()[0].size == (60, 40)


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_every_made_file_in_both_forms(tmp_path):
    for form in ("base64", "paths"):
        for name, path in made.write(tmp_path / form, n=6, form=form).items():
            found = tsv.read(path, BENCHMARKS[name])
            rows = [one for one in made.MAKERS[name](6) if one["image"]]
            assert [str(one.index) for one in found] == [str(one["index"]) for one in rows]
            assert found.dropped == len(made.MAKERS[name](6)) - len(rows) == (1 if name == "HallusionBench" else 0)
            for one, raw in zip(found, rows):
                assert {**{key: None if str(value) in MISSING else str(value) for key, value in raw.items()
                           if key not in ("index", "image", "image_path")}} == one.fields
                assert len(one.pictures()) == (raw["image"].count("'") // 2 or 1)
                assert all(image.mode == "RGB" for image in one.pictures())


def test_pictures_are_those_that_models_are_shown(tmp_path):
    grey = made.picture(5).convert("L")
    clear = Image.new("RGBA", (9, 9), (200, 30, 10, 0))
    rows = [row(1), row(2, image=made.base64_of(grey)), row(3, image=made.base64_of(clear)), row(4, image="1")]
    pixels = [one.pictures()[0].tobytes() for one in table(tmp_path, rows)]
    assert pixels == [shown(made.picture()), shown(grey), shown(clear.convert("RGB")), shown(made.picture())]
    assert pixels[0] != made.picture().tobytes()
    # Several are written into the files of image_path, each in its own format.
    rows = [{**row(1, image=str([PICTURE] * 2)), "image_path": "['a.JPG', 'b.png']"}]
    assert [one.tobytes() for one in next(iter(table(tmp_path, rows))).pictures()] == [
        shown(made.picture()), made.picture().tobytes()]
    # nano's own are shown as they are, and so are files.
    assert next(iter(table(tmp_path, [row(1)], "NanoMMStar"))).pictures()[0].tobytes() == made.picture().tobytes()
    made.picture().save(tmp_path / "p.png")
    rows = [{**row(1), "image_path": "p.png"}]
    del rows[0]["image"]
    assert next(iter(table(tmp_path, rows))).pictures()[0].tobytes() == made.picture().tobytes()


def test_pictures_of_other_rows(tmp_path):
    """Of an earlier one, a later one, over several; never in a circle, nor of a row that has none."""
    rows = [row(1, image="2"), row(2, image="4"), row(3, image="1"), row(4, image=made.base64_of(made.picture(4))),
            row(5, image="6"), row(6, image="5"), row(7, image="7"), row(8, image="9"), row(9, image=None),
            row(10, image="2.0")]
    found = list(table(tmp_path, rows))
    assert [one.index for one in found if isinstance(one, Row)] == [1, 2, 3, 4]
    assert {one.pictures()[0].tobytes() for one in found if isinstance(one, Row)} == {shown(made.picture(4))}
    assert list(why(found)) == [6, 7, 8, 9, 11]


def test_pictures_in_lines_of_base64(tmp_path):
    wrapped = base64.encodebytes(made.file_of(made.picture())).decode()
    assert wrapped.count("\n") > 2
    found = list(table(tmp_path, [row(1, image=wrapped), row(2)], end="\r\n"))
    assert [one.pictures()[0].size for one in found] == [(60, 40)] * 2 and found[1].line == 3 + wrapped.count("\n")


@pytest.mark.parametrize("image, says", [
    ("A" * 65, "is no base64; write the picture anew"), (base64.b64encode(b"no picture" * 9).decode(), "not a picture"),
    (PICTURE[:len(PICTURE) // 8 * 4], "cut short"), (f"['{PICTURE}', 'no']", "picture 2 of 2: 'no' is no base64"),
    ("[" + " " * 70 + "]", "it has 0 pictures, which must be 1 to 512"), ("[" * 70 + "]" * 70, "is empty (0 bytes)"),
    (str([PICTURE] * 513), "it has 513 pictures"),
    (made.base64_of(Image.new("1", (12_000, 12_000))), " pixels, "),
    (made.base64_of(Image.new("1", (70_000, 500))), "a picture of 70000x500 cannot be a JPEG file; make it smaller")])
def test_pictures_that_are_none(tmp_path, image, says):
    bad, good = table(tmp_path, [row("v1_7", image=image), row(8)])
    with pytest.raises(InputError) as error:
        bad.pictures()
    assert str(error.value).startswith(f"{tmp_path / 'MMStar.tsv'}, index v1_7") and says in str(error.value)
    assert len(good.pictures()) == 1


def test_files_of_pictures_never_lie_outside(tmp_path):
    data = tmp_path / "data"
    for k, place in enumerate(("images/MMBench_DEV_EN_V11", "images/MMBench_V11", ".", "elsewhere", "../secret")):
        (data / place).mkdir(parents=True, exist_ok=True)
        made.picture(k).save(data / place / f"{k}.png")
    (data / "fifo").mkdir()
    os.mkfifo(data / "pipe.png")
    benchmark = BENCHMARKS["MMBench_V11"]
    cells = {"0.png": 0, "1.png": 1, "2.png": 2, "elsewhere/3.png": 3, str(data / "2.png"): 2, "['0.png', '1.png']": 0,
             "images/../2.png": 2, "../secret/4.png": None, str(tmp_path / "secret/4.png"): None, "9.png": None,
             "../../../secret/4.png": None, f"file://{data}/2.png": None, "http://127.0.0.1/2.png": None, "fifo": None,
             "pipe.png": None, "a\0b": None, "x" * 300: None, "/etc/passwd": None}
    rows = [{"index": k, "question": "q", "image_path": cell, "A": 1, "B": 2, "category": "c", "l2-category": "l",
             "split": "dev"} for k, cell in enumerate([*cells, None])]
    found = table(data, rows, "MMBench_DEV_EN_V11", benchmark)
    assert found.dropped == 1
    for one, cell in zip(found, cells):
        if cells[cell] is not None:
            assert one.pictures()[0].tobytes() == made.picture(cells[cell]).tobytes()
            continue
        outside = cell.startswith(("../../..", "/"))
        with pytest.raises(InputError, match=f"index {one.index}, picture 1 of 1: .*"
                                             f"{'lies outside' if outside else 'is in none of'}"):
            one.pictures()


def test_a_file_that_changes(tmp_path):
    found = table(tmp_path, [row(1), row(2)])
    first, _ = found
    made.tsv(tmp_path / "MMStar.tsv", [row(1, question="longer than it was"), row(2)])
    for read in (first.pictures, lambda: list(found)):
        with pytest.raises(InputError, match="MMStar.tsv was changed while it was in use; start again"):
            read()


# ---- which file, which rows -----------------------------------------------------------------------------------------

def test_known_files_are_known(tmp_path, monkeypatch):
    golden = json.loads(shared("golden/evaluate/benchmarks.json").read_text("utf-8"))
    assert {name: {one["tsv_md5_dec2024"], one["tsv_md5_head"]} for name, one in golden.items()} == {
        name: set(known) for name, known in tsv.MD5.items()}
    found = table(tmp_path, [row(1)])
    assert found.released is False and len(found.md5) == 32
    monkeypatch.setitem(tsv.MD5, "MMStar", (found.md5,))
    assert table(tmp_path, [row(1)]).released is True
    assert table(tmp_path, [row(1)], "MMStar_mine").released is None


def test_a_sample_has_each_category_by_its_share(tmp_path):
    rows = [row(k, category=f"c{k % 10 // 6}", l2="l") for k in range(200)]         # 6 of 10, 4 of 10
    found = table(tmp_path, rows)
    drawn = found.sample(50, seed=1)
    assert drawn == sorted(set(drawn)) == found.sample(50, seed=1) != found.sample(50, seed=2)
    assert sum(number % 10 < 6 for number in drawn) == 30 and len(drawn) == 50
    assert [one.index for one in found.pick(drawn)] == drawn
    assert found.sample(1000) == list(range(200))
    assert len({found.sample(1, seed)[0] % 10 < 6 for seed in range(20)}) == 1      # the larger category has the one
    assert len(table(tmp_path, [*rows[:9], row(None)]).sample(10)) == 10            # what is broken is drawn as well


def test_a_sample_of_hallusionbench_has_whole_sets(tmp_path):
    """A figure, or a question, of which only a part is asked is right more often: the score would be too high."""
    rows = made.MAKERS["HallusionBench"](80)
    found = tsv.read(made.tsv(tmp_path / "HallusionBench.tsv", rows), BENCHMARKS["HallusionBench"])
    of = lambda one: (one.fields["l2-category"], one.index.split("_")[3])
    for n, least, most in ((1, 1, 4), (20, 14, 20), (40, 30, 40), (1000, 80, 80)):
        drawn = list(found.pick(found.sample(n, seed=n)))
        assert least <= len(drawn) <= most
        chosen = {of(one) for one in drawn}
        assert {one.index for one in drawn} == {one.index for one in found if of(one) in chosen}
    rows = [{**one, "index": k} for k, one in enumerate(rows[:20]) if one["image"]]       # an index that names no set
    found = tsv.read(made.tsv(tmp_path / "HallusionBench.tsv", rows), BENCHMARKS["HallusionBench"])
    assert len(found.sample(7)) == 7


def test_a_sample_of_circular_questions_and_of_one_split(tmp_path):
    paths = made.write(tmp_path, n=10)
    found = tsv.read(paths["MMBench_V11"], BENCHMARKS["MMBench_V11"])
    drawn = {one.index for one in found.pick(found.sample(4))}
    questions = {index % 10**6 for index in drawn}
    assert len(questions) == 4 < len(drawn)
    assert drawn == {one.index for one in found if one.index % 10**6 in questions}
    found = tsv.read(paths["MMMU"], BENCHMARKS["MMMU"])
    assert {one.fields["split"] for one in found.pick(found.sample(10))} == {"validation"}
    assert len(found.sample(10)) == 8
    assert len(table(tmp_path, [row(1), row(1_000_001)]).sample(1)) == 1        # not a circular one
