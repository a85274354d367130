"""The API a person types: every form of the card, sessions, batches, streams, and what is refused."""
import re
import warnings

import pytest
import torch
from conftest import GOLDEN, shared
from PIL import Image

import minivl
from minivl import IMAGE_TOKEN, EngineConfig, GenerationConfig, InputError, Limits, Picture, Pipeline, prompt
from minivl.prompt import encode

SHORT = GenerationConfig(max_new_tokens=12)
TIGER = GOLDEN / "tiger.jpeg"


def noise(width, height, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Image.frombytes("RGB", (width, height), bytes(torch.randint(0, 256, (3 * width * height,), generator=g).tolist()))


def with_config(pipe, **values):
    return Pipeline(pipe.model, pipe.tokenizer, EngineConfig(**values))


def expected(pipe, messages, pictures, tiles_per_block, system=None, max_new_tokens=12, **options):
    """Straight from the parts: render, encode, tiles, generate."""
    ids = encode(pipe.tokenizer, messages, tiles_per_block, system, tokens_per_tile=4, **options)
    tiles = [t for p in pictures for t in minivl.tiling.tile(p, max_num=12, tile_size=56)]
    pixels = minivl.tiling.to_pixel_values(tiles) if tiles else None
    got = minivl.generate(pipe.model, [ids], pixels, max_new_tokens=max_new_tokens)[0]
    return ids, [t for t in got if t not in pipe.stop_ids]


def test_text_and_picture(pipe):
    image = minivl.load_image(TIGER)
    response = pipe(("describe this image", image), SHORT)
    ids, tokens = expected(pipe, [("<image>\ndescribe this image", None)], [image], [7])
    assert response.input_token_len == len(ids) and response.token_ids == tokens
    assert response.generate_token_len == len(tokens) and response.finish_reason in ("length", "stop")
    assert response.text == pipe.tokenizer.decode(tokens)
    for same in (TIGER, str(TIGER), TIGER.read_bytes(), Picture(TIGER), Picture(image, max_num=12)):
        assert pipe(("describe this image", same), SHORT).token_ids == tokens


def test_text_only(pipe):
    ids, tokens = expected(pipe, [("Hello, who are you?", None)], [], [])
    response = pipe("Hello, who are you?", SHORT)
    assert (response.input_token_len, response.token_ids) == (len(ids), tokens)


def test_the_picture_is_looked_at(pipe):
    a, b = pipe([("what?", noise(60, 60, 1)), ("what?", noise(60, 60, 2))], SHORT)
    assert a.token_ids != b.token_ids


def test_several_pictures(pipe):
    a, b = noise(100, 60, 1), noise(56, 200, 2)         # grids 2x1 (a stays below half of 4x2) and 1x4
    tiles = [len(minivl.tiling.tile(p, max_num=12, tile_size=56)) for p in (a, b)]
    assert tiles[0] != tiles[1] and min(tiles) > 1
    text = f"Image-1: {IMAGE_TOKEN}\nImage-2: {IMAGE_TOKEN}\ncompare"
    ids, tokens = expected(pipe, [("Image-1: <image>\nImage-2: <image>\ncompare", None)], [a, b], tiles)
    response = pipe((text, [a, b]), SHORT)
    assert (response.input_token_len, response.token_ids) == (len(ids), tokens)
    assert pipe((text.replace(IMAGE_TOKEN, "<image>"), [a, b]), SHORT).token_ids == tokens
    assert pipe((text.replace(IMAGE_TOKEN, f"<img>{IMAGE_TOKEN}</img>"), [a, b]), SHORT).token_ids == tokens
    # without marks, as LMDeploy 0.6.4: in front, all in one <img></img>; neighbouring marks too
    ids, tokens = expected(pipe, [("<image>\ncompare", None)], [a, b], [sum(tiles)])
    with pytest.warns(UserWarning, match="2 pictures without <IMAGE_TOKEN> in the text share one <img></img> pair"):
        response = pipe(("compare", [a, b]), SHORT)
    assert (response.input_token_len, response.token_ids) == (len(ids), tokens)
    assert pipe((f"{IMAGE_TOKEN}{IMAGE_TOKEN}\ncompare", [a, b]), SHORT).token_ids == tokens


def test_tiles_per_picture(pipe):
    image = noise(300, 300)
    one = pipe(("what?", Picture(image, max_num=1)), SHORT)
    many = pipe(("what?", Picture(image, max_num=9)), SHORT)
    assert many.input_token_len - one.input_token_len == 9 * 4      # 9 tiles and the thumbnail instead of one tile
    for bad in (0, 41, "3", True):
        with pytest.raises(InputError, match=r"max_num is .*; it must be a whole number in 1..40"):
            pipe(("what?", Picture(image, max_num=bad)))


def test_messages(pipe):
    image = noise(60, 60)
    ids, tokens = expected(pipe, [("<image>\nfirst", "yes"), ("second", None)], [image], [1], "Be brief.")
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "first"},
                                             {"type": "image_data", "image_data": {"data": image}}]},
                {"role": "assistant", "content": "yes"}, {"role": "user", "content": "second"}]
    response = pipe(messages, SHORT)
    assert (response.input_token_len, response.token_ids) == (len(ids), tokens)
    batch = pipe([messages, messages[-1:]], SHORT)
    assert batch[0].token_ids == tokens and batch[1].token_ids == pipe("second", SHORT).token_ids
    url = {"type": "image_url", "image_url": {"url": str(TIGER), "max_dynamic_patch": 2}}
    low = {"type": "image_url", "image_url": {"url": str(TIGER), "detail": "low"}}
    text = {"type": "text", "text": "what?"}
    few, more = (pipe._read([{"role": "user", "content": [item, text]}]).tiles for item in (url, low))
    image = minivl.load_image(TIGER)
    assert len(few) == len(minivl.tiling.tile(image, max_num=2, tile_size=56))
    assert len(more) == len(minivl.tiling.tile(image, max_num=6, tile_size=56)) > len(few)


