"""What happens to a service: clients that go away, are slow or send half; too many of them; a worker that fails."""
import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from serving import SAMPLES, another, ask, chat, events, nano, sample, served, url_of, wait

from minivl.serve import scheduler
from minivl.serve import server as serve

LONG = chat(ignore_eos=True, max_tokens=1900, stream=True)


@pytest.fixture(scope="module")
def pipe():
    return nano()


def head(body, length=None, key=""):
    """A request as it goes over the wire."""
    body = json.dumps(body).encode()
    length = len(body) if length is None else length
    return (f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{key}"
            f"Content-Length: {length}\r\n\r\n").encode() + body


@contextlib.contextmanager
def connected(port, data=b""):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(data)
        yield connection


def status_of(connection):
    """The status that comes next, or None for a connection that is closed."""
    found = re.match(rb"HTTP/1.1 (\d+) ", connection.recv(4096))
    return found and int(found[1])


def running(server):
    return len(server.service.scheduler.batch.alive())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_killed_in_mid_stream(pipe, stream):
    """Its place is free within a token or two, and the next one in the queue has it."""
    with served(another(pipe, max_batch_size=1)) as server:
        with connected(server.port, head(LONG | {"stream": stream, "n": 2})) as connection:
            if stream:
                assert status_of(connection) == 200
            wait(lambda: running(server))
            jobs = list(server.service.scheduler.batch.jobs)
        wait(lambda: server.service.asked == 0)
        wait(lambda: not server.service.scheduler.busy())
        assert len(jobs[0].answer.token_ids) < 1000 and jobs[0].cancelled
        assert ask(server.port, body=chat()).status == 200
        assert 'status="499"} 1' in ask(server.port, "/metrics").data.decode()


def test_a_client_that_goes_away_while_it_waits(pipe):
    with served(another(pipe, max_batch_size=1)) as server:
        with connected(server.port, head(LONG)) as first:
            assert status_of(first) == 200
            for _ in range(6):              # the first of them are read, the last are not
                with connected(server.port, head(LONG)):
                    wait(lambda: server.service.asked == 2)
                wait(lambda: server.service.asked == 1)
        wait(lambda: server.service.asked == 0)


def test_half_a_request(pipe, monkeypatch):
    monkeypatch.setattr(serve, "HEADER_SECONDS", 0.3)
    with served(pipe, body_seconds=0.3) as server:
        whole = head(chat(max_tokens=1))
        started = time.monotonic()
        with contextlib.ExitStack() as stack:           # of the head: closed
            for connection in [stack.enter_context(connected(server.port, whole[:n])) for n in (0, 1, 70)]:
                assert connection.recv(100) == b""
        with connected(server.port, whole) as connection:       # also the second one of a connection
            assert status_of(connection) == 200
            connection.sendall(whole[:30])
            connection.settimeout(5)
            while connection.recv(4096):
                pass
        for part in (whole[:-1], head(chat(), 10_000)):         # of the body: 408
            with connected(server.port, part) as connection:
                connection.settimeout(10)
                wait(lambda: server.service.asked == 1)
                assert ask(server.port, body=chat(max_tokens=1)).status == 200
                assert status_of(connection) == 408
        assert time.monotonic() - started < 15
        for rubbish in (b"\0" * 99, b"POST /v1/chat/completions HTTP/1.1\r\n"
                        b"Host: x\r\nContent-Length: -5\r\n\r\n", b"G" * 200_000, b"\r\n" * 9):
            with connected(server.port) as connection, contextlib.suppress(ConnectionError):
                connection.sendall(rubbish)
                assert status_of(connection) in (400, None)


