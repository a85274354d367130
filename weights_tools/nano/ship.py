"""Put a trained nano into the package: python -m weights_tools.nano.ship RUN/stage-3

    float16 checkpoint -> minivl/nano/float16 and, quantised, minivl/nano/awq
                       -> sample pictures, the model card with its table
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

from minivl import load, options
from minivl.files.find import SHIPPED
from minivl.files.formats import safetensors_header
from minivl.limits import InputError, is_there
from minivl.tokenizer import Tokenizer
from weights_tools import run
from weights_tools.files import told, unfinished, write_text
from weights_tools.nano import evaluate, int4, recipe
from weights_tools.nano.draw import BACKGROUNDS, Scene, Thing, draw
from weights_tools.quantize import Recipe, quantize_folder
from weights_tools.quantize.prompts import from_nano

LIMIT = 16_000_000      # bytes of everything in minivl/nano
WAYS = 1200             # conversations on which the ways to int4 are compared
# Sections of the card that are written by hand around tables of other commands -> which those are.
EIGHT = "## Its own eight benchmarks"
PREFERENCES = "## What preferences teach it"
MEASURED_BY = {EIGHT: "`python -m weights_tools.nano.eight`, then `python -m weights_tools.evaluate`",
               PREFERENCES: "`python -m weights_tools.nano.web` and `python -m weights_tools.nano.prefer`"}
METHOD = "lmdeploy"     # as the shipped weights were made; no group of nano's has one sign, so it hurts none


def _shape(kind, colour, row, column, size="large"):
    return Thing(kind, colour, row, column, size, radius=0.42 if size == "large" else 0.22)


def _word(kind, colour, row, text, size=24, x=0.0):
    return Thing(kind, colour, row, text=text, radius=size, shift=(x, 0.0))


GREY, GREEN, SAND, BLUE, DARK = BACKGROUNDS[:5]
# name -> (scene, questions to try)
SAMPLES = {
    "shapes": (Scene((_shape("star", "red", 0, 0), _shape("circle", "blue", 1, 1),
                      _shape("star", "yellow", 0, 2, "small"), _shape("heart", "purple", 2, 2)), GREY),
               ("describe this image", "How many stars are there?", "Is there a green circle?",
                "What colour is the heart?")),
    "count": (Scene((_shape("ring", "orange", 0, 1, "small"), _shape("ring", "blue", 1, 0),
                     _shape("cross", "orange", 1, 2), _shape("square", "orange", 2, 0, "small"),
                     _shape("ring", "white", 2, 1), _shape("triangle", "black", 2, 2)), GREEN),
              ("How many shapes are there?", "How many rings are there?", "How many orange shapes are there?")),
    "words": (Scene((_word("word", "blue", 0, "OPEN", 28), _word("number", "red", 2, "1955", 24, 0.5)), SAND),
              ("What does it say at the top?", "What is the number?", "What colour is the word?")),
    "new-word": (Scene((_word("word", "black", 1, "MINIVL", 24),), BLUE), ("What does it say?", 'Does it say "MINI"?')),
    "wide": (Scene((_shape("heart", "red", 1, 0), _shape("triangle", "green", 1, 1), _shape("circle", "white", 1, 2)),
                   DARK, grid=(3, 1)),
             ("describe this image", "What is in the middle?")),
    "tall": (Scene((_shape("cross", "black", 0, 1), _shape("star", "yellow", 2, 1)), BLUE, grid=(1, 2)),
             ("describe this image", "Where is the star?")),
    "small-print": (Scene((_shape("circle", "red", 0, 0), _shape("square", "blue", 0, 2),
                           Thing("print", "black", 0, text="741", radius=13, shift=(0.5, 0.78))), GREY,
                          grid=(3, 2), scale=1.07),
                    ("What does the small print say?", "What shape is in the top left corner?")),
    "small-print-tall": (Scene((_shape("ring", "purple", 0, 1), Thing("print", "blue", 0, text="TEA", radius=13,
                                                                      shift=(0.4, 0.85))), SAND, grid=(2, 3)),
                         ("What does the small print say?",)),
    "before": (Scene((_shape("star", "green", 0, 0), _shape("square", "red", 1, 2), _shape("ring", "black", 2, 0)),
                     GREY), ()),
    "after": (Scene((_shape("star", "green", 0, 0), _shape("square", "blue", 1, 2), _shape("ring", "black", 2, 0)),
                    GREY),
              ("(both pictures) What changed?",)),
    "reason": (Scene((_shape("star", "yellow", 1, 1), _shape("circle", "red", 0, 0, "small"),
                      _shape("square", "red", 2, 0), _shape("triangle", "red", 1, 2, "small"),
                      _shape("heart", "blue", 0, 2)), GREY),
               ("How many red shapes are left of the star? Think step by step.",
                "Are there more red shapes than blue shapes?")),
    "texture": (Scene((), texture=11, grid=(2, 2)), ("describe this image",)),
}


def samples(folder):
    """Draw a dozen pictures and a short video; README.md says what to ask."""
    folder = Path(folder)
    with unfinished(folder.parent, "what was there before is left as it was") as new, told(folder, "run again"):
        _draw_samples(new)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(new, folder)


def _draw_samples(folder: Path):
    lines = ["# Pictures from nano's world", "",
             "Drawn by `weights_tools/nano/ship.py`; none of them was seen in training.", "",
             "| picture | ask for example |", "|---|---|"]
    for name, (scene, questions) in SAMPLES.items():
        draw(scene).save(folder / f"{name}.png", optimize=True)
        lines.append(f"| ![{name}]({name}.png) `{name}.png` | {'<br>'.join(questions)} |")
    frames = []
    for i in range(16):
        moving = Thing("circle", "red", 1, 0 + 2 * i / 15, "small", radius=0.35)
        frames.append(draw(Scene((_shape("square", "blue", 0, 1, "small"), moving), GREY)))
    frames[0].save(folder / "video.webp", save_all=True, append_images=frames[1:], duration=125, loop=0, lossless=True)
    lines.append("| ![video](video.webp) `video.webp` | Which way does it move? |")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


CARD = """\
# nano: an InternVL2.5 with {parameters:.2f} million parameters

