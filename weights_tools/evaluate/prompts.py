"""Write the question of a row as VLMEvalKit's InternVL wrapper writes it, with the most tiles of each picture.

    build(row, "MMStar", images=1, mpo_prompt=True, cot=False) -> ("<image>\\nYour task is ..", 6)

Two switches: `mpo_prompt`, for models trained by MPO; `cot`, the variable USE_COT=1 there, reasoning before the answer.
Source: VLMEvalKit vlmeval/vlm/internvl/internvl_chat.py:242-337, utils.py:117-314 @00e0cf87.
"""
from __future__ import annotations

import os
import re
from pathlib import Path
from string import ascii_uppercase

from minivl.limits import InputError
from minivl.prompt import IMAGE
from weights_tools.evaluate.benchmarks import of
from weights_tools.mpo.prompts import LETTER, PROMPTS

# Whether the text so far holds a Chinese character -> what a question with options ends in, and one without.
WITH_OPTIONS = {False: LETTER, True: "请直接回答选项字母。"}
WITHOUT = {False: "Answer the question directly.", True: "请直接回答问题。"}
SHORT = "Answer the question using a single word or phrase."
YES_NO = "Please answer yes or no."
BOXED_LETTER = (
    "Answer the preceding multiple choice question. The last line of your response should follow this format: "
    "'Answer: \\boxed{$LETTER}' (without quotes), where LETTER is one of the options. If you are uncertain or the "
    "problem is too complex, make a reasoned guess based on the information provided. Avoid repeating steps "
    "indefinitely—provide your best guess even if unsure. Think step by step logically, considering all relevant "
    "information before answering.")
ALWAYS_MPO = ("MMStar", "HallusionBench", "OCRBench")       # such models are asked so there even without USE_COT=1
# The most tiles of one picture where a dataset's name holds one of these; of the others, and of all pictures together.
TILES = {12: ("ChartQA_TEST", "MMMU_DEV_VAL", "MMMU_TEST", "MME-RealWorld", "OCRVQA"),
         18: ("DocVQA_VAL", "DocVQA_TEST", "DUDE", "MMLongBench_DOC", "SLIDEVQA"),
         24: ("InfoVQA_VAL", "InfoVQA_TEST", "OCRBench", "HRBench4K", "HRBench8K")}
OTHER_TILES = 6
NANO = "Nano"       # nano's own datasets begin so; it has learned no instructions, so its questions stand as they are
ALL_TILES = 64


def build(row: dict, dataset: str, *, images: int, mpo_prompt: bool, cot: bool) -> tuple[str, int]:
    """Write (the question with a mark <image> for each picture, the most tiles of each) of one row.

    row: its columns, None where one is missing. Raises InputError for an unknown dataset, or no picture.
    """
    max_num = tiles(dataset, images)
    if uses_mpo(dataset, mpo_prompt, cot):
        text = PROMPTS["en"].replace("{question}", _with_options(row["question"], row)).strip()
    else:
        text = _plain(row, dataset, cot)
    marks = [f"{IMAGE}\n"] if images == 1 else [f"Image-{k}: {IMAGE}\n" for k in range(1, images + 1)]
    return "".join(marks) + text, max_num


def _plain(row: dict, dataset: str, cot: bool) -> str:
    """Write a question without the MPO prompt."""
    question = row["question"]
    kind = of(dataset).kind
    if dataset.startswith(NANO):
        return question
    if kind == "mcq":
        return _multiple_choice(row, cot)
    if kind == "yes_no":
        return f"{question} {YES_NO} {SHORT}"
    if kind == "ocr":
        return f"{question}\n{SHORT}"
    return PROMPTS["en_v2"].replace("{question}", question) if cot else question


def _multiple_choice(row: dict, cot: bool) -> str:
    hint = "" if row.get("hint") is None else f"{row['hint']}\n"
    question = hint + row["question"]
    text = _with_options(question, row)
    endings = WITHOUT if text == question else WITH_OPTIONS
    text += "\n" + endings[bool(re.search("[\u4e00-\u9fff]", text))]
    # Only the English line makes way; wherever it stands, as there.
    return f"{text.replace(LETTER, '').strip()}\n{BOXED_LETTER}" if cot else text


def _with_options(text: str, row: dict) -> str:
    """Add a line for each option that is there."""
    return "\n".join([text] + [f"{letter}. {row[letter]}" for letter in ascii_uppercase if row.get(letter) is not None])


def model_name(checkpoint: str) -> str:
    """Name a model by the last part of its folder or id; in the hub's cache models--WHO--NAME/snapshots/.. NAME."""
    *before, name = Path(os.path.abspath(os.path.expanduser(checkpoint))).parts
    cached = before[-2] if before[-1:] == ["snapshots"] else ""
    return cached.rpartition("--")[2] if cached.startswith("models--") else name


def is_of_mpo(name: str) -> bool:
    """Tell whether a model's name says MPO, as a word: "tempo" does not."""
    return re.search(r"(?<![a-z])mpo(?![a-z])", name.lower()) is not None


def uses_mpo(dataset: str, mpo_prompt: bool, cot: bool) -> bool:
    """Tell whether this dataset is asked with the MPO prompt: MMVet and nano's own never are."""
    return mpo_prompt and (cot or dataset in ALWAYS_MPO) and "MMVet" not in dataset and not dataset.startswith(NANO)


def after(text: str, dataset: str, mpo: bool) -> str:
    """Take the answer out of what was said to the MPO prompt (`mpo`): of multiple choice and yes/no questions only.

    It is the rest of the line after the first "Final answer:" or "Answer:"; if that line ends there, the next one.
    Of nano's reasoning it is what follows the last "Final Answer:", by which its world judges it.
    """
    if dataset == f"{NANO}MathVista":
        return text.rpartition("Final Answer:")[2].strip()
    if not mpo or of(dataset).kind not in ("mcq", "yes_no"):
        return text
    found = re.search(r"(?:Final answer:|Answer:)\s*(.*)", text, re.IGNORECASE)
    return (found[1] if found else text).strip()


def tiles(dataset: str, images: int = 1) -> int:
    """Look up the most tiles of each picture of a question with so many. Raises InputError without a picture."""
    if images < 1:
        raise InputError(f"a question of {dataset} has {images} pictures; it needs at least 1")
    own = dataset.startswith(NANO)
    most = next((most for most, names in TILES.items() if any(name in dataset for name in names) and not own),
                OTHER_TILES)
    return max(1, min(most, ALL_TILES // images))


def upscaled(dataset: str) -> bool:
    """Tell whether a question's first picture is doubled in size (bilinear) before it is cut into tiles."""
    return dataset.startswith("MMMU")
