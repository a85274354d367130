"""Fetch the bytes behind http(s):// and data: URLs: the one module of the package that talks to the network itself.

A URL may come from a stranger, so the address is checked before connecting and the size before reading. Whatever cannot
be used raises `InputError`.
"""
from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Collection

from minivl.limits import InputError, Limits, offline
from minivl.media.local import check_bytes, split_url

# Where no public host is, by IANA's registries of special-purpose addresses, of 2025-10: iana.org/assignments/
# iana-ipv4-special-registry and iana-ipv6-special-registry, all that lies in 2001::/23 taken together. Our own table:
# what Python's ipaddress calls global depends on its version. Public is all other IPv4, and of IPv6 all other of
# 2000::/3, the only block that addresses are given out of (iana.org/assignments/ipv6-unicast-address-assignments).
NOT_PUBLIC_4 = tuple(map(ipaddress.IPv4Network, (
    "0.0.0.0/8",            # this network, RFC 791
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",            # private, RFC 1918
    "100.64.0.0/10",        # shared by customers of a provider, RFC 6598
    "127.0.0.0/8",          # loopback, RFC 1122
    "169.254.0.0/16",       # link-local, RFC 3927; clouds serve credentials there
    "192.0.0.0/24",         # protocol assignments, RFC 6890
    "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24",        # documentation, RFC 5737
    "192.88.99.0/24",       # 6to4 relays, deprecated by RFC 7526
    "198.18.0.0/15",        # benchmarks, RFC 2544
    "224.0.0.0/4",          # multicast, RFC 5771
    "240.0.0.0/4")))        # reserved, RFC 1112, with the broadcast address
GIVEN_OUT_6 = ipaddress.IPv6Network("2000::/3")
NOT_PUBLIC_6 = tuple(map(ipaddress.IPv6Network, (
    "2001::/23",            # protocol assignments, RFC 2928: Teredo, benchmarks, ORCHID, ...
    "2001:db8::/32", "3fff::/20",       # documentation, RFC 3849 and RFC 9637
    "2002::/16",            # 6to4, which wraps an IPv4 address; deprecated by RFC 7526
    "3ffe::/16")))          # the former 6bone, RFC 3701
# The IPv4 address that is really meant is the last 32 bits: IPv4-mapped, RFC 4291, and NAT64, RFC 6052.
WRAPS_IPV4 = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))

URL_SAFE = "%/:=&?~#+!$,;'@()*[]"      # stays as written in path and query, besides letters, digits and _.-


def fetch(url: str, *, limits: Limits = Limits(), allow_hosts: Collection[str] = ()) -> bytes:
    """Fetch the bytes behind an http(s) URL. Raises InputError.

    Refused: hosts with any address outside the public internet, unless the host name as written in the URL is in
    `allow_hosts`; more than limits.picture_bytes; more than limits.fetch_seconds in all, redirects included;
    any final status but 200; everything while the environment variable HF_HUB_OFFLINE is true.
    """
    if not isinstance(url, str):
        raise InputError(f"a URL must be a str, not a {type(url).__name__}")
    if not isinstance(allow_hosts, (list, tuple, set, frozenset)):      # ("localhost") without a comma is a str
        raise InputError(f"allow_hosts must be a list or tuple of host names, not {allow_hosts!r}")
    if offline():
        raise InputError(f"{show_url(url)} is not fetched: HF_HUB_OFFLINE is set; unset it or give a local file")
    # A worker thread, because socket timeouts bound each wait and not the whole: resolving a name has no timeout at
    # all, and a server sending one byte per second never meets one. At the deadline its socket is shut from here.
    allowed = {host.lower() for host in allow_hosts}
    deadline = time.monotonic() + limits.fetch_seconds
    outcome = []        # the bytes or the exception
    live = []           # the open socket

    def work():
        try:
            outcome.append(_follow(url, deadline, limits, allowed, live))
        except BaseException as error:
            outcome.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(limits.fetch_seconds)
    if worker.is_alive() and not outcome:
        for sock in live:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)      # the TCP one: SSLSocket's own is not thread-safe
        raise _too_slow(url, limits)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _follow(url: str, deadline: float, limits: Limits, allowed: set[str], live: list) -> bytes:
    """Get a URL and follow redirects, checking every stop like the first: `fetch` inside its thread."""
    first = url
    for _ in range(limits.redirects + 1):
        body, location = _get(url, deadline, limits, allowed, live)
        if location is None:
            return body
        secure = url[:6].lower() == "https:"
        try:
            url = urllib.parse.urljoin(url, location)
        except ValueError:
            raise InputError(f"{show_url(url)} redirects to something that is not a valid URL; check it") from None
        if secure and url[:5].lower() == "http:":
            raise InputError(f"{show_url(first)} redirects from https to unprotected http, which is refused; "
                             "use a URL that stays on https")
    raise InputError(f"{show_url(first)}: more than {limits.redirects} redirects; give the final URL or raise "
                     "Limits(redirects=...)")


