"""What a person at a terminal sees: words that stay whole, characters that every terminal has, Tab."""
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import minivl
from minivl.__main__ import main
from minivl.demo import TOUR, demo
from minivl.terminal import Wrapped, can_show, completions, plain, typed_paths, width_of
from minivl.tokenizer import TextStream

ROOT = Path(minivl.__file__).parents[1]
COMMANDS = ["/add ", "/new", "/quit"]


def wrapped(text, columns, monkeypatch, indent="", pieces=None):
    """What a terminal of this width gets, the text given whole or in pieces."""
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", str(columns))
    page = Wrapped(out, indent)
    for piece in pieces or [text]:
        page.write(piece)
    page.finish()
    return out.getvalue()


@pytest.mark.parametrize("columns", [7, 20, 40, 120])
def test_no_line_ends_inside_a_word(columns, monkeypatch):
    text = "In the top left corner there is a large red star, in the middle a circle.\n\n  - two\n  - three  four\nend"
    got = wrapped(text, columns, monkeypatch)
    assert got.split() == text.split() and "\n\n  - two\n" in got
    assert all(len(line) <= columns for line in got.split("\n"))
    whole = {line for line in text.split("\n") if len(line) <= columns}
    assert whole <= set(got.split("\n"))            # what fits is not touched, spaces at its start and inside included
    assert wrapped(text, columns, monkeypatch, pieces=list(text)) == got            # however it was streamed
    assert wrapped(text, columns, monkeypatch, pieces=[text[i:i + 3] for i in range(0, len(text), 3)]) == got


def test_the_last_column_is_used(monkeypatch):
    assert wrapped("aaa bbb ccc", 7, monkeypatch) == "aaa bbb\nccc"
    assert wrapped("aaa bbbb ccc", 7, monkeypatch) == "aaa\nbbbb\nccc"
    assert wrapped("aaa  bbb", 7, monkeypatch) == "aaa\nbbb"


def test_a_word_longer_than_a_line_is_left_to_the_terminal(monkeypatch):
    assert wrapped("a " + "x" * 12 + " b cc", 5, monkeypatch) == "a\n" + "x" * 12 + " b\ncc"


def test_wide_characters_take_two_columns(monkeypatch):
    assert (width_of("漢字"), width_of("a😀"), width_of("e\u0301"), width_of("é")) == (4, 3, 1, 1)
    assert wrapped("漢字漢字漢字", 5, monkeypatch) == "漢字\n漢字\n漢字"
    assert wrapped("漢字漢。字", 6, monkeypatch) == "漢字\n漢。字"      # no line begins with a full stop

    assert wrapped("漢字abc漢", 4, monkeypatch) == "漢字\nabc\n漢"


def test_an_indent_stands_before_lines_and_not_on_empty_ones(monkeypatch):
    assert wrapped("aa bb\n\ncc\n", 5, monkeypatch, "  ") == "  aa\n  bb\n\n  cc\n"


def test_a_pipe_gets_the_text_as_it_is():
    text = "a  long line\twith \n\n  everything " + "x" * 500 + " \u6f22\u5b57 \n"
    out = io.StringIO()
    page = Wrapped(out)
    for char in text:
        page.write(char)
    page.finish()
    assert out.getvalue() == text
    out = io.StringIO()
    Wrapped(out, "  ").write("a\nb\n\nc")
    assert out.getvalue() == "  a\n  b\n\n  c"


# ---- characters -----------------------------------------------------------------------------------------------------

def test_every_character_has_a_plain_form():
    text = "caf\u00e9 \u2192 \u201cna\u00efve\u201d \u2014 3\u00d74 \u2265 1\u2026"
    assert plain(text) == 'cafe -> "naive" -- 3x4 >= 1...'
    assert plain("\u6f22\u5b57") == "??"
    assert all(plain(chr(code)).isascii() and plain(chr(code)) for code in range(0xa0, 0x3000))
    assert can_show(io.TextIOWrapper(io.BytesIO(), "utf-8"), "\u2580") and can_show(io.StringIO(), "\u2580")
    assert not can_show(io.TextIOWrapper(io.BytesIO(), "latin-1"), "\u2580")


ANSWER = "\u201ccaf\u00e9\u201d \u2192 3\u00d74 \u2014 \u6f22\u5b57"


@pytest.mark.parametrize("encoding, seen", [
    ("ascii", '"cafe" -> 3x4 -- ??'), ("latin-1", '"caf\u00e9" -> 3\u00d74 -- ??'), ("utf-8", ANSWER)])
def test_a_terminal_of_another_encoding(tiny, monkeypatch, encoding, seen):
    """Whatever the model writes, and whatever stands in an error: no traceback, no bytes of another encoding."""
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding))
    monkeypatch.setattr(TextStream, "push", lambda self, id: "")
    monkeypatch.setattr(TextStream, "finish", lambda self: ANSWER)
    assert main(["chat", "-m", str(tiny), "-p", "Hello!", "--max-new-tokens", "1"]) == 0
    assert main(["chat", "-m", str(tiny), "-p", "x", ANSWER]) == 2
    assert main(["chat", "-m", str(tiny), "-p", "Hello!", "--max-new-tokens", "1", "--json"]) == 0
    sys.stdout.flush()
    sys.stderr.flush()
    answer, data = out.getvalue().decode(encoding).splitlines()
    assert answer == seen and json.loads(data)["text"] == ANSWER        # data stays what it is
    assert err.getvalue().decode(encoding) == f"error: '{seen}': no such file; check the path\n"


