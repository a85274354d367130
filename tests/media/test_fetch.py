"""fetch: what is sent, which addresses and answers are refused, how long it may take; data: URLs. All offline."""
import base64
import contextlib
import ipaddress
import pathlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse

import pytest
from media_files import encoded, noise, refused

from minivl import load_image
from minivl.limits import InputError, Limits
from minivl.media.fetch import _is_public, fetch


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_data_urls_in_every_spelling():
    """What the bytes are decides; the stated type, and how the sender broke or coded the text, do not."""
    picture = noise(61, 3)
    data = encoded(picture, compress_level=0)
    standard = base64.b64encode(data).decode()
    assert "+" in standard and "/" in standard and standard.endswith("=")
    safe = base64.urlsafe_b64encode(data).decode()
    texts = [standard, standard.rstrip("="), safe, safe.rstrip("="), urllib.parse.quote(standard, safe=""),
             base64.encodebytes(data).decode(), standard.replace("A", "A\r\n\t "), standard + "\n"]
    heads = ["data:image/png;base64", "data:application/octet-stream;base64", "data:;base64", "DATA:IMAGE/PNG;BASE64",
             "data:text/plain;charset=utf-8;base64", "data:image/png; base64", "data:image/png;name=a b.png;base64",
             "data:image/png;base64;charset=utf-8", " \n data:image/*;base64"]
    urls = [f"{heads[0]},{text}" for text in texts] + [f"{head},{standard}" for head in heads]
    percent = urllib.parse.quote(data)
    all_coded = "".join(f"%{byte:02x}" for byte in data)
    urls += [f"data:image/png,{percent}", f"data:,{all_coded}", f"data:;charset=x,{percent[:200]}\n{percent[200:]}"]
    for url in urls:
        assert load_image(url).tobytes() == picture.tobytes(), url[:60]


def test_bad_data_urls():
    with refused("has no comma", "data:image/...;base64,"):
        load_image("data:image/png;base64")
    with refused("(percent-coded, as it does not say ;base64) is not a picture"):       # the word was forgotten
        load_image("data:image/png," + base64.b64encode(encoded(noise())).decode())
    with refused("the data: URL is not a picture"):
        load_image("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode())
    for payload in ("abcde", "@@@@", "iVBO=Rw0K", "é" * 8, "iVBO%"):
        with refused("not valid base64"):
            load_image("data:image/png;base64," + payload)
    for url in ("data:image/png;base64," + "A" * 16, "data:," + "A" * 12):
        with refused("has 12 bytes, the limit is 11"):
            load_image(url, limits=Limits(picture_bytes=11))
    with refused("the data: URL is empty"):
        load_image("data:image/png;base64,")
    with refused("the data: URL is not a picture"):
        load_image("data:image/png;base64," + base64.b64encode(b"hello there").decode())


@contextlib.contextmanager
def http_server(answer, tls=None, listen=True):
    """A server on 127.0.0.1: `answer(connection, request)` sends whatever it likes. Gives (port, requests seen)."""
    requests, listener = [], socket.create_server(("127.0.0.1", 0))

    def serve(connection):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            if tls is not None:
                connection = stack.enter_context(tls.wrap_socket(connection, server_side=True))
            request = b""
            while listen and b"\r\n\r\n" not in request and (part := connection.recv(4096)):
                request += part
            requests.append(request.decode("latin-1"))
            answer(connection, requests[-1])

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], requests
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def reply(body=b"", status="200 OK", headers=(), length=True):
    head = [f"HTTP/1.1 {status}", *headers] + ([f"Content-Length: {len(body)}"] if length else [])
    message = "\r\n".join(head).encode("utf-8") + b"\r\n\r\n" + body
    return lambda connection, _request: connection.sendall(message)


LOCAL = {"allow_hosts": ("127.0.0.1",)}


