"""A conversation answers as the whole of it would, and a failed turn leaves no trace."""
import copy
import gc
import pickle
import random
import sys
import threading

import pytest
from asking import SHORT, TIGER, counted, forced, noise, with_config

import minivl
from minivl import GenerationConfig, InputError
from minivl.prompt import encode

FEW = GenerationConfig(max_new_tokens=5)
LONG = GenerationConfig(max_new_tokens=9, ignore_eos=True)


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


# ---- one turn at a time ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def quick(made):
    """Without int4: some 4 times as fast."""
    return minivl.pipeline(made("plain"))


def state(session):
    return list(session.ids), session.cache.length, list(session.history), session.response


def text_of(stream):
    return "".join(stream)


def test_two_streams_on_one_session(quick):
    """In whatever order they are opened and read: one answers as if alone, the other raises and changes nothing."""
    want = quick.chat("one", gen_config=LONG).response.text
    for opened in ("before", "after"):
        session = quick.session()
        a = quick.stream("one", LONG, session)
        b = quick.stream("two", LONG, session) if opened == "before" else None
        start = next(a)
        with pytest.raises(InputError, match=r"session \d+ is busy with its turn 1; read that stream to its end"):
            next(b or quick.stream("two", LONG, session))
        with pytest.raises(InputError, match="busy with its turn 1"):
            quick.chat("three", session, LONG)
        assert start + text_of(a) == want == session.response.text and len(session.history) == 1
        assert quick.chat("two", session, LONG).response.text == quick.chat("two", quick.chat("one", gen_config=LONG),
                                                                          LONG).response.text
        assert repr(session).startswith(f"<Session {session.id}: 2 turns, ")


