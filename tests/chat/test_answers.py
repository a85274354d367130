"""Text comes in whole characters and stops where it should: stop words, bad words, log-probabilities."""
import pytest
import torch
from asking import TIGER, forced

from minivl import GenerationConfig, InputError
from minivl.chat.answers import Answer


def test_stream_yields_the_same_text_in_whole_characters(pipe):
    config = GenerationConfig(max_new_tokens=60, ignore_eos=True)
    whole = pipe(("what?", TIGER), config)
    pieces = list(pipe.stream(("what?", TIGER), config))
    assert "".join(pieces) == whole.text and len(pieces) > 5
    with pytest.raises(InputError, match="the prompt is empty"):
        pipe.stream("")             # at the call, not at the first piece


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
    turn = pipe.turn(("what?", TIGER))
    placeholder = pipe.model.img_context_token_id
    seen = Answer(turn, pipe.tokenizer, pipe.stop_ids, 0).sampler([], placeholder).seen
    assert len(seen) == len(turn.ids) - 7 * 4 and placeholder not in seen


def test_sampling_is_seeded(pipe):
    def draw(seed):
        return pipe("hello", GenerationConfig(max_new_tokens=20, do_sample=True, temperature=1.5, random_seed=seed,
                                              ignore_eos=True)).token_ids
    assert draw(1) == draw(1) != draw(2)