def test_messages_with_several_texts_keep_their_order(pipe):
    a, b = noise(50, 50, 1), noise(50, 50, 2)
    items = [{"type": "text", "text": "one "}, {"type": "image_data", "image_data": {"data": a}},
             {"type": "text", "text": "two "}, {"type": "image_data", "image_data": {"data": b}}]
    _, tokens = expected(pipe, [("one <image>\ntwo <image>\n", None)], [a, b], [1, 1])
    assert pipe([{"role": "user", "content": items}], SHORT).token_ids == tokens


def test_batch_equals_singles(pipe):
    prompts = [("what?", noise(60, 60)), "hello there", (f"{IMAGE_TOKEN} and {IMAGE_TOKEN}?", [noise(90, 60), TIGER]),
               "this one spells <IMG_CONTEXT>, harmless without a picture", ("and this?", noise(20, 300))]
    alone = [pipe(p, SHORT) for p in prompts]
    for size in (8, 2):
        together = with_config(pipe, max_batch_size=size)(prompts, SHORT)
        assert [r.token_ids for r in together] == [r.token_ids for r in alone]
        assert [r.text for r in together] == [r.text for r in alone]
        assert [r.index for r in together] == [0, 1, 2, 3, 4]
    configs = [GenerationConfig(max_new_tokens=n, ignore_eos=True) for n in (3, 9, 1, 12, 5)]
    assert [r.generate_token_len for r in pipe(prompts, configs)] == [3, 9, 1, 12, 5]


def test_stream_yields_the_same_text_in_whole_characters(pipe):
    config = GenerationConfig(max_new_tokens=60, ignore_eos=True)
    whole = pipe(("what?", TIGER), config)
    pieces = list(pipe.stream(("what?", TIGER), config))
    assert "".join(pieces) == whole.text and len(pieces) > 5
    with pytest.raises(InputError, match="the prompt is empty"):
        pipe.stream("")             # at the call, not at the first piece


