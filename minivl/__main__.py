"""The command line: python -m minivl chat PICTURE... [-p PROMPT]; demo; models; serve."""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict

from minivl import (
    EngineConfig,
    GenerationConfig,
    InputError,
    Limits,
    Picture,
    Pipeline,
    Session,
    __version__,
    load_image,
    load_video,
    pipeline,
    video_prompt,
)
from minivl.choose import models
from minivl.demo import demo
from minivl.family import VARIANTS
from minivl.files.find import SHIPPED
from minivl.limits import sentence
from minivl.options import Help, option, spoken
from minivl.serve.server import SERVICE, add_options, serve
from minivl.terminal import Wrapped, can_show, check_text, complete_with_tab, person, say, typed_paths

HELP = """\
Ask about pictures.

  python -m minivl chat PICTURE -p "describe this image"            one answer of nano, the small model in the package
  python -m minivl chat -m FOLDER PICTURE                           a conversation with another model
  echo "what is this?" | python -m minivl chat -m FOLDER PICTURE    the prompt from a pipe

In a conversation: /add PICTURE brings a picture to your next message (Tab completes its path), /new starts over,
/quit ends (as do exit and Ctrl-D). Ctrl-C stops an answer and forgets that turn."""
COMMANDS = "/add PICTURE brings a picture to your next message, /new starts over, /quit ends; Ctrl-C stops an answer"
ENDS = ("/quit", "/exit", "quit", "exit")
# Arguments that have an effect only with --sample -> fields of GenerationConfig.
SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "repetition_penalty": "repetition_penalty", "seed": "random_seed"}


def parser() -> argparse.ArgumentParser:
    """Make the parser of all options."""
    main = argparse.ArgumentParser(prog="python -m minivl", description="InternVL2.5 in plain PyTorch.")
    main.add_argument("--version", action="version", version=f"minivl {__version__}")
    commands = main.add_subparsers(dest="command", metavar="COMMAND")
    tour = commands.add_parser("demo", help="the shipped small model answers questions about its sample pictures")
    tour.add_argument("named", nargs="?", metavar="MODEL",
                      help="nano-awq (default, int4), nano (float16), or what chat takes")
    tour.add_argument("-m", "--model", help="the same, as in chat")
    family = commands.add_parser("models", help="the released models: memory, which fit here, which are downloaded")
    family.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    add_options(commands.add_parser("serve", help="answer requests over HTTP, as OpenAI's client sends them",
                                    description=SERVICE, formatter_class=Help))
    chat = commands.add_parser("chat", help="ask about pictures", description=HELP,
                               formatter_class=Help)
    chat.add_argument("pictures", nargs="*", metavar="PICTURE",
                      help="path, URL or data: URL; none for a text-only question")
    chat.add_argument("-p", "--prompt", help="the question; without it, a conversation (or the prompt from a pipe)")
    chat.add_argument("--system", metavar="TEXT", help="replaces the trained system message")
    chat.add_argument("--json", action="store_true", help="print the whole response as one JSON object")

    model = chat.add_argument_group("model")
    model.add_argument("-m", "--model", default="nano", metavar="FOLDER|NAME|HUB_ID",
                       help="a checkpoint folder, or a released model (downloads it): its short name, like 4b-mpo-awq "
                            "(`models` lists them), or its hub id, like OpenGVLab/InternVL2_5-4B-MPO-AWQ; "
                            "default nano, the small model inside the package, which knows shapes, words and numbers; "
                            "nano-awq is its int4 twin")
    model.add_argument("--revision", help="branch, tag or commit of a hub id")
    model.add_argument("--lora", metavar="FILE", help="what python -m weights_tools.lora learned on this model")
    model.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps (untested)")
    model.add_argument("--dtype", choices=["float32", "float16", "bfloat16"],
                       help="of the computation; default float32 on cpu, elsewhere float16 for AWQ, else bfloat16")
    model.add_argument("--precision", choices=["exact", "fast"], default="exact",
                       help="fast: round to bfloat16 where that is faster (default exact)")
    model.add_argument("--session-len", type=int, metavar="TOKENS",
                       help="longest conversation; default all the model can")

    look = chat.add_argument_group("pictures and video")
    look.add_argument("--max-tiles", type=int, metavar="N",
                      help="most tiles of a picture, thumbnail not counted (default: the model's, 12); fewer are "
                           "faster, more read smaller print")
    look.add_argument("--video", metavar="FILE|FOLDER", help="video file, animated GIF/WebP/PNG, or folder of frames")
    look.add_argument("--segments", type=int, metavar="N", help="frames taken from the video (default 8)")
    look.add_argument("--bound", type=float, nargs=2, metavar=("START", "END"), help="part of the video, seconds")
    look.add_argument("--fps", type=float, help="frames per second of a folder of frames (needed for --bound)")
    look.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                      help="fetch pictures from this host though its address is private or local")
    look.add_argument("--plain-text", action="store_true",
                      help="treat the prompt as text even where it spells <|im_end|> or <image>")

    write = chat.add_argument_group("answer")
    write.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default 512")
    write.add_argument("--sample", action="store_true", help="draw tokens instead of always taking the most probable")
    write.add_argument("--temperature", type=float, help="with --sample: default 0.8")
    write.add_argument("--top-k", type=int, metavar="K", help="with --sample: default 50, 0 for all")
    write.add_argument("--top-p", type=float, metavar="P", help="with --sample: default 1.0")
    write.add_argument("--min-p", type=float, metavar="P", help="with --sample: default 0.0")
    write.add_argument("--repetition-penalty", type=float, metavar="X", help="with --sample: default 1.0")
    write.add_argument("--seed", type=int, help="with --sample: the same seed gives the same answer")
    return main


