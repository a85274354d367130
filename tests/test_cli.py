"""The command line as a person uses it: one answer, a pipe, a conversation on a terminal, Ctrl-C."""
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import GOLDEN
from PIL import Image

import minivl
from minivl.__main__ import main
from minivl.terminal import person
from minivl.tokenizer import TextStream

ROOT = Path(minivl.__file__).parents[1]
TIGER = str(GOLDEN / "tiger.jpeg")


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


def answer(tiny, *pictures, text="what?", n=8):
    pipe = minivl.pipeline(tiny)
    return pipe((text, list(pictures)), minivl.GenerationConfig(max_new_tokens=n))


def test_one_answer(tiny, capsys):
    assert main(["chat", "-m", str(tiny), TIGER, "-p", "what?", "--max-new-tokens", "8"]) == 0
    out = capsys.readouterr()
    assert out.out == answer(tiny, TIGER).text + "\n" and out.err == ""


def test_json(tiny, capsys):
    assert main(["chat", "-m", str(tiny), TIGER, "-p", "what?", "--max-new-tokens", "8", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    want = answer(tiny, TIGER)
    assert got["text"] == want.text
    assert got["token_ids"] == want.token_ids
    assert got["finish_reason"] == want.finish_reason


def test_fewer_tiles_several_pictures_and_system(tiny, capsys):
    def tokens(*arguments):
        assert main(["chat", "-m", str(tiny), "-p", "what?", "--max-new-tokens", "2", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["input_token_len"]
    assert tokens(TIGER) - tokens(TIGER, "--max-tiles", "1") == 6 * 4
    numbered = answer(tiny, TIGER, TIGER, text="Image-1: <IMAGE_TOKEN>\nImage-2: <IMAGE_TOKEN>\nwhat?").input_token_len
    assert tokens(TIGER, TIGER) == numbered
    assert tokens(TIGER, "--system", "Be brief.") < tokens(TIGER)


def test_sampling_options(tiny, capsys):
    def text(*arguments):
        assert main(["chat", "-m", str(tiny), "-p", "hello", "--max-new-tokens", "12", *arguments]) == 0
        return capsys.readouterr().out
    draw = ["--sample", "--temperature", "1.8", "--top-k", "0"]
    assert text(*draw, "--seed", "1") == text(*draw, "--seed", "1") != text(*draw, "--seed", "2")
    assert text("--sample", "--top-k", "1") == text()
    assert main(["chat", "-m", str(tiny), "-p", "x", "--temperature", "1", "--seed", "3"]) == 2
    assert "--temperature, --seed has an effect only with --sample" in capsys.readouterr().err


def test_video(tiny, tmp_path, capsys):
    frames = [Image.new("RGB", (60, 60), (i * 20, 0, 0)) for i in range(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    asked = ["chat", "-m", str(tiny), "--video", str(tmp_path / "a.gif"), "--segments", "4", "-p", "what?", "--json",
             "--max-new-tokens", "2"]
    assert main(asked) == 0
    four = json.loads(capsys.readouterr().out)["input_token_len"]
    messages = minivl.video_prompt("what?", minivl.load_video(tmp_path / "a.gif", num_segments=4))
    assert minivl.pipeline(tiny)(messages, minivl.GenerationConfig(max_new_tokens=2)).input_token_len == four
    assert main([*asked, "--plain-text"]) == 0
    assert json.loads(capsys.readouterr().out)["input_token_len"] == four
    assert main(["chat", "-m", str(tiny), "--video", str(tmp_path / "a.gif"), TIGER, "-p", "what?"]) == 2
    assert "a video comes without pictures" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["missing.png", "-p", "x"], "missing.png"), (["-p", ""], "the question of -p is empty; write a question"),
    ([TIGER, "-p", " \n\t"], "the question of -p is empty"), (["-p", "caf\udce9"], "bytes that are not valid"),
    (["-p", "x", "--segments", "0", "--video", str(GOLDEN)], "--segments, the number of frames to take"),
    (["-p", "x", "--session-len", "0"], "--session-len is 0; it must be"),
    (["-p", "x", "--max-new-tokens", "99999"], "--max-new-tokens is 99999, the limit is 32768; ask for fewer"),
    (["-p", "long " * 40, "--session-len", "20"], "or a larger --session-len"),
    (["-p", "<image>"], "give the pictures, or --plain-text if it is only text"),
    (["-p", "x", "--max-tiles", "2", "--allow-host", "a"], "--max-tiles, --allow-host has an effect only on pictures"),
    (["-p", "x", "--video", "a.gif", "--fps", "2"], "give --bound too, or leave --fps out"),
    (["-p", "x", "--video", str(GOLDEN), "--bound", "3", "1"], "--bound 3..1 seconds must not end before"),
    ([TIGER, "-p", "x", "--max-tiles", "99"], "--max-tiles is 99; it must be in 1..40"),
    (["-p", "x", "--fps", "3"], "name it with --video"),
    (["-p", "x", "--video", "a.gif", "--max-tiles", "2"], "without pictures"),
    (["-p", "x", "--device", "gpu"], "device 'gpu' cannot"),
    (["-p", "x", "--sample", "--top-p", "7"], "error: --top-p is 7.0; it must be in"),
    (["-p", "x", "--sample", "--seed", "-1"], "error: --seed is -1"), (["-p", "x", "--video", "none.gif"], "none.gif")])
def test_errors_are_one_line_and_exit_2(tiny, capsys, arguments, message):
    assert main(["chat", "-m", str(tiny), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err and err.count("\n") == 1


def test_missing_model(capsys):
    assert main(["chat", "-m", "does/not/exist", "-p", "x"]) == 2
    assert "error: does/not/exist does not exist" in capsys.readouterr().err


def test_the_shipped_model_is_the_default(capsys, monkeypatch):
    opened = []

    def noted(name, config):
        opened.append(name)
        return minivl.pipeline(name, config)
    monkeypatch.setattr("minivl.__main__.pipeline", noted)
    assert main(["chat", "-p", "Hello!"]) == 0
    assert opened == ["nano"] and len(capsys.readouterr().out) > 5


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    text = capsys.readouterr().out
    for word in ("one answer", "a conversation", "/add PICTURE", "--max-tiles", "--video", "--json"):
        assert word in text


def test_prompt_from_a_pipe(tiny):
    run = subprocess.run([sys.executable, "-m", "minivl", "chat", "-m", str(tiny), TIGER, "--max-new-tokens", "8"],
                         input="what?\n", capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and run.stdout == answer(tiny, TIGER).text + "\n", run.stderr


@pytest.mark.parametrize("text, words", [(b" \n", "is empty; write a question"), (b"caf\xe9", "not valid utf-8")])
def test_a_pipe_without_a_question(tiny, monkeypatch, capsys, text, words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
    assert main(["chat", "-m", str(tiny)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: the question from the pipe") and words in err and not out


@pytest.mark.parametrize("package, words", [
    ("minivl", ("demo", "chat", "--version")), ("weights_tools.nano", ("evaluate", "train OUT", "ship")),
    ("weights_tools", ("verify", "inspect", "bench", "download", "quantize", "synthesize"))])
def test_no_command_lists_the_commands(package, words, monkeypatch, capsys):
    """Exit code 2: a script that forgot the command must not go on as if it had run."""
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: None)        # runpy's: the module is imported already
    for more, code in ((), 2), (("--help",), 0):
        monkeypatch.setattr(sys, "argv", [package, *more])
        with pytest.raises(SystemExit) as exit:
            runpy.run_module(package, run_name="__main__")
        out, err = capsys.readouterr()
        assert exit.value.code == code and not err
        assert all(word in out for word in words)


@pytest.mark.parametrize("module, words", [("minivl.demo", "python -m minivl demo"),
                                           ("weights_tools.files", "has no command"),
                                           ("weights_tools.bench.gpu", "weights_tools.bench --device cuda")])
def test_a_module_without_a_command_says_so(module, words):
    with pytest.raises(SystemExit, match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore")         # runpy's, where the module is imported already
        runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("words, model", [([], "nano-awq"), (["nano"], "nano"), (["-m", "nano"], "nano"),
                                          (["--model=x/y"], "x/y"), (["folder"], "folder"), ([""], "")])
def test_the_demo_takes_its_model_with_or_without_an_option(words, model, monkeypatch):
    taken = []
    monkeypatch.setattr("minivl.__main__.demo", lambda name: taken.append(name) or 0)
    assert main(["demo", *words]) == 0 and taken == [model]


def test_a_model_named_twice_or_as_a_picture(tiny, capsys):
    assert main(["demo", "nano", "-m", "nano-awq"]) == 2
    assert capsys.readouterr().err == "error: the model is named twice, nano and -m nano-awq; leave one out\n"
    for model in ("nano", "nano-awq", str(tiny)):
        assert main(["chat", model, "-p", "x"]) == 2
        assert capsys.readouterr().err == f"error: {model} is a model, not a picture; give it with -m: -m {model}\n"


def test_a_host_to_be_trusted_is_named_with_its_option(capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert main(["chat", "-p", "x", "http://127.0.0.1:9/x.png"]) == 2
    assert capsys.readouterr().err.endswith("if you trust it, add --allow-host 127.0.0.1\n")


def test_a_warning_is_one_line_without_its_source(capsys):
    message = "2 pictures share a pair"
    with person():
        warnings.simplefilter("always")
        warnings.warn(f"{message}; a larger session_len helps", stacklevel=1)
    assert capsys.readouterr().err == f"warning: {message}; a larger --session-len helps\n"


@pytest.mark.parametrize("word", ["/quit", "/exit", "quit", "exit"])
def test_words_that_end_a_conversation(tiny, terminal, monkeypatch, word):
    lines = iter([word])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", "-m", str(tiny)]) == 0 and next(lines, None) is None


def test_add_takes_what_a_shell_takes(tiny, terminal, monkeypatch, capsys, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("my tiger.jpeg", "b.jpeg"):
        (home / name).write_bytes(Path(TIGER).read_bytes())
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    lines = iter(['/add "~/my tiger.jpeg"', "/add ~/my\\ tiger.jpeg b.jpeg", "/add   my tiger.jpeg ",
                  "/add b.jpeg no.png", "what?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", "-m", str(tiny), "--max-new-tokens", "3", "--max-tiles", "1"]) == 0
    out, err = capsys.readouterr()
    assert re.findall(r"next message: (\d)", err) == ["1", "3", "4"] and "'b.jpeg no.png': no such file" in err
    text = "".join(f"Image-{i}: <IMAGE_TOKEN>\n" for i in (1, 2, 3, 4)) + "what?"
    pictures = [minivl.Picture(TIGER, 1)] * 4
    assert out == minivl.pipeline(tiny)((text, pictures), minivl.GenerationConfig(max_new_tokens=3)).text + "\n"


def test_conversation(tiny, terminal, monkeypatch, capsys):
    lines = iter(["what?", "", "/help", "and now?", f"/add {TIGER}", "/add nowhere.png", "see this", "/quit now",
                  "/new", "what?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", "-m", str(tiny), TIGER, "--max-new-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    pipe, short = minivl.pipeline(tiny), minivl.GenerationConfig(max_new_tokens=8)
    session, want = None, []
    for prompt in (("what?", TIGER), "and now?", ("see this", TIGER)):
        session = pipe.chat(prompt, session, short)
        want.append(session.response.text)
    assert out == "".join(t + "\n" for t in [*want, want[0]])
    assert "error: the question is empty" in err and "error: 'nowhere.png': no such file" in err
    assert "(goes with your next message: 1 picture)" in err
    assert err.count("/add PICTURE brings") == 3        # at the start, and for two unknown commands


def test_ctrl_c_during_an_answer_forgets_the_turn(tiny, terminal, monkeypatch, capsys):
    lines = iter(["hello", "hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    original, calls = TextStream.push, []

    def push(self, id):
        calls.append(id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, id)
    monkeypatch.setattr(TextStream, "push", push)
    assert main(["chat", "-m", str(tiny), "--max-new-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert "(stopped; this turn is forgotten)" in err
    assert out.endswith(minivl.pipeline(tiny)("hello", minivl.GenerationConfig(max_new_tokens=8)).text + "\n")


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_of_one_answer_ends_cleanly(tiny):
    endless = ("import sys, minivl.sampling\n"
               "minivl.sampling.Sampler.__call__ = lambda self, logits: 40\n"      # never a stop token
               "from minivl.__main__ import main\n"
               "sys.exit(main(sys.argv[1:]))")
    run = subprocess.Popen([sys.executable, "-u", "-c", endless, "chat", "-m", str(tiny), TIGER, "-p", "what?",
                            "--max-new-tokens", "30000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           cwd=ROOT, start_new_session=True)
    assert run.stdout.read(1)           # the answer has begun
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and b"stopped" in err and b"Traceback" not in err
