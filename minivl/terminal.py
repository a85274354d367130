"""What a person at a terminal sees: lines broken at words, every character in some form, paths completed with Tab."""
from __future__ import annotations

import codecs
import contextlib
import os
import re
import shlex
import shutil
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from typing import TextIO

from minivl.limits import InputError
from minivl.media.pictures import SUFFIXES
from minivl.options import spoken

# What stands for a character that the terminal's encoding lacks and that is not a letter with an accent.
PLAIN = {"\u2190": "<-", "\u2192": "->", "\u21d2": "=>", "\u2264": "<=", "\u2265": ">=", "\u00d7": "x", "\u2212": "-",
         "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "--", "\u2018": "'", "\u2019": "'",
         "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u00ab": '"', "\u00bb": '"', "\u2022": "*", "\u00b7": "*",
         "\u00b0": " deg", "\u00a0": " ", "\u00df": "ss", "\u20ac": "EUR", "\u00e6": "ae", "\u00f8": "o"}
# Between wide characters a line may end anywhere, but not before these and not after those.
NOT_FIRST = "\u3001\u3002\uff0c\uff0e\uff01\uff1f\uff1a\uff1b\uff09\u300d\u300f\u3011\u300b\u3009\u30fc"
NOT_LAST = "\uff08\u300c\u300e\u3010\u300a\u3008"


# ---- every character in some form -----------------------------------------------------------------------------------

def plain(text: str) -> str:
    """Write a text with the characters of ASCII: arrows, dashes and quotes by signs alike, letters without accents."""
    letters = unicodedata.normalize("NFKD", "".join(PLAIN.get(char, char) for char in text))
    return "".join(char if char.isascii() else "?" for char in letters if not unicodedata.combining(char)) or "?"


codecs.register_error("minivl.plain", lambda error: (plain(error.object[error.start:error.end]), error.end))


@contextlib.contextmanager
def person() -> Iterator[None]:
    """Speak to a person inside: no character is too much for the terminal, and a warning is a line without its source.

    What Python would call a UnicodeEncodeError is written as `plain` has it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="minivl.plain")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {spoken(str(message))}")
        yield


def can_show(stream: TextIO, text: str) -> bool:
    """Tell whether the encoding of a stream has all characters of a text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
        return True
    except (UnicodeEncodeError, LookupError):
        return False


# ---- lines broken at words ------------------------------------------------------------------------------------------

def width_of(text: str) -> int:
    """Count the columns that a text takes: two for a wide character (Chinese, emoji), none for a combining one."""
    return sum(0 if unicodedata.combining(char) or char in "\u200b\u200d\ufe0f" else
               2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


class Wrapped:
    """Write streamed text to `out` so that on a terminal no line ends inside a word; elsewhere as it is.

    `indent` stands before every line that is not empty. Words wait until they are complete: call `finish` at the end.
    """

    def __init__(self, out: TextIO, indent: str = ""):
        self.out = out
        self.indent = indent
        self.columns = shutil.get_terminal_size().columns if out.isatty() else None
        self.column = 0         # where the cursor is
        self.spaces = ""        # before the waiting word
        self.word = ""          # perhaps not complete yet

    def write(self, text: str):
        """Write what is certain of it."""
        if self.columns is None:
            first, *others = text.split("\n")
            self._put(first)
            for line in others:
                self._end_line()
                self._put(line)
        else:
            for char in text:
                self._take(char)
        self.out.flush()

    def finish(self):
        """Write what is still waiting; the line is not ended."""
        self._place()
        self.out.flush()

    def _take(self, char: str):
        if char == "\n":
            self._place()
            self._end_line()
        elif char.isspace() and char != "\u00a0":
            self._place()
            self.spaces += "    " if char == "\t" else char
        else:
            wide = self.word and (width_of(char) == 2 or width_of(self.word[-1]) == 2)
            if wide and char not in NOT_FIRST and self.word[-1] not in NOT_LAST and width_of(char):
                self._place()
            self.word += char

    def _place(self):
        """Write the waiting word, on the next line if this one has no room for it."""
        if not self.word:
            return
        if self.column and self.column + width_of(self.spaces + self.word) > self.columns:
            self._end_line()
        self._put(self.spaces + self.word)
        self.spaces = self.word = ""

    def _put(self, text: str):
        if not text:
            return
        text = text if self.column else self.indent + text
        self.out.write(text)
        self.column += width_of(text)
        if self.columns and self.column > self.columns:     # a word longer than a line: the terminal itself breaks it
            self.column = (self.column - 1) % self.columns + 1

    def _end_line(self):
        self.out.write("\n")
        self.column = 0
        self.spaces = ""


def say(text: str):
    """Tell the person something that is no answer, on stderr."""
    page = Wrapped(sys.stderr)
    page.write(text + "\n")
    page.finish()


# ---- paths that are typed -------------------------------------------------------------------------------------------

def typed_paths(text: str) -> list[str]:
    """Read the paths of a typed line: with quotes, backslashes or ~ as in a shell, and with bare spaces as well."""
    text = text.strip()
    if os.path.exists(os.path.expanduser(text)) or re.match("https?:|data:|file:", text, re.IGNORECASE):
        return [os.path.expanduser(text)]
    try:
        # A backslash is part of a path on Windows.
        parts = [part.strip("\"'") for part in shlex.split(text, posix=os.name == "posix")]
    except ValueError:          # a quotation mark that is not closed, or one in a name
        parts = [text.strip("\"'")]
    parts = [os.path.expanduser(part) for part in parts]
    if len(parts) > 1 and not re.search("[\"'\\\\]", text) and not all(map(os.path.exists, parts)):
        return [os.path.expanduser(text)]       # one name with spaces, that is not there
    return parts


def completions(line: str, commands: list[str]) -> list[str]:
    """List what a line may become: a command, or after the first of `commands` the folders and pictures there are."""
    head, space, rest = line.partition(" ")
    if not space:
        return [command for command in commands if command.startswith(line)] if line else []
    if head != commands[0].strip():
        return []
    quote = rest[:1] if rest[:1] in ("'", '"') else ""
    start, slash, partial = rest[len(quote):].rpartition("/")
    folder = os.path.expanduser(start + slash)
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return []
    found = []
    for name in names:
        if not name.startswith(partial) or name.startswith(".") and not partial:
            continue
        if os.path.isdir(os.path.join(folder, name)):
            found.append(f"{head} {quote}{start}{slash}{name}/")
        elif name.lower().endswith(SUFFIXES):
            found.append(f"{head} {quote}{start}{slash}{name}{quote}")
    return found


def complete_with_tab(commands: list[str]):
    """Let input() edit its line and complete it with Tab, where Python has readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(_, number):
        # readline completes from its last delimiter on; a path may hold spaces, so only / is one.
        found = completions(readline.get_line_buffer()[:readline.get_endidx()], commands)
        return found[number][readline.get_begidx():] if number < len(found) else None
    readline.set_completer(complete)
    readline.set_completer_delims("/")
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def check_text(text: str, name: str) -> str:
    """Refuse a question that is empty, or that holds bytes which were no text in the terminal's encoding; return it."""
    if not text.strip():
        raise InputError(f"{name} is empty; write a question")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"{name} holds bytes that are not valid {sys.stdin.encoding or 'UTF-8'}; write it in that "
                         "encoding, or set PYTHONUTF8=1 if it is UTF-8")
    return text