def main(argv: list[str] | None = None) -> int:
    """Run a command; exit code 0, 2 for an input error or no command, 130 after Ctrl-C."""
    options = parser()
    args = options.parse_args(argv)
    if args.command is None:
        options.print_help()
        return 2            # a script that forgot the command must not take this for an answer
    try:
        with person():
            if args.command == "models":
                return models(args.json)
            if args.command == "serve":
                return serve(args)
            return demo(tour_of(args)) if args.command == "demo" else chat(args)
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):      # the reader of a pipe went away, e.g. `| head`
            sys.stderr.close()
            return 0
        say(f"error: {spoken(sentence(error))}")
        return 2
    except KeyboardInterrupt:
        say("\nstopped")
        return 130


def tour_of(args) -> str:
    """Choose the model of the demo, which is named with -m or without."""
    if args.named is not None and args.model is not None:
        raise InputError(f"the model is named twice, {args.named} and -m {args.model}; leave one out")
    return next((name for name in (args.named, args.model) if name is not None), "nano-awq")


def chat(args) -> int:
    """Give one answer, or hold a conversation."""
    check(args)
    gen_config = generation_config(args)
    # Pictures are opened before the model: a typo costs no loading time.
    pictures = [open_picture(source, args) for source in args.pictures]
    segments = 8 if args.segments is None else args.segments
    video = None if args.video is None else load_video(os.path.expanduser(args.video), num_segments=segments,
                                                       bound=args.bound and tuple(args.bound), fps=args.fps,
                                                       # Ctrl-C stops it
                                                       limits=Limits(decoding_work=10**12, video_work=10**12))
    engine = EngineConfig(session_len=args.session_len, device=args.device, dtype=args.dtype, precision=args.precision,
                          revision=args.revision, plain_text=args.plain_text, lora=args.lora)
    pipe = pipeline(args.model, engine)
    if args.prompt is None and sys.stdin.isatty():
        return Conversation(pipe, args, gen_config, pictures, video).run()
    text = args.prompt if args.prompt is not None else piped()
    session = pipe.session()
    answer(pipe, session, message(text, pictures, args, video), gen_config, quiet=args.json)
    if args.json:
        found = asdict(session.response)
        text = json.dumps(found, ensure_ascii=False)
        # Data must not become signs alike: what the encoding lacks is escaped, as JSON can.
        print(text if can_show(sys.stdout, text) else json.dumps(found))
    return 0


def piped() -> str:
    """Read the question from a pipe."""
    try:
        return check_text(sys.stdin.read().strip(), "the question from the pipe")
    except UnicodeDecodeError:
        raise InputError(f"the question from the pipe is not valid {sys.stdin.encoding}; pass it on in that encoding, "
                         "or set PYTHONIOENCODING to its own") from None


def check(args):
    """Refuse options that do not go together, or that would have no effect."""
    for text, name in ((args.prompt, "the question of -p"), (args.system, "--system")):
        if text is not None and (text or name != "--system"):       # no system text at all is a choice
            check_text(text, name)
    unused = [] if args.sample else [name for name in SAMPLING if getattr(args, name) is not None]
    if unused:
        raise InputError(f"{', '.join(map(option, unused))} has an effect only with --sample; without it the most "
                         "probable token is always taken")
    if args.json and args.prompt is None and sys.stdin.isatty():
        raise InputError("--json prints one answer; give the question with -p")
    most = Limits().tiles_per_picture
    if args.max_tiles is not None and not 1 <= args.max_tiles <= most:
        raise InputError(f"--max-tiles is {args.max_tiles}; it must be in 1..{most}")
    if args.video is None and (args.segments, args.bound, args.fps) != (None, None, None):
        raise InputError("--segments, --bound and --fps choose frames of a video; name it with --video")
    if args.fps is not None and args.bound is None:
        raise InputError("--fps says where the seconds of --bound are; give --bound too, or leave --fps out")
    if args.video is not None and (args.pictures or args.max_tiles):
        raise InputError("a video comes without pictures and --max-tiles, its frames have one tile each; in a "
                         "conversation /add a picture to a later message")
    one_answer = args.prompt is not None or not sys.stdin.isatty()
    unused = [name for name in ("max_tiles", "allow_host") if getattr(args, name)]
    if unused and one_answer and not args.pictures:
        raise InputError(f"{', '.join(map(option, unused))} has an effect only on pictures; name one")


