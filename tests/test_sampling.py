"""Sampling against loops a beginner believes; what a GenerationConfig refuses."""
import itertools
import math
import warnings

import pytest
import torch

from minivl import GenerationConfig, InputError
from minivl.sampling import Sampler, drawn, penalise, probabilities


def test_top_k_keeps_k_tokens_also_where_scores_tie():
    assert (probabilities(torch.ones(5), top_k=1) > 0).sum() == 1
    scores = (torch.randn(50_000) * 2).bfloat16()
    assert (probabilities(scores, top_k=50) > 0).sum() == 50


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([1.0, 3.0, 2.0])
    for temperature in (1e-40, 1e-300):
        assert probabilities(logits, temperature=temperature).tolist() == [0.0, 1.0, 0.0]


def slow_probabilities(logits, temperature, top_k, top_p, min_p):
    """By the words: scale; keep the k best; keep the best until they hold p; keep min_p of the best; rescale."""
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


def test_a_tiny_penalty_does_not_overflow():
    logits = torch.tensor([2.0, -2.0, 0.0, float("-inf")])
    assert penalise(logits, [0, 1, 2, 3], 1e-40).isinf().tolist() == [False, False, False, True]
    config = GenerationConfig(do_sample=True, repetition_penalty=1e-40, random_seed=0)
    assert Sampler(config, [0, 1, 3])(logits) == 0


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


def test_a_draw_is_where_the_running_sum_exceeds_u():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2 ** -53, 4)):
        assert drawn(p, u) == token, u
    p = torch.randn(5000).mul(4).softmax(-1).index_fill(0, torch.arange(0, 5000, 3), 0.0)
    p /= p.sum()
    shares = p.double().tolist()
    total = math.fsum(shares)
    for u in torch.rand(50, dtype=torch.float64).tolist():
        token = next(i for i, sum_to in enumerate(itertools.accumulate(shares)) if sum_to > u * total)  # the slow spec
        assert drawn(p, u) == token and p[token] > 0


def test_sampling_values_without_do_sample_warn():
    with pytest.warns(UserWarning, match="do_sample is False, so decoding is greedy and top_p, top_k have no effect"):
        GenerationConfig(top_k=40, top_p=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerationConfig(top_k=40, top_p=0.8, do_sample=True)
        GenerationConfig(max_new_tokens=5)


@pytest.mark.parametrize("values, message", [
    ({"n": 2}, "n is 2; it must be 1"), ({"top_p": 0.0}, r"in \(0, 1\]"), ({"top_p": 1.1}, r"in \(0, 1\]"),
    ({"top_k": -1}, "0 .all tokens. or more"), ({"temperature": 2.5}, r"in \[0, 2\]"),
    ({"min_p": -0.1}, r"in \[0, 1\]"),
    ({"max_new_tokens": 0}, "1 or more"), ({"random_seed": 2 ** 70}, r"in 0..2\^63-1"), ({"random_seed": -1}, "in 0"),
    ({"max_new_tokens": 1.5}, "a whole number"), ({"repetition_penalty": 0}, "positive"),
    ({"temperature": "hot"}, "a number"),
    ({"top_p": float("nan")}, "a number"), ({"do_sample": "False"}, "True or False"),
    ({"stop_token_ids": ["x"]}, "token ids"),
    ({"bad_token_ids": [True]}, "token ids"), ({"stop_token_ids": [5, False]}, "token ids"),
    ({"stop_token_ids": [1.0]}, "token ids"), ({"bad_token_ids": [1] * 10 ** 6}, r"^.{,90}\(1000000 in all\).{,90}$"),
    ({"stop_words": ["x"] * 10 ** 6}, r"^.{,150}\(1000000 in all\).{,150}$"),
    ({"bad_words": ["x" * 10 ** 6] * 10}, "^.{,250} in all.{,150}$"),
    ({"bad_token_ids": [-1]}, "token ids"), ({"bad_token_ids": 5}, "token ids"), ({"ignore_eos": 1}, "True or False"),
    ({"stop_words": "x"}, "non-empty strings"),
    ({"stop_words": [""]}, "non-empty strings"), ({"stop_words": ["x" * 10 ** 6]}, "at most 200 characters"),
    ({"response_format": {}}, "not supported"),
    ({"logprobs": 0}, "1 or more")])
def test_bad_generation_configs(values, message):
    with pytest.raises(InputError, match=message):
        GenerationConfig(**{"do_sample": True, **values})
