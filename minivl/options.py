"""Rules that all command lines share: an option counts or is refused; a message names options, not Python's names."""
from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Collection

from minivl.limits import InputError

# Fields and arguments that are called otherwise on the command line.
OPTIONS = {"max_num": "--max-tiles", "random_seed": "--seed", "num_segments": "--segments",
           "allow_hosts": "--allow-host"}
FIELD = r"(?:EngineConfig|GenerationConfig)\.(\w+)"
ARGUMENT = r"\b(session_len|max_new_tokens|max_num|num_segments|plain_text|overwrite)\b"
# What a message says of Python -> what it says on a command line. There no limit can be raised.
SPOKEN = (
    (r",? or raise (?:both PIL\.Image\.MAX_IMAGE_PIXELS and )?Limits\(\w+=\.\.\.\)", lambda _: ""),
    (r"(?:plain=True \(in a pipeline: )?EngineConfig\(plain_text=True\)\)?(?= if|$)", lambda _: "--plain-text"),
    (r"pass allow_hosts=\('?([^,']+)'?,\)", lambda found: f"add --allow-host {found[1]}"),
    (r"pass fps=\.\.\.", lambda _: "give --fps"),
    (r"\b(?:pass|set) (\w+)=True\b", lambda found: f"add {option(found[1])}"),
    (r"\b(dtype|device|precision)='(\w+)'( or '(\w+)')?", lambda found: f"--{found[1]} {found[2]}" + (
        f" or {found[4]}" if found[3] else "")),
    (r"`revision`", lambda _: "--revision"),
    (r"(?<!-)\bbound(?= (?:-?\d|is in|must be))|(?<=start of )bound|(?<=end of )bound|(?<=with )bound$",
     lambda _: "--bound"),
    (r"\bfps(?= must be)", lambda _: "--fps"),
    (f"{FIELD}|(?<!-){ARGUMENT}(?: \\(--\\w+\\))?", lambda found: option(found[1] or found[2])),
)


class Help(argparse.RawDescriptionHelpFormatter):
    """Show a description as it is written, its lines broken at words where the terminal is narrower."""

    def _fill_text(self, text, width, indent):
        width += 2      # argparse leaves two columns free
        # A paragraph, or a line that is indented: an example, a row of a list.
        blocks = re.findall(r"(?:^(?! ).+\n?)+|^ .*\n?|^\n", super()._fill_text(text, width, indent), re.M)
        return "".join(block if max(map(len, block.splitlines())) <= width else _broken(block, width)
                       for block in blocks) + "\n"


def _broken(block: str, width: int) -> str:
    start = " " * (len(block) - len(block.lstrip(" ")))
    return textwrap.fill(block, width, subsequent_indent=start and start + "    ", break_on_hyphens=False,
                         break_long_words=False) + "\n"


def option(name: str) -> str:
    """Spell the option of an argument's or a field's name: top_k is --top-k."""
    return OPTIONS.get(name, "--" + name.replace("_", "-"))


def spoken(message: str) -> str:
    """Say on a command line what a message of the Python API says: "session_len" becomes "--session-len"."""
    message, *code = re.split(r"(?=\bpython -c \")", message, maxsplit=1)       # a line to run stays as it is
    for pattern, words in SPOKEN:
        message = re.sub(pattern, words, message)
    return message + "".join(code)


def given(parser: argparse.ArgumentParser, argv: list | None = None, intermixed: bool = False) -> dict[str, str]:
    """Find what a command line itself names, {dest: how it is spelled}; with the value of its default it counts too."""
    defaults = [(action, action.default) for action in parser._actions]
    try:
        for action, _ in defaults:
            action.default = argparse.SUPPRESS
        found = (parser.parse_intermixed_args if intermixed else parser.parse_args)(argv)
    finally:
        for action, default in defaults:
            action.default = default
    return {action.dest: action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            for action, _ in defaults if hasattr(found, action.dest)}


def refuse(found: dict[str, str], names: Collection[str], why: str):
    """Refuse those of `names` that the command line gives (`found`, of `given`), as nothing would be done with them."""
    idle = [spelling for name, spelling in found.items() if name in names]
    if idle:
        raise InputError(f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect {why}")
