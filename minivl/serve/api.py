"""The HTTP API: who may ask, how much, for how long; answers whole or as server-sent events. What is asked: wire.py.

    client --> keys, place in the queue, body --> wire.read in a thread --> Scheduler.submit --> events --> client
               401   429                413, 408    400: what is wrong with it                      gone: cancelled

A place counts from before the body is read until the last token is written: who reads an answer slowly holds none, and
the bodies that wait are bounded, too. Nothing of a request is logged but its size and times, unless it was asked for.
"""
from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from minivl.chat.pipeline import Pipeline
from minivl.limits import InputError
from minivl.preprocess import grid_for
from minivl.serve import wire
from minivl.serve.scheduler import Job, Scheduler

LOG = logging.getLogger("minivl.serve")
PAGE = Path(__file__).with_name("page.html")
# Scripts and styles of the page itself, and nothing from anywhere else.
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)     # bounds of the histograms
KINDS = {"requests_total": "counter", "prompt_tokens_total": "counter", "prompt_tokens_reused_total": "counter",
         "completion_tokens_total": "counter", "first_token_seconds": "histogram", "token_seconds": "histogram"}
DRAIN_SECONDS = 5
PATIENCE = 0.02         # seconds that a token may wait for the next one
FAILED = "the server failed on this request; others are not affected"
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
          (b"x-accel-buffering", b"no")]


@dataclass(frozen=True)
class Guards:
    """What a service accepts."""
    api_keys: tuple = ()                # one of them must be sent; none: everybody may ask
    hosts: tuple = ()                   # names a client may call this server by; none: any
    allow_remote: bool = False          # fetch pictures by http(s)
    log_prompts: bool = False
    requests: int = 64                  # waiting and running
    body_bytes: int = 32 * 2**20        # of one request
    all_bytes: int = 256 * 2**20        # of all that wait
    body_seconds: float = 30            # to send it
    seconds: float = 600                # from the first byte to the last


