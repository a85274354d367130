"""A conversation answers as the whole of it would, and a failed turn leaves no trace."""
import pytest
from asking import SHORT, TIGER, counted, forced, noise

import minivl
from minivl import GenerationConfig, InputError
from minivl.prompt import encode


def test_a_session_answers_as_the_whole_conversation_does(pipe):
    a, b = noise(90, 60, 1), noise(60, 60, 2)
    turns = [("<image>\nwhat?", a), ("and now?", None), ("<image>\nthis one?", b), ("why?", None)]
    session = previous = None
    ids = []
    pictures = []
    for turn, (text, picture) in enumerate(turns):
        count = counted(pipe.model)
        prompt_ = (text.replace("<image>\n", ""), picture) if picture else text
        session = pipe.chat(prompt_, session=session, gen_config=SHORT)
        for handle in count["handles"]:
            handle.remove()
        # in full: everything rendered again, the answers' tokens as they were generated
        new = encode(pipe.tokenizer, [(text, None)], [len(minivl.tiling.tile(picture, max_num=12, tile_size=56))]
                     if picture else [], tokens_per_tile=4, after=previous)
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
