"""What goes wrong while answers are written: ids that no token has, and one prompt's trouble beside other prompts."""
import json
import math
import shutil
import warnings

import pytest
import torch
from asking import SHORT, TIGER, noise, with_config
from checkpoints import edit, raw, write

import minivl
from minivl import EngineConfig, GenerationConfig, InputError, Pipeline
from minivl.chat import pipeline as module

HOT = GenerationConfig(max_new_tokens=20, do_sample=True, temperature=2.0, top_k=0, random_seed=1, ignore_eos=True)
GREEDY = GenerationConfig(max_new_tokens=20, ignore_eos=True)


# ---- more rows than tokens ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def padded(tiny, tmp_path_factory):
    """The tiny checkpoint with 40 more rows and a hole, which the scores favour: copies of every row, three times."""
    folder = tmp_path_factory.mktemp("padded") / "awq"
    shutil.copytree(tiny, folder)
    tensors = raw(folder)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        rows = tensors[name]
        favoured = 3 * rows[:40] if "head" in name else rows[:40]
        tensors[name] = torch.cat([rows, favoured])
        if "head" in name:
            tensors[name][598] = 4 * rows[65]
    write(folder, tensors)
    edit(folder, lambda c: c["llm_config"].update(vocab_size=640))
    added = json.loads((folder / "added_tokens.json").read_text())
    del added["<box>"]                  # 598
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


UNUSED = (598, *range(600, 640))


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("config", [GREEDY, HOT, GenerationConfig(max_new_tokens=20, lookup=5, ignore_eos=True)])
def test_ids_without_a_token_are_never_chosen(padded, config, precision):
    pipe = minivl.pipeline(padded, EngineConfig(precision=precision))
    assert pipe.model.unused_ids == UNUSED
    prompts = [("what?", TIGER), "one two one two one two one", "hello"]
    answers = [pipe(prompt, config) for prompt in prompts] + pipe(prompts, config)
    assert all(r.finish_reason == "length" and r.generate_token_len == 20 for r in answers)
    assert not {i for r in answers for i in r.token_ids} & {*UNUSED}
    with torch.no_grad():               # the model's own scores stay as they are, and would have chosen one
        ids = pipe.turn("hello").ids
        assert int(pipe.model(torch.tensor([ids]))[0, -1].argmax()) in UNUSED
    text_only = minivl.generate(pipe.model, [ids], max_new_tokens=5, ignore_eos=True)[0]
    assert not {*text_only} & {*UNUSED}


def test_logprobs_know_only_tokens(padded):
    config = GenerationConfig(max_new_tokens=3, ignore_eos=True, logprobs=640)
    response = minivl.pipeline(padded)("hello", config)
    for chosen, logprobs in zip(response.token_ids, response.logprobs):
        assert logprobs.keys() == {*range(600)} - {598} and max(logprobs, key=logprobs.get) == chosen
        assert sum(map(math.exp, logprobs.values())) == pytest.approx(1, abs=1e-4)


def test_a_model_put_together_by_hand(padded):
    """The pipeline asks its tokenizer: such a model has no `unused_ids`."""
    model = minivl.load(padded)
    model.unused_ids = ()
    pipe = Pipeline(model, minivl.Tokenizer.load(padded))
    assert not {*pipe("hello", GREEDY).token_ids} & {*UNUSED}


# ---- one prompt's trouble -------------------------------------------------------------------------------------------

@pytest.fixture
def nan_token(pipe):
    """A token whose vector is NaN: who reads or writes it cannot go on."""
    table = pipe.model.language_model.embeddings.weight.data
    kept = table.clone()
    yield lambda i: table[i].fill_(float("nan"))
    table.copy_(kept)


