"""Continuous batching: many requests, one model. They join and leave between two tokens. No HTTP here.

                         one thread does rounds:
    submit()    +-----------+   +--------------------------+   +-----------------------------+   told("word")
    ----------> | waiting   |-->| reading: at most CHUNK   |-->| writing: one token of each  |-------------->
    any thread  | in order  |   | tokens a round, of one   |   | row of one batch            |   told("", ended)
                +-----------+   | request or of several    |   +-----------------------------+
                                +--------------------------+        | what was read and written
                                   ^ tiles seen before: Pictures    v
                                   ^ beginnings read before: Beginnings

The batch is one KV cache, a row for each request, aligned at its end; the padding before a row is what left_pad puts
before a prompt. A row whose request ended is free: it is written on with nobody listening until another moves in.

    place 0 | . . . . a a a a a a        a joined when the others had 4 tokens more
    place 1 | b b b b b b b b b b        the longest begins at 0
    place 2 | - - - - - - - - - -        free

So what is promised for batches holds here: a request's scores are what it would have got alone, up to the order of
additions. B rows, T tokens of a prompt, S tokens of the longest, K kv heads, E head dim, D language width.
"""
from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

import torch
from PIL import Image

from minivl import tiling
from minivl.cache import KVCache, copied
from minivl.chat.answers import Answer
from minivl.chat.pipeline import Pipeline
from minivl.chat.requests import Turn
from minivl.fast.threads import at_most, pace
from minivl.generation import choose, visual_tokens
from minivl.memory import full_memory_told
from minivl.model import MiniVL

CHUNK = 256                     # tokens of prompts that are read between two tokens of the others
TILES = 4                       # tiles that count as that many
PICTURE_BYTES = 256 * 2**20     # of visual tokens kept
TILES_KEPT = 128
BEGINNING_BYTES = 2**30         # of keys and values kept: of the 4B in float32, some 14,000 tokens
BEGINNINGS = 32                 # prompts and answers they are of; each is compared with each new prompt


class Job:
    """One request. `told(job, text, ended)` is called by the scheduler's thread: it must be quick and never wait."""

    def __init__(self, turn: Turn, answer: Answer, placeholder: int | None, tokens_per_tile: int,
                 told: Callable[[Job, str, bool], None]):
        self.turn = turn
        self.answer = answer
        self.told = told
        self.sampler = answer.sampler([], placeholder)
        self.tiles = [hash_of(tile) for tile in turn.tiles]
        # What the keys and values depend on: ids, and in a placeholder's place the tile that stands there, below 0.
        tiles = (tile for tile in self.tiles for _ in range(tokens_per_tile))
        self.key = [next(tiles) if i == placeholder else i for i in turn.ids]
        self.seen = []                  # visual tokens of its tiles so far, each float[L, D]
        self.vectors = None             # of the prompt, float[1, T, D], what was read of it already left out
        self.cache = None               # KVCache of this prompt, while it is read
        self.token = None               # the last one written
        self.reused = 0                 # tokens of the prompt that need not be read
        self.cancelled = False
        self.error = None               # the exception that ended it

    def cancel(self) -> None:
        """Let it end within a token; nothing more is told. Any thread, also after its end."""
        self.cancelled = True


def hash_of(tile: Image.Image) -> int:
    """Hash size, mode and pixels of a picture: below 0, as no token id is."""
    digest = hashlib.sha256(f"{tile.size} {tile.mode} ".encode() + tile.tobytes()).digest()
    return -1 - int.from_bytes(digest, "big")


class Pictures:
    """Visual tokens of tiles seen lately, by hash; what was not used for longest makes room."""

    def __init__(self, most: int = PICTURE_BYTES):
        self.most = most
        self.kept = OrderedDict()       # hash -> float[L, D]
        self.bytes = 0

    def get(self, tile: int) -> torch.Tensor | None:
        """Find a tile's visual tokens float[L, D]."""
        if tile in self.kept:
            self.kept.move_to_end(tile)
        return self.kept.get(tile)

    def put(self, tile: int, tokens: torch.Tensor) -> None:
        """Keep a tile's visual tokens."""
        if tile not in self.kept:
            self.kept[tile] = tokens
            self.bytes += tokens.nbytes
        while self.bytes > self.most or len(self.kept) > TILES_KEPT:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes


