"""Invented TSVs of all eight benchmarks, with the columns of the released files and every form a picture can have.

    paths = write(folder)                        # {"MMBench_V11": folder/MMBench_DEV_EN_V11.tsv, ..}, 8 questions each
    write(folder, ["OCRBench"], n=3, form="paths")      # pictures as files: folder/images/OCRBench/0.png
    tsv(folder / "MMStar.tsv", rows)             # any rows (dicts): for what is broken

Rows are dicts of column -> str, int, float or None (an empty cell). `right(name, row)` is an answer that is right.
"""
import ast
import base64
import csv
import io
import random
from pathlib import Path

from PIL import Image, ImageDraw

from weights_tools.evaluate.benchmarks import BENCHMARKS

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "square", "bar")
WORDS = ("HARBOUR", "MARKET", "RIVER", "GARDEN", "TOWER", "BRIDGE")


def picture(seed=0, size=(60, 40)) -> Image.Image:
    """A small picture; another one for each seed."""
    draw = random.Random(f"made {seed}")
    image = Image.new("RGB", size, tuple(draw.randrange(256) for _ in range(3)))
    box = [size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2]
    ImageDraw.Draw(image).rectangle(box, fill=tuple(draw.randrange(256) for _ in range(3)))
    return image


def file_of(image: Image.Image, format="PNG") -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def base64_of(image: Image.Image, format="PNG") -> str:
    """As it stands in a cell."""
    return base64.b64encode(file_of(image, format)).decode()


# ---- the rows of each: n questions ----------------------------------------------------------------------------------

def mmbench(n: int) -> list[dict]:
    """Circular: a question of k options has k rows, `index` plus millions; the picture stands in the first only."""
    rows = []
    for i in range(n):
        options = random.Random(i).sample(COLOURS, 2 + i % 3)
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            rows.append({"index": 3 + i + turn * 10**6, "question": f"Which colour has thing {i}?",
                         "hint": "The picture was taken in the north." if i % 2 else None,
                         **{letter: text for letter, text in zip("ABCD", turned + [None] * 4)},
                         "answer": "ABCD"[turned.index(options[0])], "category": ("colour", "place")[i % 2],
                         "image": str(3 + i) if turn else base64_of(picture(f"mmbench {i}"), "JPEG"),
                         "l2-category": ("perception", "reasoning", "relation")[i % 3],
                         "split": "dev"})
    return sorted(rows, key=lambda row: row["index"])


def mmstar(n: int) -> list[dict]:
    """Some questions carry their options in their own text only."""
    rows = []
    for i in range(n):
        inside = i % 4 == 3
        options = [None] * 4 if inside else ["left", "right", "same", "both"]
        question = "How many stripes?\nOptions: A: 2, B: 3, C: 4, D: 5" if inside else f"What is taller in picture {i}?"
        rows.append({"index": i, "question": question, "image": base64_of(picture(f"mmstar {i}"), "JPEG"),
                     **dict(zip("ABCD", options)), "answer": "ABCD"[i % 4],
                     "category": ("coarse perception", "math")[i % 2],
                     "l2-category": ("image style", "geometry", "counting")[i % 3]})
    return rows


def mmmu(n: int) -> list[dict]:
    """One to three pictures, as a list of base64 in text form; open questions without options; two splits."""
    rows = []
    for i in range(n):
        pictures = [base64_of(picture(f"mmmu {i} {k}")) for k in range(1 + i % 3)]
        names = [f"validation_Art_{i}_{k + 1}.jpg" for k in range(len(pictures))]
        split = "dev" if i % 5 == 4 else "validation"
        options = [] if i % 4 == 2 else ["baroque", "cubism", "None", "realism"][:2 + i % 3]
        rows.append({"index": f"{split}_Art_{i}", "question": "Compare " + " and ".join(
                         f"<image {k + 1}>" for k in range(len(pictures))) + ".",
                     **dict(zip("ABCD", options + [None] * 4)), "answer": "AB"[i % 2] if options else "stem",
                     "category": ("Art", "Biology", "Math")[i % 3], "l2-category": ("Humanities", "Science")[i % 2],
                     "split": split, "options": str(options),
                     "image_path": names[0] if len(names) == 1 else str(names),
                     "image": pictures[0] if len(pictures) == 1 else str(pictures)})
    return rows


def mathvista(n: int) -> list[dict]:
    """Whole numbers, decimals, lists, texts and multiple choice."""
    kinds = (("free_form", "integer", "7", None, None), ("free_form", "float", "1.25", None, None),
             ("multi_choice", "text", "top", "['top', 'bottom']", "A"), ("free_form", "list", "[1, 2]", None, None),
             ("multi_choice", "integer", "12", "['10', '12', '14']", "B"), ("free_form", "text", "tiger", None, None))
    rows = []
    for i in range(n):
        question_type, answer_type, answer, choices, option = kinds[i % len(kinds)]
        hint = "Please answer the question and provide the final value at the end."
        rows.append({"index": i + 1, "question": f"Hint: {hint}\nQuestion: How much is it in picture {i}?",
                     "answer": answer, "question_type": question_type, "answer_type": answer_type, "choices": choices,
                     "answer_option": option, "task": ("figure question answering", "math word problem")[i % 2],
                     "skills": str([("algebraic reasoning", "statistical reasoning")[i % 2], "numeric commonsense"]),
                     "category": "math-targeted-vqa", "image": base64_of(picture(f"mathvista {i}"))})
    return rows


