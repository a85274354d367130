"""Judges: what they are asked and how often, as VLMEvalKit counts it; services that fail; what they said is kept."""
import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import shared

from minivl import InputError
from weights_tools.evaluate import judge as judging
from weights_tools.evaluate.benchmarks import BENCHMARKS, Row
from weights_tools.evaluate.judge import Cached, Judge, JudgeError
from weights_tools.evaluate.score import verdicts

FAILED = "Failed to obtain answer via API."


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def golden(name):
    return json.loads((shared("golden/evaluate") / f"{name}.json").read_text("utf-8"))


class Says:
    """Gives ready answers in order, the last one again and again; VLMEvalKit's text of a failure is a failure."""

    def __init__(self, outputs):
        self.outputs = outputs or [""]
        self.prompts = []
        self.temperatures = []

    def __call__(self, prompt, temperature):
        said = self.outputs[min(len(self.prompts), len(self.outputs) - 1)]
        self.prompts.append(prompt)
        self.temperatures.append(temperature)
        if said == FAILED:
            raise JudgeError("failed")
        return said


def judged(name, item, judge, version="2024"):
    fields = {key: None if value is None else str(value) for key, value in item.items()
              if key not in ("index", "prediction")}
    prediction = str(item["prediction"])
    return verdicts(BENCHMARKS[name], [Row(item.get("index", 0), fields, list, 2)], [prediction],
                    judge=judge, version=version)[0]


# ---- beside VLMEvalKit ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", ["2024", "head"])
def test_options_as_the_original(version):
    """Where the original draws a letter by chance, nobody has decided."""
    for case in golden("mcq_judge"):
        judge = Says(case["judge_outputs"])
        want = case["expected"]
        verdict = judged("MMStar", case["item"], judge, version)
        assert len(judge.prompts) == want["calls"]
        assert all(prompt.endswith(want["prompt_tail"]) for prompt in judge.prompts)
        if want["random"]:
            assert (verdict.extracted, verdict.right, verdict.by) == (None, 0, "nobody")
        else:
            assert verdict.extracted == want["opt"]
            assert verdict.right == (want["opt"] == case["item"]["answer"])
            assert verdict.by == ("judge" if want["calls"] else "rule")
            assert verdict.note == (want["log"] if want["calls"] else "")


def test_yes_no_as_the_original():
    for case in golden("yes_no_judge"):
        judge = Says(case["judge_outputs"])
        want = case["expected"]
        verdict = judged("HallusionBench", {"index": "a_b_c_0_0_0", **case["line"]}, judge)
        assert (verdict.extracted or "Unknown") == want["answer"]
        assert judge.temperatures == want["temperatures"]
        assert len(judge.prompts) == want["calls"]
        assert all(prompt.endswith(want["prompt_tail"]) for prompt in judge.prompts)


@pytest.mark.parametrize("version", ["2024", "head"])
def test_mathvista_as_the_original(version):
    for case in golden("mathvista"):
        judge = Says(case["judge_outputs"])
        want = case["expected"]
        # A number in the prediction's place is what a spreadsheet makes of "7"; its text is what a model says.
        prediction = case["line"]["prediction"]
        line = {**case["line"], "prediction": int(prediction) if isinstance(prediction, float) else prediction}
        verdict = judged("MathVista", line, judge, version)
        assert bool(verdict.right) == want["hit"], case
        assert verdict.extracted == str(want["res"])
        assert judge.temperatures == want["temperatures"]
        assert verdict.by == ("rule" if want["log"] == "Prefetch succeed" else "judge")
        prompt = judging.math_prompt(case["line"]["question"], str(prediction))
        assert prompt.endswith(want["prompt_tail"])
        assert all(asked.endswith(want["prompt_tail"]) for asked in judge.prompts)


def test_mmvet_as_the_original():
    for case in golden("mmvet"):
        judge = Says(case["judge_outputs"])
        want = case["expected"]
        verdict = judged("MMVet", case["line"], judge)
        assert verdict.right == want["score"]
        assert verdict.by == ("judge" if want["log"].endswith("Succeed") else "nobody")
        assert judge.temperatures == want["temperatures"]
        assert all(prompt.endswith(want["prompt_tail"]) for prompt in judge.prompts)


# ---- without the data -----------------------------------------------------------------------------------------------

