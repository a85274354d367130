"""Every pair of options of every command: both count, or the pair is refused. And messages speak of options."""
import argparse
import ast
import importlib.util
import itertools
import re
import runpy
import sys
from pathlib import Path

import pytest
from fuzz import __main__ as fuzz

from minivl import EngineConfig, GenerationConfig, InputError, Limits
from minivl import __main__ as chat
from minivl.options import given, spoken
from minivl.serve import server
from weights_tools import dequantize, download, inspect, lora, merge, rows, synthesize
from weights_tools.bench import __main__ as bench
from weights_tools.bench import beside, serve
from weights_tools.convert import __main__ as convert
from weights_tools.evaluate import __main__ as measure
from weights_tools.language import __main__ as language
from weights_tools.language import cut
from weights_tools.mpo import cost, dropout, pairs, sample, show
from weights_tools.mpo import train as mpo_train
from weights_tools.nano import eight, evaluate, int4, lesson, prefer, ship, train, web
from weights_tools.quantize import __main__ as quantize
from weights_tools.quantize import rederive
from weights_tools.quantize.hurts import __main__ as hurts
from weights_tools.verify import __main__ as verify
from weights_tools.verify import mistakes

ROOT = Path(__file__).parents[1]


def parse_chat(argv):
    args = chat.parser().parse_args(["chat", *argv])
    chat.check(args)


def parse_demo(argv):
    chat.tour_of(chat.parser().parse_args(["demo", *argv]))


def parse_models(argv):
    chat.parser().parse_args(["models", *argv])


def parse_serve(argv):
    server.check(chat.parser().parse_args(["serve", *argv]))