def check_batch(pipe, prompts, configs, bad, message):
    """All but the bad ones get what they get alone; the bad ones say what was wrong, alone by an error."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        responses = pipe(prompts, configs)
    starts = [f"prompt {i + 1} of the list was not finished: " for i in bad]
    assert len(told) == len(bad) and all(str(w.message).startswith(start) for w, start in zip(told, starts))
    assert all(message in str(w.message) and w.filename == __file__ for w in told)
    for i, (prompt, config, response) in enumerate(zip(prompts, configs, responses)):
        assert response.index == i
        if i in bad:
            assert response.finish_reason == "error" and message in response.error
            assert response.text == pipe.tokenizer.decode(response.token_ids)
            with pytest.raises(InputError, match=message):
                pipe(prompt, config)
            with pytest.raises(InputError, match=message):
                list(pipe.stream(prompt, config))
        else:
            alone = pipe(prompt, config)
            assert (response.token_ids, response.text, response.finish_reason, response.error) == (
                alone.token_ids, alone.text, alone.finish_reason, None)
    return responses


@pytest.mark.parametrize("size", [1, 2, 8])
def test_every_token_is_banned(pipe, size):
    all_banned = GenerationConfig(max_new_tokens=12, bad_token_ids=list(range(600)))
    until_late = GenerationConfig(max_new_tokens=12, min_new_tokens=3, stop_token_ids=list(range(600)))
    check_batch(with_config(pipe, max_batch_size=size), ["hello", ("what?", noise(60, 60)), "a", "b c"],
                [SHORT, all_banned, HOT, until_late], [1, 3], "every token is banned")


def test_scores_that_are_no_numbers(pipe, nan_token):
    letter = pipe.tokenizer.encode("Q")
    assert len(letter) == 1
    nan_token(letter[0])
    prompts = ["hello", "Q", ("what?", TIGER)]
    responses = check_batch(pipe, prompts, [GREEDY, GREEDY, HOT], [1], "NaN or infinite scores for new token 1")
    assert responses[1].text == "" and responses[1].generate_token_len == 0


def test_the_text_so_far_is_kept(pipe, nan_token):
    free = pipe("hello", GREEDY)
    n = next(n for n in range(2, 20) if free.token_ids[n] not in free.token_ids[:n] + pipe.turn("hello").ids)
    nan_token(free.token_ids[n])
    with pytest.warns(UserWarning, match="prompt 1 of the list was not finished"):
        responses = pipe(["hello", "hello"], [GREEDY, GenerationConfig(max_new_tokens=n, ignore_eos=True)])
    assert responses[0].token_ids == free.token_ids[:n + 1] and f"new token {n + 2}" in responses[0].error
    assert responses[0].text == pipe.tokenizer.decode(free.token_ids[:n + 1])
    assert responses[1].token_ids == free.token_ids[:n] and responses[1].finish_reason == "length"


def test_a_session_is_as_before_when_the_model_cannot_go_on(pipe, nan_token):
    session = pipe.chat("hello", gen_config=SHORT)
    state = (list(session.ids), session.cache.length, list(session.history), session.response)
    nan_token(pipe.tokenizer.encode("Q")[0])
    with pytest.raises(InputError, match="NaN"):
        pipe.chat("Q", session, SHORT)
    assert state == (session.ids, session.cache.length, session.history, session.response)


def test_what_is_too_much_together_is_done_one_by_one(pipe, monkeypatch):
    """A full device: three prompts at once do not fit, one alone does; a picture never does."""
    whole, embed = module.left_pad, module.embed

    def full(rows):
        if len(rows) > 1:
            raise InputError("the device is full")
        return whole(rows)

    def too_large(model, turn):
        if turn.tiles:
            raise InputError("the picture is too large")
        return embed(model, turn)
    want = [pipe(prompt, SHORT).token_ids for prompt in ("hello", "a", "b")]
    monkeypatch.setattr(module, "left_pad", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [r.token_ids for r in pipe(["hello", "a", "b"], SHORT)] == want
    monkeypatch.setattr(module, "embed", too_large)
    check_batch(pipe, ["hello", ("what?", TIGER), "b"], [SHORT] * 3, [1], "the picture is too large")


# ---- what they are called -------------------------------------------------------------------------------------------

def test_repr_of_a_pipeline_and_a_session(tiny, pipe):
    assert repr(pipe) == (f"<Pipeline {tiny}: {repr(pipe).split(': ')[1].split(' MB')[0]} MB, 3 layers of 128, "
                          f"int4, computed in float32 on cpu, precision exact, context {pipe.room}>")
    assert repr(Pipeline(pipe.model, pipe.tokenizer)).startswith("<Pipeline without a name: ")
    assert repr(minivl.pipeline("nano")).startswith("<Pipeline nano: ")
    session = pipe.session()
    assert repr(session) == f"<Session {session.id}: 0 turns, 0 tokens>"
    pipe.chat("hello", session, SHORT)
    session.close()
    assert repr(session) == f"<Session {session.id}: 1 turn, {len(session.ids)} tokens, closed>"


def test_a_text_of_millions_of_tokens_is_refused_before_they_are_made(pipe, monkeypatch):
    made = []
    ids_of = minivl.Tokenizer._ids_of
    monkeypatch.setattr(minivl.Tokenizer, "_ids_of",
                        lambda self, text, plain: made.append(len(text)) or ids_of(self, text, plain))
    for text in ("7" * 1_900_000, [{"role": "user", "content": "\U0001d160" * 1_900_000}]):
        with pytest.raises(InputError, match="use a shorter text"):
            pipe(text)
    assert max(made) < 10 * pipe.room + 10_000 < 500_000
