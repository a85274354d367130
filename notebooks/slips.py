"""Wrong answers that people give to the exercises of the notebooks, and a sentence for each.

SLIPS[exercise] is a tuple of (a function that is wrong, what is wrong with it), at least five of them. After the
second failure `lab.grade` tries them on the cases; if one gives just what the attempt gave, its sentence is the hint.
So on the cases in solutions.py the answers of each must differ from the right ones and from those of the others, which
tests/test_graders.py tries. Not needed here: a wrong type, shape or dtype, something given that was changed, a model
that stays changed. That the grader itself says. Spoilers: they nearly show the solutions.
"""
from __future__ import annotations

import functools
import math
import re

import torch
import torch.nn.functional as F

import minivl
import solutions
from minivl import awq, prompt, qwen2, tiling
from solutions import by_hand, instead, pixels_of

SLIPS = {}


# ---- 00 a picture becomes words -------------------------------------------------------------------------------------

SLIPS["prompt_length"] = (
    (lambda text, tiles, L: text + tiles * L, "<img> and </img> are tokens too."),
    (lambda text, tiles, L: text + tiles * L + 1, "There are two marks, <img> and </img>."),
    (lambda text, tiles, L: text + tiles * (L + 2),
     "<img> and </img> stand once around the picture, not around each tile."),
    (lambda text, tiles, L: text + L + 2, "Each of the tiles has L visual tokens."),
    (lambda text, tiles, L: tiles * L + 2, "The tokens of the text count too."),
    (lambda text, tiles, L: text + (tiles + 1) * L + 2, "The thumbnail is one of the tiles that are given."),
)

SLIPS["best_tokens"] = (
    (lambda scores, n: scores.topk(n).indices.tolist()[::-1], "Best first: you have them the other way round."),
    (lambda scores, n: scores.topk(n).values.tolist(), "Those are the scores; the ids are asked: topk(n).indices."),
    (lambda scores, n: scores.argsort()[:n].tolist(), "argsort begins with the smallest: descending=True."),
    (lambda scores, n: sorted(scores.topk(n).indices.tolist()), "Ordered by score, not by id."),
    (lambda scores, n: scores.argsort(descending=True).tolist(), "Only the first n."),
    (lambda scores, n: scores.abs().topk(n).indices.tolist(),
     "A very negative score is a bad one: no absolute values."),
    (lambda scores, n: [i + 1 for i in scores.topk(n).indices.tolist()], "The first id is 0."),
)


def _write(model, ids, stop, most, *, reads=lambda ids, new: ids + new, ends=lambda token, ids, new: False):
    new = []
    while len(new) < most:
        token = int(model(reads(ids, new)).argmax())
        if ends(token, ids, new):
            break
        new.append(token)
        if token == stop:
            break
    return new


SLIPS["write"] = (
    (lambda model, ids, stop, most: _write(model, ids, stop, most, ends=lambda token, *_: token == stop),
     "The stop token belongs to what is written."),
    (lambda model, ids, stop, most: ids + _write(model, ids, stop, most), "Only the new tokens, without the prompt."),
    (lambda model, ids, stop, most: _write(model, ids, stop, most + 1), "One token too many: at most `most`."),
    (lambda model, ids, stop, most: _write(model, ids, stop, most, reads=lambda ids, new: ids),
     "The model must read what it has written so far: ids + new."),
    (lambda model, ids, stop, most: _write(model, ids, stop, most, reads=lambda ids, new: (ids + new)[-1:]),
     "The model must read all ids, not only the last one."),
    (lambda model, ids, stop, most: _write(model, ids, stop, most, reads=lambda ids, new: new or ids),
     "The model must read the prompt each time, before what is written."),
    (lambda model, ids, stop, most: _write(model, ids, None, most), "It does not end after the stop token."),
    (lambda model, ids, stop, most: [] if stop in ids else _write(model, ids, stop, most),
     "A stop token in the prompt ends nothing; only one that is written does."),
    (lambda model, ids, stop, most: _write(model, ids, stop, most - len(ids)),
     "`most` counts new tokens, not the prompt."),
)


def _shown(pipe, question, picture, see):
    """Ask with other visual tokens: see(pixel values, the right visual tokens)."""
    model, right = pipe.model, pipe.model.visual_tokens
    with instead(model, "visual_tokens", lambda pixel_values: see(pixel_values, right(pixel_values))):
        return pipe((question, picture)).text


def _first_tile(v, value):
    out = v.clone()
    out[0] = value
    return out


def _nothing_before_projector(pipe, question, picture):
    m = pipe.model
    return _shown(pipe, question, picture, lambda p, v: m.mlp1(torch.zeros(*v.shape[:2], m.mlp1[0].weight.shape[0])))


SLIPS["blind"] = (
    (lambda pipe, q, picture: pipe((q, picture)).text, "The model still sees the picture."),
    (lambda pipe, q, picture: pipe(q).text,
     "Without the picture the prompt has no visual tokens; zeros in their place are asked."),
    (lambda pipe, q, picture: by_hand(pipe, q, 0 * pixels_of(pipe, picture)),
     "Pixels of 0 are a grey picture, and the tower sees that; the visual tokens must be 0."),
    (lambda pipe, q, picture: _shown(pipe, q, picture, lambda p, v: _first_tile(v, 0.0)),
     "All tiles, not only the first."),
    (lambda pipe, q, picture: _shown(pipe, q, picture, lambda p, v: torch.ones_like(v)), "Zeros, not ones."),
    (_nothing_before_projector, "0 before the projector is not 0 after it: it has a norm and biases."),
)


# ---- 01 tiles -------------------------------------------------------------------------------------------------------

def _grid(width, height, max_num=12):
    columns, rows = tiling.choose_grid(width, height, max_num=max_num)
    return columns * rows


SLIPS["tiles_of"] = (
    (lambda w, h, most: _grid(w, h, most), "The thumbnail is missing."),
    (lambda w, h, most: _grid(w, h, most) + 1, "A picture of one tile has no thumbnail."),
    (lambda w, h, most: (n := sum(tiling.choose_grid(w, h, max_num=most))) + (n > 2), "Columns times rows, not plus."),
    (lambda w, h, most: (n := _grid(w, h)) + (n > 1), "You leave max_num at 12."),
    (lambda w, h, most: (n := _grid(h, w, most)) + (n > 1), "Width comes first, then height."),
    (lambda w, h, most: min(most, (n := _grid(w, h, most)) + (n > 1)), "The thumbnail comes on top of max_num."),
    (lambda w, h, most: (n := min(most, math.ceil(w / 448) * math.ceil(h / 448))) + (n > 1),
     "The grid follows the ratio of the sides, not the size: choose_grid."),
)


@functools.cache
def _square(side, max_num=12):
    return (n := _grid(side, side, max_num)) + (n > 1)


def _largest(fits, none=0, end=2001):
    return max((s for s in range(1, end) if fits(s)), default=none)


