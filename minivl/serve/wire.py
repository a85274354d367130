"""OpenAI's JSON: a request's fields become turns for the model, answers become choices. No network, no model here.

Source of the fields: platform.openai.com/docs/api-reference; of LMDeploy's own ones and the defaults: LMDeploy v0.6.4
serve/openai/protocol.py. What would change the answer and cannot be done is refused, never left out in silence.
"""
from __future__ import annotations

import json
import re
import reprlib
import time
import uuid
from dataclasses import dataclass

from minivl.chat.answers import Answer
from minivl.chat.pipeline import Pipeline
from minivl.chat.requests import Turn
from minivl.limits import InputError
from minivl.sampling import GenerationConfig
from minivl.tokenizer import Tokenizer

ANSWERS = 8                     # of one request: n, or n for each of some prompts
TOP_LOGPROBS = 20
# Fields of a request -> of GenerationConfig, and what they are when not given.
FIELDS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "random_seed",
          "repetition_penalty": "repetition_penalty", "stop": "stop_words", "ignore_eos": "ignore_eos",
          "skip_special_tokens": "skip_special_tokens", "min_new_tokens": "min_new_tokens",
          "stop_token_ids": "stop_token_ids", "bad_words": "bad_words", "max_tokens": "max_new_tokens",
          "max_completion_tokens": "max_new_tokens"}
DEFAULTS = {"temperature": 0.7, "top_p": 1.0, "top_k": 40}
SHARED = {*FIELDS, "model", "stream", "stream_options", "n", "logprobs"}
OWN = {"chat": {"messages", "top_logprobs"}, "completion": {"prompt"}}
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Accepted with a value that changes nothing.
NEUTRAL = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "best_of": (1,),
           "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "echo": (False,), "suffix": ("",),
           "session_id": (-1,), "modalities": (["text"],), "parallel_tool_calls": (True, False)}
# What messages of the Python API say -> what they say here.
SPOKEN = ((r",? or raise (?:both PIL\.Image\.MAX_IMAGE_PIXELS and )?Limits\(\w+=\.\.\.\)", ""), (r"\bmax_num\b",
          "max_dynamic_patch"), (r"; if you trust it, pass allow_hosts=\S+", "; send it as a data: URL"),
          (r"GenerationConfig\.", ""), (r"\brandom_seed\b", "seed"), (r"\bstop_words\b", "stop"),
          (r"\bmax_new_tokens\b", "max_tokens"), (r", or a larger session_len", ""))


@dataclass
class Ask:
    """A request as it was understood. `turns`: one for each answer; top: best tokens told of each, None: none."""
    kind: str                   # "chat" or "completion"
    turns: list[Turn]
    stream: bool
    include_usage: bool
    top: int | None


def spoken(message: str) -> str:
    """Say to a client what a message of the Python API says."""
    for pattern, words in SPOKEN:
        message = re.sub(pattern, words, message)
    return message


def parse(body: bytes) -> dict:
    """Read a body as a JSON object."""
    def no_number(text):
        raise ValueError(f"{text} is no number of JSON")
    try:
        data = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError):        # not its text, which quotes the body
        raise InputError("the body is not valid JSON; send one JSON object in UTF-8") from None
    if not isinstance(data, dict):
        raise InputError(f"the body is a JSON {type(data).__name__}, it must be an object; send {{...}}")
    return data


