"""The exercises of the notebooks: what is asked (spec), the cases it is tried on, a hint, and our own solution.

Try first. `lab.grade` compares an attempt with the spec. At the second failure it says what is wrong if it knows
(slips.py has at least five slips of each exercise), else it shows the hint. The tests send each solution and each slip
through it.
"""
from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import minivl
from minivl import awq, prompt, qwen2, tiling
from minivl.cache import KVCache
from minivl.files.find import SHIPPED
from weights_tools.evaluate import intervals, score
from weights_tools.mpo import pairs as mpo_pairs
from weights_tools.mpo.loss import RewardShift

SAMPLES = Path(minivl.__file__).parent / "nano" / "samples"


@dataclass(frozen=True)
class Exercise:
    """`spec` says slowly what is right, `solution` is how one might write it; `tolerance` is relative to the largest.

    `cases`: the arguments to try, or a function that makes them, for exercises that change nano.
    """
    spec: Callable
    cases: tuple | Callable
    hint: str
    solution: Callable
    tolerance: float = 0.0


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- exercises that change a model ----------------------------------------------------------------------------------

@functools.lru_cache
def nano(name="nano"):
    return minivl.pipeline(name)


@contextmanager
def instead(owner, name, value):
    """Give an attribute another value for the length of a `with`.

    On a module: beside its method, which comes back after.
    """
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def pixels_of(pipe, picture, **how):
    return tiling.to_pixel_values(tiling.tile(minivl.load_image(picture), tile_size=pipe.model.config.force_image_size,
                                              **{"max_num": pipe.model.config.max_dynamic_patch, **how}))


def fingerprint():
    """Where a change shows: scores of both twins for a question about several tiles, their configs and weights."""
    found = []
    for pipe in (nano(), nano("nano-awq")):
        pixel_values = pixels_of(pipe, SAMPLES / "wide.png")
        ids = prompt.encode(pipe.tokenizer, [("<image>\nWhat do you see?", None)], [len(pixel_values)],
                            tokens_per_tile=pipe.model.config.num_image_token)
        with torch.no_grad():
            found.append(pipe.model(torch.tensor([ids]), pixel_values)[0, -1])
        found += [pipe.model.config, *(w.detach().clone() for w in (*pipe.model.parameters(), *pipe.model.buffers()))]
    return found


def changed(before):
    """Tell whether something is not as it was at an earlier `fingerprint`."""
    return any(not torch.equal(a, b) if isinstance(a, torch.Tensor) else a != b for a, b in zip(fingerprint(), before))


FUNCTIONS = {owner: dict(vars(owner)) for owner in (awq, qwen2, tiling, prompt, minivl.MiniVL)}


def put_back():
    """Undo what an attempt left changed: nano is opened anew, and modules get their functions back."""
    nano.cache_clear()
    for owner, kept in FUNCTIONS.items():
        for name, value in kept.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)


def by_hand(pipe, question, pixel_values, visual=None):
    """Write the greedy answer to a question about one picture, from its tiles and, if given, other visual tokens."""
    model, tokenizer = pipe.model, pipe.tokenizer
    ids = prompt.encode(tokenizer, [(f"<image>\n{question}", None)], [len(pixel_values)],
                        tokens_per_tile=model.config.num_image_token)
    cache = KVCache()
    written = []
    with torch.no_grad():
        visual = model.visual_tokens(pixel_values) if visual is None else visual
        x = model.embed(torch.tensor([ids]), visual)
        while len(written) < 512:
            written.append(int(model.language_model(x, cache)[0, -1].argmax()))
            if written[-1] in model.eos_token_ids:
                break
            x = model.embed(torch.tensor([written[-1:]]))
    return tokenizer.decode(written).strip()


def blind(pipe, question, picture):
    model, right = pipe.model, pipe.model.visual_tokens
    with instead(model, "visual_tokens", lambda pixel_values: torch.zeros_like(right(pixel_values))):
        return pipe((question, picture)).text


def _blind_spec(pipe, question, picture):
    pixel_values = pixels_of(pipe, picture)
    c = pipe.model.config
    nothing = torch.zeros(len(pixel_values), c.num_image_token, c.llm_config.hidden_size)
    return by_hand(pipe, question, pixel_values, nothing)


def without_thumbnail(pipe, question, picture):
    with instead(pipe.model, "config", replace(pipe.model.config, use_thumbnail=False)):
        return pipe((question, picture)).text


def without_layer(pipe, pixel_values, i):
    layer = pipe.model.vision_model.encoder.layers[i]
    kept = layer.ls1.data, layer.ls2.data
    layer.ls1.data, layer.ls2.data = (torch.zeros_like(gain) for gain in kept)
    try:
        with torch.no_grad():
            return pipe.model.visual_tokens(pixel_values)
    finally:
        layer.ls1.data, layer.ls2.data = kept


def _without_layer_spec(pipe, pixel_values, i):
    tower, m = pipe.model.vision_model, pipe.model
    with torch.no_grad():
        x = tower.embeddings(pixel_values)
        for k, layer in enumerate(tower.encoder.layers):
            x = x if k == i else layer(x)
        return m.mlp1(m.pixel_unshuffle(x[:, 1:]))


def averaged(pipe, question, picture):
    right = pipe.model.visual_tokens
    with instead(pipe.model, "visual_tokens", lambda p: (v := right(p)).mean(1, keepdim=True).expand_as(v)):
        return pipe((question, picture)).text


def _averaged_spec(pipe, question, picture):
    pixel_values = pixels_of(pipe, picture)
    with torch.no_grad():
        visual = pipe.model.visual_tokens(pixel_values)
    return by_hand(pipe, question, pixel_values, torch.stack([torch.stack([v.mean(0)] * len(v)) for v in visual]))


def exchanged(pipe, a, b, question, picture):
    rows = [pipe.tokenizer.encode(word)[0] for word in (a, b)]
    table = pipe.model.language_model.embeddings.weight.data
    table[rows] = table[rows[::-1]]
    try:
        return pipe((question, picture)).text
    finally:
        table[rows] = table[rows[::-1]]


def _exchanged_spec(pipe, a, b, question, picture):
    """Reads each of the two words as the other; the head is not touched."""
    a, b = (pipe.tokenizer.encode(word)[0] for word in (a, b))
    right, swap = pipe.model.embed, {a: b, b: a}

    def embed(ids, *visual):
        return right(torch.tensor([[swap.get(i, i) for i in row] for row in ids.tolist()]), *visual)
    with instead(pipe.model, "embed", embed):
        return by_hand(pipe, question, pixels_of(pipe, picture))


def layer_errors(pipe, ids, rotate):
    def run():
        with torch.no_grad(), minivl.trace(pipe.model, "llm.layers.*", "logits") as t:
            pipe.model(torch.tensor([ids]))
        return {name: x for name, x in t.items() if name == "logits" or name.split(".")[-1].isdigit()}
    right = run()
    with instead(qwen2, "rotate", rotate):
        wrong = run()
    return torch.tensor([float(minivl.relative_error(wrong[name], right[name])) for name in right])


def _layer_errors_spec(pipe, ids, rotate):
    def run():
        decoder = pipe.model.language_model
        out = []
        with torch.no_grad():
            x = pipe.model.embed(torch.tensor([ids]))
            tables = qwen2.rope_tables(torch.arange(len(ids))[None], decoder.body.head_dim, decoder.body.theta)
            for layer in decoder.layers:
                x = layer(x, *tables, None, None)
                out.append(x)
            return [*out, decoder.head(decoder.norm(x))]
    right = run()
    with instead(qwen2, "rotate", rotate):
        wrong = run()
    return torch.tensor([float((a - b).norm() / b.norm()) for a, b in zip(wrong, right)])


