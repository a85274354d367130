"""python -m minivl serve: load a model, listen, answer until it is told to stop. The HTTP server is uvicorn.

Ctrl-C and SIGTERM end it: what was asked is finished, nothing new is taken.
"""
from __future__ import annotations

import argparse
import logging
import signal
import socket
import warnings
from typing import TYPE_CHECKING

from minivl.chat.pipeline import EngineConfig, pipeline
from minivl.limits import InputError, Limits
from minivl.terminal import say

if TYPE_CHECKING:
    import uvicorn

    from minivl.serve.api import Service

SERVICE = """\
Answer requests over HTTP, as OpenAI's client sends them. Needs the extra: pip install "minivl[serve]".

  python -m minivl serve                                  nano, for this machine only; / is a page to talk to it
  python -m minivl serve 4b-mpo-awq --server-port 23333   another model
  python -m minivl serve --server-name 0.0.0.0 --api-keys KEY

Pictures come as data: URLs in the request, or by http(s) with --allow-remote; local paths are never read."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADER_SECONDS = 10             # to send the head of a request


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `serve`."""
    add = parser.add_argument
    add("model", nargs="?", default="nano", metavar="MODEL", help="as in chat; default nano")
    add("--server-name", default="127.0.0.1", metavar="ADDRESS",
        help="where to listen; default 127.0.0.1: only this machine")
    add("--server-port", type=int, default=23333, metavar="PORT", help="default 23333; 0: any that is free")
    add("--model-name", metavar="NAME", help="what clients call the model; default MODEL")
    add("--api-keys", nargs="+", default=[], metavar="KEY", help="one of them must come with each request")
    add("--allow-remote", action="store_true", help="fetch pictures from the public internet by http(s)")
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="with --allow-remote: from this host though its address is private or local")
    add("--log-prompts", action="store_true", help="write what is asked to the log, not only its size and times")
    add("--max-batch-size", type=int, default=8, metavar="N", help="requests written together; default 8")
    add("--max-requests", type=int, default=64, metavar="N", help="waiting and running; default 64, more get 429")
    add("--max-pictures", type=int, default=16, metavar="N", help="of one request; default 16")
    add("--max-seconds", type=float, default=600, metavar="S", help="a request may take; default 600")
    add("--session-len", type=int, metavar="TOKENS", help="of prompt and answer; default all the model can")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--lora", metavar="FILE", help="what python -m weights_tools.lora learned on this model")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps (untested)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="of the computation; as in chat")
    add("--precision", choices=["exact", "fast"], default="exact", help="as in chat; default exact")


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, or mean nothing."""
    if args.allow_host and not args.allow_remote:
        raise InputError("--allow-host has an effect only with --allow-remote; give it too")
    for name, least in (("server_port", 0), ("max_requests", 1), ("max_pictures", 0), ("max_seconds", 1)):
        value = getattr(args, name)
        most = 65535 if name == "server_port" else 10 ** 6
        if not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} is {value:g}; it must be in {least}..{most}")
    if not all(key.isascii() and key.isprintable() and key and " " not in key for key in args.api_keys):
        raise InputError("a key of --api-keys is empty or has a space or a sign beyond ASCII; choose another")


def serve(args: argparse.Namespace) -> int:
    """Listen and answer; exit code 0 after SIGTERM."""
    check(args)
    try:
        import uvicorn

        from minivl.serve.api import Guards, Service
    except ImportError as error:
        raise InputError(f"the service needs {error.name}, which is not installed; pip install starlette uvicorn"
                         ) from None
    listener = listen(args.server_name, args.server_port)     # before the model: a taken port costs no loading
    engine = EngineConfig(session_len=args.session_len, max_batch_size=args.max_batch_size, device=args.device,
                          dtype=args.dtype, precision=args.precision, revision=args.revision, lora=args.lora,
                          plain_text=True, allow_paths=False, allow_hosts=tuple(args.allow_host),
                          limits=Limits(pictures=args.max_pictures))
    pipe = pipeline(args.model, engine)
    local = args.server_name in LOOPBACK
    guards = Guards(api_keys=tuple(args.api_keys), hosts=(*LOOPBACK, "0.0.0.0") if local else (),
                    allow_remote=args.allow_remote, log_prompts=args.log_prompts, requests=args.max_requests,
                    seconds=args.max_seconds)
    if not local and not args.api_keys:
        say(f"warning: whoever reaches {args.server_name} may ask; --api-keys KEY asks for a key")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("minivl.serve").setLevel(logging.INFO)
    if not args.log_prompts:
        warnings.simplefilter("ignore")     # they may name what was sent
    service = Service(pipe, guards, args.model_name or args.model)
    host, port = listener.getsockname()[:2]
    say(f"{service.name} answers at http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # uvicorn raises it again when all is finished
    uvicorn.Server(configured(service)).run(sockets=[listener])
    return 0


def configured(service: Service) -> uvicorn.Config:
    """Set uvicorn up for a service."""
    import uvicorn
    return uvicorn.Config(service.app, http=patient(), ws="none", log_config=None, access_log=False,
                          server_header=False, timeout_graceful_shutdown=int(service.guards.seconds) + 1)


def listen(name: str, port: int) -> socket.socket:
    """Open the socket."""
    try:
        return socket.create_server((name, port), family=socket.AF_INET6 if ":" in name else socket.AF_INET,
                                    backlog=2048)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no such name"
        raise InputError(f"{name} port {port} cannot be listened on ({why}); choose another with --server-port or "
                         "--server-name") from None


def patient() -> type:
    """Make uvicorn's protocol, but with a bound on the time for the head of a request."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self.watch()

        def data_received(self, data):
            super().data_received(data)
            self.watch()

        def connection_lost(self, error):
            super().connection_lost(error)
            if self.timer:
                self.timer.cancel()

        def watch(self):
            """Start the clock at the first byte of a head, and stop it at the last."""
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering and self.timer:
                self.timer.cancel()
                self.timer = None
            elif not answering and self.timer is None:
                self.timer = self.loop.call_later(HEADER_SECONDS, self.give_up)

        def give_up(self):
            self.timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Patient