def answers(table, calls=None):
    """A stand-in for socket.getaddrinfo: host -> list of addresses."""
    def getaddrinfo(host, port, *_args, **_options):
        if calls is not None:
            calls.append(host)
        if host not in table:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "",
                 (address, port, 0, 0) if ":" in address else (address, port)) for address in table[host]]
    return getaddrinfo


def test_fetch_and_load_from_a_server(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")      # must not be used
    data = encoded(noise())
    with http_server(reply(data)) as (port, requests):
        assert fetch(f"http://127.0.0.1:{port}/a%20b/é.png?x=1&y=ü#part", **LOCAL) == data
        assert load_image(f"HTTP://127.0.0.1:{port}", **LOCAL).tobytes() == noise().tobytes()
    first, second = requests
    assert first.startswith("GET /a%20b/%C3%A9.png?x=1&y=%C3%BC HTTP/1.1\r\n") and second.startswith("GET / HTTP/1.1")
    assert f"Host: 127.0.0.1:{port}\r\n" in first
    assert "User-Agent: minivl\r\n" in first and "Accept-Encoding: identity\r\n" in first
    assert "cookie" not in first.lower() and "authorization" not in first.lower()


def test_fetch_body_forms():
    chunked = b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"
    for answer in (reply(b"abcdefg", length=False), reply(chunked, headers=["Transfer-Encoding: chunked"],
                                                          length=False)):
        with http_server(answer) as (port, _):
            assert fetch(f"http://127.0.0.1:{port}/", **LOCAL) == b"abcdefg"


def test_name_is_resolved_once_and_sent_as_host(monkeypatch):
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", answers({"pictures.example": ["127.0.0.1"]}, calls))
    with http_server(reply(b"x")) as (port, requests):
        assert fetch(f"http://Pictures.example:{port}/", allow_hosts=["pictures.EXAMPLE"]) == b"x"
    assert f"Host: pictures.example:{port}\r\n" in requests[0] and calls == ["pictures.example"]


@pytest.mark.parametrize("value", ["1", "on", "Yes", "TRUE"])
def test_offline(monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with refused("https://host/a.png", "HF_HUB_OFFLINE"):
        fetch("https://host/a.png?token=secret")


def test_offline_false_values(monkeypatch):
    with http_server(reply(b"x")) as (port, _):
        for value in ("", "0", "no", "false"):
            monkeypatch.setenv("HF_HUB_OFFLINE", value)
            assert fetch(f"http://127.0.0.1:{port}/", **LOCAL) == b"x"


PRIVATE = ["127.0.0.1", "127.255.255.254", "10.0.0.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
           "0.0.0.0", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.0.0.8", "192.0.2.1",
           "198.18.0.1", "192.88.99.1", "::1", "::", "fe80::1", "fe80::1%2", "fc00::1", "fd12::1", "fec0::1", "ff02::1",
           "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "2002:7f00:1::", "2002:0808:0808::",
           "2001:0:4136:e378:8000:63bf:3fff:fdd2", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1",
           "3fff::1", "3fff:fff:ffff::1", "5f00::1", "100:0:0:1::1", "2001:20::1", "3ffe::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused(monkeypatch, address):
    # also when only one of several addresses is private
    monkeypatch.setattr(socket, "getaddrinfo", answers({"evil.example": ["93.184.216.34", address]}))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    with refused("http://evil.example/a", "not on the public internet", "allow_hosts=('evil.example',)"):
        fetch("http://evil.example/a?token=secret")


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808",
                                     "::ffff:8.8.8.8"])
def test_public_addresses_are_connected_to_as_checked(monkeypatch, address):
    """Also DNS rebinding: a second question would get 127.0.0.1, so it must not be asked."""
    table, connected = {"good.example": [address]}, []

    def getaddrinfo(*args, **options):
        result = answers(table)(*args, **options)
        table["good.example"] = ["127.0.0.1"]
        return result

    def connect(_self, target):
        connected.append(target[:2])
        raise ConnectionRefusedError
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with refused("http://good.example:8080/", "connection failed"):
        fetch("http://good.example:8080/")
    assert connected == [(address, 8080)] and table["good.example"] == ["127.0.0.1"]


V4 = ["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
      "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
      "224.0.0.0/3"]
V6 = ["::/3", "2001::/23", "2001:db8::/32", "2002::/16", "3ffe::/16", "3fff::/20", "4000::/2", "8000::/1"]
# named inside them by the registries, whatever those say about their reach
INSIDE = ["192.0.0.9/32", "192.0.0.170/31", "192.88.99.2/32", "224.0.0.0/4", "239.0.0.0/8", "240.0.0.0/4",
          "255.255.255.255/32", "::/128", "::1/128", "::ffff:0:0:0/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64",
          "2001::/32", "2001:1::1/128", "2001:2::/48", "2001:3::/32", "2001:4:112::/48", "2001:10::/28", "2001:20::/28",
          "2001:30::/28", "3fff:fff::/32", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"]
PUBLIC = ["1.1.1.1/32", "93.184.216.34/32", "192.31.196.0/24", "192.52.193.0/24", "192.175.48.0/24", "2000::/16",
          "2001:200::/23", "2400:cb00::/32", "2606:4700::/32", "2620:4f:8000::/48", "2a00::/12", "2c00::/12",
          "3fff:1000::/32"]


def test_the_table_of_public_addresses(monkeypatch):
    """First and last of every block, the addresses next to it, and IPv4 inside IPv6; never Python's own opinion."""
    for kind in (ipaddress.IPv4Address, ipaddress.IPv6Address):
        for name in ("is_global", "is_private", "is_reserved", "is_multicast"):
            monkeypatch.setattr(kind, name, property(lambda self: pytest.fail("this depends on the version of Python")))
    monkeypatch.setattr(ipaddress.IPv6Address, "ipv4_mapped", None)
    blocks = [*map(ipaddress.ip_network, V4 + V6)]
    wraps = ["::ffff:{}", "64:ff9b::{}"]
    seen = 0
    for block in map(ipaddress.ip_network, V4 + V6 + INSIDE + PUBLIC):
        first, last = int(block[0]), int(block[-1])
        for number in (first - 1, first, (first + last) // 2, last, last + 1):
            if not 0 <= number < 2 ** block.max_prefixlen:
                continue
            address = type(block[0])(number)
            if address.version == 6 and any(address in ipaddress.ip_network(wrap.format("0.0.0.0/96").replace(
                    "0.0.0.0", "0:0")) for wrap in wraps):
                continue
            public = not any(address in block for block in blocks if block.version == address.version)
            assert _is_public(str(address)) == public, address
            for wrap in wraps if address.version == 4 else ():
                assert _is_public(wrap.format(address)) == public, (wrap, address)
            seen += public
    assert seen > 60
    assert not _is_public("fe80::1%2") and not _is_public("::ffff:0:8.8.8.8") and not _is_public("64:ff9a::808:808")


def test_second_address_is_tried(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answers({"two.example": ["127.0.0.9", "127.0.0.1"]}))
    with http_server(reply(b"x")) as (port, _):     # listens on 127.0.0.1 only
        assert fetch(f"http://two.example:{port}/", allow_hosts=["two.example"]) == b"x"


def test_silent_address_leaves_time_for_the_next(monkeypatch):
    waits = []

    def connect(self, _target):
        waits.append(self.gettimeout())
        raise TimeoutError
    monkeypatch.setattr(socket, "getaddrinfo", answers({"two.example": ["8.8.8.8", "8.8.4.4"]}))
    monkeypatch.setattr(socket.socket, "connect", connect)
    with refused("connection failed"):
        fetch("http://two.example/", limits=Limits(fetch_seconds=8))
    assert waits == pytest.approx([4, 8], abs=0.5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "017700000001", "[::1]",
                                  "[::ffff:127.0.0.1]", "0", "localhost."])
def test_spellings_of_this_machine(host):
    with pytest.raises(InputError, match="not on the public internet|cannot be resolved"):
        fetch(f"http://{host}/")


def test_allow_hosts_is_the_name_as_written():
    with http_server(reply(b"x")) as (port, _):
        with refused("not on the public internet"):
            fetch(f"http://127.0.0.1:{port}/", allow_hosts=["localhost"])
        with refused("not on the public internet"):
            fetch(f"http://localhost:{port}/", allow_hosts=["127.0.0.1"])
        assert fetch(f"http://localhost:{port}/", allow_hosts=["localhost"]) == b"x"
        for wrong in ("127.0.0.1", None):
            with refused("allow_hosts must be a list or tuple", repr(wrong)):
                fetch(f"http://127.0.0.1:{port}/", allow_hosts=wrong)


@pytest.mark.parametrize("url, words", [
    ("http://user:secret@host/", ["http://host/", "user name and password"]),
    ("http://secret@host/", ["user name and password"]),
    ("http://good.example\\@evil.example/", ["user name and password"]),
    ("http://host/a b", ["white space or control characters"]),
    ("http://host/a\r\nX-Header: 1", ["white space or control characters"]),
    ("http://ho\tst/", ["white space or control characters"]),
    ("http://host/\x7f", ["white space or control characters", "http://host/?"]),
    ("http://host/\u2028", ["white space or control characters"]),
    (" http://host/", ["white space or control characters"]),
    ("ftp://host/", ["only http and https", "ftp"]),
    ("file:///etc/passwd", ["only http and https", "file"]),
    ("no url", ["white space"]), ("nourl", ["without a scheme"]),
    ("http:///path", ["names no host"]), ("http://", ["names no host"]),
    ("http://host:99999/", ["the port is not a number"]), ("http://host:http/", ["the port is not a number"]),
    ("http://[::1/", ["not a valid URL"]),
    ("http://a..b/", ["cannot be resolved"]), ("http://" + "a" * 70 + ".example/", ["cannot be resolved"])])
def test_urls_refused_before_connecting(monkeypatch, url, words):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    with refused(*words) as caught:
        fetch(url)
    assert "secret" not in str(caught.value)


def test_not_a_str():
    for wrong in (None, b"http://host/", 3):
        with refused("must be a str, not a " + type(wrong).__name__):
            fetch(wrong)


def test_unknown_host(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", answers({}))
    with refused("http://nowhere.example/", "cannot be resolved"):
        fetch("http://nowhere.example/?token=secret")


def test_connection_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with refused(f"http://127.0.0.1:{port}/x", "connection failed"):
        load_image(f"http://127.0.0.1:{port}/x?token=secret", **LOCAL)


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "204 No Content", "206 Partial Content", "304 Same",
                                    "401 Unauthorized"])
def test_only_status_200(status):
    with http_server(reply(b"", status)) as (port, _):
        with refused(f"http://127.0.0.1:{port}/a", "status " + status[:3], "expected 200"):
            fetch(f"http://127.0.0.1:{port}/a?token=secret", **LOCAL)


def test_size_limit():
    limits = Limits(picture_bytes=1000)

    def endless(connection, _request):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 1000)

    def promise(connection, _request):                  # only the header: must be refused before any body comes
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")
        time.sleep(5)
    with http_server(promise) as (port, _):
        start = time.monotonic()
        with refused("has 1001 bytes, the limit is 1000", "picture_bytes"):
            fetch(f"http://127.0.0.1:{port}/", limits=limits, **LOCAL)
        assert time.monotonic() - start < 2
    for answer in (endless, reply(b"x" * 1001, length=False)):
        with http_server(answer) as (port, _):
            with refused("more than 1000 bytes, the limit", "picture_bytes"):
                fetch(f"http://127.0.0.1:{port}/", limits=limits, **LOCAL)
    with http_server(reply(b"x" * 1000)) as (port, _):
        assert len(fetch(f"http://127.0.0.1:{port}/", limits=limits, **LOCAL)) == 1000


