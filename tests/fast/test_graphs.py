"""The recorded step's arithmetic, run here as it is: a cache of fixed size and a position on the device give what the
growing cache gives."""
import gc
import weakref

import pytest
import torch

import minivl
from minivl import qwen2
from minivl.cache import KVCache
from minivl.fast import graphs


@pytest.fixture(scope="module")
def language(tiny):
    return minivl.load(tiny).language_model


def embedded(language, *shape):
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return language.embeddings(torch.randint(0, 500, shape, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, [0, 3, 1]])
def test_a_step_of_fixed_size_is_the_definition(language, padding):
    """Steps from every length on, with and without padding; what is not filled holds garbage and must not show."""
    B, T, capacity = 3, 7, 32
    padding = None if padding is None else torch.tensor(padding)
    cache, prompt = KVCache(), embedded(language, B, T)
    language.scores(prompt, cache, padding)
    recording = graphs.Recording(cache, prompt[:, :1], capacity)
    for both in recording.layers.values():
        for tensor in both:
            tensor.fill_(1e4)
    mine = KVCache()
    mine.layers, mine.length = dict(cache.layers), cache.length
    recording.take(mine, padding)
    recording.fixed.at.fill_(T)
    for t in range(12):
        x = embedded(language, B, 1)
        expected = language.scores(x, cache, padding)
        got = graphs.step(language, x, recording.fixed, recording.padding)
        assert got.shape == expected.shape and minivl.relative_error(got, expected) < 1e-6, t
        mine.length += 1
    assert int(recording.fixed.at) == cache.length == mine.length == T + 12
    # the cache that moved in holds what the growing one holds, and a later turn goes on from it
    for layer, both in cache.layers.items():
        for mine_t, its in zip(mine.layers[layer], both):
            torch.testing.assert_close(mine_t[:, :, T:mine.length], its[:, :, T:mine.length], rtol=1e-5, atol=1e-5)
    turn = embedded(language, B, 5)
    assert minivl.relative_error(language.scores(turn, mine, padding), language.scores(turn, cache, padding)) < 1e-6


class Replayed(graphs.Recording):
    """A recording without a GPU: the step is run at each replay."""

    def record(self, language, length):
        self.graph, self.language = object(), language

    def replay(self, inputs, length):
        self.inputs.copy_(inputs)
        self.fixed.at.fill_(length)
        return graphs.step(self.language, self.inputs, self.fixed, self.padding).clone()


@pytest.fixture
def recorded(tiny, monkeypatch):
    """A model whose decoder records, as on a GPU but for the recording itself."""
    monkeypatch.setattr(graphs, "Recording", Replayed)
    model = minivl.load(tiny)
    model.language_model.__class__ = graphs.RECORDED[qwen2.Qwen2ForCausalLM]
    return model


def test_whole_answers(recorded, tiny):
    """Batches of one and several, answers that outgrow a recording, prompt-lookup, and caches that come and go."""
    plain = minivl.load(tiny)
    for prompts in ([[3, 4, 9]], [[3, 4, 9], [8, 1, 2, 77, 5, 6]], [[5] * 250], [[7, 8]]):
        for config in (None, minivl.GenerationConfig(do_sample=True, random_seed=1), minivl.GenerationConfig(lookup=3)):
            how = {"max_new_tokens": 24, "ignore_eos": True, "config": config}
            assert minivl.generate(recorded, prompts, **how) == minivl.generate(plain, prompts, **how)
    idle = vars(recorded.language_model)["idle"]
    assert 0 < len(idle) <= graphs.IDLE and all(r.capacity in (512, 1024) for r in idle)


def test_sessions_keep_their_own(recorded, tiny):
    a, b = minivl.Pipeline(recorded, minivl.Tokenizer.load(tiny)), minivl.pipeline(tiny)
    config = minivl.GenerationConfig(max_new_tokens=9, ignore_eos=True)
    talks = [(a.session(), a.session()), (b.session(), b.session())]
    for question in ("one", "two", "three"):
        for which in (0, 1):
            answers = [pipe.chat(question * (which + 1), session=both[which], gen_config=config).response.token_ids
                       for pipe, both in zip((a, b), talks)]
            assert answers[0] == answers[1]
    one, two = (s.cache.recording for s in talks[0])
    assert one is not two


def test_an_outgrown_recording_is_left(recorded, monkeypatch):
    monkeypatch.setattr(graphs, "ROOM", 8)
    language, cache, plain = recorded.language_model, KVCache(), KVCache()
    with torch.no_grad():
        for x in (embedded(language, 1, 5), *(embedded(language, 1, 1) for _ in range(30))):
            got = language.scores(x, cache)
            expected = super(graphs.RECORDED[qwen2.Qwen2ForCausalLM], language).scores(x, plain)
            assert minivl.relative_error(got, expected) < 1e-6
    assert cache.length == 35 and cache.recording.capacity == 64
    assert sorted(r.capacity for r in vars(language)["idle"]) == [16, 32]


def test_what_was_changed_between_two_prompts_is_recorded_anew(recorded, monkeypatch):
    from minivl import qwen2
    language = recorded.language_model
    with torch.no_grad():
        def answer():
            cache = KVCache()
            language.scores(embedded(language, 1, 5), cache)
            return language.scores(embedded(language, 1, 1), cache), cache.recording.of

        before, seen = answer()
        again, same = answer()
        assert torch.equal(before, again) and seen == same
        for edit in (lambda: monkeypatch.setattr(qwen2.MLP, "gated", lambda self, x: self.gate_up(x)[0]),
                     lambda: monkeypatch.setattr(qwen2, "rope_tables", lambda p, e, t: tuple(
                         torch.ones(*p.shape[:1], 1, p.shape[1], e) for _ in range(2))),
                     lambda: setattr(language.layers[0].mlp, "gated", lambda x: x[..., :1].expand(*x.shape[:-1], 256)),
                     lambda: setattr(language.layers[0], "mlp", torch.nn.Identity()),
                     lambda: setattr(language.norm, "weight", torch.nn.Parameter(2 * language.norm.weight))):
            edit()
            after, now = answer()
            assert now != seen and minivl.relative_error(after, before) > 1e-3
            before, seen = after, now
        handle = language.layers[0].register_forward_hook(lambda m, args, out: 0 * out)
        cache = KVCache()
        language.scores(embedded(language, 1, 5), cache)
        hooked = language.scores(embedded(language, 1, 1), cache)
        assert not hasattr(cache, "recording") and minivl.relative_error(hooked, before) > 1e-3
        handle.remove()


def test_a_recorded_model_leaves_the_memory_at_once(tiny):
    """No circle of references holds it until Python collects: on a GPU its gigabytes would stay."""
    model = minivl.load(tiny)
    model.language_model.__class__ = graphs.RECORDED[qwen2.Qwen2ForCausalLM]
    with torch.no_grad():
        cache = KVCache()
        language = model.language_model
        language.scores(embedded(language, 1, 5), cache)
        vars(language)["seen"] = graphs.signature(language)
    gone = weakref.ref(model.language_model)
    gc.disable()
    try:
        del model, language
        assert gone() is None
    finally:
        gc.enable()
