"""Continuous batching: whoever joins or leaves, fails or goes away, each request gets what it gets alone."""
import math
import random
import time

import pytest
import torch
from PIL import Image

import minivl
from minivl import GenerationConfig, InputError
from minivl.cache import KVCache, copied
from minivl.serve import scheduler as module
from minivl.serve.scheduler import CHUNK, Beginnings, Pictures, Scheduler, hash_of, shared

SAMPLES = "minivl/nano/samples/"


@pytest.fixture(scope="module")
def nano():
    return minivl.pipeline("nano")


def sampled(seed, **options):
    return GenerationConfig(max_new_tokens=30, do_sample=True, random_seed=seed, logprobs=5, **options)


REQUESTS = [
    (("describe this image", SAMPLES + "shapes.png"), GenerationConfig(max_new_tokens=40, logprobs=5)),
    ("hello", sampled(1, temperature=2.0, top_k=0, ignore_eos=True)),
    (("what is written here?", SAMPLES + "small-print.png"), sampled(2, temperature=1.0, top_p=0.8)),
    (("How many shapes are there?", SAMPLES + "count.png"), GenerationConfig(max_new_tokens=3, logprobs=5)),
    ("Tell me what you know. " * 30, sampled(3, repetition_penalty=1.5, min_new_tokens=20)),
    (("describe this image", SAMPLES + "shapes.png"), GenerationConfig(max_new_tokens=40, stop_words=["small"],
                                                                       logprobs=5)),
    ("who are you?", sampled(5, temperature=1.5, bad_words=["a"], min_p=0.01)),
    (("what is this?", [SAMPLES + "before.png", SAMPLES + "after.png"]), sampled(6, top_k=3)),
]


def work(scheduler, most=5000):
    """Do rounds until nothing is left to do."""
    for _ in range(most):
        if not scheduler.busy():
            return
        scheduler.round()
    pytest.fail("it never ends")


def submit(scheduler, prompt, config=None, told=lambda *_: None):
    job = scheduler.job(scheduler.pipe.turn(prompt, config), told)
    scheduler.submit(job)
    return job


def check_same(job, alone):
    """The same tokens as alone, and nearly the same scores."""
    assert job.error is None
    got = job.answer.response()
    assert (got.token_ids, got.text, got.finish_reason, got.input_token_len) == (
        alone.token_ids, alone.text, alone.finish_reason, alone.input_token_len)
    for mine, its in zip(got.logprobs or [], alone.logprobs or []):
        both = mine.keys() & its.keys()
        assert len(both) >= 4 and all(mine[i] == pytest.approx(its[i], abs=2e-4) for i in both)


@pytest.fixture(scope="module")
def alone(nano):
    with pytest.warns(UserWarning, match="share one"):
        return [nano(prompt, config) for prompt, config in REQUESTS]


@pytest.mark.filterwarnings("ignore:2 pictures without")
@pytest.mark.parametrize("places, seed", [(1, 0), (3, 1), (8, 2)])
def test_each_gets_what_it_gets_alone(nano, alone, places, seed):
    """They come at any time, some are called off, twice the same comes twice."""
    scheduler = Scheduler(nano, places)
    chance = random.Random(seed)
    order = [*range(len(REQUESTS)), *range(4)]
    chance.shuffle(order)
    jobs, off = [], []
    while order or scheduler.busy():
        if order and chance.random() < 0.3:
            jobs.append((order[-1], submit(scheduler, *REQUESTS[order.pop()])))
            if chance.random() < 0.3:
                off.append(submit(scheduler, "never mind", sampled(9, ignore_eos=True)))
        if off and chance.random() < 0.2:
            off.pop(0).cancel()
        scheduler.round()
        assert len(scheduler.batch.alive()) <= places
    assert len(jobs) == len(REQUESTS) + 4
    for index, job in jobs:
        check_same(job, alone[index])