def test_what_is_asked():
    """The question laid out as VLMEvalKit does, in both languages; braces in it are only braces."""
    choices = {"A": "{x}", "B": "y"}
    laid_out = "There are several options: \nA. {x}\nB. y\n"
    assert judging.option_prompt("Which {}", choices, "{0}").endswith(
        f"Question: Which {{}}?\nOptions: {laid_out}\nAnswer: {{0}}\nYour output: ")
    assert judging.option_prompt("哪个", choices, "hm").endswith(f"\n问题: 哪个?\n选项: {laid_out}\n答案: hm\n输出: ")
    assert judging.yes_no_prompt("Is it", "hm").endswith("Question: Is it?\nAnswer: hm\nYour output: ")
    assert judging.math_prompt("q", "7").endswith("\nq\nModel respone: 7Extracted answer:")
    assert judging.vet_prompt("q", "a<AND>b<OR>c", "p").endswith("\nq | a <AND> b <OR> c | p | ")


@pytest.mark.parametrize("name, item, outputs, temperatures, right", [
    ("MMStar", {"A": "x", "B": "y", "answer": "B", "question": "q"}, ["hm", FAILED, "(B)"], [0, 0, 0], 1),
    ("MMStar", {"A": "x", "B": "y", "answer": "B", "question": "q"}, ["hm"], [0, 0, 0], 0),
    ("MMStar", {"A": "x", "B": "y", "answer": "B", "question": "q"}, ["Z"], [0], 0),
    ("HallusionBench", {"index": "a_b_c_0_0_0", "answer": "No", "question": "q"}, ["yes no", "No."], [0, 0.5], 1),
    ("HallusionBench", {"index": "a_b_c_0_0_0", "answer": "No", "question": "q"}, ["?"], [0, 0.5, 1, 1.5, 2], 0),
    ("MathVista", {"question_type": "free_form", "answer_type": "float", "answer": "0.5", "question": "q"},
     [FAILED, "0.50"], [0, 0.5], 1),
    ("MathVista", {"question_type": "free_form", "answer_type": "integer", "answer": "7", "question": "q"},
     ["seven"], [0], 0),
    ("MathVista", {"question_type": "free_form", "answer_type": "integer", "answer": "7", "question": "q"},
     [FAILED], [0, 0.5, 1, 1.5, 2], 0),
    ("MMVet", {"answer": "x", "question": "q"}, ["2", "x", "nan", "0.7"], [0, 0.5, 1, 1.5], 0.7),
    ("MMVet", {"answer": "x", "question": "q"}, [FAILED], [0, 0.5, 1, 1.5, 2], 0)])
def test_tries(name, item, outputs, temperatures, right):
    judge = Says(outputs)
    verdict = judged(name, {"prediction": "it is so", **item}, judge)
    assert judge.temperatures == temperatures
    assert verdict.right == right
    found = outputs[-1] not in ("hm", "?", FAILED)
    assert verdict.by == ("judge" if found else "nobody")
    if not found:
        assert verdict.note.startswith("the judge ") and f"{len(temperatures)}x" in verdict.note


def test_a_right_zero_goes_to_the_judge_where_there_is_one():
    """For Python 0 is false: the original takes what was found for nothing."""
    judge = Says(["1"])
    item = {"question_type": "free_form", "answer_type": "integer", "answer": "0", "question": "q", "prediction": "0"}
    assert judged("MathVista", item, judge).right == 0
    assert judged("MathVista", item, None).right == 1


def test_what_a_judge_says_at_length_is_clipped():
    item = {"question_type": "free_form", "answer_type": "integer", "answer": "7", "question": "q", "prediction": "hm"}
    verdict = judged("MathVista", item, Says(["7" + " " * 3000]))
    assert verdict.right == 1
    assert max(len(verdict.note), len(verdict.extracted)) < 300


def test_why_a_judge_failed_is_noted():
    failing = Says([FAILED, FAILED, "perhaps\nit is"])
    verdict = judged("MMStar", {"A": "x", "B": "y", "answer": "B", "question": "q", "prediction": "hm"}, failing)
    assert verdict.note == "the judge failed (2x); said 'perhaps\\nit is'"


# ---- a service ------------------------------------------------------------------------------------------------------

def completion(text, **more):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text, **more}}]}).encode()