def test_bodies_that_are_too_much_together(pipe):
    """Who comes last is told to come again; the others go on."""
    body = chat(max_tokens=1, user="x" * 8000)
    with served(pipe, body_bytes=10_000, all_bytes=20_000) as server:
        with connected(server.port) as one, connected(server.port) as two, connected(server.port) as three:
            for connection in (one, two):
                held = server.service.held
                connection.sendall(head(body)[:-1])
                wait(lambda held=held: server.service.held > held + 8000)
            three.sendall(head(body))
            assert status_of(three) == 429 and server.service.asked == 2
            one.sendall(b"}")
            assert status_of(one) == 200
            two.sendall(b"}")
            assert status_of(two) == 200


@pytest.mark.parametrize("told", [True, False])
def test_a_body_of_200_mb(pipe, told):
    with served(pipe) as server:
        body = bytes(200 * 2**20) if told else (bytes(2**20) for _ in range(200))
        held = []
        with ThreadPoolExecutor(1) as thread:
            got = thread.submit(ask, server.port, body=body, method="POST", **{"Content-Type": "application/json"})
            while not got.done():
                held.append(server.service.held)
                time.sleep(0.002)
        assert got.result().status == 413 and "33554432" in got.result().json()["error"]["message"]
        assert max(held) <= 33554432
        assert ask(server.port, body=chat(max_tokens=1)).status == 200


def test_bad_json_and_broken_pictures_beside_others(pipe):
    with open(SAMPLES + "shapes.png", "rb") as file:
        whole = file.read()
    with served(pipe) as server, ThreadPoolExecutor(8) as threads:
        good = [threads.submit(ask, server.port, body=chat("describe this image", sample("shapes.png")))
                for _ in range(3)]
        bad = [threads.submit(ask, server.port, body=body, **{"Content-Type": "application/json"})
               for body in [b"{", b"[]", *(json.dumps(chat("x", url_of(whole[:n]))).encode() for n in (30, 400, 900))]]
        assert all(one.result().status == 400 for one in bad)
        assert len({one.result().json()["choices"][0]["message"]["content"] for one in good}) == 1


def test_a_worker_exception(pipe, monkeypatch):
    """A plain picture fails, the others do not; nothing of it is told to anybody."""
    look = scheduler.visual_tokens

    def fails(model, parts):
        if float(parts[0][0, 0].std()) < 1e-6:
            raise KeyError("a secret")
        return look(model, parts)
    monkeypatch.setattr(scheduler, "visual_tokens", fails)
    plain = url_of(Image.new("RGB", (50, 50), "red"))
    with served(pipe) as server, ThreadPoolExecutor(8) as threads:
        bodies = [chat("describe this image", plain if i % 2 else sample("shapes.png"), stream=i > 3) for i in range(8)]
        got = list(threads.map(lambda body: ask(server.port, body=body), bodies))
        assert [one.status for one in got] == [200, 500] * 4
        assert all(b"others are not affected" in one.data and b"secret" not in one.data for one in got[1::2])


def test_a_worker_exception_in_mid_stream(pipe, monkeypatch):
    """The stream says so, and has no [DONE]."""
    take = scheduler.Scheduler._take

    def fails(self, job, logits):
        if len(job.answer.token_ids) == 5:
            raise KeyError("a secret")
        take(self, job, logits)
    with served(pipe) as server:
        monkeypatch.setattr(scheduler.Scheduler, "_take", fails)
        body = chat("describe this image", sample("shapes.png"))
        chunks, done = events(ask(server.port, body=body | {"stream": True}).data)
        assert len(chunks) == 6 and not done and chunks[-1]["error"]["code"] == "internal_error"
        assert ask(server.port, body=body).status == 500


@pytest.mark.slow
def test_a_slow_reader(pipe):
    """It holds no place: its answer is written and waits for it, the others go on."""
    with served(another(pipe, max_batch_size=1), buffer=4096) as server, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(head(LONG | {"max_tokens": 300, "logprobs": True, "top_logprobs": 20}))
        wait(lambda: server.service.asked == 1)
        assert ask(server.port, body=chat()).status == 200
        wait(lambda: server.service.asked == 0, 60)
        assert 'status="200"} 1' in ask(server.port, "/metrics").data.decode()      # the other one: this is not over
        slow.settimeout(20)
        data = b""
        while not data.endswith(b"0\r\n\r\n"):         # all of it is there, when it is read at last
            data += slow.recv(2**20)
        assert data.count(b"data: [DONE]") == 1 and data.count(b'"finish_reason": "length"') == 1
        assert len(data) > 2**19       # far more than is taken for it on the way