The architecture, files and prompts of InternVL2_5-4B-MPO, about a thousandth of its size, trained from nothing on
drawn pictures. It knows shapes, colours, places, words and numbers in simple pictures, short videos of them, and
nothing else of the world. It is here to be read, run, changed and measured, offline.

| | vision tower | projector | decoder |
|---|---|---|---|
| nano | InternViT, {vision[num_hidden_layers]} layers of width {vision[hidden_size]}, tiles of {vision[image_size]} \
px, 16 visual tokens each | `mlp1` {mlp} -> {llm[hidden_size]} | Qwen2, {llm[num_hidden_layers]} layers of width \
{llm[hidden_size]}, {llm[num_attention_heads]} heads on {llm[num_key_value_heads]} kv heads, {llm[vocab_size]} tokens |

- `float16/`: the weights as trained, {float_mb:.2f} MB. `awq/`: the decoder's linears in int4 (AWQ, group 128, \
by the method {method}), {awq_mb:.2f} MB.
- `samples/`: pictures and a video to try.
- Made by `python -m weights_tools.nano.train` and `python -m weights_tools.nano.ship`; sha256 of the recipe
  `{recipe}`.
  The recipe grew while these weights were trained (`weights_tools/nano/NOTES.md`): a run from nothing makes a nano
  of this recipe, not bit by bit this one.

## How often it is right

{n} held-out questions of each task, each asked through `minivl.pipeline`, greedy, float32 on a CPU; right means the
whole answer word by word (reasoning: the line after "Final Answer:"). In per cent. *aim* is what was planned before
training. `python -m weights_tools.nano.evaluate` repeats it.

{table}

*read words*: words of a list used in training, in pictures never seen; *read new words*: words that were never
written in training; *read letters*: letters at random; *yes*, *no*: questions whose answer ends so; *false premise*:
"where is the star?" where there is none; *unknown*: pictures and questions from outside its world. "rounded" is int4
by plain rounding to nearest, without AWQ's smoothing.

{eight}## Ways to int4

The mean of the tasks over {way_n} held-out conversations, each answer after the right tokens before it, and the mean
KL(float16 || int4) at the answers' tokens, in nats
(`python -m weights_tools.nano.int4`). Calibrated on 64 conversations: their text alone, their pictures alone, or both.
The standard error of a mean is about half a point: nano cannot tell the methods apart by its answers. By KL clipping
is best. That calibrating on text alone gives the lowest mean with each method that smooths may be chance. What is
shipped is `lmdeploy, both`, by the method of the 4B: another would not be better for certain.