class Beginnings:
    """Keys and values of what was read and written lately. A prompt that begins alike continues from a copy."""

    def __init__(self, most: int = BEGINNING_BYTES):
        self.most = most
        self.kept = []                  # [(key of each token in it, KVCache of one row)], the latest use last

    def longest(self, key: list[int]) -> KVCache:
        """Copy the longest beginning of a prompt that is kept, perhaps of nothing; its last token is always left."""
        common = [shared(key[:-1], mine) for mine, _ in self.kept]
        length = max(common, default=0)
        if not length:
            return KVCache()
        self.kept.append(self.kept.pop(common.index(length)))
        return copied([(self.kept[-1][1], 0, 0, length)])

    def put(self, key: list[int], cache: KVCache) -> None:
        """Keep a cache of one row and the key of each token in it. What it begins with need not be kept twice."""
        self.kept = [(mine, its) for mine, its in self.kept if mine != key[:len(mine)]] + [(key, cache)]
        while len(self.kept) > BEGINNINGS or self.kept and sum(size(cache) for _, cache in self.kept) > self.most:
            self.kept.pop(0)


def shared(a: list[int], b: list[int]) -> int:
    """Count the tokens that two prompts begin with alike."""
    most = min(len(a), len(b))
    at = 0
    while at < most and a[at:at + 64] == b[at:at + 64]:     # many at a time
        at += 64
    return next((i for i in range(at, most) if a[i] != b[i]), most)


def size(cache: KVCache) -> int:
    """Count the bytes of a cache."""
    return sum(t.nbytes for both in cache.layers.values() for t in both)


class Batch:
    """The requests that are being written: the rows of one KV cache."""

    def __init__(self):
        self.cache = KVCache()
        self.jobs = []                  # of each row; None: it is free
        self.padding = []               # tokens before each row

    def alive(self) -> list[Job]:
        """List the requests, in the order of their rows."""
        return [job for job in self.jobs if job is not None]

    def rows(self) -> list[tuple[KVCache, int, int, int]]:
        """List what `copied` needs of the rows that are not free."""
        return [(self.cache, i, self.padding[i], self.cache.length)
                for i, job in enumerate(self.jobs) if job is not None]

    def join(self, job: Job, cache: KVCache) -> None:
        """Take in a request whose prompt has been read into a cache of its own."""
        length = self.cache.length
        start = length - cache.length
        # On a GPU a step is recorded with its padding: it must find a new cache.
        if None in self.jobs and start >= 0 and cache.layers[0][0].device.type == "cpu":
            place = self.jobs.index(None)
            for layer, both in cache.layers.items():
                for mine, its in zip(self.cache.layers[layer], both):
                    mine[place, :, :start] = 0
                    mine[place, :, start:length] = its[0, :, :cache.length]
            self.jobs[place] = job
            self.padding[place] = start
            return
        self.move([*self.alive(), job], [*self.rows(), (cache, 0, 0, cache.length)])

    def leave(self, job: Job) -> None:
        """Free a request's row."""
        self.jobs[self.jobs.index(job)] = None

    def tidy(self) -> None:
        """Drop rows and padding if too many are free, or nobody needs the first of it any more."""
        alive = self.alive()
        if 2 * len(alive) <= len(self.jobs) or min(start for _, _, start, _ in self.rows()) >= KVCache.BLOCK:
            self.move(alive, self.rows())

    def move(self, jobs: list[Job], rows: list[tuple[KVCache, int, int, int]]) -> None:
        """Copy requests and their rows into a new cache. A power of two of places: the next ones need no copy."""
        places = 1 << (len(jobs) - 1).bit_length()
        need = f"the keys and values of {places} prompts of {max(end - start for _, _, start, end in rows)} tokens"
        with full_memory_told(rows[0][0].layers[0][0].device, need, "allow fewer at once, or ask for fewer tokens"):
            self.cache = copied(rows, places)
        free = places - len(jobs)
        self.jobs = jobs + [None] * free
        self.padding = [self.cache.length - (end - start) for _, _, start, end in rows] + [0] * free

    def scores(self, model: MiniVL) -> torch.Tensor:
        """Read the last token of each row -> logits float32[B, V] of the next ones."""
        language = model.language_model
        ids = torch.tensor([[0 if job is None else job.token] for job in self.jobs], device=model.device)   # (B, 1)
        padding = torch.tensor(self.padding, device=model.device) if any(self.padding) else None
        x = language.embeddings(ids)                                                    # (B, 1, D)
        with full_memory_told(x.device, f"{len(x)} prompts of {self.cache.length} tokens",
                              "allow fewer at once, or ask for fewer tokens"), pace(model, "tokens").step(x.shape):
            return language.scores(x, self.cache, padding)[:, 0]                        # (B, V)


