"""The cases that media/ is tested with, through the API: addresses, redirects, hostile servers, pictures that cost."""
import json
import socket
import sys
from pathlib import Path

import pytest
from PIL import Image
from serving import another, ask, chat, nano, served, url_of

sys.path.append(str(Path(__file__).parents[1] / "media"))       # as pytest does for the tests there
from media_files import encoded, noise, png_header
from test_costs import BOMBS
from test_fetch import PRIVATE, answers, http_server, redirect, reply
from test_hostile_servers import HOSTILE

from minivl import Limits


@pytest.fixture(scope="module")
def pipe():
    return another(nano(), allow_hosts=("127.0.0.1",), limits=Limits(fetch_seconds=0.3, picture_bytes=2**22))


@pytest.fixture(scope="module")
def remote(pipe):
    with served(pipe, allow_remote=True) as server:
        yield server


@pytest.fixture(scope="module")
def closed(pipe):
    with served(pipe) as server:
        yield server


@pytest.fixture(autouse=True)
def _network_allowed(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def refusal(server, url):
    """What is said about a picture's URL."""
    got = ask(server.port, body=chat("what?", url, max_tokens=1))
    assert got.status == 400, got.data[:200]
    return got.json()["error"]["message"]


def test_a_picture_is_fetched_where_that_is_allowed(remote):
    with http_server(reply(encoded(noise()))) as (port, requests):
        got = ask(remote.port, body=chat("what?", f"http://127.0.0.1:{port}/a.png", max_tokens=1))
        assert got.status == 200 and len(requests) == 1
        inline = ask(remote.port, body=chat("what?", url_of(noise()), max_tokens=1))
        assert inline.json()["choices"] == got.json()["choices"]


@pytest.mark.parametrize("scheme", ["http://", "HTTP://", " http://", "https://", "//", "ftp://", "file://", ""])
def test_nothing_is_fetched_where_it_is_not(closed, scheme):
    with http_server(reply(encoded(noise()))) as (port, requests):
        assert "must begin with data: (fetching others is off" in refusal(closed, f"{scheme}127.0.0.1:{port}/a.png")
        for item in ({"type": "image_data", "image_data": {"data": f"http://127.0.0.1:{port}/"}},
                     {"type": "image_url", "image_url": [f"http://127.0.0.1:{port}/"]}):
            body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, item]}]}
            assert ask(closed.port, body=body).status == 400
        assert not requests


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "minivl/nano/samples/shapes.png", "~/x.png",
                                 "\\\\host\\share", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "", "javascript:1"])
def test_local_paths_are_never_read(remote, url):
    assert "must begin with data: or http(s):" in refusal(remote, url)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(remote, monkeypatch, address):
    whole = socket.getaddrinfo
    table = answers({"evil.example": ["93.184.216.34", address]})
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **options: (
        table if "evil" in str(host) else whole)(host, *more, **options))
    said = refusal(remote, "http://evil.example/a?token=secret")
    assert "not on the public internet" in said and "secret" not in said and "allow_hosts" not in said


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "127.1", "017700000001", "[::1]", "0",
                                  "[::ffff:127.0.0.1]", "localhost."])
def test_spellings_of_this_machine(remote, host):
    said = refusal(remote, f"http://{host}:{remote.port}/metrics")
    assert "not on the public internet" in said or "cannot be resolved" in said


@pytest.mark.parametrize("target", ["http://10.0.0.1/a", "http://169.254.169.254/latest/", "http://localhost/a",
                                    "http://[::ffff:10.0.0.1]/", "file:///etc/passwd", "ftp://host/x", "/a b", "",
                                    "http://user:pw@127.0.0.1/", "http://[", "http://127.0.0.1:x/",
                                    "data:image/png;base64,aGVsbG8="])
def test_redirects(remote, target):
    with http_server(redirect(target)) as (port, requests):
        assert "pw" not in refusal(remote, f"http://127.0.0.1:{port}/")
        assert len(requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_servers(remote, name):
    with http_server(HOSTILE[name]) as (port, _):
        said = refusal(remote, f"http://127.0.0.1:{port}/start")
    assert len(said) < 600 and "Limits" not in said
    assert ask(remote.port, body=chat(max_tokens=1)).status == 200


@pytest.mark.parametrize("name", ["jpeg scans", "png chunks", "bmp runs", "tiff tile", "gif blocks"])
def test_pictures_that_cost_much(remote, name):
    """Also those that are small."""
    data, words, _ = BOMBS[name]()
    said = refusal(remote, url_of(data))
    assert words in said or "limit" in said
    assert "Limits" not in said


def test_pictures_that_claim_much(remote):
    assert "pixels" in refusal(remote, url_of(png_header(30_000, 30_000)))
    assert "aspect ratio" in refusal(remote, url_of(Image.new("1", (4000, 1))))
    whole = encoded(noise(200, 200))
    for cut in (0, 1, 20, len(whole) // 2):
        assert refusal(remote, url_of(whole[:cut]))
    assert ask(remote.port, body=json.loads(json.dumps(chat(max_tokens=1)))).status == 200