class Refused(Exception):
    """A request that ends with an error: its status and what is said."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.content = wire.error(status, message, code)


class Metrics:
    """Counters and histograms, written as Prometheus reads them."""

    def __init__(self):
        self.counts = Counter()         # (name, labels) -> number

    def add(self, name: str, value: float = 1, labels: str = "") -> None:
        """Count."""
        self.counts[name, labels] += value

    def observe(self, name: str, seconds: float, times: int = 1) -> None:
        """Count a duration, `times` times."""
        for bound in (*SECONDS, "+Inf"):
            self.add(f"{name}_bucket", times * (seconds <= float(bound)), f'{{le="{bound}"}}')
        self.add(f"{name}_sum", times * seconds)
        self.add(f"{name}_count", times)

    def text(self, gauges: dict[str, float]) -> str:
        """Write everything, and what is so now."""
        lines = []
        for name, kind in KINDS.items():
            mine = [(key, labels, value) for (key, labels), value in self.counts.items() if key.startswith(name)]
            lines.append(f"# TYPE minivl_{name} {kind}")
            lines += [f"minivl_{key}{labels} {value:.12g}" for key, labels, value in mine]
        lines += [f"# TYPE minivl_{name} gauge\nminivl_{name} {value}" for name, value in gauges.items()]
        return "\n".join(lines) + "\n"


class Service:
    """The service of one pipeline: `app` is what a server runs."""

    def __init__(self, pipe: Pipeline, guards: Guards | None = None, name: str | None = None):
        self.pipe = pipe
        self.guards = guards or Guards()
        self.name = name or pipe.name
        self.created = int(time.time())
        self.scheduler = Scheduler(pipe, pipe.config.max_batch_size)
        self.metrics = Metrics()
        self.news = deque()             # (reply, event) of a round, on their way from the scheduler's thread
        self.urgent = False             # whether an answer begins or ends in them
        self.sent = 0                   # when the last ones went
        self.asked = 0                  # requests that wait or run
        self.held = 0                   # bytes of their bodies
        # Requests whose pictures are open: those that are written and the next two. The others wait as bytes.
        self.ready = asyncio.Semaphore(pipe.config.max_batch_size + 2)
        self.app = Starlette(routes=[
            Route("/", self.page), Route("/health", self.health), Route("/metrics", self.measured),
            Route("/v1/models", self.models), Route("/tiles", self.tiles),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
        ], exception_handlers={Refused: refusal, 404: not_found, 405: not_found}, lifespan=self.lifespan)

    @asynccontextmanager
    async def lifespan(self, app):
        """Let the scheduler's thread begin and end with the server."""
        self.loop = asyncio.get_running_loop()
        self.scheduler.after = self.send_news
        self.scheduler.thread.start()
        yield
        await asyncio.to_thread(self.scheduler.close)

    def send_news(self) -> None:
        """Have what is new delivered, in the scheduler's thread: each call wakes the other, and they share one Python.

        A small model writes so fast that nobody sees its tokens come two by two; first and last ones do not wait.
        """
        now = time.perf_counter()
        if self.urgent or self.news and now > self.sent + PATIENCE:
            self.urgent = False
            self.sent = now
            self.loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        """Bring to the replies what is new."""
        while self.news:
            reply, event = self.news.popleft()
            reply.told(event)

    def check(self, request: Request, key: bool = True) -> None:
        """Refuse who may not ask."""
        host = request.headers.get("host", "").rpartition("@")[2].lower()
        # A web page whose own name was made to lead here (DNS rebinding) sends that name.
        if self.guards.hosts and (host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host).strip(
                "[]") not in self.guards.hosts:
            raise Refused(403, f"this server is not called {host[:80]!r}; it answers to {', '.join(self.guards.hosts)}")
        sent = request.headers.get("authorization", "")
        good = [hmac.compare_digest(sent.encode(), f"Bearer {one}".encode()) for one in self.guards.api_keys]
        if key and self.guards.api_keys and not any(good):
            raise Refused(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")

    async def page(self, request: Request) -> HTMLResponse:
        """Show the page to talk to the model."""
        self.check(request, key=False)
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"content-security-policy": POLICY})

    async def health(self, request: Request) -> JSONResponse:
        """Tell whether requests are worked on."""
        alive = self.scheduler.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def measured(self, request: Request) -> PlainTextResponse:
        """Tell the numbers of Prometheus."""
        self.check(request)
        running = len(self.scheduler.batch.alive())
        return PlainTextResponse(self.metrics.text({"requests_running": running, "requests_in_all": self.asked}))

    async def models(self, request: Request) -> JSONResponse:
        """Name the one model."""
        self.check(request)
        return JSONResponse({"object": "list", "data": [
            {"id": self.name, "object": "model", "created": self.created, "owned_by": "minivl", "root": self.name,
             "parent": None, "permission": []}]})

    async def tiles(self, request: Request) -> JSONResponse:
        """Tell how a picture of a size is cut, which the page draws."""
        self.check(request)
        config = self.pipe.model.config
        try:
            width, height = (int(request.query_params[name]) for name in ("width", "height"))
            columns, rows, tiles = grid_for(config, width, height)
        except (KeyError, ValueError, OverflowError):
            raise Refused(400, "a picture's size is missing or none; send /tiles?width=640&height=480") from None
        return JSONResponse({"columns": columns, "rows": rows, "tiles": tiles,
                             "tokens": tiles * config.num_image_token})

    async def chat(self, request: Request) -> Reply:
        """Answer a conversation."""
        return Reply(self, "chat", request)

    async def completion(self, request: Request) -> Reply:
        """Continue texts."""
        return Reply(self, "completion", request)


