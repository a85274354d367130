"""Let the small trained model, shipped in the package, answer questions about its sample pictures.

    python -m minivl demo [nano | nano-awq | FOLDER | 4b-mpo-awq ...]
"""
from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from PIL import Image

from minivl.chat.pipeline import pipeline
from minivl.files.find import SHIPPED
from minivl.media import load_image
from minivl.sampling import GenerationConfig
from minivl.terminal import Wrapped, can_show

SAMPLES = SHIPPED["nano"].parent / "samples"
# Sample picture, and a conversation about it.
TOUR = (
    ("shapes.png", ("describe this image", "What colour is the heart?", "Where is it?", "Is there a green circle?")),
    ("words.png", ("What does it say at the top?", "What is the number?")),
    ("small-print.png", ("What does the small print say?",)),
    ("tall.png", ("describe this image",)))


def in_terminal(image: Image.Image, columns: int = 48) -> str:
    """Draw a picture for a terminal with 24-bit colour, `columns` characters wide.

    Each character shows two pixels, one above the other, as it is twice as high as wide.
    """
    rows = max(1, round(columns * image.height / image.width / 2))
    small = image.convert("RGB").resize((columns, 2 * rows))
    lines = []
    for y in range(0, 2 * rows, 2):
        cells = ["\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m\u2580".format(
            *small.getpixel((x, y)), *small.getpixel((x, y + 1))) for x in range(columns)]
        lines.append("  " + "".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def demo(model: str = "nano-awq", out: TextIO | None = None) -> int:
    """Stream the answers of the tour to `out`, with their times; draw the pictures where the terminal can.

    Returns the exit code.
    """
    out = out or sys.stdout
    start = time.perf_counter()
    pipe = pipeline(model)
    print(f"{model}: loaded in {time.perf_counter() - start:.2f} s\n", file=out)
    colours = (out.isatty() and os.environ.get("TERM") not in (None, "dumb") and "NO_COLOR" not in os.environ
               and can_show(out, "\u2580"))
    written = 0
    seconds = 0.0
    for name, questions in TOUR:
        image = load_image(SAMPLES / name)
        page = Wrapped(out)
        page.write(f"{_shown(SAMPLES / name)}, {image.width} x {image.height} pixels\n")
        page.finish()
        if colours:
            print(in_terminal(image, min(48, shutil.get_terminal_size().columns - 4)), file=out)
        session = pipe.session()
        for question in questions:
            page = Wrapped(out, "  ")
            page.write(f"> {question}\n")
            start = time.perf_counter()
            prompt = (question, image) if not session.history else question
            for text in pipe.stream(prompt, GenerationConfig(max_new_tokens=128), session):
                page.write(text)
            page.finish()
            took = time.perf_counter() - start
            count = session.response.generate_token_len     # the one count everywhere: without the stop token
            written += count
            seconds += took
            print(file=out)
            page = Wrapped(out, "    ")
            page.write(f"[{session.response.input_token_len} tokens read, {count} written in {took:.2f} s]\n")
            page.finish()
        print(file=out)
    page = Wrapped(out)
    page.write(f"{written / seconds:.0f} tokens/s, reading the pictures included.\n")
    page.finish()
    return 0


def _shown(path: Path) -> str:
    """Write a path as short as it can be: relative to the current folder if it lies in it."""
    short = os.path.relpath(path)
    return str(path) if short.startswith("..") else short


if __name__ == "__main__":
    sys.exit("the demo is a command of minivl: python -m minivl demo")