def _get(url: str, deadline: float, limits: Limits, allowed: set[str], live: list) -> tuple[bytes | None, str | None]:
    """Send one request; return (body, None), or (None, location) for a redirect."""
    name = show_url(url)
    parts = _check_url(url)
    try:
        host = parts.hostname
        port = parts.port
    except ValueError:
        raise InputError(f"{name}: the port is not a number from 0 to 65535") from None
    secure = parts.scheme == "https"
    port = (443 if secure else 80) if port is None else port
    try:
        # Environment proxies (http_proxy) are not used: a proxy would resolve the name again, past the check.
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(_connect(host, port, deadline, allowed, live, name))
            if secure:
                context = ssl.create_default_context()
                sock = stack.enter_context(context.wrap_socket(sock, server_hostname=host,
                                                               do_handshake_on_connect=False))
                live[:] = [sock]
                sock.do_handshake()
                connection = http.client.HTTPSConnection(host, port, context=context)
            else:
                connection = http.client.HTTPConnection(host, port)
            connection.sock = sock      # connected to the very address checked; http.client then does not resolve
            target = urllib.parse.quote(parts.path or "/", safe=URL_SAFE)
            if parts.query:
                target += "?" + urllib.parse.quote(parts.query, safe=URL_SAFE)
            connection.request("GET", target, headers={"User-Agent": "minivl", "Accept-Encoding": "identity"})
            with connection.getresponse() as response:
                return _read_response(response, deadline, limits, name)
    except TimeoutError:
        raise _too_slow(url, limits) from None
    except ssl.SSLCertVerificationError:
        raise InputError(f"{name}: the server's certificate is not valid for {host}; check the host name") from None
    except (OSError, http.client.HTTPException):
        raise InputError(f"{name}: the connection failed (refused, broken off, or not speaking "
                         f"{parts.scheme}); check the URL") from None
    except InputError:
        raise
    except ValueError:                  # http.client, on some malformed answers
        raise InputError(f"{name}: the server's answer is not valid HTTP; download the file yourself") from None


def _check_url(url: str) -> urllib.parse.SplitResult:
    """Split a URL to be fetched, and refuse what a careful client does not send."""
    name = show_url(url)
    # Before splitting: urlsplit silently drops tabs and line breaks, so it would check another URL than is asked for.
    if any(not char.isprintable() or char == " " for char in url):
        raise InputError(f"{name}: the URL holds white space or control characters; write them as %20 and the like")
    parts = split_url(url, name)
    if parts.scheme not in ("http", "https"):
        raise InputError(f"{name}: only http and https are fetched, not {parts.scheme or 'a URL without a scheme'}")
    if "@" in parts.netloc:
        raise InputError(f"{name}: user name and password in the URL are not accepted; remove the part before @")
    if not parts.hostname:
        raise InputError(f"{name}: the URL names no host; write http(s)://host/path")
    return parts


def show_url(url: str) -> str:
    """Write a URL for messages, scheme://host/path: never user, password or query string, which may hold secrets."""
    try:
        parts = urllib.parse.urlsplit(url)
        text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        return "the URL"
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= 200 else text[:200] + "..."


def _too_slow(url: str, limits: Limits) -> InputError:
    """Make the error for a transfer past its deadline."""
    return InputError(f"{show_url(url)}: took longer than {limits.fetch_seconds:g} seconds; download the file "
                      "yourself or raise Limits(fetch_seconds=...)")