def test_answers_that_break_off_or_are_no_http():
    with http_server(lambda c, _: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")) as (port, _):
        with refused("the connection ended after 3 of 10 bytes"):
            fetch(f"http://127.0.0.1:{port}/", **LOCAL)
    for message in (b"", b"hello\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200,
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc",
                    b"HTTP/1.1 200 OK\r\n" + b"A" * 70_000 + b": b\r\n\r\n"):
        with http_server(lambda c, _, message=message: c.sendall(message)) as (port, _):
            with refused(f"http://127.0.0.1:{port}/: the "):        # connection failed, or answer is not valid HTTP
                fetch(f"http://127.0.0.1:{port}/", **LOCAL)


def test_content_encoding():
    with http_server(reply(b"x", headers=["Content-Encoding: gzip"])) as (port, _):
        with refused("Content-Encoding 'gzip'", "identity"):
            fetch(f"http://127.0.0.1:{port}/", **LOCAL)
    with http_server(reply(b"x", headers=["Content-Encoding: Identity"])) as (port, _):
        assert fetch(f"http://127.0.0.1:{port}/", **LOCAL) == b"x"


def drip_header(connection, _request):
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def drip_body(connection, _request):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def drip_redirects(connection, _request):
    time.sleep(0.2)
    reply(status="302 Found", headers=["Location: /again"])(connection, _request)


def silence(_connection, _request):
    time.sleep(5)


@pytest.mark.parametrize("answer", [drip_header, drip_body, drip_redirects, silence])
def test_deadline(answer):
    start = time.monotonic()
    with http_server(answer) as (port, _):
        with refused(f"http://127.0.0.1:{port}/", "longer than 0.5 seconds", "fetch_seconds"):
            fetch(f"http://127.0.0.1:{port}/?token=secret", limits=Limits(fetch_seconds=0.5), **LOCAL)
    assert 0.4 < time.monotonic() - start < 1.5


def test_deadline_leaves_no_thread_behind():
    before = set(threading.enumerate())
    gone = threading.Event()

    def answer(connection, request):
        try:
            drip_header(connection, request)
        finally:
            gone.set()
    with http_server(answer) as (port, _):
        with refused("longer than 0.3 seconds"):
            fetch(f"http://127.0.0.1:{port}/", limits=Limits(fetch_seconds=0.3), **LOCAL)
        assert gone.wait(2)                     # the connection was really shut, not just forgotten
    until = time.monotonic() + 2
    while set(threading.enumerate()) - before and time.monotonic() < until:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before


def test_slow_name_server(monkeypatch):
    release = threading.Event()

    def getaddrinfo(*_args, **_options):
        release.wait(5)
        raise socket.gaierror
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with refused("longer than 0.3 seconds"):
        fetch("http://slow.example/", limits=Limits(fetch_seconds=0.3))
    release.set()


def redirect(target, status="302 Found"):
    return lambda connection, request: (
        reply(b"arrived") if request.startswith("GET /end") else
        reply(status=status, headers=[f"Location: {target}"]))(connection, request)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed(status):
    for target in ("/end", "end?x=1", "//127.0.0.1:{port}/end", "http://127.0.0.1:{port}/end", "/end/é"):
        port_box = []

        def answer(connection, request, target=target, port_box=port_box):
            redirect(target.format(port=port_box[0]), status)(connection, request)
        with http_server(answer) as (port, requests):
            port_box.append(port)
            assert fetch(f"http://127.0.0.1:{port}/", **LOCAL) == b"arrived"
            assert len(requests) == 2
    assert requests[1].startswith("GET /end/%C3%A9 ")


@pytest.mark.parametrize("target, words", [
    ("http://10.0.0.1/a", ["http://10.0.0.1/a", "not on the public internet"]),
    ("http://169.254.169.254/latest/", ["not on the public internet"]),
    ("http://localhost/a", ["http://localhost/a", "not on the public internet"]),
    ("http://[::ffff:10.0.0.1]/", ["not on the public internet"]),
    ("file:///etc/passwd", ["only http and https", "file"]), ("ftp://host/x", ["only http and https", "ftp"]),
    ("http://user:pw@127.0.0.1/", ["user name and password"]), ("/a b", ["white space"]),
    ("", ["status 302", "without a Location"]), ("http://[", ["redirects to something that is not a valid URL"]),
    ("http://127.0.0.1:x/", ["the port is not a number"])])
def test_redirects_are_checked_like_the_first_url(target, words):
    with http_server(redirect(target)) as (port, requests):
        with refused(*words):
            fetch(f"http://127.0.0.1:{port}/", **LOCAL)
        assert len(requests) == 1


def test_redirect_name_is_checked_again(monkeypatch):
    """The first host is allowed by name; the next one resolves to a private address and is not."""
    monkeypatch.setattr(socket, "getaddrinfo", answers({"a.example": ["127.0.0.1"], "b.example": ["127.0.0.1"]}))
    with http_server(lambda c, r: redirect(f"http://b.example:{port_box[0]}/end")(c, r)) as (port, requests):
        port_box = [port]
        with refused("http://b.example", "not on the public internet"):
            fetch(f"http://a.example:{port}/", allow_hosts=["a.example"])
        assert len(requests) == 1
        assert fetch(f"http://a.example:{port}/", allow_hosts=["a.example", "b.example"]) == b"arrived"


def test_redirect_loop():
    with http_server(redirect("/again")) as (port, requests):
        with refused(f"http://127.0.0.1:{port}/start", "more than 5 redirects", "Limits(redirects"):
            fetch(f"http://127.0.0.1:{port}/start", **LOCAL)
        assert len(requests) == 6
        with refused("more than 0 redirects"):
            fetch(f"http://127.0.0.1:{port}/", limits=Limits(redirects=0), **LOCAL)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate and key file) for pictures.example, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", path, "-out", str(path) + ".crt", "-days", "2", "-subj", "/CN=pictures.example",
                    "-addext", "subjectAltName=DNS:pictures.example"], check=True, capture_output=True)
    with open(path, "ab") as file:
        file.write(pathlib.Path(str(path) + ".crt").read_bytes())
    return path