def test_the_text_is_told_as_it_comes(nano):
    scheduler = Scheduler(nano)
    told = []
    job = submit(scheduler, *REQUESTS[0], told=lambda job, text, ended: told.append((text, ended)))
    work(scheduler)
    assert "".join(text for text, _ in told) == job.answer.text and len(told) > 10
    assert [ended for _, ended in told] == [False] * (len(told) - 1) + [True]


def test_any_decoder(pipe, made):
    """int4, and another architecture."""
    for one in (pipe, minivl.pipeline(made("plain"))):
        scheduler = Scheduler(one, 2)
        prompts = [("what?", Image.new("RGB", (90, 60), (c, 0, 99))) for c in (0, 250)] + ["hello"]
        config = GenerationConfig(max_new_tokens=10, ignore_eos=True, logprobs=5)
        jobs = [submit(scheduler, prompt, config) for prompt in prompts]
        work(scheduler)
        for job, prompt in zip(jobs, prompts):
            check_same(job, one(prompt, config))


# ---- what is not computed again -------------------------------------------------------------------------------------

def counted(monkeypatch, model):
    """Counts tiles and the lengths of what the decoder reads."""
    count = {"tiles": 0, "read": []}
    look, run = type(model).visual_tokens, model.language_model.model.forward

    def visual_tokens(self, pixels):
        count["tiles"] += len(pixels)
        return look(self, pixels)

    def forward(x, cache=None, padding=None):
        count["read"].append(x.shape[1])
        return run(x, cache, padding)
    monkeypatch.setattr(type(model), "visual_tokens", visual_tokens)
    monkeypatch.setattr(model.language_model.model, "forward", forward)
    return count


def test_a_growing_conversation_is_not_read_again(nano, monkeypatch):
    scheduler = Scheduler(nano)
    picture = Image.open(SAMPLES + "wide.png").convert("RGB")
    messages = [{"role": "user", "content": [{"type": "text", "text": "describe this image"},
                                             {"type": "image_data", "image_data": {"data": picture}}]}]
    first = submit(scheduler, messages)
    work(scheduler)
    count = counted(monkeypatch, nano.model)
    messages += [{"role": "assistant", "content": first.answer.text},
                 {"role": "user", "content": "What colour is it?"}]
    second = submit(scheduler, messages)
    work(scheduler)
    assert second.reused >= len(first.turn.ids) + len(first.answer.token_ids) and count["tiles"] == 0
    assert count["read"][0] == len(second.turn.ids) - second.reused < 30
    monkeypatch.undo()
    check_same(second, nano(messages))


def test_a_prompt_asked_twice_needs_its_last_token_only(nano, monkeypatch):
    scheduler = Scheduler(nano)
    count = counted(monkeypatch, nano.model)
    jobs = [submit(scheduler, *REQUESTS[0]) for _ in range(3)]
    work(scheduler)
    prompts = [n for n in count["read"] if n > 1]
    assert prompts == [len(jobs[0].turn.ids)] and count["tiles"] == len(jobs[0].tiles)
    assert [job.reused for job in jobs[1:]] == [len(jobs[0].turn.ids) - 1] * 2


def test_tiles_seen_before(nano, monkeypatch):
    """Of the same size, mode and pixels, whatever is asked about them."""
    scheduler = Scheduler(nano)
    count = counted(monkeypatch, nano.model)
    picture = Image.open(SAMPLES + "tall.png").convert("RGB")
    for question in ("what is this?", "describe this image", "and now?"):
        submit(scheduler, (question, picture.copy()))
        work(scheduler)
    seen = count["tiles"]
    assert seen == len(nano.turn(("x", picture)).tiles) > 1
    changed = picture.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    submit(scheduler, ("what is this?", changed))
    work(scheduler)
    assert seen < count["tiles"] <= 2 * seen
    tile = Image.new("RGB", (4, 8), "red")
    assert hash_of(tile) == hash_of(tile.copy()) < 0
    turned = Image.frombytes("RGB", (8, 4), tile.tobytes())
    assert len({hash_of(x) for x in (tile, turned, tile.convert("L"), tile.convert("RGBA"))}) == 4


