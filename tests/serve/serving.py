"""A service for tests: uvicorn in a thread, on a port that is free; and a client that knows only HTTP."""
import base64
import contextlib
import functools
import http.client
import io
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed: pip install starlette uvicorn")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed: pip install starlette uvicorn")

import minivl  # noqa: E402
from minivl import EngineConfig, Limits, Pipeline  # noqa: E402
from minivl.serve.api import Guards, Service  # noqa: E402
from minivl.serve.server import configured, listen  # noqa: E402

SAMPLES = "minivl/nano/samples/"


@functools.cache
def nano():
    """A pipeline as `serve` makes it, loaded once for all tests."""
    return minivl.pipeline("nano", EngineConfig(plain_text=True, allow_paths=False, limits=Limits(pictures=16)))


def another(pipe, **engine):
    """A pipeline of the same model with another config."""
    return Pipeline(pipe.model, pipe.tokenizer, EngineConfig(plain_text=True, allow_paths=False, **engine), name="nano")


@contextlib.contextmanager
def served(pipe, buffer=0, **guards):
    """Serve a pipeline; gives .port and .service. buffer: bytes that the system takes of an answer; 0: as usual."""
    service = Service(pipe, Guards(**guards))
    server = uvicorn.Server(configured(service))
    listener = listen("127.0.0.1", 0)
    if buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)        # connections inherit it
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait(lambda: server.started)
    try:
        yield SimpleNamespace(port=listener.getsockname()[1], service=service, server=server, thread=thread)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive() and not service.scheduler.thread.is_alive()
    assert (service.asked, service.held, service.scheduler.busy()) == (0, 0, False)


def wait(until, seconds=10):
    """Wait until something is so."""
    for _ in range(int(seconds / 0.005)):
        if until():
            return
        time.sleep(0.005)
    pytest.fail("it did not happen")


def ask(port, path="/v1/chat/completions", body=None, key=None, method=None, **headers):
    """One request -> .status, .headers, .data (bytes), .json()."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    if isinstance(body, dict | list):
        body = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    got = connection.getresponse()
    data = got.read()
    connection.close()
    return SimpleNamespace(status=got.status, headers=got.headers, data=data, json=lambda: json.loads(data))


def events(data):
    """The JSON of each event of a stream, and whether it says that it is done."""
    lines = [line for line in data.decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    lines = [line.removeprefix("data: ") for line in lines]
    done = lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:len(lines) - done]], done


def url_of(picture):
    """A picture, or a file's bytes, as a data: URL."""
    if not isinstance(picture, bytes):
        file = io.BytesIO()
        picture.save(file, "PNG")
        picture = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def sample(name):
    with open(SAMPLES + name, "rb") as file:
        return url_of(file.read())


def user(text, *urls, **detail):
    """A message of the user, with pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": url, **detail}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}


def chat(text="hello", *urls, **fields):
    """A request for an answer that is always the same."""
    return {"messages": [user(text, *urls)], "temperature": 0, **fields}