def hallusionbench(n: int) -> list[dict]:
    """Each figure has two questions; every fifth row is of a set without a picture, which nobody is asked."""
    rows = []
    for i in range(n):
        kind, number, figure, question = "VS" if i % 4 < 2 else "VD", i // 4, 1 + i // 2 % 2, i % 2
        rows.append({"index": f"hallu_{kind}_chart_{number}_{figure}_{question}", "category": kind,
                     "l2-category": ("chart", "figure")[i // 4 % 2],
                     "question": f"Is the {('left', 'right')[question]} bar of picture {figure} the higher one?",
                     "answer": ("Yes", "No")[(question + figure) % 2],
                     "image": base64_of(picture(f"hallusion {number} {figure}"), "JPEG")})
        if i % 5 == 4:
            rows.append({**rows[-1], "index": f"hallu_{kind}_chart_{number}_0_{question}", "image": None})
    return rows


def ai2d(n: int) -> list[dict]:
    """Options that are letters or numbers themselves; the column of the picture is the last one, or a later row's."""
    rows = [{"index": i, "question": f"Which label marks part {i}?",
             **dict(zip("ABCD", ("A", "B", "C", "D") if i % 2 else ("1", "2", "3.5", "all"))),
             "answer": "ABCD"[i % 4], "category": ("foodChains", "life")[i % 2],
             "image": base64_of(picture(f"ai2d {i}"))} for i in range(n)]
    for i in range(0, n - 1, 3):
        rows[i]["image"] = str(rows[i + 1]["index"])
    return rows


def ocrbench(n: int) -> list[dict]:
    """Answers are Python lists as text; formulas are compared in another way."""
    categories = ("Regular Text Recognition", "Handwritten Mathematical Expression Recognition",
                  "Scene Text-centric VQA", "Key Information Extraction")
    return [{"index": i, "image": base64_of(picture(f"ocr {i}", (120, 40))),
             "question": "what is written in the image?",
             "answer": str(["x ^ { 2 }"] if i % 4 == 1 else [WORDS[i % 6], WORDS[i % 6].lower() + "!"]),
             "category": categories[i % 4], "dataset_name": "made"} for i in range(n)]


def mmvet(n: int) -> list[dict]:
    """Truths with <AND> and <OR>; categories are capabilities with commas; a question of two lines."""
    kinds = (("What is x in the equation?", "-1<AND>-5", "ocr,math"),
             ("Describe the scene.", "A quiet harbour.", "rec,gen"),
             ("Who painted \"this\"?\nSay it in a word.", "Vermeer<OR>Jan Vermeer", "know,rec"),
             ("Where is the lamp?", "left of the door", "spat"))
    return [{"index": f"v1_{i}", "question": kinds[i % 4][0], "answer": kinds[i % 4][1], "category": kinds[i % 4][2],
             "image": base64_of(picture(f"vet {i}"), "WEBP")} for i in range(n)]


MAKERS = {"MMBench_V11": mmbench, "MMStar": mmstar, "MMMU": mmmu, "MathVista": mathvista,
          "HallusionBench": hallusionbench, "AI2D": ai2d, "OCRBench": ocrbench, "MMVet": mmvet}


def right(name: str, row: dict) -> str:
    """What a model would say that is right."""
    if name == "OCRBench":
        return ast.literal_eval(row["answer"])[0]
    if name == "MathVista" and row["answer_option"]:
        return row["answer_option"]
    return row["answer"].split("<AND>")[0].split("<OR>")[0] if name == "MMVet" else row["answer"]


# ---- into files -----------------------------------------------------------------------------------------------------

def write(folder, names=tuple(MAKERS), n=8, form="base64") -> dict[str, Path]:
    """Write a file for each: {name: path}. `form` "paths": the pictures as files below images/, no column `image`."""
    return {name: tsv(Path(folder) / f"{BENCHMARKS[name].datasets[0]}.tsv",
                      MAKERS[name](n) if form == "base64" else as_files(folder, name, MAKERS[name](n)))
            for name in names}


def as_files(folder, name: str, rows: list[dict]) -> list[dict]:
    """Take the pictures out of rows into folder/images/DATASET; the column image_path says where, one or a list."""
    place = Path(folder) / "images" / BENCHMARKS[name].datasets[0]
    place.mkdir(parents=True, exist_ok=True)
    paths = {}
    for row in rows:
        cell = row["image"] or ""
        listed = ast.literal_eval(cell) if cell.startswith("[") else [cell] if len(cell) > 64 else []
        paths[str(row["index"])] = [f"{row['index']}_{k}.png" for k in range(len(listed))]
        for path, text in zip(paths[str(row["index"])], listed):
            (place / path).write_bytes(base64.b64decode(text))
    found = []
    for row in rows:
        mine = paths.get(row["image"]) or paths[str(row["index"])]
        found.append({**{key: value for key, value in row.items() if key != "image"},
                      "image_path": None if not mine else mine[0] if len(mine) == 1 else str(mine)})
    return found


def tsv(path, rows: list[dict], end="\n", encoding="utf-8") -> Path:
    """Write rows as pandas does: tabs between, quotes where they are needed, the columns of the first row."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    return path