SLIPS["largest_square"] = (
    (lambda budget: _largest(lambda s: 256 * (_square(s) - (_square(s) > 1)) <= budget),
     "The thumbnail costs 256 too."),
    (lambda budget: _largest(lambda s: 256 * _square(s) < budget), "A picture that costs just the budget fits: <=."),
    (lambda budget: _largest(lambda s: 256 * _square(s) <= budget) + 1, "One too large: that side costs more already."),
    (lambda budget: _largest(lambda s: 256 * _square(s) <= budget, end=2000),
     "Sides up to 2,000, that one included: range(1, 2001)."),
    (lambda budget: _largest(lambda s: 256 * _square(s) <= budget, none=1), "Where nothing fits, 0."),
    (lambda budget: _largest(lambda s: 256 * _square(s, 6) <= budget), "max_num is 12."),
    (lambda budget: 256 * _square(_largest(lambda s: 256 * _square(s) <= budget) or 1),
     "The side is asked, not its cost."),
    (lambda budget: 448 * math.isqrt(budget // 256),
     "A square does not begin its next grid at multiples of 448: ask choose_grid for each side."),
)


def _stitched(pixel_values, columns, rows, at=lambda k, columns, rows: (k // columns, k % columns)):
    R = pixel_values.shape[-1]
    out = torch.zeros(3, rows * R, columns * R)
    for k in range(columns * rows):
        y, x = at(k, columns, rows)
        out[:, y * R:(y + 1) * R, x * R:(x + 1) * R] = pixel_values[k]
    return out


SLIPS["stitch"] = (
    (lambda v, columns, rows: _stitched(v, columns, rows, lambda k, columns, rows: (k % rows, k // rows)),
     "Tiles come row by row, not column by column."),
    (lambda v, columns, rows: _stitched(v, rows, columns), "Columns and rows are exchanged."),
    (lambda v, columns, rows: _stitched(v[-columns * rows:], columns, rows),
     "The thumbnail is the last, not the first."),
    (lambda v, columns, rows: v[:columns * rows].reshape(3, rows * v.shape[-1], -1),
     "reshape alone mixes tiles and channels: permute first."),
    (lambda v, columns, rows: v[:columns * rows].transpose(0, 1).reshape(3, rows * v.shape[-1], -1),
     "Tiles stand side by side, also in each row of pixels: the order is rows, y, columns, x."),
    (lambda v, columns, rows: _stitched(v.transpose(2, 3), columns, rows), "Each tile is mirrored: y before x."),
    (lambda v, columns, rows: _stitched(v[:-1], columns, rows),
     "A single tile has no thumbnail behind it that could go."),
)


def _other_config(pipe, question, picture, **fields):
    from dataclasses import replace
    with instead(pipe.model, "config", replace(pipe.model.config, **fields)):
        return pipe((question, picture)).text


SLIPS["without_thumbnail"] = (
    (lambda pipe, q, picture: pipe((q, picture)).text,
     "The thumbnail is still there: pipe.model.config must be the new config."),
    (lambda pipe, q, picture: _other_config(pipe, q, picture, max_dynamic_patch=1),
     "That leaves one tile for the whole picture; the grid should stay and only the thumbnail go."),
    (lambda pipe, q, picture: by_hand(pipe, q, pixels_of(pipe, picture)[1:]),
     "You drop the first tile; the thumbnail is the last."),
    (lambda pipe, q, picture: by_hand(pipe, q, pixels_of(pipe, picture)[:-2]), "All tiles of the grid stay."),
    (lambda pipe, q, picture: by_hand(pipe, q, pixels_of(pipe, picture)[:1]), "That is the first tile alone."),
    (lambda pipe, q, picture: _shown(pipe, q, picture, lambda p, v: torch.cat([v[:-1], 0 * v[-1:]])),
     "The thumbnail's tokens are 0, but they still stand in the prompt; the tile must go."),
)


# ---- 02 vit ---------------------------------------------------------------------------------------------------------

SLIPS["attention_numbers"] = (
    (lambda layers, heads, P: layers * heads * P ** 2, "CLS is a token too: 1 + P of them."),
    (lambda layers, heads, P: layers * heads * P * (P + 1),
     "CLS looks as well: a map has 1 + P rows and 1 + P columns."),
    (lambda layers, heads, P: layers * heads * (P ** 2 + 1), "CLS adds a row and a column, not one number."),
    (lambda layers, heads, P: layers * (P + 1) ** 2, "Every head has a map of its own."),
    (lambda layers, heads, P: heads * (P + 1) ** 2, "Every layer has maps of its own."),
    (lambda layers, heads, P: layers * heads * (P + 1), "A map has a number for each pair of tokens: squared."),
    (lambda layers, heads, P: layers * heads * (P + 1) * (P + 2) // 2, "The tower has no mask: each token sees all."),
)


def _cut(picture, p, *axes):
    side = picture.shape[1] // p
    return picture.view(3, side, p, side, p).permute(*axes).reshape(side * side, -1)    # channel, row, y, column, x


SLIPS["patches"] = (
    (lambda x, p: _cut(x, p, 1, 3, 2, 4, 0), "The numbers of a patch are (y, x, channel); (channel, y, x) is asked."),
    (lambda x, p: x.reshape(-1, 3 * p * p), "reshape alone cuts the picture into strips: split the axes and permute."),
    (lambda x, p: _cut(x, p, 3, 1, 0, 2, 4), "The patches come column by column; row by row is asked."),
    (lambda x, p: _cut(x, p, 1, 3, 0, 4, 2), "Within a patch y comes before x."),
    (lambda x, p: _cut(x, p, 0, 1, 3, 2, 4), "The channels belong into the patch: row and column come before them."),
    (lambda x, p: _cut(x, p, 2, 4, 0, 1, 3),
     "A patch is made of neighbours: the large step is the patch, the small one the pixel."),
    (lambda x, p: _cut(x, p, 0, 2, 4, 1, 3).reshape(3 * p * p, -1),
     "Transposed: a row for each patch (unfold gives columns)."),
)


def _normed(x, weight, bias, eps, mean=True, variance=None, axis=-1):
    centred = x - x.mean(axis, keepdim=True) if mean else x
    var = x.var(axis, correction=0, keepdim=True) if mean else x.pow(2).mean(axis, keepdim=True)
    return centred / (var + eps if variance is None else variance(var)).sqrt() * weight + bias


SLIPS["layer_norm"] = (
    (lambda x, w, b, eps: _normed(x, 1, 0, eps, variance=lambda v: (v.sqrt() + eps) ** 2) * w + b,
     "eps stands outside of the root; it belongs under it, beside the variance."),
    (lambda x, w, b, eps: _normed(x, w, b, 0.0), "eps is missing: it is added to the variance, under the root."),
    (lambda x, w, b, eps: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt() * w + b,
     "torch divides a variance by n - 1; here it is n: correction=0, or the mean of the squares."),
    (lambda x, w, b, eps: _normed(x, w, 0, eps), "The bias is missing."),
    (lambda x, w, b, eps: _normed(x, 1, b, eps), "The weight is missing."),
    (lambda x, w, b, eps: _normed(x, w, b, eps, mean=False), "The mean is not taken off: that is RMSNorm with a bias."),
    (lambda x, w, b, eps: _normed(x, w, b, eps, variance=lambda v: (v + eps) ** 2),
     "Divide by the root of the variance."),
    (lambda x, w, b, eps: _normed(x, w, b, eps, axis=0), "Mean and variance go over the last axis, not the first."),
    (lambda x, w, b, eps: _normed(x, w, b, eps, axis=tuple(range(x.dim()))),
     "Each token has a mean and a variance of its own: over the last axis only."),
    (lambda x, w, b, eps: (_normed(x, 1, 0, eps) + b) * w, "First times the weight, then plus the bias."),
)


def _tower(pipe, pixel_values, step):
    """Visual tokens with step(number, layer, x) in the place of each layer."""
    m, tower = pipe.model, pipe.model.vision_model
    with torch.no_grad():
        x = tower.embeddings(pixel_values)
        for k, layer in enumerate(tower.encoder.layers):
            x = step(k, layer, x)
        return m.mlp1(m.pixel_unshuffle(x[:, 1:]))


def _half_a_layer(pipe, pixel_values, i, gain):
    layer = pipe.model.vision_model.encoder.layers[i]
    kept = getattr(layer, gain).data
    getattr(layer, gain).data = torch.zeros_like(kept)
    try:
        with torch.no_grad():
            return pipe.model.visual_tokens(pixel_values)
    finally:
        getattr(layer, gain).data = kept


SLIPS["without_layer"] = (
    (lambda pipe, v, i: _tower(pipe, v, lambda k, layer, x: layer(x)), "All layers are still there."),
    (lambda pipe, v, i: _half_a_layer(pipe, v, i, "ls1"), "Its MLP still adds something: ls2 must be 0 too."),
    (lambda pipe, v, i: _half_a_layer(pipe, v, i, "ls2"), "Its attention still adds something: ls1 must be 0 too."),
    (lambda pipe, v, i: _tower(pipe, v, lambda k, layer, x: x if k == max(0, i - 1) else layer(x)),
     "Layers are counted from 0."),
    (lambda pipe, v, i: _tower(pipe, v, lambda k, layer, x: x if k >= i else layer(x)),
     "The layers after it must stay: only layer i goes."),
    (lambda pipe, v, i: _tower(pipe, v, lambda k, layer, x: 0 * x if k == i else layer(x)),
     "A layer that adds nothing hands on what it was given; you hand on zeros."),
    (lambda pipe, v, i: _tower(pipe, v, lambda k, layer, x: x if k == 5 - i else layer(x)),
     "You count the layers from the end."),
)


# ---- 03 unshuffle and projector -------------------------------------------------------------------------------------

SLIPS["visual_tokens"] = (
    (lambda R, p, f: R // p // f, "That is one side: squared."),
    (lambda R, p, f: (R // p) ** 2, "Those are the patches; f times f of them become one token."),
    (lambda R, p, f: (R // p) ** 2 // f, "f times f patches become one token, not f."),
    (lambda R, p, f: (R // p // f) ** 2 + 1, "CLS is dropped before."),
    (lambda R, p, f: (R // p) ** 2 // 4, "f need not be 2."),
    (lambda R, p, f: (R // f) ** 2, "A patch has p times p pixels: divide by p first."),
    (lambda R, p, f: (R // p * f) ** 2, "The grid of tokens is smaller than that of patches: divide by f."),
)


def _unshuffled(x, f, *axes):
    side = round(len(x) ** 0.5)                             # the axes: row, dy, column, dx, c
    return x.view(side // f, f, side // f, f, -1).permute(*axes).reshape(len(x) // f ** 2, -1)


def _far_apart(x, f):
    far = round(len(x) ** 0.5) // f
    return x.view(f, far, f, far, -1).permute(1, 3, 0, 2, 4).reshape(len(x) // f ** 2, -1)


SLIPS["unshuffle"] = (
    (lambda x, f: _unshuffled(x, f, 0, 2, 3, 1, 4), "The order is (dx, dy, c); (dy, dx, c) is asked."),
    (lambda x, f: _unshuffled(x, f, 0, 2, 4, 1, 3), "The channels come last, not first: (dy, dx, c)."),
    (lambda x, f: x.reshape(len(x) // f ** 2, -1),
     "reshape alone takes f * f patches of one row; the block has f rows: split the axes and permute."),
    (lambda x, f: _unshuffled(x, f, 2, 0, 1, 3, 4), "The tokens come column by column; row by row is asked."),
    (_far_apart, "A token is made of neighbours; you take patches that lie far apart."),
    (lambda x, f: _unshuffled(x, 2, 0, 2, 1, 3, 4), "f need not be 2."),
    (lambda x, f: x.view(len(x) // f ** 2, f ** 2, -1).mean(1),
     "Nothing is averaged: the patches stand one behind the other."),
    (lambda x, f: x.T.reshape(len(x) // f ** 2, -1), "x is [P, C]: the grid is its first axis."),
)


def _shuffled(x, split, *axes):
    n = round(len(x) ** 0.5)
    return x.view(n, n, *split).permute(*axes).reshape(4 * len(x), -1)


SLIPS["shuffle"] = (
    (lambda x: _shuffled(x, (2, 2, -1), 0, 3, 1, 2, 4), "You read the order (dx, dy, c); it is (dy, dx, c)."),
    (lambda x: x.reshape(4 * len(x), -1),
     "reshape alone puts the four patches of a token into one row; they are a block."),
    (lambda x: _shuffled(x, (-1, 2, 2), 0, 3, 1, 4, 2), "You read the order (c, dy, dx); the channels come last."),
    (lambda x: _shuffled(x, (2, 2, -1), 1, 2, 0, 3, 4), "The tokens lie row by row, not column by column."),
    (lambda x: _shuffled(x, (2, 2, -1), 2, 0, 3, 1, 4),
     "The patches of a token are neighbours; you set them far apart."),
    (lambda x: x[:, :x.shape[1] // 4].repeat_interleave(4, 0),
     "Each patch has a quarter of the token, not all the same one."),
    (lambda x: _shuffled(x, (2, 2, -1), 0, 2, 1, 3, 4).flip(0), "The first patch comes first."),
)


def _mean_picture(pipe, question, picture):
    pixel_values = pixels_of(pipe, picture)
    return by_hand(pipe, question, pixel_values.mean((2, 3), keepdim=True).expand_as(pixel_values))


SLIPS["averaged"] = (
    (lambda pipe, q, picture: _shown(pipe, q, picture, lambda p, v: v.mean((0, 1), keepdim=True).expand_as(v)),
     "Each tile has a mean of its own: not over all tiles."),
    (lambda pipe, q, picture: _shown(pipe, q, picture, lambda p, v: v.mean(0, keepdim=True).expand_as(v)),
     "Axis 0 are the tiles; the tokens are axis 1."),
    (lambda pipe, q, picture: _shown(pipe, q, picture, lambda p, v: v.mean(2, keepdim=True).expand_as(v)),
     "Axis 2 are the numbers of a token; the tokens are axis 1."),
    (lambda pipe, q, picture: _shown(pipe, q, picture, lambda p, v: v[:1].mean(1, keepdim=True).expand_as(v)),
     "Each tile has a mean of its own; you give all tiles that of the first."),
    (lambda pipe, q, picture: _shown(pipe, q, picture, lambda p, v: v.sum(1, keepdim=True).expand_as(v)),
     "The mean, not the sum."),
    (lambda pipe, q, picture: pipe((q, picture)).text,
     "Nothing is averaged: the model still uses its own visual tokens."),
    (_mean_picture, "The mean of the pixels is not the mean of the visual tokens."),
)


# ---- 04 prompt and tokens -------------------------------------------------------------------------------------------

SLIPS["placeholders"] = (
    (lambda tiles, L: len(tiles) * L, "That counts pictures: each has several tiles, and each tile L placeholders."),
    (lambda tiles, L: sum(tiles), "Each tile has L placeholders."),
    (lambda tiles, L: sum(tiles) * L + 2 * len(tiles), "<img> and </img> are no placeholders."),
    (lambda tiles, L: sum(n + 1 for n in tiles) * L, "The thumbnail is one of the tiles that are given."),
    (lambda tiles, L: sum(tiles[:1]) * L, "All pictures, not only the first."),
    (lambda tiles, L: max(tiles, default=0) * L, "The pictures' tiles are added."),
    (lambda tiles, L: math.prod(tiles) * L, "Tiles of different pictures are added, not multiplied."),
)


def _glue(parts, pair, most=None):
    out, k, glued = [], 0, 0
    while k < len(parts):
        if tuple(parts[k:k + 2]) == tuple(pair) and (most is None or glued < most):
            out.append(parts[k] + parts[k + 1])
            k += 2
            glued += 1
        else:
            out.append(parts[k])
            k += 1
    return out


def _best(parts, merges, key=None):
    pairs = [pair for pair in zip(parts, parts[1:]) if pair in merges]
    return min(pairs, key=key or merges.index) if pairs else ("", "")


def _from_the_right(parts, pair):
    out = list(parts)
    for k in range(len(out) - 2, -1, -1):
        if tuple(out[k:k + 2]) == pair:
            out[k:k + 2] = [pair[0] + pair[1]]
    return out


def _all_merges(parts, merges):
    for pair in merges:
        parts = _glue(parts, pair)
    return parts


def _to_the_end(parts, merges):
    while any(pair in merges for pair in zip(parts, parts[1:])):
        parts = _glue(parts, _best(parts, merges))
    return parts


def _overlapping(parts, merges):
    pair = _best(parts, merges)
    out = []
    for a, b in zip(parts, [*parts[1:], ""]):
        out.append(a + b if (a, b) == pair else a)
        if len(out) > 1 and out[-2] == pair[0] + pair[1] and out[-1] == pair[1]:
            out.pop()
    return out


SLIPS["bpe_step"] = (
    (lambda parts, merges: _glue(parts, _best(parts, merges), most=1),
     "Every place of the pair is glued, not only the first."),
    (lambda parts, merges: _glue(parts, _best(parts, merges, key=lambda _: 0)),
     "The best pair is the one that stands first in `merges`, not in the text."),
    (lambda parts, merges: _glue(parts, _best(parts, merges, key=lambda pair: -merges.index(pair))),
     "The best pair stands first in `merges`, not last."),
    (lambda parts, merges: _glue(parts, _best(parts, merges, key=lambda pair: (
        -sum(pair == other for other in zip(parts, parts[1:])), merges.index(pair)))),
     "Which pair is the most frequent was asked in training; now the order of `merges` counts."),
    (_all_merges, "One step uses one pair; you go through all merges."),
    (_to_the_end, "One step only; you go on until nothing is left to glue."),
    (lambda parts, merges: _from_the_right(parts, _best(parts, merges)),
     "From left to right: of a a a the first two are glued."),
    (_overlapping, "A part that has been glued is used up: of a a a only two are glued."),
    (lambda parts, merges: _glue(parts[:-1], _best(parts, merges)) + parts[-1:], "The last pair is never looked at."),
    (lambda parts, merges: _glue(parts, _best(parts, merges)) if _best(parts, merges)[0] else [],
     "If no pair is left the parts come back as they are."),
)


def _turn(question, head="<|im_start|>user\n", end="<|im_end|>\n", then="<|im_start|>assistant\n"):
    return f"{head}{question}{end}{then}"


SLIPS["user_turn"] = (
    (lambda question: _turn(question, end="<|im_end|>"), "A line ends after <|im_end|>."),
    (lambda question: _turn(question, then="<|im_start|>assistant"), "A line ends after the assistant's header too."),
    (lambda question: _turn(question, then=""), "The header of the assistant's turn is missing."),
    (lambda question: _turn(question, head="<|im_start|>user "), "After `user` a line ends; a space is another token."),
    (lambda question: _turn(question, end="\n<|im_end|>\n"), "<|im_end|> comes right after the question."),
    (lambda question: _turn(question, end="\n"), "<|im_end|> is missing."),
    (lambda question: prompt.render([(question, None)]), "Without the system message."),
    (lambda question: _turn(question.strip()), "The question stays as it is, spaces at its ends included."),
    (lambda question: _turn(question).replace("\n", "\\n"), "A real line end, not a backslash and an n."),
)


def _rows(pipe, a, b):
    table = pipe.model.language_model.embeddings.weight.data
    return table, *(pipe.tokenizer.encode(word)[0] for word in (a, b))


def _new_rows(pipe, words, question, picture, change, owner="embeddings"):
    """Ask with change(table, a, b) done to a copy of the table."""
    weight = getattr(pipe.model.language_model, owner).weight
    kept = weight.data
    weight.data = kept.clone()
    change(weight.data, *(pipe.tokenizer.encode(word)[0] for word in words))
    try:
        return pipe((question, picture)).text
    finally:
        weight.data = kept


def _swap(table, a, b):
    table[[a, b]] = table[[b, a]]


def _second_over_first(table, a, b):
    table[a] = table[b]


def _first_over_second(table, a, b):
    table[b] = table[a]


def _mean_of_both(table, a, b):
    table[[a, b]] = (table[a] + table[b]) / 2


SLIPS["exchanged"] = (
    (lambda pipe, a, b, q, picture: _new_rows(pipe, (a, b), q, picture, _second_over_first),
     "Both rows are the same now: table[a] is a view, so keep a clone, or table[[a, b]] = table[[b, a]]."),
    (lambda pipe, a, b, q, picture: _new_rows(pipe, (a, b), q, picture, _first_over_second),
     "Only one row is copied; they are to be exchanged."),
    (lambda pipe, a, b, q, picture: pipe((q, picture)).text, "The table is as before while the model answers."),
    (lambda pipe, a, b, q, picture: _new_rows(pipe, (a, b), q, picture, _swap, "head"),
     "Those are the rows of the head, by which it writes; it reads by language_model.embeddings."),
    (lambda pipe, a, b, q, picture: _new_rows(pipe, (a.strip(), b.strip()), q, picture, _swap),
     "A word with its space has another row than without."),
    (lambda pipe, a, b, q, picture: _new_rows(pipe, (a, b), q, picture, _mean_of_both), "Exchanged, not averaged."),
    (lambda pipe, a, b, q, picture: pipe((q.replace(a, "\0").replace(b, a).replace("\0", b), picture)).text,
     "You exchange the words of the question; the model also reads what it has written itself."),
)


# ---- 05 decoder -----------------------------------------------------------------------------------------------------

SLIPS["cache_numbers"] = (
    (lambda layers, H, K, D: layers * K * D // H, "Keys and values: two of everything."),
    (lambda layers, H, K, D: 2 * layers * D, "Only K heads are kept, not H."),
    (lambda layers, H, K, D: 2 * layers * K * D, "A head has D / H numbers."),
    (lambda layers, H, K, D: 2 * K * D // H, "Every layer has a cache."),
    (lambda layers, H, K, D: 4 * layers * K * D // H, "The numbers are asked, not the bytes."),
    (lambda layers, H, K, D: 2 * layers * D // H, "K heads are kept, not one."),
    (lambda layers, H, K, D: 3 * layers * K * D // H, "Queries are not kept: nobody asks for them again."),
    (lambda layers, H, K, D: 2 * layers * D // K, "The width of a head is D / H, and K of them are kept."),
)


def _window(T, seen):
    return torch.tensor([[bool(seen(t, s)) for s in range(T)] for t in range(T)])


SLIPS["window_mask"] = (
    (lambda T, w: _window(T, lambda t, s: 0 <= t - s <= w), "One too many: t itself is one of the w."),
    (lambda T, w: _window(T, lambda t, s: 0 <= t - s < w - 1), "One too few: t itself and w - 1 before it."),
    (lambda T, w: _window(T, lambda t, s: abs(t - s) < w), "Nobody sees what comes later."),
    (lambda T, w: _window(T, lambda t, s: 0 <= s - t < w), "Transposed: row t is the one that looks."),
    (lambda T, w: _window(T, lambda t, s: 0 < t - s < w), "A token sees itself."),
    (lambda T, w: ~_window(T, lambda t, s: 0 <= t - s < w), "True means visible."),
    (lambda T, w: _window(T, lambda t, s: s <= t), "That is the mask without a window."),
    (lambda T, w: _window(T, lambda t, s: s <= t and s >= T - w), "The window moves along: it ends at t, not at T."),
)


def _attended(q, k, v, *, share="repeat_interleave", scale=None, mask=True, hidden=float("-inf"), diagonal=0, axis=-1,
              after=False):
    (H, T, E), K = q.shape, k.shape[0]
    k, v = (x.repeat_interleave(H // K, 0) if share == "repeat_interleave" else x.repeat(H // K, 1, 1) for x in (k, v))
    scores = q @ k.transpose(1, 2) / (E ** 0.5 if scale is None else scale)
    past = torch.ones(T, T, dtype=torch.bool).tril(diagonal)
    if mask and not after:
        scores = scores.masked_fill(~past, hidden)
    weights = scores.softmax(axis)
    return (weights * past if after else weights) @ v


SLIPS["attention"] = (
    (lambda q, k, v: _attended(q, k, v, scale=1), "The scores are not divided by the root of E."),
    (lambda q, k, v: _attended(q, k, v, scale=q.shape[-1]), "Divided by E; its root is asked."),
    (lambda q, k, v: _attended(q, k, v, scale=(len(q) * q.shape[-1]) ** 0.5),
     "E is the width of one head, not of all heads together."),
    (lambda q, k, v: _attended(q, k, v, mask=False), "Nobody may see later tokens: the causal mask is missing."),
    (lambda q, k, v: _attended(q, k, v, share="repeat"),
     "Heads share in neighbours, 0 0 1 1: repeat_interleave, not repeat."),
    (lambda q, k, v: _attended(q, k, v, axis=-2), "The softmax goes over the keys, the last axis."),
    (lambda q, k, v: _attended(q, k, v, axis=0), "The softmax goes over the keys, not over the heads."),
    (lambda q, k, v: _attended(q, k, v, after=True),
     "Masked after the softmax, the weights no longer sum to 1: mask the scores."),
    (lambda q, k, v: _attended(q, k, v, hidden=0.0), "A score of 0 still gets weight, e to the 0: -inf hides it."),
    (lambda q, k, v: _attended(q, k, v, diagonal=-1), "A token sees itself."),
    (lambda q, k, v: _attended(q, k, v, diagonal=1), "One too many: a token sees up to itself."),
)


def _layers(pipe, ids, rotate=None, also=()):
    with torch.no_grad(), minivl.trace(pipe.model, "llm.layers.*", *also, "logits") as t:
        if rotate:
            with instead(qwen2, "rotate", rotate):
                pipe.model(torch.tensor([ids]))
        else:
            pipe.model(torch.tensor([ids]))
    return {name: x for name, x in t.items() if name in (*also, "logits") or name.split(".")[-1].isdigit()}


def _layer_errors(pipe, ids, rotate, error, also=()):
    right, wrong = _layers(pipe, ids, also=also), _layers(pipe, ids, rotate, also)
    return torch.tensor([float(error(wrong[name], right[name])) for name in right])


def _relative(a, b):
    return (a - b).norm() / b.norm()


SLIPS["layer_errors"] = (
    (lambda pipe, ids, rotate: _layer_errors(pipe, ids, rotate, lambda a, b: (a - b).norm()),
     "Relative errors: divided by the size."),
    (lambda pipe, ids, rotate: _layer_errors(pipe, ids, rotate, lambda a, b: _relative(b, a)),
     "relative_error(wrong, right): relative to what is right."),
    (lambda pipe, ids, rotate: _layer_errors(pipe, ids, rotate, _relative)[:-1], "The logits are missing."),
    (lambda pipe, ids, rotate: _layer_errors(pipe, ids, rotate, _relative).roll(1),
     "The layers first, the logits last."),
    (lambda pipe, ids, rotate: _layer_errors(pipe, ids, rotate, _relative, ["llm.norm"]),
     "Whole layers and logits only, no llm.norm."),
    (lambda pipe, ids, rotate: 0 * _layer_errors(pipe, ids, rotate, _relative),
     "Both runs are the same: qwen2.rotate must be the other function in one of them, and only there."),
    (lambda pipe, ids, rotate: _layer_errors(pipe, ids, rotate, lambda a, b: (a - b).abs().max() / b.abs().max()),
     "minivl.relative_error measures with norms, not with the largest difference."),
    (lambda pipe, ids, rotate: _layer_errors(pipe, ids, rotate, lambda a, b: _relative(a[:, -1], b[:, -1])),
     "All tokens, not only the last."),
)


# ---- 06 generate ----------------------------------------------------------------------------------------------------

SLIPS["cached_passes"] = (
    (lambda T, n: T + n, "The last token of the answer is never read."),
    (lambda T, n: n, "Tokens, not calls: the prompt's tokens pass too."),
    (lambda T, n: n * T + n * (n - 1) // 2, "That is without a cache, where everything is read again for each token."),
    (lambda T, n: T * n, "With a cache the prompt is read once."),
    (lambda T, n: T, "Each token of the answer but the last is read too."),
    (lambda T, n: T + n + 1,
     "The first token of the answer comes from reading the prompt, and the last is never read."),
    (lambda T, n: T + n - 2, "Only the last token of the answer is not read."),
)


def _kept(probs, keep, rescale=True, descending=True):
    ordered, index = probs.sort(descending=descending)
    out = torch.zeros_like(probs).index_copy(0, index, ordered.where(keep(ordered), 0.0))
    return out / out.sum() if rescale else out


def _before(ordered):
    return ordered.cumsum(0) - ordered


SLIPS["top_p"] = (
    (lambda probs, p: _kept(probs, lambda o: _before(o) < p),
     "If those before it hold exactly p, a token still stays: <=."),
    (lambda probs, p: _kept(probs, lambda o: _before(o) <= p, rescale=False),
     "What is left must be scaled to the sum 1."),
    (lambda probs, p: _kept(probs, lambda o: (o.cumsum(0) <= p) | (_before(o) == 0)),
     "The token that goes beyond p stays too: compare the sum of those before it, without its own."),
    (lambda probs, p: _kept(probs, lambda o: o.cumsum(0) <= p),
     "The most probable token always stays: the sum of those before it is 0."),
    (lambda probs, p: _kept(probs, lambda o: o >= p),
     "p is no threshold of a single token; the sum from the best down counts."),
    (lambda probs, p: _kept(probs, lambda o: _before(o) <= p, descending=False),
     "From the most probable down: descending=True."),
    (lambda probs, p: (o := probs.where(_before(probs) <= p, 0.0)) / o.sum(),
     "Sort first, the most probable at the front."),
    (lambda probs, p: (o := probs.sort(descending=True).values).where(_before(o) <= p, 0.0)
     / o.where(_before(o) <= p, 0.0).sum(), "Each must go back to its own id after the sorting."),
    (lambda probs, p: _kept(probs, lambda o: _before(o) <= p, rescale=False).softmax(0),
     "Divide by the sum; a softmax gives weight to the zeros again."),
)


def _penalised(scores, seen, change):
    return torch.tensor([float(change(v, i)) if i in seen else float(v) for i, v in enumerate(scores)])


def _by(r):
    return lambda v, i: v / r if v > 0 else v * r


SLIPS["repetition"] = (
    (lambda scores, seen, r: _penalised(scores, seen, lambda v, i: v / r),
     "A negative score divided by r gets better: it is multiplied."),
    (lambda scores, seen, r: _penalised(scores, seen, lambda v, i: v * r),
     "A positive score multiplied by r gets better: it is divided."),
    (lambda scores, seen, r: _penalised(scores, seen, lambda v, i: v * r if v > 0 else v / r), "The other way round."),
    (lambda scores, seen, r: _penalised(scores, seen, lambda v, i: _by(r ** seen.count(i))(v, i)),
     "Once, also for a token that was seen twice: set(seen)."),
    (lambda scores, seen, r: _penalised(scores, seen, lambda v, i: v - r), "Divided or multiplied, not subtracted."),
    (lambda scores, seen, r: _penalised(scores, range(len(scores)), _by(r)),
     "Only tokens that were seen."),
    (lambda scores, seen, r: _penalised(scores, set(range(len(scores))) - set(seen), _by(r)),
     "Those that were seen, not the others."),
    (lambda scores, seen, r: _penalised(scores, seen[-1:], _by(r)),
     "All that were seen."),
    (lambda scores, seen, r: _penalised(scores, seen, lambda v, i: float("-inf")), "A penalty, not a ban."),
)


def _chosen(model, ids, n, banned, choose=torch.argmax):
    """Greedy writing without a cache; the scores of banned(ids, written) are hidden."""
    written = []
    with torch.no_grad():
        for _ in range(n):
            scores = model(torch.tensor([[*ids, *written]]))[0, -1].clone()
            scores[banned(ids, written)] = float("-inf")
            written.append(int(choose(scores)))
    return written


SLIPS["never_twice"] = (
    (lambda model, ids, n: _chosen(model, ids, n, lambda ids, new: []),
     "Tokens come twice: what is written must be hidden."),
    (lambda model, ids, n: _chosen(model, ids, n, lambda ids, new: new[-1:]),
     "All that is written is hidden, not only the last."),
    (lambda model, ids, n: _chosen(model, ids, n, lambda ids, new: ids + new),
     "Tokens of the prompt may be written, once."),
    (lambda model, ids, n: _chosen(model, ids, n + 1, lambda ids, new: new), "n tokens; that is one more."),
    (lambda model, ids, n: _chosen(model, ids, n - 1, lambda ids, new: new), "n tokens; that is one less."),
    (lambda model, ids, n: ids + _chosen(model, ids, n, lambda ids, new: new),
     "Only the new tokens, without the prompt."),
    (lambda model, ids, n: list(dict.fromkeys(_chosen(model, ids, n, lambda ids, new: []))),
     "Hide them before the choice; to drop the repetitions afterwards gives another text."),
    (lambda model, ids, n: _chosen(model, ids, n, lambda ids, new: new, lambda s: s.topk(2).indices[1]),
     "The best of those that are left, not the second best."),
)


# ---- 07 int4 --------------------------------------------------------------------------------------------------------

def _word(numbers, columns=(0, 2, 4, 6, 1, 3, 5, 7), bits=4):
    return sum(numbers[column] << bits * n for n, column in enumerate(columns))


SLIPS["pack_word"] = (
    (lambda numbers: _word(numbers, range(8)),
     "The columns do not lie in their order: 0, 2, 4, 6, 1, 3, 5, 7 from the right."),
    (lambda numbers: _word(numbers, (0, 4, 1, 5, 2, 6, 3, 7)),
     "That is the inverse order: digit n holds column order[n]; column n does not go to digit order[n]."),
    (lambda numbers: _word(numbers, (7, 5, 3, 1, 6, 4, 2, 0)), "Digits are counted from the right, the lowest bits."),
    (lambda numbers: _word(numbers, range(7, -1, -1)),
     "The first number does not stand leftmost: from the right the columns are 0, 2, 4, 6, 1, 3, 5, 7."),
    (lambda numbers: (w := _word(numbers)) - (w >> 31 << 32),
     "Unsigned: a first bit of 1 is no minus sign. Modulo 2 ** 32."),
    (lambda numbers: _word(numbers, bits=1), "A number has 4 bits: shift by 4 * n."),
    (lambda numbers: _word(numbers, bits=8), "A number has 4 bits, not 8."),
    (lambda numbers: _word(numbers, (0, 2, 4, 6, 1, 3, 5)), "Eight numbers: one is missing."),
)


def _dequantised(q, z, s, *, group=lambda i, g, G: i // g, formula=lambda q, z, s: (q - z) * s):
    g = len(q) // len(s)
    rows = [group(i, g, len(s)) for i in range(len(q))]
    return formula(q.float(), z.float()[rows], s[rows])


SLIPS["dequantise"] = (
    (lambda q, z, s: (q - z.repeat_interleave(len(q) // len(z), 0)).float() * s.repeat_interleave(len(q) // len(s), 0),
     "uint8 has no negative numbers, 3 - 5 is 254: float() before the difference."),
    (lambda q, z, s: _dequantised(q, z, s, formula=lambda q, z, s: q * s - z), "First minus z, then times s."),
    (lambda q, z, s: _dequantised(q, z, s, formula=lambda q, z, s: (z - q) * s), "q - z, not z - q."),
    (lambda q, z, s: _dequantised(q, z, s, formula=lambda q, z, s: (q - z - 1) * s),
     "No 1 is added to z; that is GPTQ's convention."),
    (lambda q, z, s: _dequantised(q, z, s, formula=lambda q, z, s: q * s), "The zero point is missing."),
    (lambda q, z, s: _dequantised(q, z, s, formula=lambda q, z, s: (q - 8) * s), "The zero point is z, not always 8."),
    (lambda q, z, s: _dequantised(q, z, s, formula=lambda q, z, s: (q - z).clamp(0) * s), "Weights may be negative."),
    (lambda q, z, s: _dequantised(q, z, s, formula=lambda q, z, s: (q - z) / s), "Times s, not divided by it."),
    (lambda q, z, s: _dequantised(q, z, s, group=lambda i, g, G: i % G),
     "A group is g rows one below the other: row i belongs to group i // g (repeat_interleave, not repeat)."),
    (lambda q, z, s: _dequantised(q, z, s, group=lambda i, g, G: 0), "Each group has an s and a z of its own."),
)


def _rounded(w, *, low=lambda w: w.min().clamp(max=0), high=lambda w: w.max().clamp(min=0), steps=15, z=torch.round,
             digit=lambda w, s, z: torch.round(w / s) + z, clamp=True, back=lambda q, z, s: (q - z) * s):
    low, high = low(w), high(w)
    s = (high - low) / steps
    z = z(-low / s)
    q = digit(w, s, z)
    return back(q.clamp(0, 15) if clamp else q, z, s)


SLIPS["round_group"] = (
    (lambda w: _rounded(w, clamp=False), "q must stay in 0..15: the rounded z can push it to 16 or -1."),
    (lambda w: _rounded(w, low=torch.min, high=torch.max), "0 must be among the levels: max(w, 0) and min(w, 0)."),
    (lambda w: _rounded(w, digit=lambda w, s, z: (w / s).floor() + z), "Rounded to nearest, not down."),
    (lambda w: _rounded(w, digit=lambda w, s, z: (w / s).trunc() + z),
     "Rounded to nearest, not cut off: int() goes towards 0."),
    (lambda w: _rounded(w, steps=16), "Sixteen levels have fifteen steps between them."),
    (lambda w: _rounded(w, back=lambda q, z, s: q), "Those are the numbers q; the dequantised group is asked."),
    (lambda w: _rounded(w, back=lambda q, z, s: q * s), "The zero point must come off again: (q - z) * s."),
    (lambda w: _rounded(w, z=lambda z: z), "z is a whole number: round it."),
    (lambda w: _rounded(w, z=torch.floor), "z is rounded to nearest, not down."),
    (lambda w: _rounded(w, digit=lambda w, s, z: torch.round((w - w.min().clamp(max=0)) / s)),
     "w / s and z are rounded each by itself; the rounded sum can be another."),
    (lambda w: torch.round(w / (s := w.abs().max() / 7)) * s,
     "That is symmetric, with one level for 0 in the middle; here there is a z."),
    (lambda w: w, "Nothing is rounded."),
)


def _bits_away(model, ids, pixel_values, change, *, zeros=True, error=_relative):
    """Errors of visual tokens and scores with change(numbers) done to what every linear holds."""
    def run():
        with torch.no_grad():
            visual = model.visual_tokens(pixel_values)
            return visual, model.language_model(model.embed(torch.tensor([ids]), visual))
    right = run()
    linears = [m for m in model.modules() if isinstance(m, awq.AWQLinear)]
    kept = [(m.qweight, m.qzeros) for m in linears]
    try:
        for m in linears:
            m.qweight = awq.pack(change(awq.unpack(m.qweight)))
            m.qzeros = awq.pack(change(awq.unpack(m.qzeros))) if zeros else m.qzeros
        wrong = run()
    finally:
        for m, (qweight, qzeros) in zip(linears, kept):
            m.qweight, m.qzeros = qweight, qzeros
    return torch.tensor([float(error(a, b)) for a, b in zip(wrong, right)])


SLIPS["fewer_bits"] = (
    (lambda m, ids, p: _bits_away(m, ids, p, lambda n: n // 2), "n // 2 halves the numbers too: times 2 again."),
    (lambda m, ids, p: _bits_away(m, ids, p, lambda n: n // 2 * 2, zeros=False), "The zero points lose their bit too."),
    (lambda m, ids, p: _bits_away(m, ids, p, lambda n: n // 4 * 4), "One bit, not two."),
    (lambda m, ids, p: _bits_away(m, ids, p, lambda n: n % 8), "The lowest bit goes, not the highest."),
    (lambda m, ids, p: _bits_away(m, ids, p, lambda n: n // 2 * 2, error=lambda a, b: (a - b).norm()),
     "Relative errors are asked."),
    (lambda m, ids, p: _bits_away(m, ids, p, lambda n: n // 2 * 2, error=lambda a, b: _relative(b, a)),
     "relative_error(wrong, right): relative to what is right."),
    (lambda m, ids, p: _bits_away(m, ids, p, lambda n: n // 2 * 2).flip(0),
     "The visual tokens first, then the scores."),
    (lambda m, ids, p: _bits_away(m, ids, p, lambda n: n),
     "Both runs are the same: awq.unpack must be the other one in one of them."),
)


# ---- 08 verify ------------------------------------------------------------------------------------------------------

SLIPS["relative_error"] = (
    (lambda a, b: float((a - b).norm()), "That is the absolute error: divide by the size of b."),
    (lambda a, b: float((a - b).norm() / a.norm()), "Relative to b, not to a."),
    (lambda a, b: float((a - b).norm() / b.norm()) ** 2, "The root is missing."),
    (lambda a, b: float((a - b).abs().max() / b.abs().max()), "Norms: all numbers count, not only the largest."),
    (lambda a, b: float(((a - b) / b).abs().mean()), "One quotient of two norms, not the mean of many quotients."),
    (lambda a, b: float((a - b).abs().sum() / b.abs().sum()), "The norm is the root of the summed squares."),
    (lambda a, b: float(((a - b).norm(dim=-1) / b.norm(dim=-1)).mean()),
     "One norm over all axes, not one for each row."),
    (lambda a, b: float((a - b).norm() / (a.norm() + b.norm())), "Divided by the size of b alone."),
    (lambda a, b: abs(float(a.norm() / b.norm()) - 1), "The norm of the difference, not the difference of the norms."),
)


SLIPS["first_difference"] = (
    (lambda errors, tolerance: next((n for n, e in errors if e > tolerance), None),
     "nan > x is False: ask `not error <= tolerance`."),
    (lambda errors, tolerance: max([(e, n) for n, e in errors if not e <= tolerance], default=(0, None))[1],
     "The first that differs, not the largest."),
    (lambda errors, tolerance: next((n for n, e in errors[::-1] if not e <= tolerance), None),
     "The first, not the last."),
    (lambda errors, tolerance: next((k for k, (n, e) in enumerate(errors) if not e <= tolerance), None),
     "Its name, not its place."),
    (lambda errors, tolerance: next((e for n, e in errors if not e <= tolerance), None), "Its name, not its error."),
    (lambda errors, tolerance: next((n for n, e in errors if not e <= tolerance), ""), "None if all agree."),
    (lambda errors, tolerance: next((n for n, e in errors if not e <= 2e-5), None), "The tolerance is given."),
    (lambda errors, tolerance: next((n for n, e in errors if e <= tolerance), None),
     "The first that differs, not that agrees."),
    (lambda errors, tolerance: next((n for n, e in errors if not e <= 0), None),
     "An error within the tolerance is no difference."),
)


def _beyond(error, tolerance):
    return [t for t, e in enumerate(error.tolist()) if e > tolerance]


def _size(x, *axes):
    return x.pow(2).sum(axes).sqrt()


SLIPS["wrong_tokens"] = (
    (lambda a, b, tolerance: _beyond(_size(a - b, 0, 2), tolerance),
     "That is the absolute error: divide by the size of b."),
    (lambda a, b, tolerance: _beyond((_size(a - b, 2) / _size(b, 2)).amax(0), tolerance),
     "One error for a token over all tiles together; a tile alone may be beyond."),
    (lambda a, b, tolerance: _beyond((_size(a - b, 2) / _size(b, 2)).mean(0), tolerance),
     "The squares of all tiles are summed before the root; a mean of the tiles' errors is another number."),
    (lambda a, b, tolerance: _beyond(_size(a - b, 2)[0] / _size(b, 2)[0], tolerance), "All tiles, not only the first."),
    (lambda a, b, tolerance: _beyond(_size(a - b, 0, 2) / b.norm(), tolerance),
     "Relative to the same token of b, not to all of b."),
    (lambda a, b, tolerance: _beyond(_size(a - b, 0, 2) / _size(a, 0, 2), tolerance), "Relative to b, not to a."),
    (lambda a, b, tolerance: [t for t, e in enumerate(_size(a - b, 0, 2) / _size(b, 0, 2)) if e >= tolerance],
     "Above the tolerance: an error equal to it is not."),
    (lambda a, b, tolerance: _beyond((_size(a - b, 0, 2) / _size(b, 0, 2)) ** 2, tolerance), "The root is missing."),
    (lambda a, b, tolerance: _beyond(_size(a - b, 1, 2) / _size(b, 1, 2), tolerance),
     "Those are tiles; tokens are axis 1."),
    (lambda a, b, tolerance: _beyond(_size(a - b, 0, 1) / _size(b, 0, 1), tolerance),
     "Those are channels; tokens are axis 1."),
    (lambda a, b, tolerance: [t + 1 for t in _beyond(_size(a - b, 0, 2) / _size(b, 0, 2), tolerance)],
     "The first token is 0."),
    (lambda a, b, tolerance: _beyond((a - b).abs().amax((0, 2)) / b.abs().amax((0, 2)), tolerance),
     "Norms: all numbers of the token count, not only the largest."),
)


@functools.cache
def _report(name, wrong):
    from weights_tools.verify import compare
    folder, recording, picture = solutions._recorded()
    model = minivl.load(folder)
    with instead(model, name, functools.partial(wrong, model)):
        return compare.compare(folder, recording, pictures=[picture], model=model)


SLIPS["caught_at"] = (
    (lambda name, wrong: None, "Nothing differed: `wrong` must be the method while the comparison runs."),
    (lambda name, wrong: _report(name, wrong).rows[0].stage, "That stage agrees; the first that does not is asked."),
    (lambda name, wrong: [r.stage for r in _report(name, wrong).rows if not r.agrees][-1],
     "The first that differs, not the last."),
    (lambda name, wrong: max(_report(name, wrong).rows, key=lambda r: r.error or 0).stage,
     "The first that differs, not the one with the largest error."),
    (lambda name, wrong: name, "The name of the stage, not of the method."),
    (lambda name, wrong: [r.stage for r in _report(name, wrong).rows if r.agrees][-1],
     "The first that differs, not the last that agrees."),
)


# ---- 09 look inside -------------------------------------------------------------------------------------------------

def _looks(q, k, *, share="repeat_interleave", scale=None, axis=-1):
    k = k.repeat_interleave(len(q) // len(k), 0) if share == "repeat_interleave" else k.repeat(len(q) // len(k), 1, 1)
    return (torch.einsum("he,hse->hs", q, k) / (q.shape[1] ** 0.5 if scale is None else scale)).softmax(axis)


SLIPS["weights_of"] = (
    (lambda q, k: _looks(q, k, scale=1), "The scores are not divided by the root of E."),
    (lambda q, k: _looks(q, k, scale=q.shape[1]), "Divided by E; its root is asked."),
    (lambda q, k: _looks(q, k, share="repeat"), "Heads share in neighbours, 0 0 1 1: repeat_interleave, not repeat."),
    (lambda q, k: _looks(q, k, axis=0), "The softmax goes over the positions S, not over the heads."),
    (lambda q, k: torch.einsum("he,hse->hs", q, k.repeat_interleave(len(q) // len(k), 0)) / q.shape[1] ** 0.5,
     "Those are the scores; the softmax makes weights of them."),
    (lambda q, k: _looks(q, k, scale=1) / q.shape[1] ** 0.5, "Divide before the softmax: weights sum to 1."),
    (lambda q, k: _looks(q, k, scale=k.shape[1] ** 0.5), "Divided by the root of E, the width of a head, not of S."),
    (lambda q, k: _looks(q, k[:1]), "Each group of query heads has a kv head of its own."),
)


SLIPS["normalised"] = (
    (lambda d: d / d.max() if d.max() > 0 else torch.zeros_like(d), "Negative drops become 0: clamp(min=0)."),
    (lambda d: d.clamp(min=0) / d.abs().max().clamp(min=1e-30),
     "By the largest drop, not by the largest absolute value."),
    (lambda d: d.abs() / d.abs().max().clamp(min=1e-30), "A negative drop becomes 0, it does not change its sign."),
    (lambda d: (d - d.min()) / (d.max() - d.min()).clamp(min=1e-30),
     "The smallest is not moved to 0: only negative ones become 0."),
    (lambda d: d.clamp(min=0) / d.clamp(min=0).sum().clamp(min=1e-30), "Divided by the largest, not by the sum."),
    (lambda d: d.clamp(min=0) / d.clamp(min=0).amax(1, keepdim=True).clamp(min=1e-30),
     "One largest for the whole map, not for each row."),
    (lambda d: d.clamp(min=0) / d.clamp(min=0).max(), "If none is positive, that is 0 / 0: all 0 then."),
    (lambda d: d.clamp(min=0) / d.max() if d.max() > 0 else d, "If none is positive all become 0."),
    (lambda d: d.clamp(0, 1), "Divided by the largest, not cut off at 1."),
)


def _read_out(hidden, weight, eps, head, *, mean=False, axis=-1, root=torch.sqrt):
    x = hidden - hidden.mean(-1, keepdim=True) if mean else hidden
    return x / root(x.pow(2).mean(axis, keepdim=True) + eps) * weight @ head.T


SLIPS["lens_ids"] = (
    (lambda x, w, eps, head: _read_out(x, w, 0.0, head).argmax(-1).tolist(),
     "eps is missing: a state near 0 is divided by 0."),
    (lambda x, w, eps, head: _read_out(x, 1, eps, head).argmax(-1).tolist(), "The norm's weight is missing."),
    (lambda x, w, eps, head: _read_out(x, w, eps, head, mean=True).argmax(-1).tolist(),
     "RMSNorm does not take the mean off."),
    (lambda x, w, eps, head: _read_out(x, w, eps, head).argmin(-1).tolist(), "The largest score, not the smallest."),
    (lambda x, w, eps, head: _read_out(x, w, eps, head).argmax(0).tolist(),
     "The best id of each layer: argmax over the last axis."),
    (lambda x, w, eps, head: [int(_read_out(x, w, eps, head)[-1].argmax())], "Every layer, not only the last."),
    (lambda x, w, eps, head: _read_out(x, w, eps, head, axis=0).argmax(-1).tolist(),
     "Each layer's vector has a norm of its own: over the last axis."),
    (lambda x, w, eps, head: _read_out(x, 1 + w, eps, head).argmax(-1).tolist(),
     "Times the weight, not times 1 + weight."),
    (lambda x, w, eps, head: _read_out(x, w, eps, head).abs().argmax(-1).tolist(),
     "The largest score, not the largest absolute value."),
)


def _grafted(pipe, question, picture, other, graft):
    """Ask about `picture` with graft(its visual tokens, those of `other`)."""
    a, b = (pixels_of(pipe, p, max_num=1) for p in (picture, other))
    with torch.no_grad():
        a_tokens, b_tokens = (pipe.model.visual_tokens(x) for x in (a, b))
    return by_hand(pipe, question, a, graft(a_tokens, b_tokens))


def _row(a, b, token):
    out = a.clone()
    out[0, token] = b[0, token]
    return out


SLIPS["patched"] = (
    (lambda pipe, q, a, b, k: _grafted(pipe, q, a, b, lambda x, y: x), "No token is replaced."),
    (lambda pipe, q, a, b, k: _grafted(pipe, q, a, b, lambda x, y: y),
     "Only row `token` comes from the other picture, not all."),
    (lambda pipe, q, a, b, k: _grafted(pipe, q, a, b, lambda x, y: _row(y, x, k)),
     "The pictures are exchanged: `picture` gets one row of `other`."),
    (lambda pipe, q, a, b, k: _grafted(pipe, q, a, b, lambda x, y: _row(x, y, k - 1)), "Tokens are counted from 0."),
    (lambda pipe, q, a, b, k: _grafted(pipe, q, a, b, lambda x, y: _row(x, 0 * y, k)),
     "The row comes from the other picture; you give zeros."),
    (lambda pipe, q, a, b, k: _grafted(pipe, q, a, b, lambda x, y: (x + y) / 2), "Replaced, not averaged."),
)


# ---- 10 change it ---------------------------------------------------------------------------------------------------

SLIPS["tokens_at_factor"] = (
    (lambda text, tiles, s, f: text + tiles * (s // f), "A tile has two sides: squared."),
    (lambda text, tiles, s, f: text + tiles * s ** 2, "Those are the patches; f times f of them become one token."),
    (lambda text, tiles, s, f: text + tiles * s ** 2 // f, "f times f patches become one token, not f."),
    (lambda text, tiles, s, f: text + (s // f) ** 2, "Every tile has that many."),
    (lambda text, tiles, s, f: tiles * (s // f) ** 2, "The text's tokens count too."),
    (lambda text, tiles, s, f: text + tiles * (s // 2) ** 2, "f need not be 2."),
    (lambda text, tiles, s, f: text + tiles * ((s // f) ** 2 + 1), "CLS is dropped before."),
    (lambda text, tiles, s, f: text + tiles * (s // f) ** 2 + 2,
     "Nothing is to be added for <img> and </img>: `text` has them."),
)


def _thrifty(width, height, max_num, R, *, room=lambda x: max(1, round(x)), tie=-1, limit=True):
    room = room(width * height / R ** 2)
    most = min(max_num, room) if limit else room
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)]
    return min(grids, key=lambda g: (abs(width / height - g[0] / g[1]), tie * g[0] * g[1]))


SLIPS["thrifty_grid"] = (
    (lambda w, h, most, R: _thrifty(w, h, most, R, tie=1), "On a tie the grid with more tiles."),
    (lambda w, h, most, R: _thrifty(w, h, most, R, room=lambda x: most),
     "Never more tiles than the picture has pixels for."),
    (lambda w, h, most, R: _thrifty(w, h, most, R, limit=False), "At most max_num tiles."),
    (lambda w, h, most, R: _thrifty(w, h, most, R, room=lambda x: max(1, int(x))), "Rounded to nearest, not down."),
    (lambda w, h, most, R: _thrifty(w, h, most, R, room=lambda x: max(1, math.ceil(x))), "Rounded to nearest, not up."),
    (lambda w, h, most, R: _thrifty(w, h, most, R)[::-1],
     "(columns, rows) in this order, and columns / rows beside width / height."),
    (lambda w, h, most, R: _thrifty(w, h, most, R, room=round), "A tiny picture gets one tile too: max(1, ...)."),
    (lambda w, h, most, R: tiling.choose_grid(w, h, max_num=most),
     "That is the package's rule; on a tie and for small pictures this one differs."),
)


def _labelled(ids, answers, inside=lambda k, a, b: a <= k < b, outside=-100):
    return [i if any(inside(k, a, b) for a, b in answers) else outside for k, i in enumerate(ids)]

SLIPS["merged"] = (
    (lambda W, A, B, alpha: W + alpha * B @ A, "alpha is divided by r, the number of rows of A."),
    (lambda W, A, B, alpha: W + B @ A, "The factor alpha / r is missing."),
    (lambda W, A, B, alpha: W + B @ A / len(A), "alpha is missing in the factor alpha / r."),
    (lambda W, A, B, alpha: alpha / len(A) * B @ A, "That is the addition alone: W + ..."),
    (lambda W, A, B, alpha: alpha / len(A) * (W + B @ A), "Only the addition has the factor, not W."),
    (lambda W, A, B, alpha: W + alpha / A.shape[1] * B @ A, "r is the number of rows of A, not of its columns."),
    (lambda W, A, B, alpha: W + alpha / len(B) * B @ A, "r is the number of rows of A, not of B."),
    (lambda W, A, B, alpha: W - alpha / len(A) * B @ A, "Added, not taken away."),
    (lambda W, A, B, alpha: W + (A.T @ B.T), "A.T @ B.T is [I, O]; W is [O, I]: B @ A."),
)


def _damage(model, ids, rounded, chosen=lambda layer, k: True, *, error=_relative, rows=lambda scores: scores[-1],
            more=()):
    def run():
        with torch.no_grad():
            return rows(model(torch.tensor([ids]))[0])
    right = run()
    weights = [linear.weight for layer, block in enumerate(model.language_model.layers)
               for k, linear in enumerate(block.linears.values()) if chosen(layer, k)]
    weights += more
    kept = [w.data for w in weights]
    try:
        for w in weights:
            w.data = rounded(w.data)
        wrong = run()
    finally:
        for w, data in zip(weights, kept):
            w.data = data
    return float(error(wrong, right))


SLIPS["damage"] = (
    (lambda m, ids, f: _damage(m, ids, f, error=lambda a, b: (a - b).norm()), "Relative: divided by |right|."),
    (lambda m, ids, f: _damage(m, ids, f, error=lambda a, b: _relative(b, a)), "Relative to what is right."),
    (lambda m, ids, f: _damage(m, ids, f, error=lambda a, b: (a - b).abs().max() / b.abs().max()),
     "|x| is the norm, the root of the summed squares, not the largest number."),
    (lambda m, ids, f: _damage(m, ids, f, rows=lambda scores: scores), "The scores at the last token alone, [-1]."),
    (lambda m, ids, f: _damage(m, ids, f, rows=lambda scores: scores[0]), "That is the first token: take the last."),
    (lambda m, ids, f: _damage(m, ids, f, lambda layer, k: k < 4), "All seven linears: the mlp's three too."),
    (lambda m, ids, f: _damage(m, ids, f, lambda layer, k: k > 3), "All seven linears: q, k, v and o too."),
    (lambda m, ids, f: _damage(m, ids, f, lambda layer, k: layer == 0), "Every layer, not the first alone."),
    (lambda m, ids, f: _damage(m, ids, f, more=[m.language_model.head.weight]),
     "The head is none of the layers' linears: it stays as it is."),
    (lambda m, ids, f: _damage(m, ids, lambda w: f(w.T).T), "rounded(weight), as it is stored, not turned."),
    (lambda m, ids, f: 0.0, "Both runs are the same: the weights must be the rounded ones in one of them."),
)


# ---- 11 train it ----------------------------------------------------------------------------------------------------

def _learning(names, stage, wrong=None, adapters=("LoRA",)):
    parts = {"1": ("mlp1.",), "1.5": ("vision_model.", "mlp1."), **(wrong or {})}
    return [n for n in names if (stage in adapters if n.endswith((".A", ".B")) else
                                 stage != "LoRA" and n.startswith(parts.get(stage, ("",))))]


SLIPS["learning"] = (
    (lambda names, stage: _learning(names, stage, adapters=("LoRA", "2", "MPO")),
     "Adapters are left out of the stages that have none."),
    (lambda names, stage: _learning(names, stage, {"1.5": ("vision_model.",)}), "Stage 1.5: the projector learns too."),
    (lambda names, stage: _learning(names, stage, {"1": ("vision_model.", "mlp1.")}), "Stage 1: the projector alone."),
    (lambda names, stage: _learning(names, stage, {"2": ("language_model.",)}), "Stage 2: all, not the decoder alone."),
    (lambda names, stage: _learning(names, stage, {"MPO": ("language_model.",)}), "MPO freezes nothing."),
    (lambda names, stage: [n for n in names if n not in _learning(names, stage)], "Those that learn, not the frozen."),
    (lambda names, stage: sorted(_learning(names, stage)), "In the order they are given."),
    (lambda names, stage: [n for n in names if ".linear." in n or n.endswith((".A", ".B"))] if stage == "LoRA" else
     _learning(names, stage), "W itself, in `.linear`, is frozen: only A and B learn."),
    (lambda names, stage: [] if stage == "LoRA" else _learning(names, stage), "With LoRA the adapters learn."),
)


def _terms(scores, ids, labels, shift=1, masked=True, log_p=lambda row: row.log_softmax(0), label=1):
    return torch.stack([-log_p(scores[t])[ids[t + shift]] for t in range(len(ids) - shift)
                        if not masked or labels[t + label] != -100])


SLIPS["masked_loss"] = (
    (lambda scores, ids, labels: float(_terms(scores, ids, labels, shift=0, label=0).mean()),
     "Position t foresees token t + 1: shift by one."),
    (lambda scores, ids, labels: float(_terms(scores, ids, labels, masked=False).mean()),
     "Only where the label is not -100."),
    (lambda scores, ids, labels: float(_terms(scores, ids, labels).sum()), "The mean, not the sum."),
    (lambda scores, ids, labels: float(_terms(scores, ids, labels).sum()) / len(ids),
     "The mean over the learned tokens, not over all."),
    (lambda scores, ids, labels: float(_terms(scores, ids, labels).sum()) / (len(ids) - 1),
     "The mean over the learned tokens, not over all that are foreseen."),
    (lambda scores, ids, labels: -float(_terms(scores, ids, labels).mean()), "Minus log p: a loss is not negative."),
    (lambda scores, ids, labels: float(_terms(scores, ids, labels, log_p=lambda row: row).mean()),
     "Scores are no log-probabilities yet: log_softmax."),
    (lambda scores, ids, labels: float(_terms(scores, ids, labels, log_p=lambda row: row.softmax(0) - 1).mean()),
     "-log p, not 1 - p."),
    (lambda scores, ids, labels: float(_terms(scores, ids, labels, label=0).mean()),
     "The label of the token that is foreseen decides: labels[t + 1]."),
    (lambda scores, ids, labels: float(_terms(scores, ids, labels).mean()) / math.log(2), "The natural logarithm."),
)


SLIPS["labels_of"] = (
    (lambda ids, answers: _labelled(ids, answers, lambda k, a, b: a <= k <= b), "`end` is not included."),
    (lambda ids, answers: _labelled(ids, answers, lambda k, a, b: a < k < b), "`start` is included."),
    (lambda ids, answers: _labelled(ids, answers)[1:] + [-100], "Not shifted: the loss does that."),
    (lambda ids, answers: _labelled(ids, answers, outside=0), "0 is a token's id; outside of the answers stands -100."),
    (lambda ids, answers: _labelled(ids, answers[:1]), "All answers, not only the first."),
    (lambda ids, answers: [i for a, b in answers for i in ids[a:b]], "As long as ids: -100 outside of the answers."),
    (lambda ids, answers: [-100 if label == i else i for label, i in zip(_labelled(ids, answers), ids)],
     "The other way round: the answers are learned, the rest is -100."),
    (lambda ids, answers: [label == i for label, i in zip(_labelled(ids, answers), ids)],
     "The ids themselves, not a mask."),
)


SLIPS["mixed_lessons"] = (
    (lambda new, old, every, n: [old(i) if i % every == 0 else new(i) for i in range(n)],
     "The old one is the last of each `every`: index 1, 3, 5 for 2."),
    (lambda new, old, every, n: [old(i // every) if i % every == every - 1 else new(i) for i in range(n)],
     "Each is called with its own index, old ones too."),
    (lambda new, old, every, n: [old(i) if i % every == every - 1 else new(i - i // every) for i in range(n)],
     "Each is called with its own index, new ones too."),
    (lambda new, old, every, n: [new(i) for i in range(n - n // every)] + [old(i) for i in range(n - n // every, n)],
     "Mixed, not the old ones at the end."),
    (lambda new, old, every, n: [new(i) if i % every == every - 1 else old(i) for i in range(n)],
     "The other way round."),
    (lambda new, old, every, n: [old(i) if i % (every + 1) == every else new(i) for i in range(n)],
     "Of `every` examples one is old, not of `every` + 1."),
    (lambda new, old, every, n: [x for i in range(n) for x in ([new(i), old(i)] if (i + 1) % every == 0 else [new(i)])],
     "n examples in all: an old one takes the place of a new one."),
    (lambda new, old, every, n: [old(i) if i and i % every == 0 else new(i) for i in range(1, n + 1)],
     "The first index is 0."),
    (lambda new, old, every, n: [new(i) for i in range(n)], "No old ones are among them."),
)


# ---- 12 make int4 ---------------------------------------------------------------------------------------------------

def _middle(f):
    return f / (f.max() * f.min()).sqrt()


SLIPS["smoothing_factors"] = (
    (lambda mean, alpha: mean ** alpha, "Scaled, too: the largest times the smallest is 1."),
    (lambda mean, alpha: _middle(mean * alpha), "To the power alpha, not times it."),
    (lambda mean, alpha: _middle(mean ** -alpha), "Loud channels get large factors: their weights grow."),
    (lambda mean, alpha: _middle(mean ** (1 - alpha)), "To the power alpha, not 1 - alpha."),
    (lambda mean, alpha: (f := mean ** alpha) / (f.max() * f.min()), "The root of the product is missing."),
    (lambda mean, alpha: (f := mean ** alpha) / f.max(), "Not the largest is 1 but the largest times the smallest."),
    (lambda mean, alpha: (f := mean ** alpha) / f.mean(), "Not the mean is 1 but the largest times the smallest."),
    (lambda mean, alpha: mean, "Those are the means: to the power alpha, then scaled."),
)


def _lost(X, W, f, rounded, *, inputs=lambda X, f: X / f, weights=lambda W, f: W * f, size=lambda e: e.pow(2).sum(),
          of=lambda right, wrong: right):
    right = X @ W.T
    wrong = inputs(X, f) @ rounded(weights(W, f)).T
    return float(size(wrong - right) / size(of(right, wrong)))


SLIPS["output_error"] = (
    (lambda X, W, f, rounded: _lost(X, W, f, rounded, inputs=lambda X, f: X), "The inputs are divided by f."),
    (lambda X, W, f, rounded: _lost(X, W, 1, rounded), "Rounded is W * f, not W; else f changes nothing."),
    (lambda X, W, f, rounded: _lost(X, W, 1 / f, rounded), "The other way round: X / f and W * f."),
    (lambda X, W, f, rounded: float((rounded(W * f) / f - W).pow(2).sum() / W.pow(2).sum()),
     "That is the weights' error; the outputs' is asked."),
    (lambda X, W, f, rounded: _lost(X, W, f, rounded) ** 0.5, "Squares over squares, without a root."),
    (lambda X, W, f, rounded: _lost(X, W, f, rounded, of=lambda right, wrong: torch.ones(1)),
     "Divided by the outputs' square."),
    (lambda X, W, f, rounded: _lost(X, W, f, rounded, of=lambda right, wrong: wrong),
     "Divided by the square of the right outputs, not of the wrong ones."),
    (lambda X, W, f, rounded: _lost(X, W, f, rounded, size=lambda e: e.abs().sum()), "Squares, not absolute values."),
    (lambda X, W, f, rounded: _lost(X, W, f, rounded, size=lambda e: e.pow(2).sum(1)[0]),
     "All tokens, not only the first."),
    (lambda X, W, f, rounded: float(((X / f @ rounded(W * f).T - X @ W.T).pow(2).sum(1)
                                     / (X @ W.T).pow(2).sum(1)).mean()),
     "One quotient of two sums over all tokens, not the mean of one for each."),
    (lambda X, W, f, rounded: 100 * _lost(X, W, f, rounded), "A share, not per cent."),
)


def _share(w, X, shares, rounded, *, most=lambda w: w.abs().max(), cut=lambda w, most: w.clamp(-most, most),
           then=lambda rounded, w, most, cut: rounded(cut(w, most)), beside=lambda w, cut: w,
           error=lambda X, off: (X @ off).pow(2).sum(), pick=min):
    errors = []
    for share in shares:
        level = share * most(w)
        off = then(rounded, w, level, cut) - beside(w, cut(w, level))
        errors.append(float(error(X, off)))
    return shares[errors.index(pick(errors))]


SLIPS["best_share"] = (
    (lambda w, X, shares, f: _share(w, X, shares, f, beside=lambda w, cut: cut),
     "Wrong is what differs from w as it was, not from what was cut."),
    (lambda w, X, shares, f: _share(w, X, shares, f, error=lambda X, off: off.pow(2).sum()),
     "That is the weights' error; the output's counts, so X is needed."),
    (lambda w, X, shares, f: _share(w, X, shares, f, cut=lambda w, most: w.clamp(max=most)),
     "Negative weights are cut as well: clamp(-most, most)."),
    (lambda w, X, shares, f: _share(w, X, shares, f, most=torch.max), "The largest |w|, not the largest w."),
    (lambda w, X, shares, f: _share(w, X, shares, f, pick=max), "The least error, not the largest."),
    (lambda w, X, shares, f: _share(w, X, shares, f, then=lambda rounded, w, most, cut: cut(rounded(w), most)),
     "First cut, then round: the steps must become finer."),
    (lambda w, X, shares, f: _share(w, X, shares, f, error=lambda X, off: (X @ off).sum().abs()),
     "Each token's error is squared by itself before the sum."),
    (lambda w, X, shares, f: _share(w, X, shares, f, error=lambda X, off: (X @ off)[0] ** 2),
     "All tokens, not only the first."),
    (lambda w, X, shares, f: shares[0], "No other share is tried: each gives an error."),
    (lambda w, X, shares, f: shares.index(_share(w, X, shares, f)), "The share itself, not its place in the list."),
)


def _mlp_error(model, ids, i, f, rounded, *, norm=lambda n, f: n / f, weights=lambda rounded, w, f: rounded(w * f),
               before="post_attention_layernorm", chosen=("gate_proj", "up_proj"), error=_relative,
               rows=lambda scores: scores[-1]):
    layer = model.language_model.layers[i]
    norm_weight = getattr(layer, before).weight
    linears = [getattr(layer.mlp, name).weight for name in chosen]

    def run():
        with torch.no_grad():
            return rows(model(torch.tensor([ids]))[0])
    right = run()
    kept = [w.data for w in (norm_weight, *linears)]
    try:
        norm_weight.data = norm(norm_weight.data, f)
        for w in linears:
            w.data = weights(rounded, w.data, f)
        return float(error(run(), right))
    finally:
        for w, data in zip((norm_weight, *linears), kept):
            w.data = data


SLIPS["smoothed_error"] = (
    (lambda *case: _mlp_error(*case, norm=lambda n, f: n), "The norm's weight is divided by f."),
    (lambda *case: _mlp_error(*case, norm=lambda n, f: n * f, weights=lambda rounded, w, f: rounded(w / f)),
     "The other way round: the norm is divided, the channels are multiplied."),
    (lambda *case: _mlp_error(*case, weights=lambda rounded, w, f: w * f), "The two weights are rounded, too."),
    (lambda *case: _mlp_error(*case, weights=lambda rounded, w, f: rounded(w) * f),
     "Times f first, then rounded; else f changes nothing."),
    (lambda *case: _mlp_error(*case, chosen=("gate_proj",)), "Both read the norm: up_proj, too."),
    (lambda *case: _mlp_error(*case, chosen=("up_proj",)), "Both read the norm: gate_proj, too."),
    (lambda *case: _mlp_error(*case, before="input_layernorm"),
     "The norm before gate and up is post_attention_layernorm; input_layernorm feeds q, k and v."),
    (lambda model, ids, i, f, rounded: _mlp_error(model, ids, 0, f, rounded), "Layer i, counted from 0."),
    (lambda *case: _mlp_error(*case, error=lambda a, b: (a - b).norm()), "Relative: divided by |right|."),
    (lambda *case: _mlp_error(*case, error=lambda a, b: _relative(b, a)), "Relative to what is right."),
    (lambda *case: _mlp_error(*case, error=lambda a, b: (a - b).abs().max() / b.abs().max()),
     "|x| is the norm, the root of the summed squares, not the largest number."),
    (lambda *case: _mlp_error(*case, rows=lambda scores: scores), "The scores at the last token alone, [-1]."),
    (lambda *case: 0.0, "Both runs are the same: one of them must be of the changed layer."),
)


# ---- 13 preferences -------------------------------------------------------------------------------------------------

def _preferred(x):
    return -F.logsigmoid(x)


SLIPS["preference"] = (
    (lambda c, r, c0, r0, b: _preferred((c - c0) - (r - r0)), "beta is missing."),
    (lambda c, r, c0, r0, b: _preferred(b * ((r - r0) - (c - c0))),
     "A sign is turned: chosen above rejected, the model minus the reference."),
    (lambda c, r, c0, r0, b: _preferred(b * (c - r)),
     "The reference is missing: what counts is what an answer gained."),
    (lambda c, r, c0, r0, b: _preferred(b * ((c - r0) - (r - c0))),
     "Each answer against itself under the reference: c with c, r with r."),
    (lambda c, r, c0, r0, b: -_preferred(b * ((c - c0) - (r - r0))),
     "A loss falls as the margin grows: minus the log."),
    (lambda c, r, c0, r0, b: torch.sigmoid(b * ((c - c0) - (r - r0))), "The logarithm is missing, and the minus."),
    (lambda c, r, c0, r0, b: _preferred(b * (c - r) - (c0 - r0)), "beta stands before the reference's part, too."),
    (lambda c, r, c0, r0, b: _preferred(b * (c - c0)) + _preferred(b * (r0 - r)),
     "The logistic function of the difference, not one for each answer: that is L_q."),
)


def _running(means):
    return means.cumsum(0) / torch.arange(1, len(means) + 1)


def _together(chosen, rejected):
    return torch.cat([chosen, rejected], dim=1).mean(1)


def _decayed(means):
    found = means[:1]
    for mean in means[1:]:
        found = torch.cat([found, 0.9 * found[-1:] + 0.1 * mean])
    return found


SLIPS["shifts"] = (
    (lambda c, r: _together(c, r), "Those are the means of each step alone; delta remembers all before."),
    (lambda c, r: _running(c.mean(1)), "Rejected answers count as well."),
    (lambda c, r: _running(r.mean(1)), "Chosen answers count as well."),
    (lambda c, r: _together(c, r).cumsum(0), "The sum so far, but the mean is asked: divide by the number of steps."),
    (lambda c, r: torch.cat([torch.zeros(1), _running(_together(c, r))[:-1]]),
     "A step's batch is part of its own mean."),
    (lambda c, r: _running(c.mean(1) + r.mean(1)), "The mean of both kinds, not their sum."),
    (lambda c, r: _running(c.mean(1) - r.mean(1)), "The mean of all rewards, not of the margin."),
    (lambda c, r: _running(_together(c, r))[-1:].expand(len(c)), "Each step's own delta, not the last for all."),
    (lambda c, r: _decayed(_together(c, r)), "All steps count the same: a plain mean, not a decaying one."),
)


def _cut_words(text, ratio, *, split=lambda text: text.split(" "), count=int, part=lambda words, n: words[:n],
               strip=str.strip):
    words = split(text)
    return strip(" ".join(part(words, count(len(words) * ratio))))


SLIPS["truncate"] = (
    (lambda text, ratio: _cut_words(text, ratio, count=math.ceil), "Rounded down."),
    (lambda text, ratio: _cut_words(text, ratio, split=str.split), 'Words stand between single spaces: split(" ").'),
    (lambda text, ratio: text[:int(len(text) * ratio)].strip(), "Words are counted, not letters."),
    (lambda text, ratio: _cut_words(text, ratio, part=lambda words, n: words[n:]), "The first words, not the others."),
    (lambda text, ratio: _cut_words(text, ratio, strip=str), "White space at the ends goes."),
    (lambda text, ratio: _cut_words(text, 0.5), "You leave the ratio at a half."),
    (lambda text, ratio: _cut_words(text, ratio, count=lambda n: max(1, int(n))), "Perhaps no word is left."),
    (lambda text, ratio: _cut_words(text.strip(), ratio), "First the cut, then the strip: a space before counts."),
)


def _gains(c, r, c0, r0, n, m, b, *, chosen=lambda gain, n, m: gain / n, rejected=lambda gain, n, m: gain / m):
    return _preferred(b * (chosen(c - c0, n, m) - rejected(r - r0, n, m)))


SLIPS["per_token"] = (
    (lambda c, r, c0, r0, n, m, b: _preferred(b * ((c - c0) - (r - r0))),
     "Nothing is divided by its number of tokens."),
    (lambda c, r, c0, r0, n, m, b: _gains(c, r, c0, r0, m, n, b), "Each answer by its own tokens: n_c for the chosen."),
    (lambda *case: _gains(*case, rejected=lambda gain, n, m: gain / n), "The rejected answer has n_r tokens."),
    (lambda *case: _gains(*case, chosen=lambda gain, n, m: gain / m), "The chosen answer has n_c tokens."),
    (lambda *case: _gains(*case, rejected=lambda gain, n, m: gain), "The rejected answer's gain is divided as well."),
    (lambda *case: _gains(*case, chosen=lambda gain, n, m: gain), "The chosen answer's gain is divided as well."),
    (lambda *case: _gains(*case[:6], 1.0), "beta is missing."),
    (lambda c, r, c0, r0, n, m, b: _preferred(b * (c / n - r / m)), "The reference is missing."),
    (lambda c, r, c0, r0, n, m, b: _preferred(b * ((c / n - c0) - (r / m - r0))),
     "The reference's sums are divided as well."),
    (lambda c, r, c0, r0, n, m, b: _gains(r, c, r0, c0, m, n, b), "Chosen above rejected, not the other way round."),
    (lambda c, r, c0, r0, n, m, b: _preferred(b * ((c - c0) - (r - r0)) / (n + m)),
     "Each gain by its own tokens, not both by all."),
)


# ---- 14 measure -----------------------------------------------------------------------------------------------------

def _uneven(b, c, *, terms=lambda b, c: range(min(b, c) + 1), sides=2, most=1.0):
    return min(most, sides * sum(math.comb(b + c, i) for i in terms(b, c)) / 2 ** (b + c))


SLIPS["mcnemar_p"] = (
    (lambda b, c: _uneven(b, c, sides=1), "Both sides count: as uneven the other way round is as likely. Twice."),
    (lambda b, c: _uneven(b, c, most=math.inf), "It is a probability: at most 1."),
    (lambda b, c: _uneven(b, c, terms=lambda b, c: range(min(b, c))),
     "The sum includes min(b1, b2) itself: range(.. + 1)."),
    (lambda b, c: _uneven(b, c, terms=lambda b, c: [min(b, c)]), "So uneven or more: the sum of all smaller i, too."),
    (lambda b, c: _uneven(b, c, terms=lambda b, c: range(max(b, c) + 1)),
     "Up to the smaller of the two, not the larger."),
    (lambda b, c: _uneven(b, c, terms=lambda b, c: range(b + 1)),
     "Up to the smaller of the two, whichever comes first."),
    (lambda b, c: math.erfc(abs(b - c) / math.sqrt(2 * (b + c) or 1)),
     "That is the approximation by chi square; exact is the sum of binomials."),
    (lambda b, c: 1 - _uneven(b, c), "Small where the split is uneven: not 1 minus it."),
)


def _told(text, *, words=lambda text: re.findall("[a-z]+", text.lower()), both="Unknown", neither="Unknown",
          part=lambda words: words):
    found = part(words(text))
    if "yes" in found and "no" in found:
        return both
    return "Yes" if "yes" in found else "No" if "no" in found else neither


SLIPS["says"] = (
    (lambda text: _told(text, words=str.lower),
     '"know" and "not" hold a "no", "yesterday" a "yes": compare whole words.'),
    (lambda text: _told(text, words=lambda text: re.findall("[A-Za-z]+", text)),
     "Capitals do not matter: lower() first."),
    (lambda text: _told(text, words=lambda text: text.lower().split()),
     "A comma or a stop hangs on the word: take marks off."),
    (lambda text: _told(text, both="Yes"), "With both words in it the answer is Unknown, not Yes."),
    (lambda text: _told(text, both="No"), "With both words in it the answer is Unknown, not No."),
    (lambda text: _told(text, neither="No"), "With neither word in it the answer is Unknown, not No."),
    (lambda text: _told(text, part=lambda words: words[:1]), "The word may stand anywhere, not only first."),
    (lambda text: _told(text, part=lambda words: words[-1:]), "The word may stand anywhere, not only last."),
    (lambda text: _told(text).lower(), '"Yes", "No" and "Unknown", with a capital.'),
)


def _hits(indices, right, *, key=lambda index: index % 10**6, hit=all, scale=100):
    questions = {}
    for index, one in zip(indices, right):
        questions.setdefault(key(index), []).append(one)
    return scale * torch.tensor([sum(right) / len(right), sum(map(hit, questions.values())) / len(questions)])


def _in_fours(indices, right):
    fours = [all(right[i:i + 4]) for i in range(0, len(right), 4)]
    return 100 * torch.tensor([sum(right) / len(right), sum(fours) / len(fours)])


SLIPS["circular_hits"] = (
    (lambda i, r: _hits(i, r, key=lambda index: index // 10**6),
     "index // 10**6 is the turn; index % 10**6 the question."),
    (lambda i, r: _hits(i, r, key=lambda index: index), "Each row stands alone: rows of one question belong together."),
    (lambda i, r: _hits(i, r, hit=any), "All rows of a question must be right, not one of them."),
    (lambda i, r: _hits(i, r, hit=lambda of: sum(of) / len(of)),
     "A question counts whole or not at all, not by its share."),
    (lambda i, r: _hits(i, r, hit=lambda of: sum(of) > len(of) / 2), "All rows of a question, not most."),
    (lambda i, r: _hits(i, r, scale=1), "Per cent: times 100."),
    (lambda i, r: _hits(i, r).flip(0), "[plain, circular], in this order."),
    (_in_fours, "Rows come in any order, and not each question has four: go by the index."),
    (lambda i, r: torch.stack([_hits(i, r)[0], _hits(i, r)[1] * len({x % 10**6 for x in i}) / len(i)]),
     "Circular is a share of the questions, not of the rows."),
)


def _between(gaps, low=0.025, high=0.975):
    return torch.quantile(gaps, torch.tensor([low, high]))


def _drawn_gaps(a, b, drawn, scale=100):
    return scale * (b[drawn].mean(1) - a[drawn].mean(1))


def _apart(a, b, drawn):
    return 100 * (b[drawn].mean(1) - a[drawn.flip(0)].mean(1))


def _by_spread(a, b, drawn):
    gaps = _drawn_gaps(a, b, drawn)
    return torch.stack([gaps.mean() - 1.96 * gaps.std(), gaps.mean() + 1.96 * gaps.std()])


SLIPS["paired_interval"] = (
    (lambda a, b, d: _between(_drawn_gaps(b, a, d)), "Second minus first."),
    (lambda a, b, d: _between(_apart(a, b, d)), "The same questions of both runs in each draw."),
    (lambda a, b, d: torch.stack([_between(100 * b[d].mean(1))[0] - _between(100 * a[d].mean(1))[1],
                                  _between(100 * b[d].mean(1))[1] - _between(100 * a[d].mean(1))[0]]),
     "The interval of the differences, not the difference of two intervals."),
    (lambda a, b, d: _between(_drawn_gaps(a, b, d), 0.05, 0.95), "95 % lie between the quantiles 0.025 and 0.975."),
    (lambda a, b, d: _between(_drawn_gaps(a, b, d, scale=1)), "In points: times 100."),
    (lambda a, b, d: torch.stack([_drawn_gaps(a, b, d).min(), _drawn_gaps(a, b, d).max()]),
     "The middle 95 %, not all draws."),
    (_by_spread, "Quantiles of the draws, not 1.96 times their spread."),
    (lambda a, b, d: _between(100 * b[d].mean(1)), "That is the second run's score; the difference is asked."),
    (lambda a, b, d: _between(100 * (b - a)[d].mean(0)), "The mean over the questions of a draw: axis 1."),
    (lambda a, b, d: _between(100 * (b - a)), "Nothing is drawn: the scores of `drawn` are asked."),
)