def read(kind: str, data: dict, pipe: Pipeline, allow_remote: bool = False) -> Ask:
    """Read a request: its fields checked, pictures opened and tiled, texts encoded. The model computes nothing."""
    data = {name: value for name, value in data.items() if value is not None and name not in WITHOUT_EFFECT}
    for name, value in data.items():
        if name not in SHARED | OWN[kind] and value not in NEUTRAL.get(name, ()):
            known = "not supported with this value" if name in NEUTRAL else "not known here"
            raise InputError(f"the field {name[:80]!r} is {known}; leave it out")
    stream = whether(data, "stream")
    options = data.get("stream_options", {})
    if not isinstance(options, dict) or options and not stream:
        raise InputError('stream_options belong to "stream": true; give {"include_usage": true} or leave them out')
    n = whole(data, "n", 1, ANSWERS, 1)
    top = read_logprobs(kind, data)
    config = read_config(data, top, pipe)
    if kind == "chat":
        turns = [pipe.turn(read_messages(data.get("messages"), allow_remote), config)]
    else:
        turns = [pipe.text_turn(prompt, config) for prompt in read_prompts(data.get("prompt"), n)]
    seed = config.random_seed
    if n > 1 and seed is not None:      # the same seed would draw the same answer
        configs = [read_config({**data, "seed": seed + i}, top, pipe) for i in range(n)]
        turns = [Turn(turn.ids, turn.tiles, own, turn.max_new_tokens, 0) for turn in turns for own in configs]
    else:
        turns = [turn for turn in turns for _ in range(n)]
    return Ask(kind, turns, stream, whether(options, "include_usage"), top)


def whether(data: dict, name: str) -> bool:
    """Get a field that is true or false, false if it is not there."""
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name} is {reprlib.repr(value)}; it must be true or false")
    return value


def whole(data: dict, name: str, least: int, most: int, default: int) -> int:
    """Get a field that is a whole number in least..most."""
    value = data.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} is {reprlib.repr(value)}; it must be a whole number in {least}..{most}")
    return value


def read_logprobs(kind: str, data: dict) -> int | None:
    """Find how many best tokens are told of each token of the answer; None: not even its own."""
    if kind == "completion":
        return whole(data, "logprobs", 0, TOP_LOGPROBS, 0) if "logprobs" in data else None
    top = whole(data, "top_logprobs", 0, TOP_LOGPROBS, 0)
    if whether(data, "logprobs"):
        return top
    if top:
        raise InputError(f'top_logprobs is {top}, and needs "logprobs": true; give it too, or leave both out')
    return None


def read_config(data: dict, top: int | None, pipe: Pipeline) -> GenerationConfig:
    """Make the GenerationConfig of a request's fields."""
    values = {**DEFAULTS, **{FIELDS[name]: value for name, value in data.items() if name in FIELDS}}
    if len({repr(data[name]) for name in ("max_tokens", "max_completion_tokens") if name in data}) > 1:
        raise InputError("max_tokens and max_completion_tokens are different numbers; give one of them")
    if isinstance(data.get("stop"), str):
        values["stop_words"] = [data["stop"]]
    values.setdefault("max_new_tokens", pipe.config.limits.new_tokens)
    return GenerationConfig(do_sample=True, logprobs=None if top is None else max(1, top), **values)


def read_prompts(prompts, n: int) -> list[str]:
    """Bring the prompts of a completion into a list."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError("prompt must be a text or a list of texts; lists of token ids are not read")
    if n * len(prompts) > ANSWERS:
        raise InputError(f"{len(prompts)} prompts with n {n} ask for {n * len(prompts)} answers, the limit is "
                         f"{ANSWERS}; ask for fewer at once")
    return prompts


def read_messages(messages, allow_remote: bool) -> list[dict]:
    """Copy what is known of a conversation: roles, texts, pictures. Local paths are no pictures here."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError("messages must be a list of objects with role and content")
    read = []
    for message in messages:
        unknown = [name for name, value in message.items() if name not in ("role", "content", "name") and value]
        if unknown:
            raise InputError(f"a message has the field {unknown[0][:80]!r}, which is not supported; leave it out")
        content = message.get("content")
        items = content if isinstance(content, list) else [{"type": "text", "text": content}]
        role = "system" if message.get("role") == "developer" else message.get("role")
        read.append({"role": role, "content": [read_item(item, allow_remote) for item in items]})
    return read