def test_https(monkeypatch, certificate):
    names = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    monkeypatch.setattr(socket, "getaddrinfo",
                        answers({"pictures.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}))
    allowed = {"allow_hosts": ["pictures.example", "other.example"]}

    def answer(connection, request):
        if request.startswith("GET /down"):
            return reply(status="302 Found", headers=["Location: http://pictures.example/"])(connection, request)
        if request.startswith("GET /drip"):
            return drip_header(connection, request)
        return reply(b"secret picture")(connection, request)
    with http_server(answer, tls=context) as (port, requests):
        with refused("certificate is not valid for pictures.example"):          # signed by nobody known
            fetch(f"https://pictures.example:{port}/", **allowed)
        assert not requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch(f"https://pictures.example:{port}/", **allowed) == b"secret picture"
        assert names[-1] == "pictures.example" and f"Host: pictures.example:{port}\r\n" in requests[0]
        with refused("certificate is not valid for other.example"):
            fetch(f"https://other.example:{port}/", **allowed)
        with refused("redirects from https to unprotected http"):
            fetch(f"https://pictures.example:{port}/down", **allowed)
        start = time.monotonic()
        with refused("longer than 0.5 seconds"):
            fetch(f"https://pictures.example:{port}/drip", limits=Limits(fetch_seconds=0.5), **allowed)
        assert time.monotonic() - start < 1.5
    with http_server(lambda connection, _request: time.sleep(5)) as (port, _):      # never answers the handshake
        with refused("longer than 0.3 seconds"):
            fetch(f"https://pictures.example:{port}/", limits=Limits(fetch_seconds=0.3), **allowed)
    with http_server(reply(b"x"), listen=False) as (port, _):                       # speaks http on an https port
        with refused("connection failed", "https"):
            fetch(f"https://pictures.example:{port}/", limits=Limits(fetch_seconds=2), **allowed)