def parse_notebooks(argv, file="run.py"):
    spec = importlib.util.spec_from_file_location("a_notebook_tool", ROOT / "notebooks" / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.arguments(argv)


def parse_pages(argv):
    pytest.importorskip("latex2mathml", reason="the extra `html` is not installed")
    parse_notebooks(argv, "pages.py")


class Command:
    """What was decided about the options of a command.

    words: what each option is given as here, by its name in the Namespace; positional arguments too.
    needs: an option that counts only together with another one, and is refused without.
    apart: an option -> those that cannot be given with it; everything else that is not listed counts beside it.
    base: the positional arguments that the command line must have, unless one of `instead` is given.
    """

    def __init__(self, file, parse, words, needs=(), apart=(), base="", instead=()):
        self.file, self.parse, self.needs, self.instead = file, parse, dict(needs), instead
        self.words = {name: text.split() for name, text in words.items()}
        self.base = base.split()
        self.apart = {frozenset((a, b)) for a, others in dict(apart).items() for b in others.split()}

    def with_needs(self, names):
        """The options and what they need, each once."""
        found = []
        for name in names:
            chain = [name]
            while chain[-1] in self.needs:
                chain.append(self.needs[chain[-1]])
            found += [one for one in reversed(chain) if one not in found]
        return found

    def refuses(self, names):
        positional = [name for name in names if not self.words[name][0].startswith("-")]
        base = self.base if not positional and not set(self.instead) & set(names) else []
        flags = [word for name in names if name not in positional for word in self.words[name]]
        longest = max((self.words[name] for name in positional), key=len, default=[])   # "m" and "m x.png": the latter
        try:
            self.parse([*base, *longest, *flags])
            return False
        except (InputError, SystemExit):
            return True


MODES = "record trace shrink nano record_nano inputs"
ALL = ("checkpoint pictures prompt record trace shrink nano record_nano inputs stages layers max_tiles max_new_tokens "
       "dtype local tolerance trust_remote_code python resident json html")


def but(names, all=ALL):
    return " ".join(set(all.split()) - set(names.split()))


SAMPLING = {"temperature": "--temperature 1", "top_k": "--top-k 5", "top_p": "--top-p .5",
            "max_new_tokens": "--max-new-tokens 9", "seed": "--seed 1", "batch": "--batch 2", "max_num": "--max-num 2",
            "root": "--root r", "lora": "--lora l", "device": "--device cpu", "precision": "--precision fast"}
COMMANDS = [
    Command(
        "minivl/__main__.py", parse_chat,
        {"pictures": "x.png", "prompt": "-p q", "system": "--system s", "json": "--json", "model": "-m a/b",
         "revision": "--revision main", "lora": "--lora l", "device": "--device cpu", "dtype": "--dtype float32",
         "precision": "--precision exact", "session_len": "--session-len 99", "max_tiles": "--max-tiles 2",
         "video": "--video v.gif", "segments": "--segments 4", "bound": "--bound 0 1", "fps": "--fps 5",
         "allow_host": "--allow-host h", "plain_text": "--plain-text", "max_new_tokens": "--max-new-tokens 9",
         "sample": "--sample", "temperature": "--temperature 1", "top_k": "--top-k 5", "top_p": "--top-p .5",
         "min_p": "--min-p .1", "repetition_penalty": "--repetition-penalty 1.1", "seed": "--seed 1"},
        needs={"json": "prompt", "segments": "video", "bound": "video", "fps": "bound",
               **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"), "sample")},
        apart={"pictures": "video segments bound fps", "max_tiles": "video segments bound fps prompt json",
               "allow_host": "prompt json"}),
    Command("minivl/__main__.py", parse_demo, {"named": "nano", "model": "-m nano"}, apart={"named": "model"}),
    Command("minivl/__main__.py", parse_models, {"json": "--json"}),
    Command(
        "minivl/__main__.py", parse_serve,
        {"model": "m", "server_name": "--server-name ::1", "server_port": "--server-port 1", "model_name":
         "--model-name n", "api_keys": "--api-keys k", "allow_remote": "--allow-remote", "allow_host": "--allow-host h",
         "log_prompts": "--log-prompts", "max_batch_size": "--max-batch-size 2", "max_requests": "--max-requests 9",
         "max_pictures": "--max-pictures 2", "max_seconds": "--max-seconds 9", "session_len": "--session-len 99",
         "revision": "--revision main", "lora": "--lora l", "device": "--device cpu", "dtype": "--dtype float32",
         "precision": "--precision exact"},
        needs={"allow_host": "allow_remote"}),
    Command("weights_tools/bench/serve.py", serve.arguments,
            {"model": "m", "clients": "--clients 1", "seconds": "--seconds 1", "requests": "--requests 9",
             "max_batch_size": "--max-batch-size 8"}),
    Command(
        "weights_tools/verify/__main__.py", verify.arguments,
        {"checkpoint": "m", "pictures": "m x.png", "prompt": "-p q", "record": "--record t", "trace": "--trace t",
         "shrink": "--shrink t u", "nano": "--nano", "record_nano": "--record-nano", "inputs": "--inputs",
         "stages": "--stages logits", "layers": "--layers 2", "max_tiles": "--max-tiles 2",
         "max_new_tokens": "--max-new-tokens 2", "dtype": "--dtype float32", "local": "--local",
         "tolerance": "--tolerance 1e-9", "trust_remote_code": "--trust-remote-code", "python": "--python p",
         "resident": "--resident 4.0", "json": "--json x.json", "html": "--html x.html"},
        apart={"record": f"{but('record', MODES)} tolerance json html",
               "trace": f"{but('trace', MODES)} prompt max_tiles max_new_tokens trust_remote_code python resident",
               "shrink": but("shrink"), "nano": but("nano stages layers tolerance json"),
               "record_nano": but("record_nano python resident"),
               "inputs": but("inputs checkpoint pictures prompt max_tiles"),
               "layers": "stages", "max_new_tokens": "stages layers local", "resident": "trust_remote_code"},
        base="m", instead=("shrink", "nano", "record_nano")),
    Command(
        "weights_tools/verify/mistakes.py", mistakes.options,
        {"checkpoint": "m x.png", "pictures": "m x.png", "nano": "--nano", "precision": "--precision exact",
         "traces": "--traces t", "record": "--record t", "json": "--json j", "page": "--page p"},
        apart={"nano": "checkpoint pictures traces record", "traces": "record"}, base="m x.png", instead=("nano",)),
    Command(
        "weights_tools/bench/__main__.py", bench.arguments,
        {"checkpoint": "m", "device": "--device cpu", "size": "--size 4B", "questions": "--questions 200",
         "parts": "--parts proof speed", "precision": "--precision exact fast", "against": "--against llama.cpp",
         "jobs": "--jobs tile", "rounds": "--rounds 3", "tokens": "--tokens 16", "peers_python": "--peers-python p",
         "accuracy": "--accuracy", "json": "--json j", "serve": "--serve exact"},
        needs={"size": "device", "questions": "device", "parts": "device", "peers_python": "against"},
        apart={**dict.fromkeys(("device", "size", "questions", "parts"),
                               "checkpoint precision against jobs rounds tokens peers_python accuracy serve"),
               "accuracy": "against jobs rounds tokens peers_python serve",
               "serve": "precision against jobs rounds peers_python json"},
        base="m", instead=("device",)),
    Command("weights_tools/inspect.py", inspect.arguments,
            {"source": "m", "revision": "--revision main", "json": "--json", "filter": "--filter x",
             "summary": "--summary"}, base="m"),
    Command("weights_tools/download.py", download.arguments,
            {"hub_id": "m", "revision": "--revision main", "to": "--to t", "dry_run": "--dry-run"}, base="m"),
    Command("weights_tools/quantize/__main__.py", quantize.arguments,
            {"checkpoint": "m out", "out": "m out", "method": "--method awq", "clip": "--clip", "alpha": "--alpha 0.5",
             "group_size": "--group-size 128", "dtype": "--dtype float16", "pictures": "--pictures p",
             "text": "--text t", "samples": "--samples 9", "length": "--length 9", "max_num": "--max-num 6",
             "stats": "--stats s",
             "save_stats": "--save-stats s.safetensors", "overwrite": "--overwrite"},
            needs={"length": "text"},
            apart={"method": "alpha stats", "stats": "pictures text samples length max_num save_stats clip"},
            base="m out"),
    Command("weights_tools/quantize/rederive.py", rederive.arguments,
            {"parent": "m out", "released": "m out", "stats": "--stats s", "json": "--json j"}, base="m out"),
    Command("weights_tools/quantize/hurts/__main__.py", hurts.arguments,
            {"parent": "m q", "twins": "m q", "pictures": "--pictures p", "text": "--text t", "samples": "--samples 9",
             "length": "--length 9", "max_num": "--max-num 6", "json": "--json j", "html": "--html h"},
            needs={"length": "text"}, base="m q"),
    Command("weights_tools/convert/__main__.py", convert.arguments,
            {"checkpoint": "m out", "out": "m out", "dequantize": "--dequantize float16", "overwrite": "--overwrite"},
            base="m out"),
    Command("weights_tools/dequantize.py", dequantize.arguments,
            {"checkpoint": "m out", "out": "m out", "dtype": "--dtype float16", "overwrite": "--overwrite"},
            base="m out"),
    Command("weights_tools/language/__main__.py", language.arguments,
            {"file": "m", "methods": "--methods rtn", "groups": "--groups 64", "held_out": "--held-out t",
             "calibration": "--calibration t", "json": "--json j"}, base="m"),
    Command("weights_tools/language/cut.py", cut.arguments, {"file": "m out", "out": "m out"}, base="m out"),
    Command("weights_tools/lora.py", lora.arguments,
            {"checkpoint": "m data out", "data": "m data out", "out": "m data out", "rank": "--rank 4",
             "alpha": "--alpha 8", "only": "--only q_proj", "steps": "--steps 9", "batch": "--batch 2",
             "lr": "--lr 1e-3", "seed": "--seed 1", "keep": "--keep k", "check": "--check c",
              "device": "--device cpu"}, base="m data out"),
    Command("weights_tools/merge.py", merge.arguments,
            {"checkpoint": "m lora out", "lora": "m lora out", "out": "m lora out", "dtype": "--dtype float32",
             "overwrite": "--overwrite"}, base="m lora out"),
    Command("weights_tools/rows.py", rows.arguments,
            {"checkpoint": "m data", "data": "m data", "lora": "--lora l", "device": "--device cpu"}, base="m data"),
    Command("weights_tools/bench/beside.py", beside.arguments, {"model": "m", "busy": "--busy 0"}),
    Command("tests/fuzz/__main__.py", fuzz.arguments,
            {"what": "bin=1", "seed": "--seed 1", "workers": "--workers 1"}),
    Command("weights_tools/synthesize.py", synthesize.arguments,
            {"out": "out", "size": "--size 4B", "awq": "--awq", "format": "--format bin", "shard_gb": "--shard-gb 2",
             "tokenizer": "--tokenizer t", "seed": "--seed 0", "dtype": "--dtype float16",
             "group_size": "--group-size 128", "config_quirk": "--config-quirk llm", "overwrite": "--overwrite"},
            needs={"group_size": "awq", "config_quirk": "awq", "tokenizer": "size"}, base="out"),
    Command("weights_tools/mpo/pairs.py", pairs.arguments,
            {"answers": "m out", "out": "m out", "rules": "--rules head", "fix": "--fix", "limit": "--limit 3",
             "seed": "--seed 1"}, base="m out"),
    Command("weights_tools/mpo/sample.py", sample.arguments,
            {"checkpoint": "m q o.jsonl", "questions": "m q o.jsonl", "out": "m q o.jsonl", "n": "-n 2",
             "prompt_version": "--version asked", **SAMPLING}, base="m q o.jsonl"),
    Command("weights_tools/mpo/cost.py", cost.arguments,
            {"sizes": "1B", "tokens": "--tokens 999 1999", "answer": "--answer 99", "tiles": "--tiles 3",
             "pairs": "--pairs 9", "longest": "--longest 4096", "dtype": "--dtype float32", "device": "--device cpu"}),
    Command("weights_tools/mpo/dropout.py", dropout.arguments,
            {"checkpoint": "m q o.jsonl", "rows": "m q o.jsonl", "out": "m q o.jsonl", "ratio": "--ratio .3",
             "with_picture": "--with-picture", **SAMPLING}, needs={"max_num": "with_picture"}, base="m q o.jsonl"),
    Command("weights_tools/mpo/show.py", lambda argv: show.arguments([*argv, "--html", "x"]),
            {"file": "m.jsonl", "html": "--html x", "root": "--root r", "n": "-n 5", "seed": "--seed 1"},
            base="m.jsonl"),
    Command("weights_tools/mpo/train.py", mpo_train.arguments,
            {"checkpoint": "m d.jsonl out", "data": "m d.jsonl out", "out": "m d.jsonl out", "root": "--root r",
             "reference": "--reference r", "keep": "--keep k", "hold": "--hold 2", "lora": "--lora 4",
             "lr": "--lr 1e-5", "batch": "--batch 8", "micro": "--micro 4", "epochs": "--epochs 2",
             "steps": "--steps 9", "beta": "--beta 0.2", "weights": "--weights 1 0 0",
             "shift": "--no-shift", "optimiser": "--optimiser muon",
             "weight_decay": "--weight-decay 0", "warmup": "--warmup 0", "max_tiles": "--max-tiles 6",
             "max_tokens": "--max-tokens 99", "dtype": "--dtype float32", "seed": "--seed 1",
             "device": "--device cpu"}, needs={"hold": "keep"}, apart={"epochs": "steps"}, base="m d.jsonl out"),
    Command("weights_tools/evaluate/__main__.py", measure.arguments,
            {"checkpoint": "m --out o", "benchmark": "--benchmark MMStar", "data": "--data d", "out": "--out o",
             "n": "-n 5", "seed": "--seed 1", "setting": "--setting both", "mpo_prompt": "--mpo-prompt yes",
             "limit_tiles": "--limit-tiles 2", "max_new_tokens": "--max-new-tokens 9", "batch": "--batch 2",
             "workers": "--workers 2", "judge": "--judge http://localhost:1", "judge_model": "--judge-model j",
             "scorers": "--scorers head", "lora": "--lora l", "device": "--device cpu",
             "precision": "--precision fast", "compare": "--compare a b --out o"},
            needs={"seed": "n", "judge_model": "judge"},
            apart={"compare": "checkpoint benchmark data n seed setting mpo_prompt limit_tiles max_new_tokens batch "
                              "workers judge judge_model scorers lora device precision"},
            base="m --out o", instead=("compare",)),
    Command("weights_tools/nano/evaluate.py", evaluate.arguments,
            {"checkpoints": "m", "n": "-n 500", "tasks": "--tasks colour", "precision": "--precision exact",
             "ablations": "--ablations", "wrong": "--wrong 0", "json": "--json j"},
            apart={"ablations": "tasks precision"}),
    Command("weights_tools/nano/eight.py", eight.arguments, {"out": "m", "n": "-n 5", "seed": "--seed 1"}, base="m"),
    Command("weights_tools/nano/int4.py", int4.arguments, {"out": "m", "n": "-n 5", "json": "--json j"}, base="m"),
    Command("weights_tools/nano/prefer.py", prefer.arguments,
            {"out": "m", "questions": "--questions 5", "n": "-n 5", "seed": "--seed 1"}, base="m"),
    Command("weights_tools/nano/web.py", web.arguments,
            {"out": "m", "questions": "--questions 5", "n": "-n 5", "only": "--only 2", "seed": "--seed 1"}, base="m"),
    Command("weights_tools/nano/lesson.py", lesson.arguments,
            {"out": "out", "train": "--train 9", "asked": "--asked 9", "old": "--old 9"}, base="out"),
    Command("weights_tools/nano/ship.py", ship.arguments, {"checkpoint": "m", "n": "-n 5"}, base="m"),
    Command("weights_tools/nano/train.py", train.arguments,
            {"out": "m", "quick": "--quick", "seed": "--seed 1", "workers": "--workers 0", "device": "--device cpu",
             "steps": "--steps 3"}, base="m"),
    Command("notebooks/run.py", parse_notebooks, {"notebooks": __file__, "write": "--write"}),
    Command("notebooks/pages.py", parse_pages, {"notebooks": __file__, "out": "--out x"}),
]
each = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.file)


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


def parser_of(command, monkeypatch):
    """The parser that its arguments go to."""
    parsers = []
    original = argparse.ArgumentParser.parse_known_args

    def spy(self, *args, **options):
        parsers.append(self)
        return original(self, *args, **options)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", spy)
    assert not command.refuses([])
    return next(parser for parser in reversed(parsers) if len(parser._actions) > 1)


@each
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = parser_of(command, monkeypatch)
    formatter = parser.formatter_class(prog="x")
    formatter.add_text(parser.description)
    text = formatter.format_help()
    assert text.split() == (parser.description or "").split()
    if not command.file.startswith(("notebooks/", "weights_tools/verify/mistakes.py")):     # which import no minivl
        assert all(len(line) <= columns for line in text.splitlines())
    if columns == 120:
        assert text.strip() == (parser.description or "").strip()


@each
def test_every_option_is_decided_on(command, monkeypatch):
    """A new option of a parser needs a line in the table: what it goes with."""
    parser = parser_of(command, monkeypatch)
    assert {action.dest for action in parser._actions} - {"help", "version"} == set(command.words)


@each
def test_every_pair_counts_or_is_refused(command):
    for name in command.words:
        assert command.refuses([name]) == (name in command.needs), f"{name} alone"
        assert not command.refuses(command.with_needs([name])), f"{name} with what it needs"
    for pair in itertools.combinations(command.words, 2):
        names = command.with_needs(pair)
        refused = any(frozenset(two) in command.apart for two in itertools.combinations(names, 2))
        assert command.refuses(names) == refused, " with ".join(pair)


def test_no_command_is_forgotten():
    """The one not in the table, verify/reference.py, is run by verify alone and has one option, refused there."""
    files = {str(path.relative_to(ROOT)) for folder in ("minivl", "weights_tools", "notebooks", "tests")
             for path in (ROOT / folder).rglob("*.py") if " = argparse.ArgumentParser(" in path.read_text("utf-8")}
    files -= {"weights_tools/verify/reference.py", "tests/test_options.py"}
    assert files == {command.file for command in COMMANDS}


@pytest.mark.parametrize("file", ["minivl/fast/__main__.py", "notebooks/trip.py"])
def test_a_command_without_options_refuses_any(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [file, "--write"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert exit.value.code == 2 and "--write" in capsys.readouterr().err


def test_an_option_with_the_value_of_its_default_is_given():
    parser = argparse.ArgumentParser()
    parser.add_argument("place", nargs="?")
    parser.add_argument("more", nargs="*")
    parser.add_argument("-s", "--size", type=int, default=3)
    parser.add_argument("--on", action="store_true")
    assert given(parser, []) == {} and parser.parse_args([]).size == 3
    assert given(parser, ["--size", "3"]) == {"size": "--size"}
    assert given(parser, ["a", "--on"]) == given(parser, ["--on", "a"], True) == {"place": "place", "on": "--on"}
    assert given(parser, ["a", "b", "c", "-s", "3"], True).keys() == {"place", "more", "size"}


# ---- messages -------------------------------------------------------------------------------------------------------

def messages():
    """(place, text) of every message that the package and the tools raise or warn with; 3 stands for what is put in."""
    def flat(node):
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "3" for part in node.values)
        return flat(node.left) + flat(node.right) if isinstance(node, ast.BinOp) else "3"

    for path in [*(ROOT / "minivl").rglob("*.py"), *(ROOT / "weights_tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args and getattr(
                    node.func, "id", getattr(node.func, "attr", "")) in ("InputError", "warn", "_warn"):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", flat(node.args[0])


# What no command line can cause: a wrong Python type or call.
NOT_THERE = ("backend_config is", "the session is closed", "Name the argument", "load the model again with device=",
             "generate() has no text", "it must be a GenerationConfig", "do_sample is False", "under torch.no_grad()",
             "allow_hosts must be a list", "bad_token_ids hold", "shorten bad_words", "act_absmax=None",
             "cut the tiles with minivl.tiling", "the PIL image is closed", "set model.img_context_token_id",
             "max_frame", "weights_only=True; install torch", "save() writes any SVG", "one cache serves one iteration",
             "cannot be copied or pickled", "is busy with its turn", "was started by another pipeline",
             "was closed while turn")
# Python that a message means: of another package, or a line to run.
MEANT = re.compile(r"(merge_and_unload|state_dict)\(\)|python -c \".*\"|_use_new_zipfile_serialization=False")


def test_messages_speak_of_options():
    kinds = (EngineConfig, GenerationConfig, Limits)
    fields = {name for kind in kinds for name in kind.__dataclass_fields__ if "_" in name}
    fields |= {"max_num", "num_segments", "allow_hosts", "EngineConfig", "GenerationConfig", "Limits"}
    python = re.compile(rf"\b({'|'.join(sorted(fields))})\b|\b(?!MINIVL_|HF_|PYTHON)[A-Za-z]\w*=|\w\(\)")
    seen = 0
    for place, text in messages():
        if any(words in text for words in NOT_THERE):
            continue
        seen += 1
        assert not python.search(MEANT.sub("", spoken(text))), f"{place}: {spoken(text)}"
    assert seen > 200


@pytest.mark.parametrize("python, options", [
    ("session_len 9 must be in 1..5", "--session-len 9 must be in 1..5"),
    ("GenerationConfig.random_seed is -1; it must be", "--seed is -1; it must be"),
    ("smaller pictures (max_num), a shorter text, or a larger session_len",
     "smaller pictures (--max-tiles), a shorter text, or a larger --session-len"),
    ("it; if you trust it, pass allow_hosts=('localhost',)", "it; if you trust it, add --allow-host localhost"),
    ("make it smaller or raise Limits(picture_pixels=...)", "make it smaller"),
    ("make it smaller, or raise both PIL.Image.MAX_IMAGE_PIXELS and Limits(picture_pixels=...)", "make it smaller"),
    ("convert it: python -c \"f(x, dtype='float32')\"", "convert it: python -c \"f(x, dtype='float32')\""),
    ("load with dtype='bfloat16' or 'float32'", "load with --dtype bfloat16 or float32"),
    ("an AWQ model, or device='cpu'", "an AWQ model, or --device cpu"),
    ("bound 7..8 seconds lies outside", "--bound 7..8 seconds lies outside"),
    ("the end of bound must be a number", "the end of --bound must be a number"),
    ("or EngineConfig(plain_text=True) if it is only text", "or --plain-text if it is only text"),
    ("another folder or pass overwrite (--overwrite)", "another folder or pass --overwrite"),
    ("--max-tiles is 99; the pictures are bound to fit", "--max-tiles is 99; the pictures are bound to fit")])
def test_spoken(python, options):
    assert spoken(python) == spoken(options) == options