def generation_config(args) -> GenerationConfig:
    """Make the GenerationConfig of the options."""
    values = {SAMPLING[name]: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    return GenerationConfig(max_new_tokens=args.max_new_tokens, do_sample=args.sample, **values)


def open_picture(source: str, args) -> Picture:
    """Open a picture that was named on the command line or with /add."""
    named = source in SHIPPED or source.lower() in VARIANTS
    if named and not os.path.exists(source) or os.path.isfile(os.path.join(source, "config.json")):
        raise InputError(f"{source} is a model, not a picture; give it with -m: -m {source}")
    return Picture(load_image(source, allow_hosts=args.allow_host), args.max_tiles)


def message(text: str, pictures: list[Picture], args, video: list | None = None, first: bool = True) -> list[dict]:
    """Put together what goes to the pipeline: the text typed and its pictures, first also the video and system text."""
    if first and video and pictures:
        raise InputError("the first message brings the video; /add pictures to a later one")
    if first and video:
        messages = video_prompt(text, video)
    else:
        if len(pictures) > 1 and not args.plain_text and "<IMAGE_TOKEN>" not in text and "<image>" not in text:
            text = "".join(f"Image-{i}: <IMAGE_TOKEN>\n" for i in range(1, len(pictures) + 1)) + text
        items = [{"type": "image_data", "image_data": {"data": picture}} for picture in pictures]
        messages = [{"role": "user", "content": [{"type": "text", "text": text}, *items]}]
    system = [{"role": "system", "content": args.system}] if first and args.system is not None else []
    return system + messages


def answer(pipe: Pipeline, session: Session, message: list[dict], gen_config: GenerationConfig, quiet: bool = False):
    """Stream one answer to the terminal, broken at words, and its speed to stderr if that is one."""
    start = time.perf_counter()
    first = None
    page = Wrapped(sys.stdout)
    for text in pipe.stream(message, gen_config, session):
        first = first or time.perf_counter()
        if not quiet:
            page.write(text)
    end = time.perf_counter()
    if quiet:
        return
    page.finish()
    print()
    if sys.stderr.isatty():
        first = first or end
        count = session.response.generate_token_len
        rate = f", {(count - 1) / (end - first):.1f} tokens/s" if count > 1 and end > first else ""
        say(f"[{session.response.input_token_len} tokens read, first text after {first - start:.1f} s, "
            f"{count} tokens written{rate}]")


class Conversation:
    """A conversation on a terminal: lines typed, commands, answers. An error or Ctrl-C leaves it as it was."""

    def __init__(self, pipe: Pipeline, args, gen_config: GenerationConfig, pictures: list[Picture], video: list | None):
        self.pipe = pipe
        self.args = args
        self.gen_config = gen_config
        self.pictures = pictures
        self.video = video
        self.start_over()

    def start_over(self):
        """Forget what was said; the pictures of the command line go with the next message again."""
        self.session = self.pipe.session()
        self.waiting = list(self.pictures)

    def run(self) -> int:
        """Take lines until the person ends it; exit code 0."""
        complete_with_tab(["/add ", "/new", "/quit"])
        say(f"Ask away. {COMMANDS}.")
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                say("")
                return 0
            except KeyboardInterrupt:       # perhaps a second one, meant for the answer just stopped
                say("\n(Ctrl-D or /quit ends)")
                continue
            except UnicodeDecodeError:
                say(f"error: the line is not valid {sys.stdin.encoding}; type it in the encoding of the terminal")
                continue
            if line in ENDS:
                return 0
            try:
                self.take(line)
            except (InputError, OSError) as error:      # the conversation goes on as it was, waiting pictures too
                say(f"error: {spoken(sentence(error))}")
            except KeyboardInterrupt:
                say("\n(stopped; this turn is forgotten)")

    def take(self, line: str):
        """Do what one line asks: a command, or a question to be answered."""
        command, _, rest = line.partition(" ")
        if line == "/new":
            self.start_over()
        elif command == "/add" and rest.strip():
            self.waiting += [open_picture(path, self.args) for path in typed_paths(rest)]
            say(f"(goes with your next message: {len(self.waiting)} picture{'s' * (len(self.waiting) > 1)})")
        elif command.startswith("/") and "/" not in command[1:]:
            say(f"{COMMANDS}.")
        else:
            first = not self.session.history
            text = check_text(line, "the question")
            answer(self.pipe, self.session, message(text, self.waiting, self.args, self.video, first), self.gen_config)
            self.waiting = []


if __name__ == "__main__":
    sys.exit(main())
