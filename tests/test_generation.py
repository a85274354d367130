"""Sampling against loops, batches against singles, and what generate refuses."""
import math
import warnings

import pytest
import torch
from test_shapes import build

import minivl
from minivl import GenerationConfig, InputError
from minivl.cache import KVCache
from minivl.generation import left_pad, prompt_lookup, steps
from minivl.sampling import Sampler, penalise, probabilities


def test_top_k_keeps_k_tokens_also_where_scores_tie():
    assert (probabilities(torch.ones(5), top_k=1) > 0).sum() == 1
    scores = (torch.randn(50_000) * 2).bfloat16()
    assert (probabilities(scores, top_k=50) > 0).sum() == 50


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([1.0, 3.0, 2.0])
    for temperature in (1e-40, 1e-300):
        assert probabilities(logits, temperature=temperature).tolist() == [0.0, 1.0, 0.0]


def slow_probabilities(logits, temperature, top_k, top_p, min_p):
    """By the words: scale; keep the k best; keep the best until they hold p; keep at least min_p of the best; rescale."""
    ranked = sorted(((value / temperature, i) for i, value in enumerate(logits.tolist())), reverse=True)
    ranked = ranked[:top_k] if top_k else ranked
    total = sum(math.exp(v) for v, _ in ranked)
    kept, before = {}, 0.0
    for value, i in ranked:
        p = math.exp(value) / total
        if before > top_p:
            break
        kept[i], before = p, before + p
    best = max(kept.values())
    kept = {i: p for i, p in kept.items() if p >= min_p * best}
    return torch.tensor([kept.get(i, 0.0) / sum(kept.values()) for i in range(len(logits))])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
def test_filters_against_the_slow_spec(temperature, top_k, top_p, min_p):
    logits = torch.randn(40) * 2
    got = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.allclose(got, slow_probabilities(logits, temperature, top_k, top_p, min_p), atol=1e-5)


