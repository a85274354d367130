"""A full device is one sentence with the numbers, wherever it fills up.

No GPU: its error and its numbers are made up.
"""
import pytest
import torch

import minivl


@pytest.fixture
def full(monkeypatch):
    def fail(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\n"
                                     "GPU 0 has a total capacity of ...")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1.5e9, 80e9))
    return fail


def test_the_weights(tiny, full, monkeypatch):
    monkeypatch.setattr("minivl.files.load._read_tensors", full)
    says = (r"^no memory left on cpu for 0\.0 GB of weights: 1\.5 of its 80\.0 GB are free; take a smaller or an AWQ "
            r"model, or device='cpu'$")
    with pytest.raises(minivl.InputError, match=says):
        minivl.load(tiny)


def test_a_prompt_and_tiles(tiny, full):
    model = minivl.load(tiny)
    model.language_model.layers[1].forward = full
    says = "^no memory left on cpu for 2 prompts of 3 tokens: 1.5 of its 80.0 GB are free; ask for fewer at once"
    with pytest.raises(minivl.InputError, match=says):
        minivl.generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=3)
    model.vision_model.encoder.layers[0].forward = full
    says = "^no memory left on cpu for 3 tiles at once: .* look at fewer together$"
    with pytest.raises(minivl.InputError, match=says):
        model.visual_tokens(torch.randn(3, 3, 56, 56))