def test_a_beginning_that_ends_within_a_tile(nano):
    """The caches of two prompts part in the middle of a picture's tokens: the rest of the tile is not lost."""
    scheduler = Scheduler(nano)
    prompt = ("describe this image", SAMPLES + "wide.png")
    turn = nano.turn(prompt)
    job = submit(scheduler, prompt, GenerationConfig(max_new_tokens=1))
    work(scheduler)
    within = turn.ids.index(nano.model.img_context_token_id) + 21           # 16 tokens a tile
    (key, cache), = scheduler.beginnings.kept[-1:]
    scheduler.beginnings.kept = [(key[:within], copied([(cache, 0, 0, within)]))]
    again = submit(scheduler, prompt)
    work(scheduler)
    assert again.reused == within < len(job.key)
    check_same(again, nano(prompt))


def test_tiles_of_those_who_wait_are_looked_at_together(nano, alone, monkeypatch):
    """Each once, at most TILES at a time, in the order of the requests; a cancelled one may be among them."""
    looked = []
    original = module.visual_tokens
    monkeypatch.setattr(module, "visual_tokens", lambda model, parts: looked.append(len(parts[0])) or original(
        model, parts))
    scheduler = Scheduler(nano)
    numbers = [0, 2, 3, 5, 0]
    jobs = [submit(scheduler, *REQUESTS[i]) for i in numbers]
    jobs[-1].cancel()
    work(scheduler)
    for job, i in zip(jobs[:-1], numbers):
        check_same(job, alone[i])
    tiles = len({tile for job in jobs for tile in job.tiles})
    assert sum(looked) == tiles and max(looked) == module.TILES and len(looked) == math.ceil(tiles / module.TILES)


def test_visual_tokens_kept_are_bounded():
    pictures = Pictures(most=1000)
    for i in range(10):
        pictures.put(i, torch.zeros(5, 10))     # 200 bytes
        assert pictures.get(0) is not None      # stays, as it is used
    assert [*pictures.kept] == [6, 7, 8, 9, 0]
    assert pictures.get(1) is None and pictures.bytes == sum(t.nbytes for t in pictures.kept.values()) <= 1000
    pictures.put(11, torch.zeros(5, 100))       # too large by itself
    assert not pictures.kept and pictures.bytes == 0
    pictures = Pictures()
    for i in range(module.TILES_KEPT + 9):
        pictures.put(i, torch.zeros(1, 1))
    assert [*pictures.kept] == [*range(9, module.TILES_KEPT + 9)] and pictures.bytes == 4 * module.TILES_KEPT


def one_row(length):
    cache = KVCache()
    cache.length = length
    cache.layers = {0: [torch.zeros(1, 1, length, 4) for _ in range(2)]}       # 32 bytes a token
    return cache


def test_beginnings_kept_are_bounded():
    beginnings = Beginnings(most=32 * 100)
    for i in range(20):
        beginnings.put([i] * 30, one_row(30))
        assert sum(len(key) for key, _ in beginnings.kept) <= 100
        assert beginnings.longest([0] * 10 + [1]).length == 10                  # stays, as it is used
    assert beginnings.longest([5] * 10).length == 0
    beginnings = Beginnings()
    for i in range(100):
        beginnings.put([i], one_row(1))
    assert [key for key, _ in beginnings.kept] == [[i] for i in range(100 - module.BEGINNINGS, 100)]
    beginnings.put([99, 1, 2], one_row(3))              # begins with one that is kept: that one goes
    assert [key for key, _ in beginnings.kept][-2:] == [[98], [99, 1, 2]]
    assert beginnings.longest([99, 1, 2]).length == 2 and beginnings.longest([5]).length == 0


def test_shared():
    chance = random.Random(0)
    for _ in range(300):
        a = [chance.randrange(2) for _ in range(chance.choice([0, 1, 63, 64, 65, 128, 200]))]
        b = a[:chance.randrange(len(a) + 1)] + [chance.randrange(2) for _ in range(chance.randrange(70))]
        naive = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        assert shared(a, b) == shared(b, a) == naive