def interleaved(x, cos, sin):
    half = x.shape[-1] // 2
    even, odd, c, s = x[..., ::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)


def never_twice(model, ids, n):
    from minivl.generation import steps
    written = []

    def choose(scores):
        scores = scores.clone()
        scores[written] = float("-inf")
        written.append(int(scores.argmax()))
        return written[-1]
    with torch.no_grad():
        for _ in zip(range(n), steps(model, model.embed(torch.tensor([ids])), [choose])):
            pass
    return written[:n]


def _never_twice_spec(model, ids, n):
    written = []
    for _ in range(n):
        with torch.no_grad():
            scores = model(torch.tensor([[*ids, *written]]))[0, -1].tolist()
        written.append(max((i for i in range(len(scores)) if i not in written), key=scores.__getitem__))
    return written


def fewer_bits(model, ids, pixel_values):
    def run():
        with torch.no_grad():
            visual = model.visual_tokens(pixel_values)
            return visual, model.language_model(model.embed(torch.tensor([ids]), visual))
    right, unpack = run(), awq.unpack
    with instead(awq, "unpack", lambda packed: unpack(packed) // 2 * 2):
        wrong = run()
    return torch.tensor([float(minivl.relative_error(a, b)) for a, b in zip(wrong, right)])


def _fewer_bits_spec(model, ids, pixel_values):
    with torch.no_grad():
        right = model(torch.tensor([ids]), pixel_values)
        linears = [m for m in model.modules() if isinstance(m, awq.AWQLinear)]
        kept = [(m.qweight, m.qzeros) for m in linears]
        for m in linears:
            m.qweight, m.qzeros = (awq.pack(awq.unpack(x).int() & 0b1110) for x in (m.qweight, m.qzeros))
        wrong = model(torch.tensor([ids]), pixel_values)
        for m, (qweight, qzeros) in zip(linears, kept):
            m.qweight = qweight
            m.qzeros = qzeros
    return torch.tensor([0.0, float((wrong - right).norm() / right.norm())])


def _recorded():
    """Find what notebook 08 compares with: (checkpoint, the recorded reference, its picture)."""
    from weights_tools.verify import compare
    folder = SHIPPED["nano-awq"]
    file = Path(compare.__file__).parent / "nano" / "awq" / "float32.safetensors"
    return folder, compare.Recording.open(file), SAMPLES / "small-print.png"


def caught_at(name, wrong):
    from weights_tools.verify import compare
    folder, recording, picture = _recorded()
    model = minivl.load(folder)
    with instead(model, name, functools.partial(wrong, model)):
        report = compare.compare(folder, recording, pictures=[picture], model=model)
    return report.first and report.first.stage


def _caught_at_spec(name, wrong):
    from weights_tools.verify import compare
    folder, recording, picture = _recorded()
    kept = getattr(minivl.MiniVL, name)
    setattr(minivl.MiniVL, name, wrong)
    try:
        report = compare.compare(folder, recording, pictures=[picture])
    finally:
        setattr(minivl.MiniVL, name, kept)
    return next((row.stage for row in report.rows if not row.agrees), None)


def last_patch_dropped(self, pixel_values):
    return self.mlp1(self.pixel_unshuffle(self.vision_model(pixel_values.to(self.device, self.dtype))[:, :-1]))


def two_percent_more(self, pixel_values):
    return 1.02 * self.mlp1(self.pixel_unshuffle(self.vision_model(pixel_values.to(self.device, self.dtype))[:, 1:]))


def patched(pipe, question, picture, other, token):
    right = pipe.model.visual_tokens
    with torch.no_grad():
        foreign = right(pixels_of(pipe, other, max_num=1))

    def mixed(pixel_values):
        visual = right(pixel_values).clone()
        visual[0, token] = foreign[0, token]
        return visual
    with instead(pipe.model, "visual_tokens", mixed):
        return pipe((question, minivl.Picture(minivl.load_image(picture), max_num=1))).text


def _patched_spec(pipe, question, picture, other, token):
    a, b = (pixels_of(pipe, p, max_num=1) for p in (picture, other))
    with torch.no_grad():
        a_tokens, b_tokens = (list(pipe.model.visual_tokens(x)[0]) for x in (a, b))
    a_tokens[token] = b_tokens[token]
    return by_hand(pipe, question, a, torch.stack(a_tokens)[None])


def _green_heart():
    """shapes.png and the same with a green heart, as files would be given."""
    from PIL import Image
    picture = minivl.load_image(SAMPLES / "shapes.png")
    w, h = picture.size
    purple = picture.getpixel((round(0.83 * w), round(0.83 * h)))
    green = Image.new("RGB", (w, h))
    green.putdata([(40, 160, 70) if sum(abs(a - b) for a, b in zip(p, purple)) < 60 else p
                   for p in (picture.getpixel((x, y)) for y in range(h) for x in range(w))])
    return picture, green


def mixed_lessons(new, old, every, n):
    return [old(i) if i % every == every - 1 else new(i) for i in range(n)]


def _mixed_lessons_spec(new, old, every, n):
    out = []
    while len(out) < n:
        out.append(old(len(out)) if (len(out) + 1) % every == 0 else new(len(out)))
    return out


def damage(model, ids, rounded):
    def last():
        with torch.no_grad():
            return model(torch.tensor([ids]))[0, -1]
    right = last()
    weights = [linear.weight for layer in model.language_model.layers for linear in layer.linears.values()]
    kept = [w.data for w in weights]
    try:
        for w in weights:
            w.data = rounded(w.data)
        return float(minivl.relative_error(last(), right))
    finally:
        for w, data in zip(weights, kept):
            w.data = data


def _damage_spec(model, ids, rounded):
    with torch.no_grad():
        right = model(torch.tensor([ids]))[0, -1]
        other = copy.deepcopy(model)
        for layer in other.language_model.layers:
            for linear in layer.linears.values():
                linear.weight.copy_(rounded(linear.weight))
        wrong = other(torch.tensor([ids]))[0, -1]
    return float((wrong - right).norm() / right.norm())


def smoothed_error(model, ids, i, f, rounded):
    layer = model.language_model.layers[i]
    weights = [layer.post_attention_layernorm.weight, layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]

    def last():
        with torch.no_grad():
            return model(torch.tensor([ids]))[0, -1]
    right = last()
    kept = [w.data for w in weights]
    try:
        weights[0].data = kept[0] / f
        for w in weights[1:]:
            w.data = rounded(w.data * f)
        return float(minivl.relative_error(last(), right))
    finally:
        for w, data in zip(weights, kept):
            w.data = data


def _smoothed_error_spec(model, ids, i, f, rounded):
    """Smooths nothing: rounds f W and divides by f again."""
    with torch.no_grad():
        right = model(torch.tensor([ids]))[0, -1]
        other = copy.deepcopy(model)
        mlp = other.language_model.layers[i].mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(rounded(linear.weight * f) / f)
        wrong = other(torch.tensor([ids]))[0, -1]
    return float((wrong - right).norm() / right.norm())


def coarse(weight):
    """Round weights to multiples of 0.05."""
    return (weight / 0.05).round() * 0.05


def signs(weight):
    """Leave of each row its signs and its mean size: one bit each."""
    return weight.sign() * weight.abs().mean(1, keepdim=True)


# ---- 00 a picture becomes words -------------------------------------------------------------------------------------

def _counting(ids):
    """A toy model: the next token is the last one plus one, modulo 7."""
    scores = torch.zeros(7)
    scores[(ids[-1] + 1) % 7] = 1.0
    return scores


def _summing(ids):
    """Another: the next token is the sum of all, modulo 7."""
    scores = torch.zeros(7)
    scores[sum(ids) % 7] = 1.0
    return scores


def _write_spec(model, ids, stop, most):
    ids, new = list(ids), []
    for _ in range(most):
        scores = model(ids)
        token = max(range(len(scores)), key=lambda i: float(scores[i]))
        new.append(token)
        ids.append(token)
        if token == stop:
            break
    return new


def write(model, ids, stop, most):
    new = []
    while len(new) < most and stop not in new:
        new.append(int(model([*ids, *new]).argmax()))
    return new


# ---- 01 tiles -------------------------------------------------------------------------------------------------------

def _tiles_of_spec(width, height, max_num):
    from PIL import Image
    return len(tiling.tile(Image.new("RGB", (width, height)), max_num=max_num, tile_size=448))


def tiles_of(width, height, max_num):
    columns, rows = tiling.choose_grid(width, height, max_num=max_num)
    return columns * rows + (columns * rows > 1)


@functools.cache
def _square(side):
    return tiles_of(side, side, 12)


def _largest_square_spec(budget):
    fitting = [s for s in range(1, 2001) if 256 * _square(s) <= budget]
    return max(fitting, default=0)


def largest_square(budget):
    side = 0
    for s in range(1, 2001):
        columns, rows = tiling.choose_grid(s, s, max_num=12)
        if 256 * (columns * rows + (columns * rows > 1)) <= budget:
            side = s
    return side


def _stitch_spec(pixel_values, columns, rows):
    R = pixel_values.shape[-1]
    out = torch.empty(3, rows * R, columns * R)
    for k in range(columns * rows):
        y, x = k // columns * R, k % columns * R
        out[:, y:y + R, x:x + R] = pixel_values[k]
    return out


def stitch(pixel_values, columns, rows):
    R = pixel_values.shape[-1]
    grid = pixel_values[:columns * rows].view(rows, columns, 3, R, R)       # without the thumbnail
    return grid.permute(2, 0, 3, 1, 4).reshape(3, rows * R, columns * R)


# ---- 02 vit ---------------------------------------------------------------------------------------------------------

def _patches_spec(picture, p):
    side = picture.shape[1] // p
    return torch.stack([picture[:, r * p:(r + 1) * p, c * p:(c + 1) * p].flatten()
                        for r in range(side) for c in range(side)])


def patches(picture, p):
    side = picture.shape[1] // p
    return picture.view(3, side, p, side, p).permute(1, 3, 0, 2, 4).reshape(side * side, 3 * p * p)


def _layer_norm_spec(x, weight, bias, eps):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


# ---- 03 unshuffle and projector -------------------------------------------------------------------------------------

def _unshuffle_spec(x, f):
    side = round(len(x) ** 0.5)
    return torch.stack([torch.cat([x[(row + dy) * side + column + dx] for dy in range(f) for dx in range(f)])
                        for row in range(0, side, f) for column in range(0, side, f)])


def unshuffle(x, f):
    side = round(len(x) ** 0.5)
    return x.view(side // f, f, side // f, f, -1).permute(0, 2, 1, 3, 4).reshape(len(x) // f ** 2, -1)


def _shuffle_spec(x):
    n, C = round(len(x) ** 0.5), x.shape[1] // 4
    out = torch.empty(2 * n, 2 * n, C)
    for token in range(len(x)):
        for k in range(4):
            out[token // n * 2 + k // 2, token % n * 2 + k % 2] = x[token, k * C:(k + 1) * C]
    return out.view(-1, C)


def shuffle(x):
    n = round(len(x) ** 0.5)
    return x.view(n, n, 2, 2, -1).permute(0, 2, 1, 3, 4).reshape(4 * len(x), -1)


# ---- 04 prompt and tokens -------------------------------------------------------------------------------------------

def _bpe_step_spec(parts, merges):
    for first in merges:                                    # the list is ordered: the first pair that occurs anywhere
        if any((a, b) == first for a, b in zip(parts, parts[1:])):
            out = []
            for part in parts:
                if out and (out[-1], part) == first:
                    out[-1] = out[-1] + part
                else:
                    out.append(part)
            return out
    return parts


def bpe_step(parts, merges):
    pairs = [pair for pair in zip(parts, parts[1:]) if pair in merges]
    if not pairs:
        return parts
    best, k, out = min(pairs, key=merges.index), 0, []
    while k < len(parts):
        width = 1 + (tuple(parts[k:k + 2]) == best)
        out.append("".join(parts[k:k + width]))
        k += width
    return out


def _user_turn_spec(question):
    text = prompt.render([(question, None)])
    return text[text.index("<|im_start|>user"):]


# ---- 05 decoder -----------------------------------------------------------------------------------------------------

def _window_mask_spec(T, w):
    return torch.tensor([[0 <= t - s < w for s in range(T)] for t in range(T)])


def _attention_spec(q, k, v):
    (H, T, E), K = q.shape, k.shape[0]
    out = torch.zeros(H, T, E)
    for h in range(H):
        for t in range(T):
            scores = torch.stack([q[h, t] @ k[h * K // H, s] for s in range(t + 1)]) / E ** 0.5
            out[h, t] = sum(a * v[h * K // H, s] for s, a in enumerate(scores.softmax(0)))
    return out


def attention(q, k, v):
    (H, T, E), K = q.shape, k.shape[0]
    k, v = k.repeat_interleave(H // K, 0), v.repeat_interleave(H // K, 0)
    scores = (q @ k.transpose(1, 2) / E ** 0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


# ---- 06 generate ----------------------------------------------------------------------------------------------------

def _top_p_spec(probs, p):
    kept, before = [], 0.0
    for value, i in sorted((-float(v), i) for i, v in enumerate(probs)):
        if before > p:
            break
        kept.append(i)
        before -= value
    return torch.tensor([float(v) / before if i in kept else 0.0 for i, v in enumerate(probs)])


def top_p(probs, p):
    ordered, index = probs.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    out = torch.zeros_like(probs).index_copy(0, index, ordered.where(before <= p, 0.0))
    return out / out.sum()


def _repetition_spec(scores, seen, r):
    return torch.tensor([float(v) if i not in seen else float(v) / r if v > 0 else float(v) * r
                         for i, v in enumerate(scores)])


def repetition(scores, seen, r):
    out = scores.clone()
    for i in set(seen):
        out[i] = scores[i] / r if scores[i] > 0 else scores[i] * r
    return out


# ---- 11 train it ----------------------------------------------------------------------------------------------------

_NAMES = ["vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.attn.qkv.weight", "mlp1.0.weight",
          "mlp1.3.bias", "language_model.model.embed_tokens.weight",
          "language_model.model.layers.0.mlp.up_proj.linear.weight",
          "language_model.model.layers.0.mlp.up_proj.A", "language_model.model.layers.0.mlp.up_proj.B",
          "language_model.model.layers.0.self_attn.q_proj.linear.bias", "language_model.model.norm.weight",
          "language_model.lm_head.weight"]


def learning(names, stage):
    parts = {"1": ("mlp1.",), "1.5": ("vision_model.", "mlp1."), "LoRA": ()}.get(stage, ("",))
    return [name for name in names if name.endswith((".A", ".B")) == (stage == "LoRA")
            and (stage == "LoRA" or name.startswith(parts))]


def _learning_spec(names, stage):
    out = []
    for name in names:
        part = "adapter" if name.split(".")[-1] in ("A", "B") else name.split(".")[0]
        if part in {"1": ["mlp1"], "1.5": ["vision_model", "mlp1"], "LoRA": ["adapter"]}.get(
                stage, ["vision_model", "mlp1", "language_model"]):
            out.append(name)
    return out


def masked_loss(scores, ids, labels):
    wanted = torch.tensor(labels[1:])
    return float(torch.nn.functional.cross_entropy(scores[:-1], wanted))


def _masked_loss_spec(scores, ids, labels):
    terms = [-float(scores[t].log_softmax(0)[ids[t + 1]]) for t in range(len(ids) - 1) if labels[t + 1] != -100]
    return sum(terms) / len(terms)


# ---- 08 verify ------------------------------------------------------------------------------------------------------

def first_difference(errors, tolerance):
    return next((name for name, error in errors if not error <= tolerance), None)


def _first_difference_spec(errors, tolerance):
    for name, error in errors:
        if error > tolerance or error != error:
            return name
    return None


def _wrong_tokens_spec(a, b, tolerance):
    return [t for t in range(a.shape[1]) if float((a[:, t] - b[:, t]).norm() / b[:, t].norm()) > tolerance]


def wrong_tokens(a, b, tolerance):
    error = (a - b).pow(2).sum((0, 2)).sqrt() / b.pow(2).sum((0, 2)).sqrt()
    return (error > tolerance).nonzero().flatten().tolist()


def _damaged(*shape, tokens):
    x = _random(*shape)
    x[:, tokens] *= 1.5
    return x


def _unequal(*shape, tolerance, seed):
    """Tokens and tiles of very different sizes, each about 0.3 off."""
    sizes = 10 ** torch.randint(-2, 3, (*shape[:2], 1), generator=torch.Generator().manual_seed(seed))
    b = _random(*shape, seed=seed) * sizes
    return b + 0.3 * b.norm(dim=2, keepdim=True) / shape[2] ** 0.5 * _random(*shape, seed=seed + 9), b, tolerance


# ---- 09 look inside -------------------------------------------------------------------------------------------------

def _weights_of_spec(q, k):
    H, K = len(q), len(k)
    scores = [torch.stack([q[h] @ k[h * K // H, s] for s in range(k.shape[1])]) for h in range(H)]
    return torch.stack([one.div(q.shape[1] ** 0.5).softmax(0) for one in scores])


def weights_of(q, k):
    k = k.repeat_interleave(len(q) // len(k), 0)                # (H, S, E)
    return (torch.einsum("he,hse->hs", q, k) / q.shape[1] ** 0.5).softmax(-1)


def _lens_ids_spec(hidden, weight, eps, head):
    best = []
    for x in hidden:
        x = x / (x.pow(2).mean() + eps).sqrt() * weight
        best.append(max(range(len(head)), key=lambda i: float(head[i] @ x)))
    return best


def lens_ids(hidden, weight, eps, head):
    x = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight
    return (x @ head.T).argmax(-1).tolist()


# ---- 07 int4 --------------------------------------------------------------------------------------------------------

def _pack_word_spec(numbers):
    return int(awq.pack(torch.tensor(numbers))) % 2 ** 32


def pack_word(numbers):
    word = 0
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        word |= numbers[column] << 4 * nibble
    return word


def _dequantise_spec(q, z, s):
    g = len(q) // len(s)
    return torch.stack([(q[i].float() - z[i // g].float()) * s[i // g] for i in range(len(q))])


def dequantise(q, z, s):
    groups = len(s)
    return ((q.view(groups, -1, q.shape[1]).float() - z[:, None].float()) * s[:, None]).view(q.shape)


def _round_group_spec(w):
    low, high = min(0.0, float(w.min())), max(0.0, float(w.max()))
    s = (high - low) / 15
    z = round(-low / s)
    return torch.tensor([s * (min(15, max(0, round(float(v) / s) + z)) - z) for v in w])


def round_group(w):
    low, high = w.min().clamp(max=0), w.max().clamp(min=0)
    s = (high - low) / 15
    z = torch.round(-low / s)
    return ((torch.round(w / s) + z).clamp(0, 15) - z) * s


def _numbers(*shape, high=16, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# ---- 10 change it ---------------------------------------------------------------------------------------------------

def _thrifty_grid_spec(width, height, max_num, R):
    room, best = max(1, round(width * height / R ** 2)), None
    for columns in range(1, max_num + 1):
        for rows in range(1, max_num + 1):
            if columns * rows <= min(max_num, room):
                key = (abs(width / height - columns / rows), -columns * rows)
                if best is None or key < best[0]:
                    best = key, (columns, rows)
    return best[1]


def thrifty_grid(width, height, max_num, R):
    room = min(max_num, max(1, round(width * height / R ** 2)))
    grids = [(c, r) for c in range(1, room + 1) for r in range(1, room // c + 1)]
    return min(grids, key=lambda g: (abs(width / height - g[0] / g[1]), -g[0] * g[1]))


def labels_of(ids, answers):
    labels = [-100] * len(ids)
    for start, end in answers:
        labels[start:end] = ids[start:end]
    return labels


# ---- 12 make int4 ---------------------------------------------------------------------------------------------------

def _smoothing_factors_spec(mean, alpha):
    factors = [float(m) ** alpha for m in mean]
    middle = (max(factors) * min(factors)) ** 0.5
    return torch.tensor([f / middle for f in factors])


def smoothing_factors(mean, alpha):
    f = mean ** alpha
    return f / (f.max() * f.min()).sqrt()


def _output_error_spec(X, W, f, rounded):
    right = X.double() @ W.double().T
    wrong = X.double() @ (rounded(W * f) / f).double().T
    return float(sum((a - b) ** 2 for a, b in zip(wrong.flatten(), right.flatten())) / right.pow(2).sum())


def output_error(X, W, f, rounded):
    right = X @ W.T
    return float((X / f @ rounded(W * f).T - right).pow(2).sum() / right.pow(2).sum())


def _best_share_spec(w, X, shares, rounded):
    best = None
    for share in shares:
        most = share * max(abs(v) for v in w.tolist())
        cut = torch.tensor([min(most, max(-most, v)) for v in w.tolist()])
        off = rounded(cut) - w
        error = sum(float(x @ off) ** 2 for x in X)
        if best is None or error < best[0]:
            best = error, share
    return best[1]


def best_share(w, X, shares, rounded):
    most = w.abs().max()
    errors = [float((X @ (rounded(w.clamp(-s * most, s * most)) - w)).pow(2).sum()) for s in shares]
    return shares[errors.index(min(errors))]


def _group(seed, largest, loud):
    """A group of 16 weights of which two are set, and its inputs, one of which is loud."""
    w = 0.1 * _random(16, seed=seed)
    w[3] = largest
    w[11] = -0.47 * largest
    X = _random(12, 16, seed=seed + 100)
    X[:, loud] *= 10
    return w, X


# ---- 13 preferences -------------------------------------------------------------------------------------------------

def _preference_spec(l_c, l_r, l0_c, l0_r, beta):
    losses = []
    for c, r, c0, r0 in zip(l_c.tolist(), l_r.tolist(), l0_c.tolist(), l0_r.tolist()):
        losses.append(math.log(1 + math.exp(-beta * ((c - c0) - (r - r0)))))
    return torch.tensor(losses)


def preference(l_c, l_r, l0_c, l0_r, beta):
    return -F.logsigmoid(beta * ((l_c - l0_c) - (l_r - l0_r)))


def _shifts_spec(chosen, rejected):
    shift = RewardShift()
    return torch.tensor([shift.update(torch.cat([c, r])) for c, r in zip(chosen, rejected)])


def shifts(chosen, rejected):
    means = torch.cat([chosen, rejected], dim=1).mean(1)
    return means.cumsum(0) / torch.arange(1, len(means) + 1)


def truncate(text, ratio):
    words = text.split(" ")
    return " ".join(words[:int(len(words) * ratio)]).strip()


def _per_token_spec(l_c, l_r, l0_c, l0_r, n_c, n_r, beta):
    zeros = torch.zeros(len(l_c))
    return _preference_spec((l_c - l0_c) / n_c, (l_r - l0_r) / n_r, zeros, zeros, beta)


def per_token(l_c, l_r, l0_c, l0_r, n_c, n_r, beta):
    return -F.logsigmoid(beta * ((l_c - l0_c) / n_c - (l_r - l0_r) / n_r))


# ---- 14 measure -----------------------------------------------------------------------------------------------------

def mcnemar_p(only_first, only_second):
    changed = only_first + only_second
    tail = sum(math.comb(changed, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**changed)


def says(text):
    words = re.findall("[a-z]+", text.lower())
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def _circular_hits_spec(indices, right):
    questions = {}
    for index, hit in zip(indices, right):
        questions.setdefault(index % 10**6, []).append(hit)
    return torch.tensor([100 * sum(right) / len(right), 100 * sum(map(all, questions.values())) / len(questions)])


def circular_hits(indices, right):
    wrong = {index % 10**6 for index, hit in zip(indices, right) if not hit}
    questions = len({index % 10**6 for index in indices})
    return 100 * torch.tensor([sum(right) / len(right), 1 - len(wrong) / questions])


def _turns(seed, *counts):
    """Make rows of questions with so many turns each, in an order of their own, three of four of them right."""
    indices = [7 * q + turn * 10**6 for q, turns in enumerate(counts, start=1) for turn in range(turns)]
    mixed = _random(len(indices), seed=seed).argsort().tolist()
    return [indices[i] for i in mixed], (_random(len(indices), seed=seed + 1) > -0.67).tolist()


def _paired_interval_spec(first, second, drawn):
    gaps = [100 * (sum(float(second[i]) for i in draw) - sum(float(first[i]) for i in draw)) / len(draw)
            for draw in drawn.tolist()]
    return torch.quantile(torch.tensor(gaps), torch.tensor([0.025, 0.975]))


def paired_interval(first, second, drawn):
    gaps = 100 * (second - first)[drawn].mean(1)                            # (R)
    return torch.quantile(gaps, torch.tensor([0.025, 0.975]))


def _two_runs(n, draws, seed):
    first = (_random(n, seed=seed) > -1).float()
    second = torch.where(_random(n, seed=seed + 1) > 1, 1 - first, first)
    return first, second, torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))


EXERCISES = {
    "blind": Exercise(
        spec=_blind_spec,
        cases=lambda: (
            (nano(), "describe this image", SAMPLES / "tall.png"),
            (nano(), "What shape is purple?", SAMPLES / "shapes.png"),
        ),
        hint=(
            "right = pipe.model.visual_tokens; pipe.model.visual_tokens = lambda x: "
            "torch.zeros_like(right(x)); del pipe.model.visual_tokens puts it back."
        ),
        solution=blind,
    ),
    "without_thumbnail": Exercise(
        spec=lambda pipe, question, picture: by_hand(pipe, question, pixels_of(pipe, picture, use_thumbnail=False)),
        cases=lambda: tuple(
            (nano(), q, SAMPLES / p)
            for q, p in (
                ("describe this image", "wide.png"),
                ("What is in the middle?", "small-print.png"),
                ("What does it say?", "small-print.png"),
            )
        ),
        hint=(
            "dataclasses.replace(pipe.model.config, use_thumbnail=False) is the other config; "
            "pipe.model.config takes it."
        ),
        solution=without_thumbnail,
    ),
    "without_layer": Exercise(
        spec=_without_layer_spec,
        cases=lambda: tuple((nano(), pixels_of(nano(), SAMPLES / "shapes.png"), i) for i in (0, 3, 5)),
        hint="layer.ls1.data.zero_() and the same for ls2; keep clones first.",
        solution=without_layer,
        tolerance=1e-05,
    ),
    "averaged": Exercise(
        spec=_averaged_spec,
        cases=lambda: tuple(
            (nano(), q, SAMPLES / p)
            for q, p in (("describe this image", "wide.png"), ("What does it say?", "small-print.png"))
        ),
        hint="visual.mean(1, keepdim=True).expand_as(visual).",
        solution=averaged,
    ),
    "exchanged": Exercise(
        spec=_exchanged_spec,
        cases=lambda: tuple(
            (nano(), a, b, q, SAMPLES / p)
            for a, b, q, p in (
                (" star", " heart", "What colour is the heart?", "shapes.png"),
                (" star", " heart", "heart colour", "shapes.png"),
                (" top", " bottom", "describe this image", "count.png"),
            )
        ),
        hint=(
            "table = model.language_model.embeddings.weight.data; table[[a, b]] = table[[b, a]] exchanges two"
            " rows, and exchanges them back."
        ),
        solution=exchanged,
    ),
    "layer_errors": Exercise(
        spec=_layer_errors_spec,
        cases=lambda: tuple((nano(), ids, interleaved) for ids in ([300, 301, 302, 303], list(range(300, 320)))),
        hint='Trace "llm.layers.*" and "logits" twice; the stages of whole layers end in a number.',
        solution=layer_errors,
        tolerance=0.001,
    ),
    "never_twice": Exercise(
        spec=_never_twice_spec,
        cases=lambda: ((nano().model, [300, 301], 6), (nano().model, nano().tokenizer.encode("Who are you?"), 12)),
        hint="scores.clone(), -inf at what is written, argmax.",
        solution=never_twice,
    ),
    "fewer_bits": Exercise(
        spec=_fewer_bits_spec,
        cases=lambda: tuple(
            (
                nano("nano-awq").model,
                prompt.encode(nano("nano-awq").tokenizer, [("<image>\nWhere is it?", None)], [1], tokens_per_tile=16),
                pixels_of(nano("nano-awq"), SAMPLES / p, max_num=1),
            )
            for p in ("shapes.png", "count.png")
        ),
        hint=(
            "unpack = awq.unpack first; then awq.unpack = lambda packed: unpack(packed) // 2 * 2. Do all "
            "linears hold int4?"
        ),
        solution=fewer_bits,
        tolerance=0.001,
    ),
    "caught_at": Exercise(
        spec=_caught_at_spec,
        cases=lambda: (("visual_tokens", last_patch_dropped), ("visual_tokens", two_percent_more)),
        hint=("setattr(type(model), name, wrong), compare.compare(...), put back; the report's `first` has the stage."),
        solution=caught_at,
    ),
    "patched": Exercise(
        spec=_patched_spec,
        cases=lambda: tuple((nano(), "What colour is the heart?", *_green_heart()[::-1], k) for k in (0, 1, 15)),
        hint=(
            "Compute the other picture's visual tokens first; then let model.visual_tokens give a clone with "
            "one row replaced."
        ),
        solution=patched,
    ),
    "mixed_lessons": Exercise(
        spec=_mixed_lessons_spec,
        cases=(
            (lambda i: f"new {i}", lambda i: f"old {i}", 2, 5),
            (lambda i: i, lambda i: -i, 4, 9),
            (lambda i: i, lambda i: -i, 1, 3),
        ),
        hint="Every `every`-th: i % every == every - 1.",
        solution=mixed_lessons,
    ),
    "tokens_at_factor": Exercise(
        spec=lambda text, tiles, s, f: text + tiles * len([1 for r in range(0, s, f) for c in range(0, s, f)]),
        cases=((60, 7, 32, 2), (60, 7, 32, 4), (20, 1, 8, 2), (5, 0, 8, 1)),
        hint="A tile has (s / f) squared visual tokens.",
        solution=lambda text, tiles, s, f: text + tiles * (s // f) ** 2,
    ),
    "thrifty_grid": Exercise(
        spec=_thrifty_grid_spec,
        cases=(
            (800, 600, 12, 448),
            (1920, 1080, 12, 448),
            (100, 2000, 12, 448),
            (900, 900, 12, 448),
            (2000, 2000, 6, 448),
            (200, 1600, 12, 448),
            (1100, 200, 12, 448),
            (100, 100, 12, 448),
        ),
        hint="First the number of tiles there is room for, then the nearest ratio.",
        solution=thrifty_grid,
    ),
    "merged": Exercise(
        spec=lambda W, A, B, alpha: torch.stack([
            W[o] + alpha / len(A) * sum(B[o, k] * A[k] for k in range(len(A))) for o in range(len(W))
        ]),
        cases=tuple(
            (_random(O, I), _random(r, I, seed=1), _random(O, r, seed=2), alpha)
            for O, I, r, alpha in ((5, 3, 2, 4.0), (2, 6, 1, 1.0), (4, 4, 4, 2.0), (3, 7, 3, 1.5))
        ),
        hint="B @ A has W's shape; alpha / r is its factor, r = len(A).",
        solution=lambda W, A, B, alpha: W + alpha / len(A) * B @ A,
        tolerance=1e-05,
    ),
    "damage": Exercise(
        spec=_damage_spec,
        cases=lambda: tuple(
            (nano().model, nano().tokenizer.encode(text), rounded)
            for text, rounded in (("Where is the star?", coarse), ("How many rings are there?", signs))
        ),
        hint="Every linear of every layer: layer.linears.values(); keep each weight's .data, and put it back.",
        solution=damage,
        tolerance=0.001,
    ),
    "preference": Exercise(
        spec=_preference_spec,
        cases=tuple((*(-9 * _random(B, seed=10 * B + k).abs() for k in range(4)), beta)
                    for B, beta in ((1, 0.1), (4, 0.3), (3, 1.0))),
        hint="A reward is beta times (model minus reference); then -log of the logistic function of r_c - r_r.",
        solution=preference,
        tolerance=1e-05,
    ),
    "shifts": Exercise(
        spec=_shifts_spec,
        cases=tuple((_random(S, B, seed=S), _random(S, B, seed=S + 1) - 0.5) for S, B in ((4, 2), (6, 3), (1, 2))),
        hint="First the mean of each step's rewards, of both kinds together; then the mean of those up to each step.",
        solution=shifts,
        tolerance=1e-05,
    ),
    "truncate": Exercise(
        spec=mpo_pairs.truncate,
        cases=(
            ("At the top there is a red star and on the left a ring.", 0.5),
            ("one two\nthree four  five six", 0.5),
            (" two words, and three more ", 0.4),
            ("The star is red.", 0.9),
            ("word", 0.5),
            ("all of it stays", 1.0),
        ),
        hint='text.split(" ") leaves line breaks inside words; int() rounds down.',
        solution=truncate,
    ),
    "per_token": Exercise(
        spec=_per_token_spec,
        cases=tuple((*(-9 * _random(B, seed=10 * B + k).abs() for k in range(4)), torch.arange(3, 3 + B),
                     torch.arange(12, 12 - B, -1), beta) for B, beta in ((1, 2.0), (4, 5.0), (3, 1.0))),
        hint="Divide what an answer gained over the reference by its own number of tokens; the rest is L_p.",
        solution=per_token,
        tolerance=1e-05,
    ),
    "mcnemar_p": Exercise(
        spec=intervals.mcnemar,
        cases=((5, 1), (0, 0), (3, 3), (2, 10), (0, 6), (17, 2), (4, 5)),
        hint="Of b1 + b2 changed questions: math.comb counts the ways, up to the smaller number; twice, at most 1.",
        solution=mcnemar_p,
        tolerance=1e-09,
    ),
    "says": Exercise(
        spec=score.yes_no,
        cases=tuple((text,) for text in (
            "A star is in the picture, so yes.", "The triangle is not in the picture.", "No.", "YES! It is there",
            "Yes, and no", "Yesterday it was there", "I know nothing of it", "no", "yes", "",
            "There is no star, so the answer is no", "It is not blue (no)")),
        hint='Take the words out first: re.findall("[a-z]+", text.lower()). Then look for both.',
        solution=says,
    ),
    "circular_hits": Exercise(
        spec=_circular_hits_spec,
        cases=(
            ([1, 1000001, 2, 1000002], [True, False, True, True]),
            ([3, 2000003, 1000003, 3000003, 9], [True, True, True, False, True]),
            _turns(0, 4, 2, 4, 3, 4, 4),
            _turns(2, 1, 4, 4, 2),
            ([5, 1000005, 2000005], [False, False, False]),
        ),
        hint="index % 10**6 is the question; collect its rows, then ask all() of each.",
        solution=circular_hits,
        tolerance=1e-05,
    ),
    "paired_interval": Exercise(
        spec=_paired_interval_spec,
        cases=(_two_runs(12, 50, 0), _two_runs(30, 200, 4), _two_runs(25, 80, 9)),
        hint="first[drawn] is [R, n]: the mean over questions, of both runs, then the quantiles of the differences.",
        solution=paired_interval,
        tolerance=1e-05,
    ),
    "smoothed_error": Exercise(
        spec=_smoothed_error_spec,
        cases=lambda: tuple(
            (nano().model, nano().tokenizer.encode(text), i, 0.5 + _random(256, seed=i).abs(), rounded)
            for text, i, rounded in (("Where is the star?", 1, coarse), ("How many rings are there?", 3, signs))
        ),
        hint="W * f multiplies channels: [O, I] by [I]. Keep the three weights' .data first, and put it back.",
        solution=smoothed_error,
        tolerance=0.001,
    ),
    "smoothing_factors": Exercise(
        spec=_smoothing_factors_spec,
        cases=tuple(
            (_random(I, seed=I).abs() + 0.01, alpha) for I, alpha in ((6, 0.5), (9, 0.3), (4, 0.0), (7, 0.95), (1, 0.4))
        ),
        hint="mean ** alpha, divided by the root of (its largest times its smallest).",
        solution=smoothing_factors,
        tolerance=1e-05,
    ),
    "output_error": Exercise(
        spec=_output_error_spec,
        cases=tuple(
            (_random(T, I), 0.2 * _random(O, I, seed=1), 0.5 + _random(I, seed=2).abs(), rounded)
            for T, I, O, rounded in ((5, 6, 4, coarse), (3, 9, 2, signs), (8, 4, 4, coarse))
        ),
        hint="W * f multiplies channels, X / f divides them; both sums of squares go over all tokens and outputs.",
        solution=output_error,
        tolerance=0.001,
    ),
    "best_share": Exercise(
        spec=_best_share_spec,
        cases=tuple(
            (*_group(seed, largest, loud), [1 - k / 20 for k in range(10)], round_group)
            for seed, largest, loud in ((0, -0.5, 1), (18, 0.4, 1), (1, 0.4, 8), (59, 0.4, 1))  # no near ties
        ),
        hint="For each share: cut, round, compare with w as it was; X @ (what changed) is the output's error.",
        solution=best_share,
    ),
    "learning": Exercise(
        spec=_learning_spec,
        cases=tuple((_NAMES, stage) for stage in ("1", "1.5", "2", "MPO", "LoRA")),
        hint="Names begin with vision_model, mlp1 or language_model; an adapter's end in .A or .B.",
        solution=learning,
    ),
    "masked_loss": Exercise(
        spec=_masked_loss_spec,
        cases=(
            (_random(5, 7), [3, 1, 6, 0, 2], [-100, -100, 6, 0, -100]),
            (_random(3, 4, seed=1), [0, 3, 2], [-100, 3, 2]),
            (_random(6, 5, seed=2) * 9, [1, 1, 4, 2, 0, 3], [-100, 1, -100, -100, 0, 3]),
            (_random(4, 9, seed=3), [8, 7, 6, 5], [8, 7, -100, -100]),
        ),
        hint="scores[:-1] against labels[1:], of these only where the label is not -100; the mean of -log softmax.",
        solution=masked_loss,
        tolerance=1e-05,
    ),
    "labels_of": Exercise(
        spec=lambda ids, answers: [i if any((a <= k < b for a, b in answers)) else -100 for k, i in enumerate(ids)],
        cases=(([5, 6, 7, 8, 9], [(1, 3)]), ([5, 6, 7, 8, 9], [(0, 1), (3, 5)]), ([1], []), ([1, 2], [(0, 2)])),
        hint="Start from a list of -100 and copy the slices.",
        solution=labels_of,
    ),
    "prompt_length": Exercise(
        spec=lambda text_tokens, tiles, L: len(["text"] * text_tokens + ["<img>"] + ["token"] * tiles * L + ["</img>"]),
        cases=((20, 1, 16), (60, 7, 256), (5, 13, 256)),
        hint="Two more than text and visual tokens.",
        solution=lambda text_tokens, tiles, L: text_tokens + tiles * L + 2,
    ),
    "best_tokens": Exercise(
        spec=lambda scores, n: sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:n],
        cases=((_random(9), 3), (_random(5, seed=1), 1), (_random(4, seed=2), 4)),
        hint="topk, and tolist().",
        solution=lambda scores, n: scores.topk(n).indices.tolist(),
    ),
    "write": Exercise(
        spec=_write_spec,
        cases=((_counting, [0, 1], 5, 20), (_counting, [2], 5, 2), (_counting, [5], 5, 9), (_summing, [1, 2], 5, 6)),
        hint="Ask the model for ids plus what is written so far; stop after the stop token or after `most`.",
        solution=write,
    ),
    "relative_error": Exercise(
        spec=lambda a, b: float((a - b).double().pow(2).sum() / b.double().pow(2).sum()) ** 0.5,
        cases=(
            (_random(3, 4), _random(3, 4, seed=1)),
            (_random(5), _random(5)),
            (2 * _random(2, 3, 4), _random(2, 3, 4)),
        ),
        hint="norm() takes all numbers of a tensor, whatever its shape.",
        solution=lambda a, b: float((a - b).norm() / b.norm()),
        tolerance=1e-05,
    ),
    "first_difference": Exercise(
        spec=_first_difference_spec,
        cases=(
            ([("a", 1e-07), ("b", 3e-05), ("c", 1.0)], 2e-05),
            ([("a", 0.0)], 2e-05),
            ([("a", 0.0), ("b", float("nan"))], 1.0),
            ([("a", 0.001), ("b", 0.25), ("c", 0.5), ("d", 0.25)], 0.125),
            ([], 1.0),
        ),
        hint="nan > x is False. Ask for `not error <= tolerance`.",
        solution=first_difference,
    ),
    "wrong_tokens": Exercise(
        spec=_wrong_tokens_spec,
        cases=(
            (_damaged(2, 6, 4, tokens=[1, 4]), _random(2, 6, 4), 0.1),
            (_random(1, 3, 2), _random(1, 3, 2), 1e-06),
            (_damaged(3, 5, 2, tokens=[0]), _random(3, 5, 2), 0.4),
            (torch.tensor([[[3.0, 4.0], [6.0, 8.0]]]) * 1.5, torch.tensor([[[3.0, 4.0], [6.0, 8.0]]]), 0.5),
            _unequal(3, 12, 4, tolerance=0.3, seed=1),
            _unequal(2, 9, 5, tolerance=0.15, seed=2),
        ),
        hint="Sum the squares over axes 0 and 2, of the difference and of b.",
        solution=wrong_tokens,
    ),
    "weights_of": Exercise(
        spec=_weights_of_spec,
        cases=(
            (_random(4, 6), _random(2, 5, 6, seed=1)),
            (_random(3, 2), _random(3, 1, 2, seed=1)),
            (_random(6, 4), _random(2, 3, 4, seed=1)),
        ),
        hint="repeat_interleave the keys to H heads; divide by the root of E before the softmax.",
        solution=weights_of,
        tolerance=1e-05,
    ),
    "normalised": Exercise(
        spec=lambda drops: torch.tensor(
            [
                [max(0.0, float(v)) / max(float(drops.max()), 1e-30) if drops.max() > 0 else 0.0 for v in row]
                for row in drops
            ]
        ),
        cases=((_random(3, 3),), (-_random(2, 4).abs(),), (torch.zeros(2, 2),)),
        hint="clamp first; divide only by something positive.",
        solution=lambda drops: drops.clamp(min=0) / drops.max() if drops.max() > 0 else torch.zeros_like(drops),
        tolerance=1e-06,
    ),
    "lens_ids": Exercise(
        spec=_lens_ids_spec,
        cases=(
            (_random(3, 8), _random(8, seed=1), 1e-06, _random(20, 8, seed=2)),
            (_random(1, 4), torch.ones(4), 1e-06, _random(5, 4, seed=3)),
            (_random(9, 8) * torch.tensor([[1e-25, *[1.0] * 8]]).T, _random(8, seed=1), 1e-06, _random(20, 8, seed=4)),
        ),
        hint="Norm each layer's vector, multiply by head.T, argmax.",
        solution=lens_ids,
    ),
    "attention_numbers": Exercise(
        spec=lambda layers, heads, patches: sum(heads * (patches + 1) ** 2 for _ in range(layers)),
        cases=((6, 5, 64), (24, 16, 1024), (1, 1, 1)),
        hint="Each of the 1 + P tokens has a weight for each of them.",
        solution=lambda layers, heads, patches: layers * heads * (1 + patches) ** 2,
    ),
    "patches": Exercise(
        spec=_patches_spec,
        cases=((_random(3, 6, 6), 2), (_random(3, 6, 6), 3), (_random(3, 5, 5), 5), (_random(3, 4, 4), 1)),
        hint="View as [3, rows, p, columns, p]; the axes rows and columns come first, then channel, y, x.",
        solution=patches,
    ),
    "layer_norm": Exercise(
        spec=_layer_norm_spec,
        cases=tuple(
            (x, _random(x.shape[-1], seed=1), _random(x.shape[-1], seed=2), 1e-06)
            for x in (_random(3, 8), _random(2, 3, 5), 0.001 * _random(4, 160), torch.full((2, 4), 3.0))
        ),
        hint="The variance divides by n, not by n - 1; eps goes under the root.",
        solution=layer_norm,
        tolerance=1e-05,
    ),
    "visual_tokens": Exercise(
        spec=lambda R, p, f: (R // p // f) ** 2,
        cases=((448, 14, 2), (112, 14, 2), (448, 14, 4), (56, 14, 2)),
        hint="Patches in a row, divided by f, squared.",
        solution=lambda R, p, f: (R // p // f) ** 2,
    ),
    "unshuffle": Exercise(
        spec=_unshuffle_spec,
        cases=((_random(16, 3), 2), (_random(36, 2), 3), (_random(16, 1), 4), (_random(9, 5), 1)),
        hint="View as [rows, f, columns, f, C] and bring rows and columns to the front.",
        solution=unshuffle,
    ),
    "shuffle": Exercise(
        spec=_shuffle_spec,
        cases=((_random(4, 8),), (_random(9, 4),), (_random(1, 12),)),
        hint=("The five axes of a token grid are (row, column, dy, dx, c); a patch grid has (row, dy, column, dx, c)."),
        solution=shuffle,
    ),
    "placeholders": Exercise(
        spec=lambda tiles, L: prompt.render([("<image>" * len(tiles), None)], tiles, tokens_per_tile=L).count(
            "<IMG_CONTEXT>"
        ),
        cases=(([1], 16), ([7], 256), ([3, 1, 5], 16), ([], 256)),
        hint="Every tile of every picture.",
        solution=lambda tiles, L: sum(tiles) * L,
    ),
    "bpe_step": Exercise(
        spec=_bpe_step_spec,
        cases=tuple(
            (
                (list(text), merges)
                for text, merges in (
                    ("banana", [("a", "n"), ("an", "a")]),
                    ("abcbc", [("b", "c"), ("a", "b")]),
                    ("xyz", [("a", "b")]),
                    ("lolol", [("o", "l"), ("l", "o")]),
                    ("baaab", [("a", "a"), ("b", "a")]),
                    ("abcdef", [("e", "f"), ("a", "b"), ("c", "d")]),
                    ("ababcd", [("c", "d"), ("a", "b")]),
                    ("banana", [("an", "a"), ("a", "n")]),
                )
            )
        ),
        hint="First find the pair that stands first in the list of merges, then glue every place of it.",
        solution=bpe_step,
    ),
    "user_turn": Exercise(
        spec=_user_turn_spec,
        cases=(("Who are you?",), ("A\nB",), ("  Spaces  ",)),
        hint="Print prompt.render([(question, None)]) with repr(): each line end counts.",
        solution=lambda question: f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "cache_numbers": Exercise(
        spec=lambda layers, H, K, D: layers * 2 * K * (D // H),
        cases=((36, 16, 2, 2048), (4, 8, 4, 256), (1, 2, 2, 8)),
        hint="Keys and values, of K heads with D / H numbers, in every layer.",
        solution=lambda layers, H, K, D: 2 * layers * K * D // H,
    ),
    "window_mask": Exercise(
        spec=_window_mask_spec,
        cases=((4, 2), (5, 1), (3, 9), (6, 3)),
        hint="With row and column numbers t and s: visible where 0 <= t - s < w.",
        solution=lambda T, w: (
            torch.ones(T, T, dtype=torch.bool).tril() & torch.ones(T, T, dtype=torch.bool).triu(1 - w)
        ),
    ),
    "attention": Exercise(
        spec=_attention_spec,
        cases=tuple(
            (
                (_random(H, T, 4), _random(K, T, 4, seed=1), _random(K, T, 4, seed=2))
                for H, K, T in ((2, 2, 3), (4, 2, 5), (6, 3, 4), (3, 1, 1))
            )
        ),
        hint="repeat_interleave makes H heads of K: 0 0 1 1, not 0 1 0 1. Mask before the softmax.",
        solution=attention,
        tolerance=1e-05,
    ),
    "cached_passes": Exercise(
        spec=lambda T, n: T + sum(1 for _ in range(n - 1)),
        cases=((200, 20), (5, 1), (1, 9)),
        hint="The last token of the answer is never read.",
        solution=lambda T, n: T + n - 1,
    ),
    "top_p": Exercise(
        spec=_top_p_spec,
        cases=tuple(
            (
                (torch.tensor(v), p)
                for v, p in (
                    ([0.5, 0.3, 0.15, 0.05], 0.7),
                    ([0.1, 0.2, 0.7], 0.5),
                    ([0.25, 0.35, 0.4], 1.0),
                    ([0.09375, 0.5, 0.15625, 0.25], 0.75),      # exact in binary: 0.5 + 0.25 is p
                    ([0.25, 0.5, 0.125, 0.125], 0.5),
                    ([0.125, 0.125, 0.25, 0.5], 0.75),
                )
            )
        ),
        hint="Sort (stable), and drop a token if those before it hold more than p; exactly p is not more.",
        solution=top_p,
        tolerance=1e-05,
    ),
    "repetition": Exercise(
        spec=_repetition_spec,
        cases=(
            (torch.tensor([1.0, -2.0, 3.0, -4.0]), [0, 1, 1], 2.0),
            (_random(6), [5, 2], 1.3),
            (_random(4), [], 9.0),
        ),
        hint="Divide positive scores, multiply negative ones; set(seen) has every token once.",
        solution=repetition,
        tolerance=1e-06,
    ),
    "pack_word": Exercise(
        spec=_pack_word_spec,
        cases=(
            ([0, 1, 2, 3, 4, 5, 6, 7],),
            ([15, 0, 0, 0, 0, 0, 0, 0],),
            ([0, 0, 0, 0, 0, 0, 0, 15],),
            ([3, 14, 1, 5, 9, 2, 6, 5],),
        ),
        hint="Digit n, counted from the right, holds column (0, 2, 4, 6, 1, 3, 5, 7)[n].",
        solution=pack_word,
    ),
    "dequantise": Exercise(
        spec=_dequantise_spec,
        cases=tuple(
            (
                (_numbers(I, O).byte(), _numbers(G, O, seed=1).byte(), _random(G, O).abs())
                for I, O, G in ((8, 3, 2), (12, 5, 4), (6, 2, 1), (6, 2, 6))
            )
        ),
        hint="View q as [groups, g, O]; z and s become [groups, 1, O].",
        solution=dequantise,
        tolerance=1e-06,
    ),
    "round_group": Exercise(
        spec=_round_group_spec,
        cases=(
            *((_random(16, seed=n) * 0.1 + shift,) for n, shift in enumerate((0, 0.05, 1, -1, -0.1, 0))),
            (torch.tensor([-7.5, 2.2, 0.3, -3.9, 7.5]) / 64,),      # s is 1 / 64, z and the largest w / s round to 8
        ),
        hint=(
            "0 must be one of the levels, also where all weights are positive: that is what the max and min "
            "with 0 are for."
        ),
        solution=round_group,
        tolerance=1e-05,
    ),
    "tiles_of": Exercise(
        spec=_tiles_of_spec,
        cases=((800, 600, 12), (600, 600, 12), (448, 448, 12), (1000, 1000, 6), (30, 900, 4), (100, 450, 12)),
        hint="choose_grid gives (columns, rows). When is there no thumbnail?",
        solution=tiles_of,
    ),
    "largest_square": Exercise(
        spec=_largest_square_spec,
        cases=((256,), (1280,), (3328,), (255,), (1024,)),
        hint=(
            "The cost does not fall when the side grows, but walk through all sides to be sure; a budget that"
            " nothing fits gives 0."
        ),
        solution=largest_square,
    ),
    "stitch": Exercise(
        spec=_stitch_spec,
        cases=((_random(7, 3, 4, 4), 3, 2), (_random(4, 3, 2, 2), 1, 3), (_random(1, 3, 5, 5), 1, 1)),
        hint=(
            "Drop the thumbnail, view as [rows, columns, 3, R, R], bring the five axes into the order (3, "
            "rows, R, columns, R)."
        ),
        solution=stitch,
    ),
}