def test_order_of_the_filters_matters():
    """top-p is taken of what top-k left (rescaled), not of the whole distribution."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert (probabilities(logits, top_k=2, top_p=0.5) > 0).tolist() == [True, False, False, False]    # 0.57 > 0.5
    assert (probabilities(logits, top_p=0.5) > 0).tolist() == [True, True, False, False]


def test_repetition_penalty_by_hand():
    logits = torch.tensor([2.0, -2.0, 1.0, 3.0])
    assert penalise(logits, [0, 1, 0], 2.0).tolist() == [1.0, -4.0, 1.0, 3.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 3.0]


def test_sampler():
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    assert Sampler(GenerationConfig(), [])(logits) == 1
    assert Sampler(GenerationConfig(min_new_tokens=1), [], stop_ids=[1])(logits) == 2
    late = Sampler(GenerationConfig(min_new_tokens=1), [], stop_ids=[1])
    assert [late(logits), late(logits)] == [2, 1]
    assert Sampler(GenerationConfig(), [], banned_ids=[1, 2])(logits) == 3
    assert Sampler(GenerationConfig(do_sample=True, temperature=0), [])(logits) == 1
    repeated = Sampler(GenerationConfig(do_sample=True, top_k=1, repetition_penalty=1.6), [])
    assert [repeated(logits) for _ in range(3)] == [1, 2, 1]       # 3/1.6 < 2, then 2/1.6 < 3/1.6


def test_seeded_draws_repeat_and_follow_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.7]).log()
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, random_seed=3)

    def draws(count):
        sampler = Sampler(config, [])
        return [sampler(logits) for _ in range(count)]
    first = draws(3000)
    assert first == draws(3000)
    for i, p in enumerate((0.1, 0.2, 0.7)):
        assert first.count(i) / 3000 == pytest.approx(p, abs=0.03)
    other = Sampler(GenerationConfig(do_sample=True, temperature=1.0, top_k=0, random_seed=4), [])
    assert first[:100] != [other(logits) for _ in range(100)]


def test_sampling_values_without_do_sample_warn():
    with pytest.warns(UserWarning, match="do_sample is False, so decoding is greedy and top_p, top_k have no effect"):
        GenerationConfig(top_k=40, top_p=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerationConfig(top_k=40, top_p=0.8, do_sample=True)
        GenerationConfig(max_new_tokens=5)


@pytest.mark.parametrize("values, message", [
    ({"n": 2}, "n is 2; it must be 1"), ({"top_p": 0.0}, r"in \(0, 1\]"), ({"top_p": 1.1}, r"in \(0, 1\]"),
    ({"top_k": -1}, "0 .all tokens. or more"), ({"temperature": 2.5}, r"in \[0, 2\]"), ({"min_p": -0.1}, r"in \[0, 1\]"),
    ({"max_new_tokens": 0}, "1 or more"), ({"random_seed": 2 ** 70}, r"in 0..2\^63-1"), ({"random_seed": -1}, "in 0"),
    ({"max_new_tokens": 1.5}, "a whole number"), ({"repetition_penalty": 0}, "positive"), ({"temperature": "hot"}, "a number"),
    ({"top_p": float("nan")}, "a number"), ({"do_sample": "False"}, "True or False"), ({"stop_token_ids": ["x"]}, "token ids"),
    ({"bad_token_ids": [-1]}, "token ids"), ({"bad_token_ids": 5}, "token ids"), ({"ignore_eos": 1}, "True or False"), ({"stop_words": "x"}, "non-empty strings"),
    ({"stop_words": [""]}, "non-empty strings"), ({"stop_words": ["x" * 10 ** 6]}, "at most 200 characters"), ({"response_format": {}}, "not supported"),
    ({"logprobs": 0}, "1 or more")])
def test_bad_generation_configs(values, message):
    with pytest.raises(InputError, match=message):
        GenerationConfig(**{"do_sample": True, **values})


PROMPTS = [[1, 2, 3, 4, 5], [9, 70, 70, 70, 70, 8, 7, 6, 5], [11], [20, 70, 70, 70, 70, 30]]


@pytest.mark.parametrize("awq", [False, True])
def test_a_batch_gives_each_prompt_what_it_gets_alone(awq):
    model, pixels = build(awq=awq), torch.randn(2, 3, 28, 28)
    own = [None, pixels[:1], None, pixels[1:]]
    alone = [minivl.generate(model, [p], x, max_new_tokens=8, ignore_eos=True)[0] for p, x in zip(PROMPTS, own)]
    assert minivl.generate(model, PROMPTS, pixels, max_new_tokens=8, ignore_eos=True) == alone
    assert len({tuple(a) for a in alone}) == 4
    with torch.no_grad():       # and the same scores at every step, not only the same winners
        rows = [model.embed(torch.tensor([p]), None if x is None else model.visual_tokens(x)) for p, x in zip(PROMPTS, own)]
        x, padding = left_pad(rows)
        assert padding.tolist() == [4, 0, 8, 3]
        fixed = [[int(t) for t in a] for a in alone]
        together = steps(model, x, [lambda _, a=iter(a): next(a) for a in fixed], padding=padding)
        single = [steps(model, row, [lambda _, a=iter(a): next(a)]) for row, a in zip(rows, fixed)]
        for _ in range(8):
            logits = next(together)[1]
            for i, s in enumerate(single):
                want = next(s)[1][0]
                assert (logits[i] - want).norm() / want.norm() < 1e-5


def test_chunked_prefill_with_padding_equals_prefill():
    model = build()
    with torch.no_grad():
        rows = [model.embed(torch.tensor([p])) for p in ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10])]
        x, padding = left_pad(rows)
        whole = model.language_model(x, KVCache(), padding)
        for cuts in ([2, 5], [5, 2], [3, 1, 3], [1] * 7):
            cache = KVCache()
            parts = torch.cat([model.language_model(part, cache, padding) for part in x.split(cuts, dim=1)], 1)
            for row, pad in enumerate(padding):
                a, b = parts[row, pad:], whole[row, pad:]
                assert (a - b).norm() / b.norm() < 1e-5, cuts
        alone = model.language_model(rows[1])[0]
        assert (whole[1, 4:] - alone).norm() / alone.norm() < 1e-5


def test_prompt_lookup():
    assert prompt_lookup([1, 2, 3, 9, 8, 1, 2, 3], 5) == [9, 8, 1, 2, 3] and prompt_lookup([1, 2, 3, 9, 8, 1, 2, 3], 1) == [9]
    assert prompt_lookup([5, 1, 2, 7, 6, 1, 2, 8, 4, 1, 2], 2) == [8, 4]         # the latest; two tokens where three never stood
    assert prompt_lookup([1, 2, 3, 4], 5) == prompt_lookup([1], 5) == prompt_lookup([], 5) == []
    assert prompt_lookup([4, 4, 4], 3) == [4, 4, 4] and prompt_lookup([7, 8, 9, 7, 8, 9], 4) == [7, 8, 9, 7]


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "random_seed": 5, "temperature": 2.0, "top_k": 4}])
def test_lookup_changes_nothing_but_the_number_of_passes(sampled):
    model = build()
    passes, lengths = [], []
    model.language_model.model.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0].shape[1]))
    saved = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        part = torch.randint(0, 71, (7,), generator=generator).tolist()
        answers, counts = [], []
        for lookup in (0, 1, 3, 8):
            passes.clear()
            answers.append(minivl.generate(model, [part * 3], max_new_tokens=30, ignore_eos=True,
                                           config=GenerationConfig(lookup=lookup, **sampled))[0])
            counts.append(len(passes))
            lengths += [n for n in passes[1:] if lookup]
        assert answers[1:] == answers[:1] * 3
        assert counts[0] == 30 and all(n <= 30 for n in counts)
        saved += 30 - min(counts)
    assert max(lengths) == 9 and saved > 10
    # two prompts: no guesses, the same answers
    rows = [[1, 2, 3, 1, 2, 3], [4, 5]]
    assert minivl.generate(model, rows, max_new_tokens=8, config=GenerationConfig(lookup=4)) == minivl.generate(
        model, rows, max_new_tokens=8)


def test_lookup_leaves_the_cache_right_for_the_next_turn():
    model = build()
    with torch.no_grad():
        x, cache = model.embed(torch.tensor([[1, 2, 3, 1, 2, 3]])), KVCache()
        running = steps(model, x, [Sampler(GenerationConfig(), [1, 2, 3, 1, 2, 3])], cache=cache, lookup=5)
        tokens = [1, 2, 3, 1, 2, 3]
        for _ in range(12):
            chosen, logits = next(running)
            assert cache.length == len(tokens)      # everything but the token just chosen
            want = model.language_model(model.embed(torch.tensor([tokens])))[:, -1]
            assert (logits - want).norm() / want.norm() < 1e-5
            tokens += chosen


def test_stop_tokens_and_tensor_forms():
    model = build()
    prompt = torch.tensor([1, 2, 3])
    free = minivl.generate(model, prompt, max_new_tokens=9, ignore_eos=True).tolist()
    model.eos_token_ids = (free[2],)
    first = free.index(free[2])
    assert minivl.generate(model, prompt, max_new_tokens=9).tolist() == free[:first + 1]
    both = torch.tensor([[1, 2, 3], [7, 5, 6]])
    out = minivl.generate(model, both, max_new_tokens=9)
    lists = minivl.generate(model, both.tolist(), max_new_tokens=9)
    assert lists[0] == free[:first + 1] and out[0].tolist()[:first + 1] == lists[0]
    assert set(out[0].tolist()[first:]) == {free[2]}
    assert minivl.generate(model, prompt, max_new_tokens=9, ignore_eos=True).tolist() == free


def test_generate_refuses():
    model = build()
    with pytest.raises(InputError, match="input_ids are a list; give"):
        minivl.generate(model, [1, 2, 3], max_new_tokens=1)
    with pytest.raises(InputError, match="input_ids are empty"):
        minivl.generate(model, [[]], max_new_tokens=1)
    with pytest.raises(InputError, match="90 prompt tokens . 10 new ones exceed the model's 99 positions"):
        minivl.generate(model, torch.ones(90, dtype=torch.long), max_new_tokens=10)
    for bad in (torch.tensor(3), torch.tensor([True]), torch.tensor([1.0])):
        with pytest.raises(InputError, match="input_ids have shape .* and dtype"):
            minivl.generate(model, bad, max_new_tokens=1)
    with pytest.raises(InputError, match="something that is no token id"):
        minivl.generate(model, [[True]], max_new_tokens=1)
    with pytest.raises(InputError, match="pixel_values are a list"):
        minivl.generate(model, [[1]], [1], max_new_tokens=1)
    with pytest.raises(InputError, match="max_new_tokens is '2'"):
        minivl.generate(model, [[1]], max_new_tokens="2")
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        minivl.generate(model, torch.tensor([1]), max_new_tokens=0)
    with pytest.raises(InputError, match="lookup is 65; it must be in 0..64"):
        GenerationConfig(lookup=65)


def test_nothing_left_to_choose():
    model = build()
    for sample in (False, True):
        with pytest.raises(InputError, match="every token is banned"):
            minivl.generate(model, torch.tensor([1]), max_new_tokens=2,
                            config=GenerationConfig(do_sample=sample, bad_token_ids=list(range(71))))


def test_no_field_of_a_config_is_silently_dropped():
    model = build()
    prompt = torch.tensor([1, 2, 3])
    free = minivl.generate(model, prompt, max_new_tokens=6, ignore_eos=True).tolist()
    model.eos_token_ids = (free[1],)
    assert minivl.generate(model, prompt, max_new_tokens=6, config=GenerationConfig(ignore_eos=True)).tolist() == free
    for field in ({"stop_words": ["x"]}, {"bad_words": ["x"]}, {"logprobs": 2}):
        with pytest.raises(InputError, match=f"cannot use {list(field)[0]}; use a pipeline"):
            minivl.generate(model, prompt, max_new_tokens=6, config=GenerationConfig(**field))
    for field in ("stop_token_ids", "bad_token_ids"):
        with pytest.raises(InputError, match="hold 71, the vocabulary has ids 0..70"):
            minivl.generate(model, prompt, max_new_tokens=6, config=GenerationConfig(**{field: [71]}))


def test_nan_scores_are_an_error():
    model = build()
    model.language_model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite scores for new token 1 in torch.float32; load it with dtype="):
        minivl.generate(model, torch.tensor([1, 2]), max_new_tokens=3)