class Scheduler:
    """Write the answers of many requests with one model, in one thread of its own.

    places: requests written together. Of a request that fails, its `error` says why, and the others never know.
    """

    def __init__(self, pipe: Pipeline, places: int = 8):
        self.pipe = pipe
        self.model = pipe.model
        self.places = places
        self.unused = torch.tensor(pipe.unused_ids, dtype=torch.long, device=pipe.model.device)
        self.pictures = Pictures()
        self.beginnings = Beginnings()
        self.batch = Batch()
        self.reading = None             # the job whose prompt is read
        self.waiting = deque()
        self.closing = False
        self.changed = threading.Condition()
        self.after = lambda: None       # called after each round: what was told in it can go out together
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)     # to be started

    def job(self, turn: Turn, told: Callable[[Job, str, bool], None]) -> Job:
        """Make a request of what Pipeline.turn has read. Any thread; hashing pictures takes some milliseconds."""
        answer = Answer(turn, self.pipe.tokenizer, self.pipe.stop_ids, session_id=0)
        return Job(turn, answer, self.model.img_context_token_id, self.model.config.num_image_token, told)

    def submit(self, job: Job) -> None:
        """Queue a request. Any thread. Job.answer is what is written so far."""
        with self.changed:
            if self.closing:
                raise RuntimeError("the scheduler is closed")
            self.waiting.append(job)
            self.changed.notify()

    def close(self) -> None:
        """Finish what was submitted, then end the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def busy(self) -> bool:
        """Tell whether any request is waiting, read or written."""
        return bool(self.waiting or self.reading or self.batch.alive())

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self.busy() and not self.closing:
                    self.changed.wait()
                if not self.busy():
                    return
            try:
                self.round()
            except Exception as error:          # of no request in particular: memory for the batch as a whole
                batch, self.batch = self.batch, Batch()
                for job in batch.alive():
                    self._fail(job, error)
            self.after()

    @torch.inference_mode()
    def round(self) -> None:
        """Read some of the prompts that wait, then write one token of each answer."""
        self._drop_cancelled()
        spent = 0
        while spent < CHUNK and (job := self._next()):
            try:
                spent += self._read(job)
            except Exception as error:
                self.reading = None
                self._fail(job, error)
        if self.batch.alive():
            self.batch.tidy()
            self._write()

    def _drop_cancelled(self) -> None:
        """Free what the requests hold that nobody waits for any more."""
        with self.changed:
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
        if self.reading and self.reading.cancelled:
            self.reading = None
        for job in self.batch.alive():
            if job.cancelled:
                self.batch.leave(job)
        if not self.batch.alive():
            self.batch = Batch()

    def _next(self) -> Job | None:
        """Find the request to read on with."""
        if self.reading is None and self.waiting and len(self.batch.alive()) < self.places:
            self.reading = self.waiting.popleft()
        return self.reading

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _read(self, job: Job) -> int:
        """Do the next piece of reading a prompt: look at some tiles, or read some tokens. -> what of CHUNK it cost."""
        if job.cache is None:
            job.cache = self.beginnings.longest(job.key)
            job.reused = job.cache.length
        if job.vectors is None:
            L = self.model.config.num_image_token
            behind = sum(i < 0 for i in job.key[:job.reused])       # placeholders that are read already
            cost = self._look(job, behind // L)
            if behind // L + len(job.seen) < len(job.tiles):
                return cost
            # Each placeholder by itself: what was read may have ended within a tile.
            visual = torch.cat(job.seen)[behind % L:, None] if job.seen else None       # (n, 1, D)
            job.vectors = self.model.embed(torch.tensor([job.turn.ids[job.reused:]]), visual)
            job.seen = []
            if cost:
                return cost
        piece = job.vectors[:, :CHUNK]                                                  # (1, at most CHUNK, D)
        job.vectors = job.vectors[:, CHUNK:]
        language = self.model.language_model
        with full_memory_told(piece.device, f"a prompt of {len(job.key)} tokens", "ask with fewer tiles or words"), \
                pace(self.model, "prompt").each(language.layers):
            if job.vectors.shape[1]:
                language.body(piece, job.cache)
                return piece.shape[1]
            logits = language.scores(piece, job.cache)[:, -1]                           # (1, V)
        self.reading = None
        self._keep(job.key, (job.cache, 0, 0, job.cache.length))
        self._take(job, logits)
        if not job.answer.finish_reason:
            self.batch.join(job, job.cache)
        job.cache = None
        return piece.shape[1]

    def _look(self, job: Job, skipped: int) -> int:
        """Find or compute the visual tokens of the next tiles; the first `skipped` are not needed. -> the cost."""
        at = skipped + len(job.seen)
        while at < len(job.tiles) and (known := self.pictures.get(job.tiles[at])) is not None:
            job.seen.append(known)
            at += 1
        piece = list(zip(job.tiles, job.turn.tiles))[at:at + TILES]
        if not piece:
            return 0
        new = {tile: image for tile, image in piece if tile not in self.pictures.kept}
        new |= self._tiles_that_wait(TILES - len(new), new)
        seen = dict(zip(new, visual_tokens(self.model, [tiling.to_pixel_values(list(new.values()))])[0]))
        job.seen += [seen[tile] if tile in seen else self.pictures.get(tile) for tile, _ in piece]
        for tile, tokens in seen.items():
            self.pictures.put(tile, tokens.clone())     # not a view: it would keep its neighbours
        return len(new) * CHUNK // TILES

    def _tiles_that_wait(self, most: int, besides: dict) -> dict[int, Image.Image]:
        """Find new tiles of the requests that wait next: four together take the tower as long as two or three alone."""
        with self.changed:
            next_ones = list(islice(self.waiting, most))
        new = ((tile, image) for job in next_ones for tile, image in zip(job.tiles, job.turn.tiles)
               if tile not in besides and tile not in self.pictures.kept)
        return dict(islice(new, most))

    def _keep(self, key: list[int], row: tuple[KVCache, int, int, int]) -> None:
        """Keep what a request has in its cache for others that begin alike, if there is memory for it."""
        _, _, start, end = row
        with suppress(MemoryError, RuntimeError):
            self.beginnings.put(key[:end - start], copied([row]))

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write one token of each answer."""
        jobs = self.batch.jobs
        try:
            scores = self.batch.scores(self.model)                                      # (B, V)
        except Exception as error:
            self._write_one_by_one(error)
            return
        for place, job in enumerate(jobs):
            if job is None:
                continue
            try:
                self._take(job, scores[place:place + 1])
            except Exception as error:
                self._fail(job, error)
            if job.answer.finish_reason or job.error:
                row = self.batch.cache, place, self.batch.padding[place], self.batch.cache.length
                if not job.error:
                    self._keep(job.key, row)
                self.batch.leave(job)

    def _write_one_by_one(self, error: Exception) -> None:
        """Write a token of each answer alone where together they failed: who fails alone is to blame."""
        jobs = self.batch.alive()
        rows = self.batch.rows()
        self.batch = together = Batch()
        if len(jobs) == 1:
            self._fail(jobs[0], error)
            return
        for job, row in zip(jobs, rows):
            self.batch = Batch()
            try:
                self.batch.move([job], [row])
                self._write()
                if self.batch.alive():
                    together.join(job, copied(self.batch.rows()))
            except Exception as error:
                self._fail(job, error)
        self.batch = together

    def _take(self, job: Job, logits: torch.Tensor) -> None:
        """Choose the next token from float32[1, V] and tell the text that is certain now."""
        model = self.model
        with at_most(pace(model, "tokens").now):
            tokens, logits = choose(logits, [job.sampler], self.unused, job.sampler.count + 1, model.dtype)
        job.token = tokens[0]
        job.key.append(job.token)
        text = job.answer.push(job.token, logits[0])
        if not job.cancelled and (text or job.answer.finish_reason):
            job.told(job, text, bool(job.answer.finish_reason))

    def _fail(self, job: Job, error: Exception) -> None:
        """End one request because of an exception, without its traceback, which holds memory of all."""
        job.error = error.with_traceback(None)
        if not job.cancelled:
            try:
                job.told(job, "", True)
            except Exception:
                job.cancelled = True    # nobody can be told