def test_the_demo_draws_only_where_the_terminal_has_the_character(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("minivl.demo.TOUR", TOUR[-1:])
    file = io.BytesIO()
    out = io.TextIOWrapper(file, "latin-1")
    out.isatty = lambda: True
    assert demo("nano", out) == 0
    out.flush()
    text = file.getvalue().decode("latin-1")
    assert "\x1b" not in text and all(len(line) <= 40 for line in text.splitlines()), text
    assert "tokens/s" in " ".join(text.split())


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX terminal")
def test_an_answer_on_a_real_terminal_of_40_columns():
    """All of it at the same time: a pty, its width, a picture of words drawn by nobody, whole words."""
    code = ("import fcntl, os, struct, sys, termios\n"
            "fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('4H', 24, 40, 0, 0))\n"
            "from minivl.__main__ import main\n"
            "sys.exit(main(['chat', 'minivl/nano/samples/shapes.png', '-p', 'describe this image']))")
    leader, follower = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    run = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=follower,
                           stderr=subprocess.DEVNULL, cwd=ROOT, env=env)
    os.close(follower)
    seen = b""
    try:
        while piece := os.read(leader, 4096):
            seen += piece
    except OSError:         # how Linux says that the other end is closed
        pass
    os.close(leader)
    assert run.wait() == 0
    lines = seen.decode().splitlines()
    shapes = str(ROOT / "minivl" / "nano" / "samples" / "shapes.png")
    assert " ".join(lines) == minivl.pipeline("nano")(("describe this image", shapes)).text
    assert len(lines) > 3 and all(len(line) <= 40 for line in lines)


# ---- paths ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "My Pictures").mkdir()
    for name in ("a.png", "b c.jpg", "it's.gif", "notes.txt", ".hidden.png", "My Pictures/d e.webp"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_typed_paths(folder):
    home = str(folder)
    for typed, meant in (("a.png", ["a.png"]), (" b c.jpg ", ["b c.jpg"]), ('"b c.jpg"', ["b c.jpg"]),
                         ("'b c.jpg' a.png", ["b c.jpg", "a.png"]), ("a.png a.png", ["a.png", "a.png"]),
                         ("~/a.png", [f"{home}/a.png"]), ("'~/b c.jpg'", [f"{home}/b c.jpg"]),
                         ("it's.gif", ["it's.gif"]), ("not there.png", ["not there.png"]),
                         ("it's not.png", ["it's not.png"]),
                         ("http://x/a b.png", ["http://x/a b.png"]), ("data:,%20", ["data:,%20"])):
        assert typed_paths(typed) == meant, typed
    if os.name == "posix":
        assert typed_paths(r"b\ c.jpg") == ["b c.jpg"]


def test_completions(folder):
    assert completions("/a", COMMANDS) == ["/add "] and completions("/", COMMANDS) == COMMANDS
    assert completions("wh", COMMANDS) == completions("", COMMANDS) == completions("/new x", COMMANDS) == []
    assert completions("/add ", COMMANDS) == ["/add My Pictures/", "/add a.png", "/add b c.jpg", "/add it's.gif"]
    assert completions("/add b c", COMMANDS) == ["/add b c.jpg"]
    assert completions('/add "b', COMMANDS) == ['/add "b c.jpg"']
    assert completions('/add "~/My', COMMANDS) == ['/add "~/My Pictures/']
    assert completions('/add "~/My Pictures/', COMMANDS) == ['/add "~/My Pictures/d e.webp"']
    assert completions("/add .h", COMMANDS) == ["/add .hidden.png"] and completions("/add no/where", COMMANDS) == []
    for line in completions('/add "~/My Pictures/', COMMANDS) + completions("/add b", COMMANDS):
        assert all(map(os.path.isfile, typed_paths(line.removeprefix("/add "))))


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX terminal")
def test_tab_on_a_real_terminal(folder):
    pytest.importorskip("readline")
    code = ("from minivl.terminal import complete_with_tab\n"
            "complete_with_tab(['/add ', '/new', '/quit'])\n"
            "print('GOT', repr(input('> ')))\n"
            "print('GOT', repr(input('> ')))")
    leader, follower = pty.openpty()
    run = subprocess.Popen([sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=follower, cwd=folder,
                           env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "INPUTRC": "/dev/null"})
    os.close(follower)
    os.write(leader, b"/ad\tMy\td\t\n/add b\t\n")
    seen = b""
    try:
        while piece := os.read(leader, 4096):
            seen += piece
    except OSError:
        pass
    os.close(leader)
    run.wait()
    got = [line.strip() for line in seen.decode().splitlines() if line.startswith("GOT")]
    assert got == ["GOT '/add My Pictures/d e.webp'", "GOT '/add b c.jpg'"], seen
