"""Servers that mean harm: each ends in one InputError, within the time and memory that were given."""
import gzip
import itertools
import resource
import sys
import threading
import time

import pytest
from test_fetch import LOCAL, http_server, reply

from minivl.limits import InputError, Limits
from minivl.media.fetch import fetch

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(bytes(10**8), 9)       # 97 kB


def says(message):
    """A server that sends this and closes."""
    return lambda connection, _request: connection.sendall(message)


def endless(start, piece, pause=0.0):
    """A server that sends `start` and then `piece` for ever."""
    def answer(connection, _request):
        connection.sendall(start)
        while True:
            connection.sendall(piece)
            time.sleep(pause)
    return answer


def longer_each_time(connection, request):
    """Redirect to another, longer URL every time."""
    path = request.split()[1]
    connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {path}{'x' * 10_000}\r\n\r\n".encode())


def to_itself(connection, request):
    connection.sendall(f"HTTP/1.1 307 Again\r\nLocation: {request.split()[1]}\r\n\r\n".encode())


HOSTILE = {
    "a byte of the status line now and then": endless(b"", b"H", 0.05),
    "a byte of a header now and then": endless(OK + b"X: ", b"x", 0.05),
    "a header now and then": endless(OK, b"A: b\r\n", 0.05),
    "a byte of the body now and then": endless(OK + b"\r\n", b"x", 0.05),
    "a byte of a chunk's length now and then": endless(CHUNKED, b"0", 0.05),
    "chunks of one byte now and then": endless(CHUNKED, b"1\r\nx\r\n", 0.05),
    "trailers now and then": endless(CHUNKED + b"1\r\nx\r\n0\r\n", b"A: b\r\n", 0.05),
    "endless status line": endless(b"HTTP/1.1 200 ", b"O" * 65536),
    "endless header": endless(OK + b"X: ", b"x" * 65536),
    "endless headers": endless(OK, b"A: b\r\n" * 1000),
    "headers of a MB": endless(OK, b"A: " + b"b" * 60_000 + b"\r\n"),
    "endless 100 Continue": endless(b"", b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n" * 100),
    "endless body": endless(OK + b"\r\n", b"x" * 65536),
    "endless body of a promised length": endless(OK + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536),
    "endless body of a negative length": endless(OK + b"Content-Length: -1\r\n\r\n", b"x" * 65536),
    "endless body of no number": endless(OK + b"Content-Length: many\r\n\r\n", b"x" * 65536),
    "endless chunks": endless(CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    "endless chunk": endless(CHUNKED + b"f" * 15 + b"\r\n", b"x" * 65536),
    "endless chunk length": endless(CHUNKED, b"0" * 65536),
    "endless chunk extension": endless(CHUNKED + b"1;", b"x" * 65536),
    "endless trailers": endless(CHUNKED + b"1\r\nx\r\n0\r\n", b"A: b\r\n" * 1000),
    "a chunk shorter than it says": says(CHUNKED + b"ff\r\nabc\r\n0\r\n\r\n"),
    "a chunk longer than it says": says(CHUNKED + b"1\r\nabcdef\r\n0\r\n\r\n"),
    "a chunk length of no number": says(CHUNKED + b"0x\r\nabc\r\n0\r\n\r\n"),
    "no last chunk": says(CHUNKED + b"3\r\nabc\r\n"),
    "chunks with a length beside": endless(OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
                                           b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    "fewer bytes than promised": says(OK + b"Content-Length: 900\r\n\r\nabc"),
    "a gzip bomb": reply(BOMB, headers=["Content-Encoding: gzip"]),
    "a gzip bomb in capitals": reply(BOMB, headers=["content-ENCODING:   GZIP"]),
    "a gzip bomb twice": reply(gzip.compress(BOMB), headers=["Content-Encoding: gzip, gzip"]),
    "a gzip bomb that is said to be identity too": reply(BOMB, headers=["Content-Encoding: identity, gzip"]),
    "other packings": reply(b"x" * 99, headers=["Content-Encoding: br"]),
    "a redirect to itself": to_itself,
    "redirects to ever longer URLs": longer_each_time,
    "a redirect to a URL of 60 kB": reply(status="302 Found", headers=["Location: /" + "x" * 60_000]),
    "a redirect into the private network": reply(status="301 Moved", headers=["Location: http://192.168.0.1/"]),
    "a redirect to the cloud's metadata": reply(status="301 Moved", headers=["Location: http://169.254.169.254/"]),
    "a redirect to a file": reply(status="302 Found", headers=["Location: file:///etc/passwd"]),
    "a redirect to a data: URL": reply(status="302 Found", headers=["Location: data:image/png;base64,aGVsbG8="]),
    "a redirect with a break in it": says(b"HTTP/1.1 302 Found\r\nLocation: /a\x0bX: y\r\n\r\n"),
    "two redirects at once": says(b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\nLocation: /b\r\n\r\n"),
    "a switch of protocols": says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n" + b"\0" * 999),
    "another protocol": says(b"SSH-2.0-OpenSSH_9.6\r\n" + b"\0" * 999),
    "an answer of HTTP/0.9": says(b"<html>" + b"x" * 99),
    "nothing": says(b""),
    "zeros": endless(b"", b"\0" * 65536),
}


@pytest.fixture(autouse=True)
def _network_allowed(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_servers(name):
    before, start = peak(), time.process_time()
    threads = threading.active_count()
    with http_server(HOSTILE[name]) as (port, requests), pytest.raises(InputError) as caught:
        fetch(f"http://127.0.0.1:{port}/start", limits=Limits(fetch_seconds=0.3, picture_bytes=100_000), **LOCAL)
    assert len(str(caught.value)) < 600 and "Errno" not in str(caught.value)
    assert len(requests) <= 6
    assert peak() - before < 100 * 2**20
    assert time.process_time() - start < 5
    for _ in itertools.takewhile(lambda _: threading.active_count() > threads + 1, range(100)):     # +1: the server
        time.sleep(0.02)
    assert threading.active_count() <= threads + 1      # the thread that read is gone


def peak():
    """The most bytes this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