def forced(pipe, monkeypatch, ids):
    """Makes the pipeline write these tokens."""
    import minivl.generate as generate_function     # the function; the module is found through sys.modules
    import sys
    script = iter(ids)
    monkeypatch.setattr(sys.modules["minivl.generate"].Chooser, "__call__", lambda self, logits: next(script))
    assert callable(generate_function)


def test_stream_never_splits_a_character(pipe, monkeypatch):
    text = "né 世界 🐅!"
    ids = pipe.tokenizer.encode(text, plain=True)
    assert len(ids) > len(text)     # several tokens per character in this small vocabulary
    forced(pipe, monkeypatch, [*ids, pipe.tokenizer.id("<|im_end|>")])
    pieces = list(pipe.stream("x"))
    assert "".join(pieces) == text and all("�" not in p for p in pieces)


def test_stop_words(pipe, monkeypatch):
    tokenizer, end = pipe.tokenizer, pipe.tokenizer.id("<|im_end|>")
    text = "one two STO three STOP four"
    ids = tokenizer.encode(text)
    forced(pipe, monkeypatch, [*ids, end])
    pieces = list(pipe.stream("x", GenerationConfig(stop_words=["STOP", "never"])))
    assert "".join(pieces) == "one two STO three " and all("STOP" not in p for p in pieces)
    forced(pipe, monkeypatch, [*ids, end])
    response = pipe("x", GenerationConfig(stop_words=["STOP"]))
    assert response.text == "one two STO three " and response.finish_reason == "stop"
    assert tokenizer.decode(response.token_ids) == response.text    # no token of the stop word is left
    forced(pipe, monkeypatch, [*ids, end])
    response = pipe("x", GenerationConfig(stop_words=["STOPPED"]))     # its beginning was held back, then released
    assert response.text == text and response.token_ids == ids
    forced(pipe, monkeypatch, ids)
    response = pipe("x", GenerationConfig(stop_token_ids=[ids[2]], max_new_tokens=50))
    assert response.token_ids == ids[:2] and response.finish_reason == "stop"


@pytest.mark.parametrize("text, word", [("one two STOP", "STOP"), ("one twoSTOP", "woST"), ("é世界 🐅 end", "界 🐅"),
                                        ("STOP", "STOP"), ("a 🐅🐆", "🐆")])
def test_a_session_continues_after_a_stop_word_as_if_only_the_text_was_said(pipe, monkeypatch, text, word):
    ids = pipe.tokenizer.encode(text, plain=True)
    forced(pipe, monkeypatch, [*ids, 5, 6, 7])
    session = pipe.chat("hello", gen_config=GenerationConfig(stop_words=[word]))
    assert session.response.text == text[:text.index(word)] == pipe.tokenizer.decode(session.response.token_ids)
    said = list(session.ids)
    assert session.cache.length <= len(said)
    config = GenerationConfig(max_new_tokens=1, ignore_eos=True, logprobs=5)
    got = pipe.chat("go on", session, config).response.logprobs[0]
    new = session.ids[len(said):-1]
    with torch.no_grad():
        want = pipe.model(torch.tensor([said + new]))[0, -1].log_softmax(-1)
    assert got == pytest.approx({i: float(want[i]) for i in got}, abs=1e-4)


def test_bad_words_min_tokens_and_logprobs(pipe):
    config = GenerationConfig(max_new_tokens=30, ignore_eos=True)
    free = pipe("hello", config)
    letter = next(c for c in free.text if c.isalpha() and c.isascii())
    assert letter not in pipe("hello", GenerationConfig(max_new_tokens=30, ignore_eos=True, bad_words=[letter])).text
    stop = GenerationConfig(max_new_tokens=30, stop_token_ids=[free.token_ids[1]], min_new_tokens=5, ignore_eos=True)
    assert pipe("hello", stop).generate_token_len >= 5
    logprobs = pipe("hello", GenerationConfig(max_new_tokens=4, ignore_eos=True, logprobs=3)).logprobs
    assert [max(p, key=p.get) for p in logprobs] == free.token_ids[:4] and all(len(p) == 3 for p in logprobs)
    assert all(v < 0 for p in logprobs for v in p.values()) and free.logprobs is None