@contextlib.contextmanager
def service(*replies):
    """A service that gives each reply once, the last again and again: bytes, (status, headers, bytes), or a function of
    the handler. Gives (its URL, the requests seen: path, headers, body)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, self.headers, json.loads(body)))
            reply = replies[min(len(seen), len(replies)) - 1]
            if callable(reply):
                reply(self)
                return
            status, headers, data = reply if isinstance(reply, tuple) else (200, {}, reply)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_args):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, address):
            pass            # the client has left

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def closes(handler):
    """Hang up without a word."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def breaks_off(handler):
    """Hang up in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')


def drips(handler):
    """Send a byte now and then: no single wait is long."""
    with contextlib.suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b"H")
            time.sleep(0.02)


def talks_nonsense(handler):
    handler.wfile.write(b"what is HTTP?\r\n\r\n")


def test_what_is_sent():
    with service(completion("B")) as (url, seen):
        for given in (url, f"{url}/", f"{url}/v1", f"{url}/v1/chat/completions", f"{url}/v1/"):
            assert Judge(given, "a key", "a-model")("Which?", 0.5) == "B"
        assert Judge(f"{url}/team/v1")("Which?", 0.0) == "B"
    assert [path for path, *_ in seen] == ["/v1/chat/completions"] * 5 + ["/team/v1/chat/completions"]
    _, headers, body = seen[0]
    assert headers["Authorization"] == "Bearer a key" and headers["Content-Type"] == "application/json"
    assert body == {"model": "a-model", "messages": [{"role": "user", "content": "Which?"}], "temperature": 0.5,
                    "max_tokens": 128}
    assert "Authorization" not in seen[-1][1] and "model" not in seen[-1][2]


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://host:0", "http://host:x",
                                 "http://[::1", "http://me:secret@host", "http://host/v1?key=secret"])
def test_urls_that_are_none(url):
    with pytest.raises(InputError, match="the judge") as caught:
        Judge(url)
    assert "secret" not in str(caught.value)


def test_a_key_that_is_none():
    with pytest.raises(InputError, match="end of a line") as caught:
        Judge("http://host", "secret\n")
    assert "secret" not in str(caught.value)


def test_half_a_surrogate_pair():
    with service(completion("B \ud83d")) as (url, _):
        assert Judge(url)("q", 0.0) == "B ?"


NO_COMPLETIONS = {
    "text": b"Service up!", "nothing": b"", "a list": b"[1]", "no choices": b'{"choices": []}', "null": b"null",
    "an error": b'{"error": {"message": "no such model"}}', "a text": b'{"choices": "abc"}',
    "a message that is text": b'{"choices": [{"message": "B"}]}', "deep": b"[" * 100_000, "not utf-8": b"\xff\xfe\x00"}


@pytest.mark.parametrize("name", NO_COMPLETIONS)
def test_json_that_is_no_completion(name):
    with service(NO_COMPLETIONS[name]) as (url, seen), pytest.raises(JudgeError, match="no chat completi") as caught:
        Judge(url)("q", 0.0)
    assert len(seen) == 1 and len(str(caught.value)) < 200


@pytest.mark.parametrize("reply, why", [
    (completion(None), "sent an answer without text"), (completion(""), "sent an answer without text"),
    (completion(None, refusal="I cannot judge people."), "refused: 'I cannot judge people.'"),
    (completion(None, refusal="\ud800"), r"refused: '\ud800'"), (completion(["B"]), "sent an answer without text"),
    (b'"' + b"x" * 2**20 + b'"', "sent more than 1048576 bytes"),
    ((401, {}, b'{"error": "wrong key: secret"}'), "HTTP 401: '{\"error\": \"wrong key: ...\"}'"),
    ((404, {}, b"no such model"), "HTTP 404: 'no such model'"),
    ((302, {"Location": "http://127.0.0.1:1/"}, b""), "HTTP 302")])
def test_answers_that_another_try_does_not_mend(reply, why):
    with service(reply) as (url, seen), pytest.raises(JudgeError) as caught:
        Judge(url, "secret", pause=0)("q", 0.0)
    assert why in str(caught.value)
    assert len(seen) == 1


@pytest.mark.parametrize("reply, why", [
    ((429, {}, b"slow"), "answered with HTTP 429: 'slow'"), ((500, {}, b"oh"), "answered with HTTP 500: 'oh'"),
    ((503, {"Retry-After": "x"}, b""), "answered with HTTP 503"), (closes, "closed the connection"),
    (breaks_off, "closed the connection"), (talks_nonsense, "closed the connection")])
def test_services_that_are_busy_are_asked_again(reply, why):
    with service(reply, reply, completion("B")) as (url, seen):
        assert Judge(url, pause=0)("q", 0.0) == "B"
        assert len(seen) == 3
    with service(reply) as (url, seen), pytest.raises(JudgeError) as caught:
        Judge(url, pause=0)("q", 0.0)
    assert why in str(caught.value)
    assert len(seen) == 3


def test_a_service_says_how_long_to_wait(monkeypatch):
    waits = []
    monkeypatch.setattr(judging.time, "sleep", waits.append)
    then = "Wed, 21 Oct 2015 07:28:00 GMT"
    with service((429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "9999"}, b""), completion("B"),
                 (429, {"Retry-After": then}, b""), (500, {}, b""), completion("B")) as (url, _):
        judge = Judge(url)
        assert judge("q", 0.0) == judge("q", 0.0) == "B"
    assert waits == [7, 30, 1, 2]


@pytest.mark.parametrize("how", [drips, lambda handler: time.sleep(0.3)])
def test_services_that_are_too_slow(how):
    with service(how) as (url, seen):
        start = time.monotonic()
        with pytest.raises(JudgeError, match=r"did not answer within 0.1 seconds"):
            Judge(url, seconds=0.1, pause=0)("q", 0.0)
        assert time.monotonic() - start < 2
        assert len(seen) == 3


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(JudgeError, match="cannot be reached: .*refused"):
        Judge(f"http://127.0.0.1:{port}", pause=0)("q", 0.0)


def test_a_service_that_fails_again_and_again_is_left_alone():
    with service((401, {}, b"no")) as (url, seen):
        judge = Judge(url)
        for _ in range(12):
            with pytest.raises(JudgeError):
                judge("q", 0.0)
        assert len(seen) == 8
        with pytest.raises(JudgeError, match=r"was not asked, after 8 calls that failed: answered with HTTP 401: 'no'"):
            judge("q", 0.0)
    with service(*[(401, {}, b"no")] * 7, completion("B"), (401, {}, b"no")) as (url, seen):
        judge = Judge(url)
        for _ in range(17):
            with contextlib.suppress(JudgeError):
                judge("q", 0.0)
        assert len(seen) == 16      # an answer in between: it counts anew


def test_bad_answers_among_others():
    """Each kind of failure in the midst of a run: named, wrong, and the row after it is judged."""
    bad = [((500, {}, b"oh"), "HTTP 500"), ((429, {}, b""), "HTTP 429"), (closes, "closed the connection"),
           (b"no JSON", "no chat completion"), (completion(None, refusal="No."), "refused: 'No.'"),
           (completion("I would rather not say"), "said 'I would rather not say'")]
    fields = {"A": "north", "B": "south", "answer": "B", "question": "q"}
    rows = [Row(f"row {i}", fields, list, i + 2) for i in range(2 * len(bad))]
    replies = []
    for reply, _ in bad:
        busy = callable(reply) or isinstance(reply, tuple)      # asked again within each of the three calls
        replies += [reply] * (9 if busy else 3) + [completion("B")]
    with service(*replies) as (url, seen):
        found = verdicts(BENCHMARKS["MMStar"], rows, ["hm"] * len(rows), judge=Judge(url, pause=0))
    assert len(seen) == len(replies)
    assert [(verdict.index, verdict.right, verdict.by) for verdict in found] == [
        (row.index, i % 2, ("nobody", "judge")[i % 2]) for i, row in enumerate(rows)]
    for (_, why), verdict in zip(bad, found[::2], strict=True):
        assert why in verdict.note and verdict.note.endswith("(3x)")


# ---- what was said is kept ------------------------------------------------------------------------------------------

def test_kept(tmp_path):
    path = tmp_path / "out" / "judged.jsonl"
    first = Says(["a", "b", FAILED, "c"])
    judge = Cached(first, path)
    assert [judge("p", 0.0), judge("p", 0.0)] == ["a", "b"]
    with pytest.raises(JudgeError):
        judge("p", 0.0)
    assert judge("p", 0.0) == "c"
    assert len(path.read_text().splitlines()) == 3
    second = Says(["d", "e"])
    again = Cached(second, path)
    assert [again("p", 0.0) for _ in range(4)] == ["a", "b", "c", "d"]      # call by call, then it asks
    assert again("p", 0.5) == "e"
    assert second.temperatures == [0.0, 0.5]


def test_kept_by_judge(tmp_path):
    with service(completion("A"), completion("B"), completion("C")) as (url, seen):
        for model, want in (("one", "A"), ("two", "B"), ("one", "A"), ("two", "B")):
            assert Cached(Judge(url, "secret", model), tmp_path / "x.jsonl")("p", 0.0) == want
        assert len(seen) == 2
    assert "secret" not in (tmp_path / "x.jsonl").read_text()


def test_kept_by_a_run_that_was_killed(tmp_path):
    """A line half written is asked again, and the next one starts on a line of its own."""
    path = tmp_path / "judged.jsonl"
    judge = Cached(Says(["a", "b"]), path)
    assert judge("p", 0.0) + judge("q", 0.0) == "ab"
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        says = Says(["new"])
        again = Cached(says, path)
        got = [again("p", 0.0), again("q", 0.0)]
        kept = (cut >= first) + (cut >= len(whole) - 1)     # a line is whole also without its end
        assert got == (["a", "b"] * 2)[:kept] + ["new"] * (2 - kept)
        assert len(says.prompts) == 2 - kept
        never = Says(["never"])
        assert [Cached(never, path)("p", 0.0), Cached(never, path)("q", 0.0)] == got


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    judge = Cached(Says(["a"]), tmp_path / "file" / "judged.jsonl")
    with pytest.raises(OSError, match=r"judged.jsonl cannot be written"):
        judge("p", 0.0)
    with pytest.raises(InputError, match="a folder"):
        Cached(Says(["a"]), tmp_path)