{ways}

## What the parts are good for

The float16 model on the same {ablation_n} questions, with one thing changed.

{ablations}

{preferences}
## Limits

Outside of drawn shapes, words of up to six capitals and numbers of up to four digits it should say that it cannot
tell; it may also describe shapes that are not there. Lower-case letters, other fonts, photographs and languages were
never seen.
"""


def kept(card: Path, heading: str, same: bool) -> str:
    """Return a section of a card that is written by hand: as it stands, or how to measure it if the weights are others.

    The tables in it come from commands of their own, which take up to an hour each.
    """
    if same and (found := re.search(rf"^{heading}\n.*?(?=^## )", card.read_text("utf-8"), re.M | re.S)):
        return found[0]
    return f"{heading}\n\nNot measured with these weights: {MEASURED_BY[heading]}.\n\n"


def ship(source, n: int = 500, ablation_n: int = 500, to: Path | None = None) -> Path:
    """Fill the folder (the package's own by default) from a trained checkpoint and measure it."""
    source = Path(source)
    to = to or SHIPPED["nano"].parent
    model = load(source)
    tokenizer = Tokenizer.load(source)
    note = safetensors_header(source / "model.safetensors")[1]
    if "recipe" not in note:
        raise InputError(f"{source} does not say of which recipe it is; give a folder that weights_tools.nano.train "
                         "wrote")
    note = {key: note[key] for key in ("recipe", "stage") if key in note}
    before = to / "float16" / "model.safetensors"
    same = is_there(before) and before.read_bytes() == (source / "model.safetensors").read_bytes()
    with unfinished(to, "what was there before is left as it was") as new, told(to / "float16", "run again"):
        shutil.copytree(source, new / "float16")
        shutil.rmtree(to / "float16", ignore_errors=True)
        os.replace(new / "float16", to / "float16")
    quantize_folder(source, to / "awq", Recipe(METHOD), prompts=partial(from_nano, 64, model.config, tokenizer),
                    overwrite=True, metadata=note)
    rounded = quantize_folder(source, source.parent / f"{source.name}-rounded", Recipe("rtn"), overwrite=True)
    samples(to / "samples")
    folders = {"float16": to / "float16", "AWQ int4": to / "awq", "rounded int4": rounded}
    scores, rows = evaluate.side_by_side(list(folders.values()), n, ablations_n=ablation_n)
    scores = dict(zip(folders, scores))
    ways = int4.measure(source, source.parent / f"{source.name}-int4", WAYS)
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6, vision=recipe.VISION, llm=recipe.LLM,
        mlp=4 * recipe.VISION["hidden_size"], recipe=note["recipe"], method=METHOD, n=n, ablation_n=ablation_n,
        float_mb=(to / "float16" / "model.safetensors").stat().st_size / 1e6,
        awq_mb=(to / "awq" / "model.safetensors").stat().st_size / 1e6,
        eight=kept(to / "README.md", EIGHT, same), preferences=kept(to / "README.md", PREFERENCES, same),
        table=evaluate.table(list(scores), list(scores.values())),
        way_n=WAYS, ways=int4.table(ways),
        ablations="\n".join(["| change | task | as it is | so |", "|---|---|---|---|", *(
            f"| {what} | {task} | {100 * before:.1f} | {100 * after:.1f} |" for what, task, before, after in rows)]))
    write_text(to / "README.md", card)
    write_text(to / "scores.json", json.dumps({"n": n, "seed": evaluate.HELD_OUT, "recipe": note["recipe"], **scores},
                                              indent=1) + "\n")
    size = sum(p.stat().st_size for p in to.rglob("*") if p.is_file())
    if size > LIMIT:
        raise InputError(f"{to} has {size} bytes, the limit is {LIMIT}; make the model smaller")
    return to


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.nano.ship", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("checkpoint", metavar="FOLDER", help="a stage folder written by weights_tools.nano.train")
    parser.add_argument("-n", type=int, default=500, help="questions per task (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    print(ship(args.checkpoint, args.n, args.n))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