def test_placeholders_do_not_count_as_repeated(pipe):
    """They stand for the picture; LMDeploy's dummy id there made it penalise `!`."""
    from minivl.pipeline import _Answer
    turn = pipe._read(("what?", TIGER))
    seen = _Answer(turn, pipe, 0).chooser(pipe, None).seen
    assert len(seen) == len(turn.ids) - 7 * 4 and pipe.model.img_context_token_id not in seen


def test_sampling_is_seeded(pipe):
    def draw(seed):
        return pipe("hello", GenerationConfig(max_new_tokens=20, do_sample=True, temperature=1.5, random_seed=seed,
                                              ignore_eos=True)).token_ids
    assert draw(1) == draw(1) != draw(2)


# ---- sessions ----

def counted(model):
    """Counts tiles through the tower and tokens through the decoder."""
    count = {"tiles": 0, "tokens": 0}

    def add(key, size):
        def hook(module, args):
            count[key] += size(args[0])
        return hook
    count["handles"] = [
        model.vision_model.register_forward_pre_hook(add("tiles", len)),
        model.language_model.model.register_forward_pre_hook(add("tokens", lambda x: x.shape[0] * x.shape[1]))]
    return count


def test_a_session_answers_as_the_whole_conversation_does(pipe):
    a, b = noise(90, 60, 1), noise(60, 60, 2)
    turns = [("<image>\nwhat?", a), ("and now?", None), ("<image>\nthis one?", b), ("why?", None)]
    session, ids, pictures, blocks = None, [], [], []
    for turn, (text, picture) in enumerate(turns):
        count = counted(pipe.model)
        prompt_ = (text.replace("<image>\n", ""), picture) if picture else text
        session = pipe.chat(prompt_, session=session, gen_config=SHORT)
        for handle in count["handles"]:
            handle.remove()
        # in full: everything rendered again, the answers' tokens as they were generated
        new = encode(pipe.tokenizer, [(text, None)], [len(minivl.tiling.tile(picture, max_num=12, tile_size=56))]
                     if picture else [], tokens_per_tile=4, **({"after": previous} if turn else {}))
        ids += new
        if picture:
            pictures.append(picture)
        tiles = [t for p in pictures for t in minivl.tiling.tile(p, max_num=12, tile_size=56)]
        want = minivl.generate(pipe.model, [ids], minivl.tiling.to_pixel_values(tiles), max_new_tokens=12)[0]
        want = [t for t in want if t not in pipe.stop_ids]
        assert session.response.token_ids == want, f"turn {turn}"
        assert session.response.input_token_len == len(new)
        # only this turn's tiles and tokens were computed: at most 1 token left over from the answer before
        assert count["tiles"] == (len(minivl.tiling.tile(picture, max_num=12, tile_size=56)) if picture else 0)
        assert count["tokens"] <= len(new) + len(want) + 1
        previous = want
        ids += want
    assert session.ids == ids and len(session.history) == 4
    assert session.history[0] == (("what?", a), session.history[0][1]) and session.history[1][0] == "and now?"


def test_session_scores_equal_the_re_rendered_ones(pipe, monkeypatch):
    answer, written = "A fine tiger.", [5, 9, 300, 7]
    config = GenerationConfig(max_new_tokens=4, logprobs=5, ignore_eos=True)
    forced(pipe, monkeypatch, [*pipe.tokenizer.encode(answer), pipe.tokenizer.id("<|im_end|>"), *written])
    session = pipe.chat("why?", pipe.chat(("what?", TIGER)), config)
    forced(pipe, monkeypatch, written)
    again = pipe([{"role": "user", "content": [{"type": "text", "text": "what?"},
                                               {"type": "image_url", "image_url": {"url": str(TIGER)}}]},
                  {"role": "assistant", "content": answer}, {"role": "user", "content": "why?"}], config)
    assert len(session.response.logprobs) == 4
    for p, q in zip(again.logprobs, session.response.logprobs):
        assert p == pytest.approx(q, abs=1e-5)


