"""The API a person types: answers, batches, limits."""
import pytest
from asking import SHORT, TIGER, expected, noise, with_config
from conftest import GOLDEN

import minivl
from minivl import IMAGE_TOKEN, EngineConfig, GenerationConfig, InputError, Limits, Picture, Pipeline


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


def test_batch_equals_singles(pipe):
    prompts = [("what?", noise(60, 60)), "hello there", (f"{IMAGE_TOKEN} and {IMAGE_TOKEN}?", [noise(90, 60), TIGER]),
               "this one spells <IMG CONTEXT>, which is only text", ("and this?", noise(20, 300))]
    alone = [pipe(p, SHORT) for p in prompts]
    for size in (8, 2):
        together = with_config(pipe, max_batch_size=size)(prompts, SHORT)
        assert [r.token_ids for r in together] == [r.token_ids for r in alone]
        assert [r.text for r in together] == [r.text for r in alone]
        assert [r.index for r in together] == [0, 1, 2, 3, 4]
    configs = [GenerationConfig(max_new_tokens=n, ignore_eos=True) for n in (3, 9, 1, 12, 5)]
    assert [r.generate_token_len for r in pipe(prompts, configs)] == [3, 9, 1, 12, 5]


def test_context_length(pipe):
    small = with_config(pipe, session_len=100)
    message = r"the prompt has at least \d+ tokens and leaves no room for an answer in a context of 100"
    with pytest.raises(InputError, match=message):
        small("word " * 100)
    held = small("hello", GenerationConfig(max_new_tokens=500, ignore_eos=True))
    assert held.finish_reason == "length" and held.generate_token_len == 100 - held.input_token_len > 0
    most = pipe.model.config.llm_config.max_position_embeddings
    with pytest.warns(UserWarning, match=f"session_len 99999 is more than this model's {most} positions; {most} are"):
        assert with_config(pipe, session_len=99999).room == most
    assert with_config(pipe, session_len=most).room == most
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


def test_far_too_much_is_refused_early(pipe, monkeypatch):
    """Neither all the text is tokenized nor all pictures are opened; long lists are counted first."""
    read = []
    whole = minivl.Tokenizer._ids_of
    monkeypatch.setattr(minivl.Tokenizer, "_ids_of",
                        lambda self, text, plain: read.append(text) or whole(self, text, plain))
    small = with_config(pipe, session_len=100)
    session = small.chat("hello", gen_config=GenerationConfig(max_new_tokens=1))
    for ask, room in ((small, "100"), (lambda text: small.chat(text, session), "[0-9]{2}")):
        with pytest.raises(InputError, match=f"there is room for {room}; use a shorter text"):
            ask("two words " * 100_000)
    assert sum(map(len, read)) < 20_000
    opened = []
    tiles = minivl.chat.requests.open_tiles
    monkeypatch.setattr(minivl.chat.requests, "open_tiles", lambda *args: opened.append(1) or tiles(*args))
    with pytest.raises(InputError, match="the prompt has at least 112 tokens and leaves no room"):
        with_config(pipe, session_len=100)((f"{IMAGE_TOKEN}" * 300, [TIGER] * 300))
    assert len(opened) == 4         # of 7 x 4 tokens
    text = {"type": "text", "text": "x"}
    one = {"role": "assistant", "content": "x"}
    for many in ([one] * 20_000, [{"role": "user", "content": [text] * 20_000}],
                 [{"role": "user", "content": [text] * 3000}] * 4):
        with pytest.raises(InputError, match="the prompt has over 10000 messages and items in them, the limit"):
            pipe(many)
    with pytest.raises(InputError, match="1000000 pictures exceed the limit of 512"):
        pipe(("what?", [TIGER] * 10 ** 6))


@pytest.mark.parametrize("values", [{"session_len": "8"}, {"session_len": 0}, {"max_batch_size": 0},
                                    {"max_batch_size": True}, {"limits": None}, {"plain_text": "no"},
                                    {"allow_hosts": "localhost"}])
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
