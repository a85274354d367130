"""LoRA on q and v of a frozen int4 model, written outside the package and trained by the core's pieces."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivl import InputError, load
from minivl.files.find import SHIPPED
from minivl.tiling import normalise
from minivl.tokenizer import Tokenizer
from weights_tools.nano import data, world
from weights_tools.train.loop import Loop
from weights_tools.train.objective import answer_logits, supervised
from weights_tools.train.optimisers import rate
from weights_tools.train.step import take_step

STEPS = 12
NAMES = ("q_proj", "v_proj")


class LoRA(nn.Module):
    """A linear and a learned correction of low rank: base(x) + x A^T B^T. arXiv:2106.09685.

    B starts at zero, so that at first nothing changes.
    """

    def __init__(self, base, inputs, outputs, rank=8):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(rank, inputs, generator=torch.Generator().manual_seed(0)) * inputs ** -0.5)
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


def with_lora(precision):
    """(nano-awq frozen, with LoRA on q and v of every layer; its A and B by name)."""
    model = load("nano-awq", precision=precision).requires_grad_(False)
    llm = model.config.llm_config
    D = llm.hidden_size
    widths = {"q_proj": D, "v_proj": D // llm.num_attention_heads * llm.num_key_value_heads}
    learned = nn.ParameterDict()
    for i, layer in enumerate(model.language_model.layers):
        for name in NAMES:
            lora = LoRA(getattr(layer.self_attn, name), D, widths[name])
            setattr(layer.self_attn, name, lora)
            learned[f"{i} {name} A"] = lora.A
            learned[f"{i} {name} B"] = lora.B
    return model, learned


def lessons(first, n=4):
    """Some of nano's pictures with a question that it never heard: ids, labels and tiles."""
    tokenizer = Tokenizer.load(SHIPPED["nano-awq"])
    examples = []
    for i in range(first, first + n):
        example = world.example("lora", i, {"find": 1})
        turns = []
        for thing in example.pictures[0].shapes:
            said = "warm" if thing.colour in ("red", "orange", "yellow") else "cold"
            question = f"Is the {thing.kind} warm or cold?"
            question = question if turns else f"<image>\n{question}"
            turns.append(world.Turn(question, f"The {thing.kind} is {said}.", "warm"))
        examples.append(replace(example, turns=tuple(turns)))
    tiles = [data.tiles_of(e) for e in examples]
    return data.collate([data.ids_of(e, t, tokenizer) for e, t in zip(examples, tiles)], tiles, tokenizer)


def loss_of(model, batch):
    """Mean over the tokens that are learned."""
    ids, labels, x = batch
    logits, tokens = answer_logits(model, ids, labels, normalise(x))
    assert len(tokens) == int(supervised(labels).sum()) > 0
    return F.cross_entropy(logits, tokens)


def train(folder, precision, stop_at=None):
    """A few steps; (finished, model, A and B, losses)."""
    model, learned = with_lora(precision)
    opts = [torch.optim.AdamW(learned.parameters(), lr=1e-2, weight_decay=0.0)]
    losses = []

    def step(number, batch):
        losses.append(take_step([loss_of(model, batch)], opts, rate(number, STEPS, warmup=2, floor=0.1)))
        return losses[-1], batch[0].numel()

    def batches(first):
        return (lessons(4 * n) for n in range(first, STEPS))

    loop = Loop(folder, "lora", stop_at=stop_at)
    finished = loop.run(1, "lora", STEPS, batches=batches, step=step, watch=dict, parts={"lora": learned},
                        optimisers=opts)
    return finished, model, learned, losses


@pytest.mark.parametrize("precision", [None, "exact"])
def test_only_a_and_b_learn(tmp_path, precision):
    before = {name: tensor.clone() for name, tensor in load("nano-awq", precision=precision).state_dict().items()}
    start = {name: p.clone() for name, p in with_lora(precision)[1].items()}
    finished, model, learned, losses = train(tmp_path, precision)
    assert finished
    assert losses[-1] < 0.4 * losses[0], losses
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()
             if not name.endswith((".A", ".B"))}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(learned) == 2 * 2 * len(model.language_model.layers)
    assert not any(torch.equal(learned[name], start[name]) for name in learned)


def test_a_stopped_training_goes_on_and_stores_only_a_and_b(tmp_path):
    whole = train(tmp_path / "whole", None)[2]
    finished, _, learned, _ = train(tmp_path / "parts", None, stop_at=5)
    assert not finished
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert set(state["lora"]) == set(learned)
    assert (tmp_path / "parts" / "state.pt").stat().st_size < 4 * sum(p.nbytes for p in learned.values())
    finished, _, resumed, _ = train(tmp_path / "parts", None)
    assert finished
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_prepared_model_honours_lora_or_refuses_it(monkeypatch):
    """On the path that a large model takes: the change is seen and its gradients arrive, or an error says no."""
    monkeypatch.setattr("minivl.fast.LARGE", 0)
    ids, labels, x = lessons(0, 2)
    try:
        model, learned = with_lora("exact")
        with torch.no_grad():
            before = loss_of(model, (ids, labels, x))
            for name, p in learned.items():
                if name.endswith("B"):
                    p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
            assert abs(float(loss_of(model, (ids, labels, x)) - before)) > 1e-3
    except InputError:
        return
    try:
        loss = loss_of(model, (ids, labels, x))
        loss.backward()
    except InputError:      # it answers with LoRA, and says that it cannot learn
        return
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned.values())
