"""python -m minivl demo: the small trained model, shipped in the package, answers questions about its sample pictures."""
from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from minivl.chat.pipeline import pipeline
from minivl.files.find import SHIPPED
from minivl.media import load_image
from minivl.sampling import GenerationConfig

SAMPLES = SHIPPED["nano"].parent / "samples"
# Sample picture, and a conversation about it.
TOUR = (("shapes.png", ("describe this image", "What colour is the heart?", "Where is it?", "Is there a green circle?")),
        ("words.png", ("What does it say at the top?", "What is the number?")),
        ("small-print.png", ("What does the small print say?",)),
        ("tall.png", ("describe this image",)))


def show(image, columns: int = 48) -> str:
    """A picture for a terminal with 24-bit colour: two pixels in each character cell, which is twice as high as wide."""
    rows = max(1, round(columns * image.height / image.width / 2))
    small = image.convert("RGB").resize((columns, 2 * rows))
    lines = []
    for y in range(0, 2 * rows, 2):
        cells = ["\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m\u2580".format(*small.getpixel((x, y)), *small.getpixel((x, y + 1)))
                 for x in range(columns)]
        lines.append("  " + "".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def demo(model: str = "nano-awq", out=None) -> int:
    """Streams the answers of the tour, with times; pictures are drawn where the terminal can."""
    out = out or sys.stdout
    start = time.perf_counter()
    pipe = pipeline(model)
    print(f"{model}: loaded in {time.perf_counter() - start:.2f} s\n", file=out)
    colours = out.isatty() and os.environ.get("TERM") not in (None, "dumb") and "NO_COLOR" not in os.environ
    written, seconds = 0, 0.0
    for name, questions in TOUR:
        image = load_image(SAMPLES / name)
        print(f"{_shown(SAMPLES / name)}, {image.width} x {image.height} pixels", file=out)
        if colours:
            print(show(image, min(48, shutil.get_terminal_size().columns - 4)), file=out)
        session = pipe.session()
        for question in questions:
            print(f"  > {question}\n  ", end="", file=out)
            start, prompt = time.perf_counter(), (question, image) if not session.history else question
            for text in pipe.stream(prompt, GenerationConfig(max_new_tokens=128), session):
                print(text.replace("\n", "\n  "), end="", file=out, flush=True)
            took, count = time.perf_counter() - start, session.response.generate_token_len + 1
            written, seconds = written + count, seconds + took
            print(f"\n    [{session.response.input_token_len} tokens read, {count} written in {took:.2f} s]", file=out)
        print(file=out)
    print(f"{written / seconds:.0f} tokens/s, reading the pictures included.", file=out)
    return 0


def _shown(path: Path) -> str:
    return os.path.relpath(path) if not os.path.relpath(path).startswith("..") else str(path)
