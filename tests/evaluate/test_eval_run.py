"""Benchmarks asked and scored from end to end: any number of processes, killed or not, give the same answers."""
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import made
import pytest
import torch
from PIL import Image

from minivl import GenerationConfig, InputError, Picture
from weights_tools.evaluate import __main__ as command
from weights_tools.evaluate import answers, shares, tsv
from weights_tools.evaluate.answers import How
from weights_tools.evaluate.benchmarks import BENCHMARKS, Broken, Row
from weights_tools.evaluate.tasks import plan

ROOT = Path(__file__).parents[2]
SMALL = ("--max-new-tokens", "6", "--batch", "2", "--limit-tiles", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of all eight, some 3 questions of each."""
    folder = tmp_path_factory.mktemp("data")
    made.write(folder, n=3)
    return folder


@pytest.fixture(scope="module")
def opened(pipe):
    """Lets a run in this process use the tiny model that is loaded already; counts how often."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "opened", lambda *args: calls.append(args) or pipe)
        yield calls


@pytest.fixture(scope="module")
def whole(tiny, data, opened, tmp_path_factory):
    """A run of all eight in both settings that nobody has disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert go(tiny, data, out, "--setting", "both", "--mpo-prompt", "yes") == 0
    return out


def words(checkpoint, data, out, *more):
    return [str(checkpoint), "--data", str(data), "--out", str(out), *SMALL, *more]


def go(checkpoint, data, out, *more):
    return command.main(words(checkpoint, data, out, *more))


def said(out):
    """{name of a file of answers: its bytes}; the seconds are never the same."""
    return {file.name: file.read_bytes() for file in (out / "answers").iterdir() if "seconds" not in file.name}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def tables(data, names=tuple(BENCHMARKS)):
    return {name: tsv.read(data / f"{BENCHMARKS[name].datasets[0]}.tsv", BENCHMARKS[name]) for name in names}


# ---- asking ---------------------------------------------------------------------------------------------------------

def test_answers_are_the_pipelines(pipe, data):
    """What is asked in batches, in any order, is what the pipeline says to each question alone."""
    for name, table in tables(data).items():
        rows = [row for row in table if isinstance(row, Row)][:3]
        how = How(table.path.stem, batch=2, max_new_tokens=6)
        given = {answer.line: answer for answer in answers.ask(pipe, rows, how)}
        assert len(given) == len(rows)
        for row in rows[-2:]:
            answer = given[row.line]
            pictures = row.pictures()
            if name == "MMMU":
                pictures[0] = pictures[0].resize([2 * side for side in pictures[0].size], 2)
            most = {"MMMU": 12, "OCRBench": 24}.get(name, 6)
            prompt = answer.question, [Picture(picture, min(most, 64 // len(pictures))) for picture in pictures]
            config = GenerationConfig(max_new_tokens=6)
            assert pipe(prompt, config).text == answer.prediction
            assert answer.question.count("<image>") == len(pictures) == len(answer.tiles)
            assert sum(answer.tiles) == len(pipe.turn(prompt, config).tiles)
            assert (answer.index, answer.refused, answer.said) == (row.index, None, None)
            assert answer.tokens <= 6 and answer.seconds > 0 and answer.finish_reason in ("stop", "length")


def test_settings_reach_the_prompt(pipe, data):
    (table,) = tables(data, ["MMStar"]).values()
    rows = list(table)[:2]
    asked = lambda **change: list(answers.ask(pipe, rows, How("MMStar", max_new_tokens=4, **change)))
    plain, mpo, cot, few = asked(), asked(mpo=True), asked(setting="cot"), asked(limit_tiles=2)
    assert len({plain[0].question, mpo[0].question, cot[0].question}) == 3
    assert few[0].question == plain[0].question and max(plain[0].tiles) > 3 >= max(few[0].tiles)
    assert max(asked(limit_tiles=99)[0].tiles) == max(plain[0].tiles)


def test_only_the_first_picture_of_mmmu_is_doubled(pipe):
    """A square of 60 pixels is one tile, one of 120 pixels is 3 x 3 and a thumbnail (tiles of 56)."""
    row = Row(1, {"question": "Which?", "A": "this"}, lambda: [made.picture(k, (60, 60)) for k in range(2)], 2)
    asked = lambda name: next(iter(answers.ask(pipe, [row], How(name, max_new_tokens=1)))).tiles
    assert asked("MMMU_DEV_VAL") == (10, 1) and asked("AI2D_TEST") == (1, 1)


def test_a_picture_too_large_to_double_is_not_doubled(pipe, monkeypatch):
    """81 million pixels are within the limit; four times as many would take a gigabyte before they were refused."""
    monkeypatch.setattr(Image.Image, "resize", None)
    row = Row(1, {"question": "Which?", "A": "this"}, lambda: [Image.new("1", (9000, 9000))], 2)
    (answer,) = answers.ask(pipe, [row], How("MMMU_DEV_VAL", max_new_tokens=1))
    assert answer.refused == ("its first picture is 9000x9000; MMMU's is doubled in size, to more than the limit of "
                              "100000000 pixels; make it smaller")


def test_reasoning_is_kept_beside_its_answer(pipe, data, monkeypatch):
    (table,) = tables(data, ["MMStar"]).values()
    write = answers.write_batch

    def reason(pipe, writing, *others):
        write(pipe, writing, *others)
        for one in writing:
            one.text = "First this.\nFinal answer: B\nor so"
    monkeypatch.setattr(answers, "write_batch", reason)
    for mpo, prediction, whole in ((True, "B", "First this.\nFinal answer: B\nor so"), (False, None, None)):
        for answer in answers.ask(pipe, list(table)[:2], How("MMStar", mpo=mpo, max_new_tokens=3)):
            assert (answer.prediction, answer.said) == (prediction or "First this.\nFinal answer: B\nor so", whole)


@pytest.mark.parametrize("batch", [1, 2])
def test_shares_and_what_is_done_change_no_answer(pipe, data, batch):
    (table,) = tables(data, ["MMBench_V11"]).values()
    rows = list(table)
    how = How(table.path.stem, batch=batch, max_new_tokens=6)
    ask = lambda **some: {one.line: (one.prediction, one.tiles) for one in answers.ask(pipe, rows, how, **some)}
    everything = ask()
    assert list(everything) != sorted(everything)       # the shorter first
    parts = [ask(share=(k, 4 - batch)) for k in range(4 - batch)]
    assert all(parts) and sum(map(len, parts)) == len(rows)
    assert {line: one for part in parts for line, one in part.items()} == everything
    done = set(list(everything)[:5])
    assert ask(done=done) == {line: one for line, one in everything.items() if line not in done}
    assert ask(done=everything) == {}


def test_what_cannot_be_finished_takes_nothing_with_it(pipe, data, monkeypatch):
    """A device that has room for one prompt, and for one not at all."""
    (table,) = tables(data, ["MMVet"]).values()
    rows = list(table)
    read = answers.read
    monkeypatch.setattr(answers, "write_batch", lambda pipe, writing, caches, bar, write=answers.write_batch: (
        write(pipe, writing, caches, bar) if len(writing) == 1 else full()))
    monkeypatch.setattr(answers, "read", lambda model, turn: (
        full() if len(turn.ids) == longest else read(model, turn)))

    def full():
        raise InputError("the device is full")
    longest = max(len(answers._read(pipe, row, How("MMVet"))[1].ids) for row in rows)
    given = list(answers.ask(pipe, rows, How("MMVet", max_new_tokens=3, batch=3)))
    refused = [one for one in given if one.refused]
    assert len(given) == len(rows) and 0 < len(refused) < len(rows)
    assert all(one.refused == "the device is full" and one.prediction is None and one.question for one in refused)


# ---- the whole command ----------------------------------------------------------------------------------------------

def test_all_eight_in_both_settings(whole, data, opened):
    assert len(said(whole)) == 16
    for name, table in tables(data).items():
        for setting in answers.SETTINGS:
            job, *given = lines(answers.place(whole, table.path.stem, setting))
            assert job["--mpo-prompt"] == "yes" and job["--max-new-tokens"] == 6
            wanted = [row.line for row in plan_of(data, name).rows]
            assert [one["line"] for one in given] == wanted and len(wanted) >= 2
            assert not any(one["refused"] for one in given)
    for name in ("report.json", "report.md", "report.html", "run.json"):
        assert (whole / name).stat().st_size > 100
    assert len(opened) == 1
    settings = json.loads((whole / "run.json").read_text())
    assert settings["mpo_prompt"] is True and settings["dtype"] == "float32" and settings["n"] is None


def plan_of(data, name, *more, checkpoint="nano"):
    (task,) = plan(command.arguments(words(checkpoint, data, "out", "--benchmark", name, *more)))
    return task


def test_only_the_split_that_counts_is_asked(data):
    assert {row.fields["split"] for row in plan_of(data, "MMMU").rows} == {"validation"}


def test_what_is_asked_twice_is_counted_once(tiny, data, opened, tmp_path, capsys):
    assert go(tiny, data, tmp_path, "--benchmark", "OCRBench", "--setting", "both") == 0
    assert capsys.readouterr().err.startswith("3 rows to ask, without the prompt of MPO models (--mpo-prompt auto)")


def test_what_is_asked_the_same_is_asked_once(whole, tiny, data, opened):
    same = {task.how.dataset for task in plan(command.arguments(words(
        tiny, data, whole, "--setting", "both", "--mpo-prompt", "yes"))) if task.same}
    assert same == {"MMStar", "HallusionBench", "OCRBench"}
    files = said(whole)
    for name in same:
        assert files[f"{name}.default.jsonl"].split(b"\n")[1:] == files[f"{name}.cot.jsonl"].split(b"\n")[1:]


def test_two_runs_beside_each_other(whole, tiny, data, opened, tmp_path, capsys):
    assert go(tiny, data, tmp_path / "one", "--mpo-prompt", "no", "--benchmark", "AI2D") == 0
    capsys.readouterr()
    assert command.main(["--compare", str(whole), str(tmp_path / "one"), "--out", str(tmp_path / "both")]) == 0
    assert "AI2D" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "both").iterdir()} == {"compare.md", "compare.json", "compare.html"}


def test_again_only_scores(whole, tiny, data, opened, capsys):
    before, calls = said(whole), len(opened)
    assert go(tiny, data, whole, "--setting", "both", "--mpo-prompt", "yes", "--scorers", "head") == 0
    assert said(whole) == before and len(opened) == calls
    settings = json.loads((whole / "run.json").read_text())
    assert settings["scorers"] == "head" and settings["dtype"] == "float32"


def test_stopped_at_any_byte(tiny, data, opened, tmp_path):
    """Lines in the order in which they were written, cut anywhere: the same command ends with the same bytes."""
    names = ("--benchmark", "AI2D", "--mpo-prompt", "no")
    assert go(tiny, data, tmp_path / "whole", *names) == 0
    wanted = said(tmp_path / "whole")
    header, *rows = wanted["AI2D_TEST.default.jsonl"].splitlines(keepends=True)
    there = header + b"".join(rows[i] for i in (2, 0))
    for size in (0, 5, len(header) + 7, len(header) + len(rows[2]), len(there) - 1):
        out = tmp_path / f"cut-{size}"
        (out / "answers").mkdir(parents=True)
        file = out / "answers" / "AI2D_TEST.default.jsonl"
        file.write_bytes(there[:size])
        file.with_name("AI2D_TEST.default.seconds.jsonl").write_bytes(b'{"line": 2, "seconds": 1.5}\n{"line": 4, "se')
        assert go(tiny, data, out, *names) == 0
        assert said(out) == wanted
        seconds = lines(file.with_name("AI2D_TEST.default.seconds.jsonl"))
        assert [one["line"] for one in seconds] == [json.loads(row)["line"] for row in rows]


def test_shares_of_processes(whole, tiny, data, opened, tmp_path):
    """As torchrun would: each process for itself, the first one last."""
    out = tmp_path / "out"
    names = ("--setting", "both", "--mpo-prompt", "yes", "--benchmark", "MMBench_V11", "MMStar", "AI2D")
    args = command.arguments(words(tiny, data, out, *names))
    for share in (2, 1):
        shares.Asker(args, share, 3).all(plan(args))
    parts = [name for name in said(out) if "part" in name]
    assert len(parts) > 5 and len(parts) == len(said(out))
    shares.Asker(args, 0, 3).all(plan(args))
    assert go(tiny, data, out, *names) == 0
    assert len(said(out)) == 6 and said(out).items() <= said(whole).items()


def test_a_process_that_ended_early_is_made_up_for(tiny, data, opened, tmp_path):
    args = command.arguments(words(tiny, data, tmp_path, "--benchmark", "MMBench_V11", "--mpo-prompt", "no"))
    with pytest.warns(UserWarning, match="ended with -9 before their share was answered; this one answers the rest"):
        shares.Asker(args, 0, 2, [SimpleNamespace(exitcode=-9)]).all(plan(args))
    (task,) = plan(args)
    assert task.is_answered()


# ---- what is wrong --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    (["--limit-tiles", "3"], "--limit-tiles 2 there and 3 here"),
    (["--batch", "3"], "--batch 2 there and 3 here"),
    (["-n", "3"], "-n None there and 3 here, --seed None there and 0 here"),
    (["--mpo-prompt", "no"], "--mpo-prompt yes there and no here"),
    (["--precision", "fast", "--device", "cuda"], "--precision exact there and fast here, --device cpu there and cuda"),
])
def test_another_work_in_its_place_is_refused(whole, tiny, data, opened, change, words):
    before = said(whole)
    settings = ["--mpo-prompt", "yes", *change]
    with pytest.raises(InputError, match=r"MMBench_.*.jsonl holds \d+ answers of another work: " + words):
        go(tiny, data, whole, *settings)
    assert said(whole) == before


def test_another_checkpoint_or_other_questions_are_refused(whole, tiny, data, opened, tmp_path):
    with pytest.raises(InputError, match="of another work: checkpoint [0-9a-f]{16} there and [0-9a-f]{16} here;"):
        go("nano", data, whole, "--mpo-prompt", "yes")
    made.write(tmp_path, n=2)
    with pytest.raises(InputError, match="of another work: questions [0-9a-f]{32} there and"):
        go(tiny, tmp_path, whole, "--mpo-prompt", "yes")


def test_broken_rows_are_named_and_nothing_else_is_lost(tiny, opened, tmp_path, capsys):
    rows = made.MAKERS["MMStar"](6)
    rows[1]["image"] = "bm8gcGljdHVyZQ==" * 9           # "no picture"
    rows[2]["index"] = rows[0]["index"]
    rows[3]["question"] = None
    path = made.tsv(tmp_path / "MMStar.tsv", rows)
    path.write_bytes(path.read_bytes() + b"a row\tof\ttoo few\n")
    assert go(tiny, tmp_path, tmp_path / "out") == 0
    _, *given = lines(answers.place(tmp_path / "out", "MMStar", "default"))
    assert [one["line"] for one in given] == [row.line for row in plan_of(tmp_path, "MMStar").rows]
    assert len(given) == 7 and all((one["prediction"] is None) == bool(one["refused"]) for one in given)
    refused = {one["index"]: one["refused"] for one in given if one["refused"]}
    report = json.loads((tmp_path / "out" / "report.json").read_text())["results"][0]
    said = " ".join(report["differences"])
    for index, why in ((1, "index 1, picture 1 of 1: .* not a picture"), (0, "its index 0 is that of line 2 too"),
                       (3, "it has no question"), ("a row", "3 cells")):
        assert re.search(why, refused[index]) and re.search(why, said), refused[index]
    assert report["refused"] == [1] and len(report["broken"]) == 3
    assert "Questions not asked, which count as wrong: 1. Broken rows: 3. report.md says why" in capsys.readouterr().out


@pytest.mark.parametrize("content, message", [
    (b'{"a": 1}\n{"index"\n', "line 2, is damaged"), (b'{"a": 1}\n{"index": 1}\n', "line 2, is damaged"),
    (b'{"a": 1}\n[1]\n', "line 2, is damaged"), (b'\xff\n', "line 1, is damaged"), (b"[1]\n", "does not begin with")])
def test_a_damaged_file_of_answers(tiny, data, opened, tmp_path, content, message):
    place = answers.place(tmp_path, "MMStar", "default")
    place.parent.mkdir()
    place.write_bytes(content)
    with pytest.raises(InputError, match=message):
        go(tiny, data, tmp_path, "--benchmark", "MMStar")
    assert place.read_bytes() == content


@pytest.mark.parametrize("change", [{"tokens": "x"}, {"prediction": 7}, {"tiles": [None]}, {"line": "2"}, {"said": []}])
def test_values_of_another_kind_are_damage(whole, tmp_path, change):
    head, first, second, *_ = lines(answers.place(whole, "MMStar", "default"))
    place = answers.place(tmp_path, "MMStar", "default")
    place.parent.mkdir()
    place.write_text("".join(json.dumps(one) + "\n" for one in (head, first, {**second, **change})))
    with pytest.raises(InputError, match="line 3, is damaged .*take it out, or delete the file, to ask anew"):
        answers.load(place)


def test_damaged_seconds(whole, tmp_path):
    content = answers.place(whole, "MMStar", "default").read_bytes()
    place = answers.place(tmp_path, "MMStar", "default")
    place.parent.mkdir()
    place.write_bytes(content)
    for text in ('{"line": 2, "seconds": "x"}', "{}", "[]", "x"):
        place.with_name("MMStar.default.seconds.jsonl").write_text(text + "\n")
        with pytest.raises(InputError, match="MMStar.default.seconds.jsonl, line 1, is damaged"):
            answers.load(place)


def test_two_at_once(tiny, data, opened, tmp_path):
    from weights_tools.files import held
    with held(tmp_path), pytest.raises(InputError, match="another process works in"):
        go(tiny, data, tmp_path)


def test_torchrun_and_workers(monkeypatch, tiny, data, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert shares.world(SimpleNamespace(workers=1)) == (1, 2)
    with pytest.raises(InputError, match="--workers 2 is given to 2 processes of torchrun; leave it out"):
        go(tiny, data, tmp_path, "--workers", "2")


def test_no_more_processes_than_work(tiny, data, opened, tmp_path, monkeypatch):
    """Of 3 rows in chunks of 16 one process has all; each loads the whole model, so the others are not started."""
    kept = []
    helpers = command.helpers
    monkeypatch.setattr(command, "helpers", lambda args: kept.append(args.workers) or helpers(args))
    assert go(tiny, data, tmp_path, "--benchmark", "MMStar", "--workers", "99") == 0
    assert go(tiny, data, tmp_path, "--benchmark", "MMStar", "--workers", "99") == 0       # all answered
    assert kept == [1, 1]
    chunk = answers.BATCHES * 2
    tasks = [SimpleNamespace(rows=[None] * rows, how=How("MMStar", batch=2), is_answered=lambda rows=rows: rows == 7)
             for rows in (chunk, chunk + 1, 1, 7)]
    assert [shares.useful(tasks, workers) for workers in (1, 3, 4, 9)] == [1, 3, 4, 4]


def test_each_process_has_its_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [shares.device_of("cuda", share) for share in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert shares.device_of("cpu", 1) == "cpu" and shares.device_of("cuda:5", 1) == "cuda:5"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert shares.device_of("cuda", 4) == "cuda:1"


# ---- a judge --------------------------------------------------------------------------------------------------------

class Service(http.server.BaseHTTPRequestHandler):
    """Says B to the first question, then nonsense, refuses, or closes the connection."""
    calls = []

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.calls.append(self.headers["Authorization"])
        kind = len(self.calls) % 4
        if kind == 3:
            self.close_connection = True
            return
        body = [b'{"choices": [{"message": {"content": "B"}}]}', b"no JSON",
                b'{"choices": [{"message": {"content": null, "refusal": "no"}}]}'][kind - 1 if kind else 1]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_judge_that_is_not_there_is_said(tiny, data, opened, monkeypatch, tmp_path, capsys):
    """Else a wrong key looks like a model that knows nothing: MMVet 0.0."""
    monkeypatch.setattr(command, "Judge", partial(command.Judge, pause=0.0))
    assert go(tiny, data, tmp_path, "--benchmark", "MMVet", "--judge", "http://127.0.0.1:1") == 0
    assert re.search(r"judge gave no verdict, which count as wrong: 3\. The last: the judge .*cannot be reached",
                     capsys.readouterr().out)
    assert re.search(r"3 of 3; the judge gave no verdict either \(v1_0: the judge .*cannot be reached",
                     (tmp_path / "report.md").read_text().replace("\\", ""))


def test_a_judge_that_fails_loses_nothing(whole, tiny, data, opened, monkeypatch, tmp_path):
    monkeypatch.setenv("MINIVL_JUDGE_KEY", "secret")
    monkeypatch.setattr(command, "Judge", partial(command.Judge, pause=0.0))
    Service.calls.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    names = ("--mpo-prompt", "yes", "--benchmark", "MMStar", "MathVista", "MMVet")
    try:
        assert go(tiny, data, tmp_path, *names, "--judge", url) == 0
    finally:
        server.shutdown()
        server.server_close()
    assert said(tmp_path).items() <= said(whole).items() and set(Service.calls) == {"Bearer secret"}
    assert all("secret" not in file.read_text() for file in tmp_path.rglob("*.json*"))
    verdicts = [one["verdict"] for file in sorted((tmp_path / "judged").iterdir()) for one in lines(file)[1:]]
    assert {one["by"] for one in verdicts} >= {"judge", "nobody"}
    assert any("no chat completion" in one["note"] for one in verdicts)
    kept = lines(tmp_path / "judge.jsonl")
    assert kept and {one["said"] for one in kept} == {"B"}


# ---- killed ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_killed_and_gone_on(tiny, data, whole, tmp_path):
    """SIGKILL after some lines, with a helper and without; no helper outlives it; the end is that of a quiet run."""
    command = [sys.executable, "-W", "ignore", "-m", "weights_tools.evaluate", *words(
        tiny, data, tmp_path, "--setting", "both", "--mpo-prompt", "yes", "--benchmark", "MMBench_V11", "AI2D")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    rows = lambda files: sum(max(0, content.count(b"\n") - 1) for content in files.values())
    of_helper = lambda files: {name: content for name, content in files.items() if "part-1" in name}
    total = rows({name: content for name, content in said(whole).items() if name.startswith(("MMBench", "AI2D"))})
    (tmp_path / "answers").mkdir()
    for workers, written in (("2", lambda: rows(of_helper(said(tmp_path)))), ("1", lambda: rows(said(tmp_path)) - 12)):
        running = subprocess.Popen([*command, "--workers", workers], env=env, cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        while written() < 1 and running.poll() is None:
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)         # to the end of its pipes: helpers hold them too
        assert running.returncode == -signal.SIGKILL and rows(said(tmp_path)) < total
    after = subprocess.run([*command, "--workers", "2"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert after.returncode == 0, after.stderr
    assert len(said(tmp_path)) == 4 and said(tmp_path).items() <= said(whole).items()


@pytest.mark.slow
def test_nano(data, tmp_path):
    """The shipped model, through the command itself."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-m", "weights_tools.evaluate", *words(
        "nano", data, tmp_path, "-n", "3")], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert len(said(tmp_path)) == 8 and "MMStar" in ran.stdout
    for name, content in said(tmp_path).items():
        given = [json.loads(line) for line in content.splitlines()[1:]]
        assert given and all(one["finish_reason"] == "stop" or one["tokens"] == 6 for one in given), name


def test_broken_is_no_row():
    answer, turn = answers._read(None, Broken(None, 7, "it is broken"), How("MMStar"))
    assert turn is None and (answer.line, answer.index, answer.refused) == (7, None, "it is broken")