@pytest.mark.parametrize("answer", ["A fine tiger.", "", " 世界 🐅"])
def test_a_later_turn_with_a_given_answer_is_the_re_rendered_prompt(pipe, monkeypatch, answer):
    """Answers that do re-encode: the session's tokens are exactly those of the original's re-rendered history."""
    end = pipe.tokenizer.id("<|im_end|>")
    forced(pipe, monkeypatch, [*pipe.tokenizer.encode(answer), end, 5, end])
    session = pipe.chat(("what?", TIGER))
    assert session.response.text == answer and session.response.finish_reason == "stop"
    session = pipe.chat("why?", session)
    want = encode(pipe.tokenizer, [("<image>\nwhat?", answer), ("why?", None)], [7], tokens_per_tile=4)
    assert session.ids == want + [5]
    assert session.cache.length == len(session.ids)


def test_a_failed_or_abandoned_turn_leaves_the_session_as_it_was(pipe):
    session = pipe.chat(("what?", TIGER), gen_config=SHORT)
    state = (list(session.ids), session.cache.length, list(session.history), session.response)
    want = pipe.chat("why?", pipe.chat(("what?", TIGER), gen_config=SHORT), SHORT).response.token_ids
    stream = pipe.stream("tell me more", SHORT, session)
    next(stream)
    stream.close()
    with pytest.raises(InputError):
        pipe.chat(("x", "missing.png"), session)
    with pytest.raises(InputError, match="one user message, got 2 messages"):
        pipe.chat([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], session)
    assert state == (session.ids, session.cache.length, session.history, session.response)
    assert pipe.chat("why?", session, SHORT).response.token_ids == want


def test_a_stream_read_too_late_is_refused(pipe):
    session = pipe.chat("hello", gen_config=SHORT)
    late, closed = pipe.stream("one", SHORT, session), pipe.stream("two", SHORT, session)
    pipe.chat("three", session, SHORT)
    ids = list(session.ids)
    with pytest.raises(InputError, match="the session went on or was closed before this stream was read"):
        next(late)
    session.close()
    with pytest.raises(InputError, match="went on or was closed"):
        next(closed)
    assert session.ids == ids and len(session.history) == 2


def test_two_sessions_do_not_mix(pipe):
    a, b = pipe.chat("hello", gen_config=SHORT), pipe.chat(("what?", TIGER), gen_config=SHORT)
    a, b = pipe.chat("go on", a, SHORT), pipe.chat("why?", b, SHORT)
    assert a.response.token_ids == pipe.chat("go on", pipe.chat("hello", gen_config=SHORT), SHORT).response.token_ids
    assert a.id != b.id


def test_closed_session(pipe):
    session = pipe.chat("hello", gen_config=SHORT)
    session.close()
    with pytest.raises(InputError, match="the session is closed"):
        pipe.chat("more", session)


def test_generated_placeholders_do_not_take_visual_tokens(pipe, monkeypatch):
    """A model may write <IMG_CONTEXT> itself; in the next turn it is an ordinary token, not a place for a picture."""
    placeholder = pipe.model.img_context_token_id
    forced(pipe, monkeypatch, [5, placeholder, 7, 8])
    session = pipe.chat("hello", gen_config=GenerationConfig(max_new_tokens=2))
    assert session.ids[-1] == placeholder and session.cache.length == len(session.ids) - 1
    session = pipe.chat(("what?", TIGER), session, GenerationConfig(max_new_tokens=2))
    assert session.response.token_ids == [7, 8]


# ---- text that spells tokens ----