def test_the_batch_does_not_grow_for_ever(nano):
    """Somebody is always there, and everybody is short."""
    scheduler = Scheduler(nano, 4)
    chance = random.Random(1)
    longest = 0
    for i in range(200):
        if len(scheduler.waiting) < 2:
            config = GenerationConfig(max_new_tokens=chance.randrange(5, 60), ignore_eos=True)
            submit(scheduler, f"hello {i % 7}", config)
        scheduler.round()
        longest = max(longest, scheduler.batch.cache.length)
        assert len(scheduler.batch.jobs) in (0, 1, 2, 4)
    assert longest < 60 + 40 + KVCache.BLOCK
    for job in [*scheduler.waiting, *scheduler.batch.alive()]:
        job.cancel()
    work(scheduler)
    scheduler.round()
    assert scheduler.batch.cache.length == 0 and scheduler.batch.jobs == []


# ---- others are not kept waiting ------------------------------------------------------------------------------------

def test_a_long_prompt_is_read_between_the_words_of_others(nano, monkeypatch):
    scheduler = Scheduler(nano)
    words = []
    talker = submit(scheduler, "hello", GenerationConfig(max_new_tokens=60, ignore_eos=True))
    scheduler.round()
    scheduler.round()
    count = counted(monkeypatch, nano.model)
    prompt = [("what is this? " * 80, [Image.effect_noise((300, 200), 50 + i).convert("RGB") for i in range(3)])]
    with pytest.warns(UserWarning, match="share one"):
        reader = submit(scheduler, *prompt, GenerationConfig(max_new_tokens=2))
    assert len(reader.turn.ids) > 2 * CHUNK and len(reader.tiles) > 2 * module.TILES
    while not reader.answer.finish_reason:
        before, tiles = len(count["read"]), count["tiles"]
        written = len(talker.answer.token_ids)
        scheduler.round()
        words.append(len(talker.answer.token_ids) - written)
        read = [n for n in count["read"][before:] if n > 1]
        cost = sum(read) + (count["tiles"] - tiles) * CHUNK // module.TILES
        assert cost < 2 * CHUNK and max(read, default=0) <= CHUNK
    assert set(words) == {1} and len(words) > len(reader.tiles) / module.TILES + 2


def test_a_request_that_is_called_off_frees_its_place_within_a_token(nano):
    scheduler = Scheduler(nano, places=1)
    told = []
    long = submit(scheduler, "hello", GenerationConfig(max_new_tokens=500, ignore_eos=True),
                  told=lambda job, text, ended: told.append(text))
    waits = submit(scheduler, "who are you?", GenerationConfig(max_new_tokens=1))
    unread = submit(scheduler, "never")
    for _ in range(5):
        scheduler.round()
    assert not waits.answer.token_ids and told
    count = len(told)
    long.cancel()
    unread.cancel()
    scheduler.round()
    assert waits.answer.finish_reason == "length" and len(told) == count and not scheduler.waiting
    long.cancel()               # again: nothing happens
    work(scheduler)


def test_called_off_while_it_is_read(nano):
    scheduler = Scheduler(nano)
    job = submit(scheduler, "Tell me what you know. " * 70, GenerationConfig(max_new_tokens=3))
    scheduler.round()
    assert scheduler.reading is job
    job.cancel()
    work(scheduler)
    assert not job.answer.token_ids and not job.error and not scheduler.busy()


# ---- one request's trouble ------------------------------------------------------------------------------------------

def beside(nano, alone, bad, config=None, message="", kind=InputError, told=lambda *_: None):
    """Run a request beside three others: it fails, they get what they get alone."""
    scheduler = Scheduler(nano, 4)
    jobs = [submit(scheduler, *REQUESTS[i]) for i in (0, 1)]
    scheduler.round()
    failing = submit(scheduler, bad, config, told)
    jobs.append(submit(scheduler, *REQUESTS[2]))
    work(scheduler)
    for index, job in enumerate(jobs):
        check_same(job, alone[index])
    assert isinstance(failing.error, kind) and message in str(failing.error)
    assert failing.error.__traceback__ is None
    return failing