@pytest.mark.parametrize("end", ["close", "collect", "never started", "error", "Ctrl-C", "error of the model"])
def test_a_turn_that_ends_early_frees_the_session(quick, monkeypatch, end):
    session = quick.chat("hello", gen_config=FEW)
    before = state(session)
    want = quick.chat("why?", quick.chat("hello", gen_config=FEW), FEW).response.token_ids
    stream = quick.stream("tell me more", LONG, session)
    if end != "never started":
        next(stream)
        with pytest.raises(InputError, match="is busy"):
            quick.chat("why?", session, FEW)
    if end == "close":
        stream.close()
    elif end in ("error", "Ctrl-C"):
        kind = KeyboardInterrupt if end == "Ctrl-C" else RuntimeError
        with pytest.raises(kind):
            stream.throw(kind())
    elif end == "error of the model":
        with monkeypatch.context() as patch:
            patch.setattr(minivl.sampling.Sampler, "__call__", lambda self, logits: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                next(stream)
    else:
        del stream
        gc.collect()
    assert state(session) == before
    assert quick.chat("why?", session, FEW).response.token_ids == want


def test_closing_a_session_during_its_stream(quick):
    session = quick.chat("hello", gen_config=FEW)
    history = list(session.history)
    stream = quick.stream("more", LONG, session)
    next(stream)
    session.close()
    with pytest.raises(InputError, match=r"session \d+ was closed while turn 2 was written"):
        text_of(stream)
    session.close()         # twice does no harm
    assert session.cache is None and session.history == history and "closed" in repr(session)
    with pytest.raises(InputError, match="the session is closed"):
        quick.chat("more", session)


def test_a_session_of_another_pipeline(quick):
    """Even one with the same weights: its limits and its texts may differ."""
    other = with_config(quick)
    session = other.chat("hello", gen_config=FEW)
    before = state(session)
    for ask in (quick.chat, lambda prompt, session: quick.stream(prompt, None, session)):
        with pytest.raises(InputError, match=r"session \d+ was started by another pipeline; start one here"):
            ask("more", session)
    assert state(session) == before
    assert other.chat("more", session, FEW).response.finish_reason
    del other
    gc.collect()
    with pytest.raises(InputError, match="another pipeline"):
        quick.chat("more", session)


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_session_is_not_copied(quick, take):
    session = quick.chat("hello", gen_config=FEW)
    with pytest.raises(InputError, match=r"session \d+ cannot be copied or pickled, its \d+ tokens lie in one cache"):
        take(session)


def test_other_threads(quick):
    """One session, many threads at once: every turn that did not raise answered as its history says."""
    session = quick.session()
    wrong = []

    def ask(name):
        for turn in range(4):
            try:
                wrong.append(quick.chat(f"{name} asks {turn}", session, FEW) and None)
            except InputError as error:
                wrong.append(None if "busy" in str(error) or "went on" in str(error) else error)
            except BaseException as error:
                wrong.append(error)
    run_together([lambda name=name: ask(name) for name in "abc"])
    assert wrong == [None] * 12 and session.history
    again = quick.session()
    assert [quick.chat(prompt, again, FEW).response.text for prompt, _ in session.history] == [
        text for _, text in session.history]


def run_together(jobs):
    """Runs each in a thread of its own, switching between them far more often than usual."""
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    finally:
        sys.setswitchinterval(usual)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


def schedule(pipe, sessions, seed, heard):
    """A thread's random doings. `heard` gets (session, prompt, turns before it, text so far, whether it was all)."""
    rng = random.Random(seed)
    streams = []
    try:
        for step in range(10):
            what = rng.choices(["stream", "read", "chat", "abandon", "close"], [6, 8, 4, 3, 0.5])[0]
            session, prompt = rng.choice(sessions), f"{rng.choice(['what', 'why', 'who'])} {rng.randrange(3)}?"
            try:
                if what == "stream":
                    streams.append([pipe.stream(prompt, FEW, session), session, prompt, None, ""])
                elif what == "chat":
                    pipe.chat(prompt, session, FEW)
                elif what == "close":
                    session.close()
                elif streams and what == "abandon":
                    streams.pop(rng.randrange(len(streams))) if step % 2 else rng.choice(streams)[0].close()
                elif streams:
                    one = rng.choice(streams)
                    for _ in range(rng.randrange(1, 9)):
                        try:
                            one[4] += next(one[0])
                            one[3] = len(one[1].history)
                            heard.append((*one[1:], False))
                        except StopIteration as end:
                            if end.value is not None:       # the first time
                                assert end.value.text == one[4]
                                if one[3] is not None:
                                    heard.append((*one[1:], True))
                            break
            except InputError:
                pass
    except BaseException as error:
        heard.append(error)


def check_schedules(pipe, seeds):
    answers = {}        # prompts of a conversation -> the last answer's text, asked one after the other

    def serial(prompts):
        if prompts not in answers:
            session = pipe.session()
            for i, prompt in enumerate(prompts):
                answers[prompts[:i + 1]] = pipe.chat(prompt, session, FEW).response.text
        return answers[prompts]

    turns = 0
    for seed in seeds:
        sessions, heard = [pipe.session() for _ in range(3)], []
        run_together([lambda half=half, seed=seed, sessions=sessions, heard=heard:
                      schedule(pipe, sessions, 2 * seed + half, heard) for half in range(2)])
        for session in sessions:
            prompts = tuple(prompt for prompt, _ in session.history)
            assert [text for _, text in session.history] == [serial(prompts[:i + 1]) for i in range(len(prompts))], seed
            assert session.cache is None or session.cache.length <= len(session.ids)
            turns += len(prompts)
        for told in heard:
            assert isinstance(told, tuple), (seed, told)
            session, prompt, before, text, whole = told
            want = serial((*(earlier for earlier, _ in session.history[:before]), prompt))
            assert want == text if whole else want.startswith(text), seed
    return turns


def test_random_schedules(quick):
    """Streams, chats, abandoned ones and closed sessions over 3 sessions in 2 threads: as asked serially, or raise."""
    assert check_schedules(quick, range(4)) > 5


@pytest.mark.slow
def test_200_random_schedules(quick):
    assert check_schedules(quick, range(1000, 1200)) > 400