def _connect(host: str, port: int, deadline: float, allowed: set[str], live: list, name: str) -> socket.socket:
    """Resolve `host` once, refuse it if any address is not public, and connect to one of the checked addresses.

    Checking and connecting share one answer of the name server: asked twice, it could first name a public address
    and then a private one ("DNS rebinding"). The open socket is also put in `live`, for `fetch` to shut it.
    """
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(f"{name}: the host name cannot be resolved; check it and the network") from None
    # Numbers in disguise (http://2130706433/, http://0x7f.1/) need no rule of their own: they are resolved by now.
    if host not in allowed and not all(_is_public(answer[4][0]) for answer in answers):
        raise InputError(f"{name}: the host is not on the public internet (its address is private, local or "
                         f"reserved); if you trust it, pass allow_hosts=({host!r},)")
    for place, (family, kind, protocol, _, address) in enumerate(answers):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        sock = socket.socket(family, kind, protocol)
        live[:] = [sock]
        try:
            sock.settimeout(remaining / (len(answers) - place))     # a silent address leaves time for the next
            sock.connect(address)
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            return sock
        except OSError:
            sock.close()
    if time.monotonic() >= deadline:
        raise TimeoutError
    raise ConnectionError


def _is_public(text: str) -> bool:
    """Tell whether an address (as getaddrinfo writes it) is one of the public internet."""
    address = ipaddress.ip_address(text)
    if any(address in block for block in WRAPS_IPV4):
        address = ipaddress.IPv4Address(address.packed[12:])
    if address.version == 4:
        return not any(address in block for block in NOT_PUBLIC_4)
    return address in GIVEN_OUT_6 and not any(address in block for block in NOT_PUBLIC_6)


def _read_response(response: http.client.HTTPResponse, deadline: float, limits: Limits,
                   name: str) -> tuple[bytes | None, str | None]:
    """Read an HTTP answer; return (body, None), or (None, location) for a redirect."""
    if response.status in (301, 302, 303, 307, 308):
        location = response.headers.get("Location")
        if not location:
            raise InputError(f"{name}: status {response.status} (redirect) without a Location; give the final URL")
        return None, location.encode("latin-1", "replace").decode("utf-8", "replace")   # http.client reads latin-1
    if response.status != 200:
        raise InputError(f"{name}: the server answered with status {response.status}, expected 200; check the URL")
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):        # not asked for; unpacking it could grow past every limit
        raise InputError(f"{name}: the server sent Content-Encoding {encoding[:40]!r}, only identity is accepted; "
                         "download the file yourself")
    promised = response.length                  # Content-Length in bytes, None when the server does not say
    limit = limits.picture_bytes
    if promised is not None and promised > limit:
        raise InputError(f"{name} has {promised} bytes, the limit is {limit}; make it smaller "
                         "or raise Limits(picture_bytes=...)")
    body = bytearray()
    while chunk := response.read1(65536):       # read1 returns what has come; read would wait for all of it
        body += chunk
        if len(body) > limit:
            raise InputError(f"{name} has more than {limit} bytes, the limit; make it smaller or raise "
                             "Limits(picture_bytes=...)")
        if time.monotonic() > deadline:
            raise TimeoutError
    if promised is not None and len(body) < promised:
        raise InputError(f"{name}: the connection ended after {len(body)} of {promised} bytes; try again")
    return bytes(body), None


def data_url_bytes(url: str, limits: Limits) -> tuple[bytes, str]:
    """Decode a data: URL, base64 or percent-coded: (its bytes, how to name it in messages).

    The type it states is not looked at, what the bytes are decides. Base64 may be url-safe, percent-coded, broken into
    lines, and without its = at the end. Source: RFC 2397, RFC 4648 section 5.
    """
    head, comma, payload = url.partition(",")
    if not comma:
        raise InputError("the data: URL has no comma; it must be data:image/...;base64, and then the picture in base64")
    coded = "base64" in (parameter.strip().lower() for parameter in head.split(";")[1:])
    name = "the data: URL" if coded else "the data: URL (percent-coded, as it does not say ;base64)"
    data = urllib.parse.unquote_to_bytes(payload if coded else re.sub(r"[\t\r\n]", "", payload))
    if coded:
        data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    check_bytes(len(data) * 3 // 4 if coded else len(data), limits.picture_bytes, "picture_bytes", name)
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True) if coded else data, name
    except ValueError:
        raise InputError("the data: URL is not valid base64 after the comma; encode the picture file again") from None