def test_no_token_is_left_to_choose(nano, alone):
    told = []
    job = beside(nano, alone, "hi", GenerationConfig(bad_token_ids=[*range(nano.tokenizer.vocab_size)]),
                 "every token is banned", told=lambda job, text, ended: told.append((text, ended)))
    assert told == [("", True)] and not job.answer.token_ids


def test_scores_that_are_no_numbers(nano, alone):
    table = nano.model.language_model.embeddings.weight.data
    letter, = nano.tokenizer.encode("Q")
    kept = table[letter].clone()
    table[letter] = math.nan
    try:
        beside(nano, alone, "Q", message="NaN or infinite scores for new token 1")
    finally:
        table[letter] = kept


def test_a_picture_that_the_tower_fails_on(nano, alone, monkeypatch):
    look = module.visual_tokens
    monkeypatch.setattr(module, "visual_tokens", lambda model, parts: 1 / 0 if float(
        parts[0][0, 0].std()) < 1e-6 else look(model, parts))
    beside(nano, alone, ("what?", Image.new("RGB", (50, 50), "red")), kind=ZeroDivisionError)


def test_nobody_to_tell(nano, alone):
    def gone(*_):
        raise BrokenPipeError("gone")
    assert beside(nano, alone, "hello", kind=BrokenPipeError, told=gone).cancelled


def test_what_fails_together_is_done_one_by_one(nano, alone, monkeypatch):
    """A full device: two rows at once do not fit. And then one alone does not, either."""
    language = nano.model.language_model
    scores = type(language).scores
    bad = []

    def full(self, x, cache=None, padding=None, last=1):
        if len(x) > 1 or bad and x.shape[1] == 1 and cache.length > 300:
            raise MemoryError("full")
        return scores(self, x, cache, padding, last)
    monkeypatch.setattr(type(language), "scores", full)
    scheduler = Scheduler(nano, 4)
    jobs = [submit(scheduler, *REQUESTS[i]) for i in range(4)]
    work(scheduler)
    for job, want in zip(jobs, alone):
        check_same(job, want)
    bad.append(True)
    beside(nano, alone, "a b c d e f g h " * 30, GenerationConfig(max_new_tokens=9, ignore_eos=True), "", Exception)


def test_no_memory_to_keep_anything(nano, alone, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(Beginnings, "put", full)
    scheduler = Scheduler(nano, 4)
    jobs = [submit(scheduler, *REQUESTS[i]) for i in range(4)]
    work(scheduler)
    for job, want in zip(jobs, alone):
        check_same(job, want)


def test_a_round_that_fails_as_a_whole(nano, alone, monkeypatch):
    """Then all that are written fail, and the next ones do not."""
    scheduler = Scheduler(nano)
    scheduler.thread.start()
    monkeypatch.setattr(module.Batch, "tidy", lambda self: 1 / 0)
    job = submit(scheduler, *REQUESTS[0])
    for _ in range(200):
        if job.error:
            break
        time.sleep(0.01)
    assert isinstance(job.error, ZeroDivisionError)
    monkeypatch.undo()
    again = submit(scheduler, *REQUESTS[0])
    scheduler.close()
    check_same(again, alone[0])


def test_closing_finishes_what_was_submitted(nano, alone):
    scheduler = Scheduler(nano, 2)
    jobs = [submit(scheduler, *REQUESTS[i]) for i in range(5)]
    scheduler.thread.start()
    scheduler.close()
    assert not scheduler.thread.is_alive()
    for job, want in zip(jobs, alone):
        check_same(job, want)
    with pytest.raises(RuntimeError, match="closed"):
        submit(scheduler, "hello")