class Reply:
    """The answer to one request: what it holds, and what was sent of it."""

    def __init__(self, service: Service, kind: str, request: Request):
        self.service = service
        self.kind = kind
        self.request = request
        self.start = time.perf_counter()
        self.counted = False            # whether it is one of service.asked
        self.reads = False              # whether it is one of those whose pictures are open
        self.held = 0                   # bytes of service.held
        self.data = bytearray()         # the body
        self.size = 0                   # bytes of it
        self.taken = False              # whether it is whole
        self.jobs = []
        self.left = 0                   # of them, not ended
        self.events = asyncio.Queue()   # (answer's number, its new text, its new tokens, how it ended)
        self.first = {}                 # answer's number -> seconds until its first text
        self.started = False            # whether the status was sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, from the first byte to the last: how starlette calls a response."""
        self.send = send
        status = 499                    # the client went away
        try:
            status = await self.run()
        except Refused as refused:
            status = refused.status
            await self.refuse(refused)
        except (ClientDisconnect, OSError):
            pass
        except Exception as error:      # a mistake of ours. Where, not what: its text may quote the request
            status = 500
            where = traceback.extract_tb(error.__traceback__)[-1]
            LOG.error("%s at %s:%d", type(error).__name__, where.filename, where.lineno)
            await self.refuse(Refused(500, FAILED, "internal_error"))
        finally:
            self.end(status)

    def hold(self, size: int) -> None:
        """Count the bytes that wait."""
        most = self.service.guards.all_bytes
        self.service.held += size - self.held
        self.held = size
        if size and self.service.held > most:
            raise Refused(429, f"the requests that wait have over {most} bytes, the limit; try again in a moment",
                          "queue_full")

    def free(self) -> None:
        """Give the place back, if it has one."""
        self.hold(0)
        self.service.asked -= self.counted
        if self.reads:
            self.service.ready.release()
        self.counted = self.reads = False

    async def run(self) -> int:
        """Take a request in, have it answered, send that. Raises Refused."""
        self.service.check(self.request)
        if self.request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be JSON; send Content-Type: application/json")
        guards = self.service.guards
        if self.service.asked >= guards.requests:
            raise Refused(429, f"{guards.requests} requests wait or run, the limit; try again in a moment",
                          "queue_full")
        self.counted = True
        self.service.asked += 1
        seconds = guards.body_seconds
        try:
            await asyncio.wait_for(self.take(), seconds)
        except asyncio.TimeoutError:
            raise Refused(408, f"the body did not arrive within {seconds:g} seconds; send it again") from None
        await self.unless_gone(self.request.receive, self.answer())
        return 200

    async def take(self) -> None:
        """Take the body, as far as it is accepted."""
        most = self.service.guards.body_bytes
        length = self.request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise Refused(413, f"the body has {length[:20]} bytes, the limit is {most}; send smaller pictures")
        while not self.taken:
            part = await self.part()
            self.size += len(part)
            if self.size > most:
                raise Refused(413, f"the body has more than {most} bytes, the limit; send smaller pictures")
            self.hold(self.size)
            self.data += part

    async def part(self) -> bytes:
        """Get the next part of the body."""
        message = await self.request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self.taken = not message.get("more_body", False)
        return message.get("body", b"")

    async def unless_gone(self, receive: Receive, work: Awaitable) -> None:
        """Do the work unless the client goes away first, or it takes too long."""
        async def gone():
            while (await receive())["type"] != "http.disconnect":
                pass
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
        seconds = self.service.guards.seconds
        try:
            await asyncio.wait(tasks, timeout=max(0, self.start + seconds - time.perf_counter()),
                               return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                return tasks[0].result()
            if tasks[1].done():
                raise ClientDisconnect
            raise Refused(504, f"the answer was not finished within {seconds:g} seconds; ask for less", "timeout")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(self) -> None:
        """Have the answers made and send them."""
        service = self.service
        await service.ready.acquire()
        self.reads = True
        ask, self.jobs = await asyncio.to_thread(self.read)
        self.hold(0)
        self.left = len(self.jobs)
        for job in self.jobs:
            service.scheduler.submit(job)
        writer = wire.Writer(ask, service.name, service.pipe.tokenizer)
        while self.left or not self.events.empty():
            events = [await self.events.get()]
            while not self.events.empty():
                events.append(self.events.get_nowait())
            chunks = [writer.chunk(*event) for event in events if event[3] != "error"]
            if ask.stream and chunks:
                await self.stream(chunks)
            for index, *_, reason in events:
                if reason == "error":
                    raise failure(self.jobs[index])
        answers = [job.answer for job in self.jobs]
        if not ask.stream:
            self.started = True
            return await JSONResponse(writer.whole(answers))(self.request.scope, None, self.send)
        await self.stream([writer.last(answers)] if ask.include_usage else [], done=True)

    def read(self) -> tuple[wire.Ask, list[Job]]:
        """Read the body, in a thread of its own."""
        service = self.service
        body, self.data = self.data, None
        try:
            data = wire.parse(body)
            del body
            named = data.get("model")
            if named is not None and named != service.name:
                raise Refused(404, f"the model {str(named)[:80]!r} is not served here; this is {service.name}",
                              "model_not_found")
            if service.guards.log_prompts:
                LOG.info("asked: %s", json.dumps(data)[:10_000])
            ask = wire.read(self.kind, data, service.pipe, service.guards.allow_remote)
            return ask, [service.scheduler.job(turn, self.teller(index, ask.stream))
                         for index, turn in enumerate(ask.turns)]
        except InputError as error:
            raise Refused(400, wire.spoken(str(error))) from None

    def teller(self, index: int, stream: bool) -> Callable[[Job, str, bool], None]:
        """Make what the scheduler calls for one answer."""
        told = 0

        def tell(job: Job, text: str, ended: bool) -> None:
            nonlocal told
            begun = index in self.first
            self.first.setdefault(index, time.perf_counter() - self.start)
            if not stream and not ended:
                return
            tokens = wire.told_of(job.answer, told)
            told += len(tokens)
            reason = (job.answer.finish_reason or "error") if ended else None
            self.service.news.append((self, (index, text, tokens, reason)))
            self.service.urgent |= ended or not begun
        return tell

    def told(self, event: tuple) -> None:
        """Take an event. Here, not where it is sent: that may wait for a client who reads slowly."""
        self.events.put_nowait(event)
        self.left -= event[3] is not None
        if not self.left:
            self.free()

    async def stream(self, chunks: list[dict], done: bool = False) -> None:
        """Send server-sent events."""
        if not self.started:
            self.started = True
            await self.send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        text = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks)
        text += "data: [DONE]\n\n" * done
        await self.send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": not done})

    async def refuse(self, refused: Refused) -> None:
        """Send an error: as the response, or in the stream that has begun. It needs no place for that."""
        self.free()
        self.data = None
        if self.started:
            await self.stream([refused.content])
            return await self.send({"type": "http.response.body", "body": b""})
        # Closed with bytes on their way, a connection is reset, and the client may never read why.
        if refused.status != 408:
            with suppress(asyncio.TimeoutError, ClientDisconnect):
                await asyncio.wait_for(self.drain(), DRAIN_SECONDS)
        response = await refusal(self.request, refused)
        await response(self.request.scope, None, self.send)

    async def drain(self) -> None:
        """Read the rest of the body, and forget it."""
        while not self.taken:
            await self.part()

    def end(self, status: int) -> None:
        """Free everything, count and log."""
        for job in self.jobs:
            job.cancel()
        self.free()
        seconds = time.perf_counter() - self.start
        metrics = self.service.metrics
        metrics.add("requests_total", labels=f'{{endpoint="{self.kind}",status="{status}"}}')
        answers = [job.answer for job in self.jobs]
        count = wire.usage(answers)
        metrics.add("prompt_tokens_total", sum(len(job.turn.ids) for job in self.jobs))
        metrics.add("prompt_tokens_reused_total", sum(job.reused for job in self.jobs))
        metrics.add("completion_tokens_total", count["completion_tokens"])
        for index, first in self.first.items():
            metrics.observe("first_token_seconds", first)
            if (tokens := len(answers[index].token_ids)) > 1:
                metrics.observe("token_seconds", (seconds - first) / (tokens - 1), tokens - 1)
        LOG.info("%s %s: %d bytes, %d + %d tokens, first text after %.3f s, all after %.3f s", self.kind, status,
                 self.size, count["prompt_tokens"], count["completion_tokens"],
                 min(self.first.values(), default=seconds), seconds)


def failure(job: Job) -> Refused:
    """Make an error of what ended a job. What is not the client's fault is not told, only its kind logged."""
    if isinstance(job.error, InputError):
        return Refused(400, wire.spoken(str(job.error)))
    LOG.error("a request failed: %s", type(job.error).__name__)
    return Refused(500, FAILED, "internal_error")


async def refusal(request: Request, refused: Refused) -> JSONResponse:
    """Write an error. The rest of a body that was not read is not waited for."""
    headers = {"retry-after": "1"} if refused.status == 429 else {}
    if refused.status in (408, 413):
        headers["connection"] = "close"
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(refused.content, refused.status, headers)


async def not_found(request: Request, error: Exception) -> JSONResponse:
    """Say that there is no such endpoint."""
    return JSONResponse(wire.error(error.status_code, "there is no such endpoint; see /v1/models, /v1/chat/completions "
                                   "and /v1/completions"), error.status_code)