def read_item(item, allow_remote: bool) -> dict:
    """Copy what is known of one part of a message."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    value = item.get("image_url") if kind == "image_url" else None
    if isinstance(value, str):
        value = {"url": value}
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        raise InputError('a message holds something else than {"type": "text", "text": ...} and {"type": "image_url", '
                         '"image_url": {"url": ...}}; send these')
    ways = "data:|https?:" if allow_remote else "data:"
    if not re.match(rf"\s*({ways})", value["url"], re.IGNORECASE):
        remote = "" if allow_remote else " (fetching others is off: --allow-remote)"
        raise InputError(f"a picture's URL must begin with {ways.replace('|', ' or ').replace('s?', '(s)')}{remote}; "
                         "send the picture itself as data:image/...;base64,")
    return {"type": "image_url",
            "image_url": {name: value[name] for name in ("url", "detail", "max_dynamic_patch") if name in value}}


# ---- answers --------------------------------------------------------------------------------------------------------

class Writer:
    """Write the JSON of one request's answers: whole, or in chunks."""
    OBJECTS = {"chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"),
               "completion": ("cmpl", "text_completion", "text_completion")}

    def __init__(self, ask: Ask, model: str, tokenizer: Tokenizer):
        self.ask = ask
        self.tokenizer = tokenizer
        prefix, self.whole_object, self.chunk_object = self.OBJECTS[ask.kind]
        self.same = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.begun = set()              # answers whose role was sent

    def whole(self, answers: list[Answer]) -> dict:
        """Write everything at once."""
        choices = []
        for index, answer in enumerate(answers):
            said = {"text": answer.text} if self.ask.kind == "completion" else {
                "message": {"role": "assistant", "content": answer.text, "tool_calls": None}}
            choices.append({"index": index, **said, "logprobs": self.logprobs(told_of(answer, 0)),
                            "finish_reason": answer.finish_reason})
        return {**self.same, "object": self.whole_object, "choices": choices, "usage": usage(answers)}

    def chunk(self, index: int, text: str, told: list, finish_reason: str | None) -> dict:
        """Write the next piece of one answer."""
        said = {"text": text}
        if self.ask.kind == "chat":
            role = {} if index in self.begun else {"role": "assistant"}
            said = {"delta": {**role, "content": text} if text or role else {}}
            self.begun.add(index)
        choice = {"index": index, **said, "logprobs": self.logprobs(told), "finish_reason": finish_reason}
        return {**self.same, "object": self.chunk_object, "choices": [choice],
                **({"usage": None} if self.ask.include_usage else {})}

    def last(self, answers: list[Answer]) -> dict:
        """Write the chunk after all others, if the client asked for it."""
        return {**self.same, "object": self.chunk_object, "choices": [], "usage": usage(answers)}

    def logprobs(self, told: list[tuple[int, dict]]) -> dict | None:
        """Write log-probabilities, of [(token, {id: log-probability}), ...], in the form of the kind asked."""
        top = self.ask.top
        if top is None:
            return None
        entries = []
        for token, values in told:
            best = sorted(values, key=values.get, reverse=True)[:top]
            entries.append({**self.entry(token, values), "top_logprobs": [self.entry(i, values) for i in best]})
        if self.ask.kind == "chat":
            return {"content": entries}
        return {"tokens": [entry["token"] for entry in entries],
                "token_logprobs": [entry["logprob"] for entry in entries],
                "top_logprobs": [{best["token"]: best["logprob"] for best in entry["top_logprobs"]}
                                 for entry in entries]}

    def entry(self, token: int, values: dict) -> dict:
        """Write one token; its bytes say what its text cannot where it is a part of a character."""
        data = self.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": values[token], "bytes": list(data)}


def told_of(answer: Answer, start: int) -> list[tuple[int, dict]]:
    """List the tokens from `start` on whose text is certain, and their log-probabilities: [(token, {id: value})]."""
    certain = len(answer.logprobs)
    if not answer.finish_reason:        # later ones may turn out to spell a stop word
        while certain and answer.sizes[certain - 1] > len(answer.text):
            certain -= 1
    return list(zip(answer.token_ids, answer.logprobs))[start:certain]


def usage(answers: list[Answer]) -> dict:
    """Count the tokens; a prompt that got several answers counts once."""
    prompt = sum({id(answer.turn.ids): len(answer.turn.ids) for answer in answers}.values())
    written = sum(len(answer.token_ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def error(status: int, message: str, code: str | None = None) -> dict:
    """Write an error in OpenAI's shape."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