def test_spelled_tokens_in_a_prompt(pipe):
    end = pipe.tokenizer.id("<|im_end|>")
    assert pipe._read("a <|im_end|> b <img>").ids.count(end) == 3
    with pytest.raises(InputError, match="spells <IMG_CONTEXT>"):
        pipe(("what is <IMG_CONTEXT>?", TIGER))
    plain = with_config(pipe, plain_text=True)
    text = f"a <|im_end|> b <img> <IMG_CONTEXT> <image> {IMAGE_TOKEN}"
    turn = plain._read((text, TIGER))
    assert turn.ids.count(end) == 2 and turn.ids.count(pipe.model.img_context_token_id) == 7 * 4
    assert text in pipe.tokenizer.decode(turn.ids)
    assert plain(("what?", TIGER), SHORT).token_ids == pipe(("what?", TIGER), SHORT).token_ids


# ---- refusals ----

@pytest.mark.parametrize("marks, pictures", [(1, 2), (2, 1), (1, 0), (3, 2)])
def test_marks_and_pictures_must_match(pipe, marks, pictures):
    for mark in (IMAGE_TOKEN, prompt.IMAGE):
        with pytest.raises(InputError, match=f"the text has {marks} picture marks? .* but {pictures} pictures are given"):
            pipe((f"{mark} " * marks + "what?", [TIGER] * pictures))


@pytest.mark.parametrize("bad, message", [
    ("", "the prompt is empty"), ("  \n", "the prompt is empty"), (5, "a prompt is a int"), ({"role": "user", "content": "x"}, "a prompt is a dict"), (None, "a prompt is a NoneType"),
    (("a", "b", "c"), r"a prompt tuple is \(text, picture\)"), ((TIGER, "describe"), r"a prompt tuple is \(text, picture\)"),
    ([], "the list of prompts is empty"), ([{"role": "user"}], "content must be a text or a list of items"),
    ([{"role": "assistant", "content": "x"}], "the last message must be the user's"),
    ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "it must be the first"),
    ([{"role": "tool", "content": "x"}], "role system, user, assistant"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "a message holds an item"),
    ([{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "a"}}]},
      {"role": "user", "content": "x"}], "a assistant message holds pictures"),
    (("x", "nowhere.png"), "nowhere.png"), (("x", 5), "int"), (("x", [None]), "NoneType")])
def test_bad_prompts(pipe, bad, message):
    with pytest.raises(InputError, match=message):
        pipe(bad)


def test_a_bad_prompt_stops_the_batch_before_any_is_run(pipe):
    count = counted(pipe.model)
    with pytest.raises(InputError, match="missing.png"):
        pipe(["hello", ("x", "missing.png")])
    for handle in count["handles"]:
        handle.remove()
    assert count["tokens"] == 0


def test_context_length(pipe):
    small = with_config(pipe, session_len=100)
    with pytest.raises(InputError, match=r"the prompt has \d+ tokens and leaves no room for an answer in a context of 100"):
        small("word " * 100)
    held = small("hello", GenerationConfig(max_new_tokens=500, ignore_eos=True))
    assert held.finish_reason == "length" and held.generate_token_len == 100 - held.input_token_len > 0
    with pytest.raises(InputError, match="session_len 99999 must be in 1.."):
        with_config(pipe, session_len=99999)
    session = small.chat("hello", gen_config=GenerationConfig(max_new_tokens=500, ignore_eos=True))
    with pytest.raises(InputError, match="leaves no room"):
        small.chat("more", session)