async def many(port, connections, requests):
    """Send requests over some connections -> {status: how often}."""
    data = head(chat("hello", max_tokens=1))
    seen = {}

    async def one():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(requests // connections):
            writer.write(data)
            answer = await reader.readuntil(b"\r\n\r\n")
            status = int(answer[9:12])
            assert status != 429 or b"retry-after: 1\r\n" in answer
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", answer)[1]))
            seen[status] = seen.get(status, 0) + 1
        writer.close()
    await asyncio.gather(*(one() for _ in range(connections)))
    return seen


@pytest.mark.slow
def test_ten_thousand_waiting(pipe, monkeypatch):
    """While four places are taken: each of the others is told at once to come again, and the four are answered."""
    with served(another(pipe, max_batch_size=4), requests=4) as server, ThreadPoolExecutor(4) as threads:
        body = chat("describe this image", sample("shapes.png"))
        alone = ask(server.port, body=body).json()["choices"]
        go_on = threading.Event()
        scores = scheduler.Batch.scores
        monkeypatch.setattr(scheduler.Batch, "scores", lambda *given: go_on.wait(60) and scores(*given))
        four = [threads.submit(ask, server.port, body=body) for _ in range(4)]
        wait(lambda: server.service.asked == 4)
        assert asyncio.run(many(server.port, 200, 10_000)) == {429: 10_000}
        go_on.set()
        assert all(one.result().json()["choices"] == alone for one in four)


def start(*options):
    """The command, and the port it listens on."""
    process = subprocess.Popen([sys.executable, "-m", "minivl", "serve", "--server-port", "0", *options],
                               stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    return process, int(re.search(r"answers at http://127.0.0.1:(\d+)/", line)[1])


@pytest.mark.slow
def test_sigterm_under_load():
    """What was asked is finished, nothing new is taken, and the exit code is 0."""
    process, port = start("--max-batch-size", "2")
    body = chat("describe this image", sample("shapes.png"), ignore_eos=True, max_tokens=150, stream=True)
    with process, ThreadPoolExecutor(6) as threads:
        load = [threads.submit(ask, port, body=body) for _ in range(6)]
        for _ in range(600):
            if b"requests_in_all 6" in ask(port, "/metrics").data:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(ConnectionError):
            ask(port, "/health")
        texts = set()
        for one in load:
            chunks, done = events(one.result().data)
            assert done and chunks[-1]["choices"][0]["finish_reason"] == "length"
            texts.add("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks))
        log = process.stderr.read()
        assert process.wait(20) == 0
    assert len(texts) == 1 and log.count("chat 200: ") == 6 and "Traceback" not in log


def test_the_command_refuses(capsys, monkeypatch):
    from minivl.__main__ import main
    monkeypatch.setattr(serve, "pipeline", lambda *_: pytest.fail("it is not refused"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--server-port", str(port)]) == 2
        assert f"127.0.0.1 port {port} cannot be listened on (" in capsys.readouterr().err
    for words, options in (("--allow-host has an effect only with", ["--allow-host", "h"]),
                           ("--server-port is 70000; it must be in 0..65535", ["--server-port", "70000"]),
                           ("--max-seconds is 0", ["--max-seconds", "0"]),
                           ("a key of --api-keys", ["--api-keys", "a b"]),
                           ("cannot be listened on (", ["--server-name", "not.a.name.example"])):
        assert main(["serve", *options]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "the service needs uvicorn, which is not installed" in " ".join(capsys.readouterr().err.split())
