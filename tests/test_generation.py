"""Batches against singles, prompt-lookup decoding, and what generate refuses."""
import pytest
import torch
from test_shapes import build

import minivl
from minivl import GenerationConfig, InputError
from minivl.cache import KVCache
from minivl.generation import left_pad, prompt_lookup, steps
from minivl.sampling import Sampler


def scripted(ids):
    """A sampler that writes these tokens."""
    script = iter(ids)
    return lambda _: next(script)


PROMPTS = [[1, 2, 3, 4, 5], [9, 70, 70, 70, 70, 8, 7, 6, 5], [11], [20, 70, 70, 70, 70, 30]]


@pytest.mark.parametrize("awq", [False, True])
def test_a_batch_gives_each_prompt_what_it_gets_alone(awq):
    model, pixels = build(awq=awq), torch.randn(2, 3, 28, 28)
    own = [None, pixels[:1], None, pixels[1:]]
    alone = [minivl.generate(model, [p], x, max_new_tokens=8, ignore_eos=True)[0] for p, x in zip(PROMPTS, own)]
    assert minivl.generate(model, PROMPTS, pixels, max_new_tokens=8, ignore_eos=True) == alone
    assert len({tuple(a) for a in alone}) == 4
    with torch.no_grad():       # and the same scores at every step, not only the same winners
        visual = [None if x is None else model.visual_tokens(x) for x in own]
        rows = [model.embed(torch.tensor([p]), v) for p, v in zip(PROMPTS, visual)]
        x, padding = left_pad(rows)
        assert padding.tolist() == [4, 0, 8, 3]
        fixed = [[int(t) for t in a] for a in alone]
        together = steps(model, x, [scripted(a) for a in fixed], padding=padding)
        single = [steps(model, row, [scripted(a)]) for row, a in zip(rows, fixed)]
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
    assert prompt_lookup([1, 2, 3, 9, 8, 1, 2, 3], 5) == [9, 8, 1, 2, 3]
    assert prompt_lookup([1, 2, 3, 9, 8, 1, 2, 3], 1) == [9]
    # the latest; two tokens where three never stood
    assert prompt_lookup([5, 1, 2, 7, 6, 1, 2, 8, 4, 1, 2], 2) == [8, 4]
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


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "random_seed": 5, "temperature": 2.0, "top_k": 0},
                                     {"do_sample": True, "random_seed": 6, "repetition_penalty": 1e-40}])
def test_ids_that_no_token_has_are_never_chosen(sampled):
    model, part = build(), [5, 6, 7, 8, 9, 10, 11]
    free = minivl.generate(model, [part * 3], max_new_tokens=20, ignore_eos=True)[0]
    unused = {*free[:4], 69, 70}                # those it would like best, and the end of the rows
    model.unused_ids = tuple(unused)
    answers = [minivl.generate(model, [part * 3], max_new_tokens=20, ignore_eos=True,
                               config=GenerationConfig(lookup=lookup, **sampled))[0] for lookup in (0, 3)]
    assert answers[0] == answers[1] and not unused & {*answers[0]} and len(answers[0]) == 20
    with torch.no_grad():
        x = model.embed(torch.tensor([part, part]))
        want = model.language_model.scores(x)[:, -1]
        _, logits = next(steps(model, x, [scripted([1]), scripted([2])], unused=model.unused_ids))
    assert all(torch.isneginf(logits[:, i]).all() for i in unused)
    kept = [i for i in range(71) if i not in unused]
    assert torch.equal(logits[:, kept], want[:, kept])


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


def test_one_cache_serves_one_iteration():
    model = build()
    x, cache = model.embed(torch.tensor([[1, 2, 3]])).detach(), KVCache()
    one, other = (steps(model, x, [scripted([4] * 9)], cache=cache) for _ in range(2))
    next(one)
    next(one)
    next(other)
    with pytest.raises(InputError, match="the cache held 4 tokens at the last step and holds 7 now; one cache serves"):
        next(one)


def test_a_config_that_was_changed_is_checked_again():
    config = GenerationConfig()
    config.bad_token_ids = [True]
    with pytest.raises(InputError, match=r"bad_token_ids is \[True\]; it must be a list of at most"):
        minivl.generate(build(), [[1, 2]], max_new_tokens=2, config=config)


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
    message = "NaN or infinite scores for new token 1 in torch.float32; load it with dtype="
    with pytest.raises(InputError, match=message):
        minivl.generate(model, torch.tensor([1, 2]), max_new_tokens=3)