def test_limits(pipe):
    with pytest.raises(InputError, match="3 pictures exceed the limit of 2"):
        with_config(pipe, limits=Limits(pictures=2))((f"{IMAGE_TOKEN} " * 3, [TIGER] * 3))
    with pytest.raises(InputError, match="the prompt has 11 characters, the limit is 10"):
        with_config(pipe, limits=Limits(prompt_chars=10))("x" * 11)
    with pytest.raises(InputError, match="max_num is 12; it must be a whole number in 1..3"):
        with_config(pipe, limits=Limits(tiles_per_picture=3))(("x", TIGER))
    with pytest.raises(InputError):
        with_config(pipe, allow_paths=False)(("x", str(TIGER)))
    with pytest.raises(InputError, match="2 generation configs are given for 3 prompts"):
        pipe(["a", "b", "c"], [SHORT, SHORT])
    with pytest.raises(InputError, match="gen_config is a dict"):
        pipe("a", {"max_new_tokens": 3})
    with pytest.raises(InputError, match="session is a GenerationConfig; .* Name the argument"):
        pipe.chat("a", SHORT)
    with pytest.raises(InputError, match="max_new_tokens is 12, the limit is 5"):
        with_config(pipe, limits=Limits(new_tokens=5))("a", SHORT)
    wide = with_config(pipe, limits=Limits(new_tokens=10 ** 6), session_len=90)
    assert wide("a", GenerationConfig(max_new_tokens=40_000, ignore_eos=True)).finish_reason == "length"
    for field in ("stop_token_ids", "bad_token_ids"):
        with pytest.raises(InputError, match="hold 99999, the vocabulary has ids"):
            pipe("a", GenerationConfig(**{field: [99999]}))


@pytest.mark.parametrize("values", [{"session_len": "8"}, {"session_len": 0}, {"max_batch_size": 0}, {"max_batch_size": True},
                                    {"limits": None}, {"plain_text": "no"}, {"allow_hosts": "localhost"}])
def test_bad_engine_configs(values):
    with pytest.raises(InputError, match=f"EngineConfig.{list(values)[0]} is .*; it must be a"):
        EngineConfig(**values)


def test_wrong_things_as_checkpoint_or_config(tiny):
    with pytest.raises(InputError, match="a checkpoint cannot be a NoneType"):
        minivl.pipeline(None)
    with pytest.raises(InputError, match="backend_config is a dict; give minivl.EngineConfig"):
        minivl.pipeline(tiny, {"session_len": 5})
    with pytest.raises(InputError, match="has no config.json"):
        minivl.pipeline(GOLDEN)


def test_tokenizer_of_another_model(pipe, tiny):
    from minivl import Tokenizer
    tokenizer = Tokenizer.load(tiny)
    tokenizer.backend.add_tokens(["<new>"])
    with pytest.raises(InputError, match=r"the tokenizer has \d+ tokens, the model's vocab_size is"):
        Pipeline(pipe.model, tokenizer)


def test_video_prompt(pipe):
    frames = [noise(90, 60, i) for i in range(3)]
    want = encode(pipe.tokenizer, [("Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nwhat happens?", None)], [1, 1, 1],
                  tokens_per_tile=4)
    for how in (pipe, with_config(pipe, plain_text=True)):
        turn = how._read(minivl.video_prompt("what happens?", frames))
        assert len(turn.tiles) == 3 and turn.ids == want


# ---- the model card ----

def snippets():
    text = shared("MODEL_CARD.md").read_text()
    return [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "from lmdeploy" in code]


def test_every_lmdeploy_snippet_of_the_card_runs(tiny, monkeypatch, capsys):
    """Only the import lines and the engine-config class are changed; the network is replaced by the same pictures."""
    import sys
    found = snippets()
    assert len(found) == 4
    monkeypatch.setattr(sys.modules["minivl.media.pictures"], "fetch",
                        lambda url, **_: shared("images/" + url.split("/")[-1]).read_bytes())
    monkeypatch.setattr(sys.modules["minivl.pipeline"], "find", lambda name, revision: tiny)
    for code in found:
        used = re.findall(r"^from lmdeploy\S* import (.*)$", code, re.M)
        names = sorted({n.strip() for line in used for n in line.split(",")})
        code = re.sub(r"^from lmdeploy.*$", "", code, flags=re.M).replace("TurbomindEngineConfig", "EngineConfig")
        code = f"from minivl import {', '.join(names).replace('TurbomindEngineConfig', 'EngineConfig')}\n" + code
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)     # the card's own sampling values without do_sample
            exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 5
