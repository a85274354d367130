"""The graders of the notebooks: what is wrong is caught and named; what is right passes, however it is written."""
import functools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import minivl
from minivl import awq, qwen2, tiling

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
import lab
import slips
import solutions

MODELS = [name for name, exercise in solutions.EXERCISES.items() if callable(exercise.cases)]
OTHERS = [name for name in solutions.EXERCISES if name not in MODELS]


def parametrized(names, quick):
    """Exercises that ask a model take long together: some are tried each time, the rest by `make test-all`."""
    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=pytest.mark.slow) if name in MODELS and name not in quick else name for name in names])


def graded(name, attempt, capsys, failures=1):
    """What `lab.grade` prints for an attempt, with the hint if it fails."""
    @functools.wraps(attempt)
    def wrapper(*case):
        return attempt(*case)
    wrapper.__name__ = name
    lab._failures[name] = failures
    capsys.readouterr()
    lab.grade(wrapper)
    return capsys.readouterr().out


GRIDS = functools.cache(tiling.choose_grid)


@pytest.fixture(autouse=True)
def known_grids(monkeypatch):
    """`largest_square` asks for the grids of 2,000 squares at each call."""
    monkeypatch.setattr(tiling, "choose_grid", GRIDS)


@pytest.fixture
def quick(monkeypatch):
    """An exercise whose cases and answers are made once; the model is looked at only at the end."""
    def prepare(name):
        exercise = solutions.EXERCISES[name]
        if name in MODELS:
            cases = exercise.cases()
            before = solutions.fingerprint()
            ends.append(lambda: solutions.changed(before))
            monkeypatch.setattr(solutions, "fingerprint", lambda: None)
            monkeypatch.setattr(solutions, "changed", lambda before: False)
            exercise = replace(exercise, cases=lambda: cases)
        monkeypatch.setitem(solutions.EXERCISES, name, replace(exercise, spec=once(exercise.spec)))

    def once(function):
        """By the identity of the arguments: those of `cases`, which stay."""
        known = {}

        def answer(*case):
            key = tuple(map(id, case))
            if key not in known:
                known[key] = function(*case)
            return known[key]
        return answer
    attempt, known, ends = lab._attempt, {}, []

    def tried(function, case):
        key = getattr(function, "__wrapped__", function), tuple(map(id, case))
        if key not in known:
            known[key] = attempt(function, case), case      # the case is kept: its ids are not given to others
        return known[key][0]
    monkeypatch.setattr(lab, "_attempt", tried)
    yield prepare
    monkeypatch.undo()
    assert not any(changed() for changed in ends)


@parametrized(solutions.EXERCISES, quick=("without_layer", "layer_errors", "never_twice"))
def test_slips_are_caught_and_named(name, quick, capsys):
    """Each by its own sentence, so their answers differ somewhere from the right ones and from each other."""
    quick(name)
    assert len(slips.SLIPS[name]) >= 5
    for wrong, words in slips.SLIPS[name]:
        shown = graded(name, wrong, capsys)
        assert shown.startswith(f"[!] {name}("), f"not caught: {words}\n{shown}"
        assert shown.endswith(f"\n    Hint: {words}\n"), f"{words}\n{shown}"
        assert len(words) <= 120 and words.endswith((".", "`", ">", ")")), words


def test_slips_belong_to_exercises():
    assert set(slips.SLIPS) == set(solutions.EXERCISES)


@pytest.mark.parametrize("name", OTHERS)
def test_what_any_answer_may_have_wrong(name, capsys):
    """Without an answer, with one that fits the first case, of another type or dtype, nan, or the arguments changed."""
    exercise = solutions.EXERCISES[name]
    right = exercise.solution
    first = exercise.spec(*exercise.cases[0])
    assert "gave None, wanted" in graded(name, lambda *case: None, capsys)
    assert "[!]" in graded(name, lambda *case: first, capsys)
    if isinstance(first, torch.Tensor):
        assert "gave a list, wanted a tensor" in graded(name, lambda *case: right(*case).tolist(), capsys)
        other = torch.int64 if first.dtype == torch.bool else torch.float64
        message = f"gave {str(other)[6:]} numbers, wanted {str(first.dtype)[6:]}"
        assert message in graded(name, lambda *case: right(*case).to(other), capsys)
        assert "wanted" in graded(name, lambda *case: right(*case)[None], capsys)
        if first.dtype != torch.bool:
            assert ": nan, wanted" in graded(name, lambda *case: right(*case) * float("nan"), capsys)
    elif isinstance(first, (list, tuple)):
        assert "wanted" in graded(name, lambda *case: torch.tensor(0), capsys)
        assert "wanted" in graded(name, lambda *case: [*right(*case), 0], capsys)
    else:
        assert "a tensor" in graded(name, lambda *case: torch.tensor(0.0), capsys)
        if isinstance(first, int):
            assert "(a float, not a int)" in graded(name, lambda *case: float(right(*case)), capsys)
    for k, value in enumerate(exercise.cases[0]):
        def spoiling(*case, k=k):
            answer = right(*case)
            if isinstance(answer, torch.Tensor):
                answer = answer.clone()
            elif isinstance(answer, list):
                answer = list(answer)
            if isinstance(case[k], torch.Tensor):
                case[k].zero_()
            else:
                case[k].append(0)
            return answer
        if isinstance(value, (list, torch.Tensor)):
            kept = lab._copy(value)
            shown = graded(name, spoiling, capsys)
            assert "it changes `" in shown and "work on a copy" in shown
            assert lab.first_difference(value, kept, 0.0) is None
    assert graded(name, right, capsys).startswith("[x] right in")


def test_an_unknown_mistake_gets_the_hint_of_the_exercise(capsys):
    shown = graded("stitch", lambda v, columns, rows: solutions.stitch(v, columns, rows) + 1, capsys)
    assert shown.endswith(f"Hint: {solutions.EXERCISES['stitch'].hint}\n")
    assert "Hint" not in graded("stitch", lambda v, columns, rows: v, capsys, failures=0)


def test_lists():
    """A tuple, or numbers that are still tensors, may stand in a list; nothing in it stops the grader."""
    same = lab.first_difference
    assert same((1, 2), [1, 2], 0.0) is None and same([torch.tensor(1), 2], [1, 2], 0.0) is None
    assert "wanted [1, 2]" in same([torch.ones(2), torch.ones(3)], [1, 2], 0.0)
    assert "wanted [1, 2]" in same([1, 2, 3], [1, 2], 0.0) and "wanted [1, 2]" in same({1, 2}, [1, 2], 0.0)
    assert same(float("nan"), 1.0, 0.5) == "gave nan, wanted 1.0" and same(3, 3.0, 0.0) is None
    assert same(torch.tensor([1.0, float("-inf")]), torch.tensor([1.0, 2.0]), 0.1)
    assert same(torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("-inf")]), 0.1)


def left(solution, change):
    def attempt(*case):
        answer = solution(*case)
        change(*case)
        return answer
    return attempt


def no_gains(pipe, pixel_values, i):
    pipe.model.vision_model.encoder.layers[i].ls1.data.zero_()


def other_config(pipe, *_):
    pipe.model.config = replace(pipe.model.config, use_thumbnail=False)


def rows_exchanged(pipe, a, b, *_):
    table, a, b = slips._rows(pipe, a, b)
    table[[a, b]] = table[[b, a]]


def other_tokens(pipe, *_):
    pipe.model.visual_tokens = lambda pixel_values: torch.zeros(len(pixel_values), 16, 256)


# What people forget to put back.
LEFT = {
    "blind": other_tokens,
    "without_thumbnail": other_config,
    "without_layer": no_gains,
    "averaged": other_tokens,
    "exchanged": rows_exchanged,
    "layer_errors": lambda pipe, ids, rotate: setattr(qwen2, "rotate", rotate),
    "fewer_bits": lambda *_: setattr(awq, "unpack", lambda packed, unpack=awq.unpack: unpack(packed) // 2 * 2),
    "caught_at": lambda name, wrong: setattr(minivl.MiniVL, name, wrong),
    "patched": other_tokens,
    "smoothed_error": lambda model, ids, i, *_: model.language_model.layers[i].mlp.up_proj.weight.data.mul_(2),
}


@parametrized(LEFT, quick=("layer_errors",))
def test_what_stays_changed_is_told_and_put_back(name, capsys, monkeypatch):
    exercise = solutions.EXERCISES[name]
    monkeypatch.setitem(solutions.EXERCISES, name, replace(exercise, cases=lambda: exercise.cases()[:1]))
    shown = graded(name, left(exercise.solution, LEFT[name]), capsys)
    assert "the model stays changed: put back what you replaced" in shown and "[x]" not in shown
    assert graded(name, exercise.solution, capsys).startswith("[x] right in 1 of 1")


# ---- other right solutions ------------------------------------------------------------------------------------------

def write(model, ids, stop, most):
    ids = list(ids)
    start = len(ids)
    for _ in range(most):
        ids.append(model(ids).argmax().item())
        if ids[-1] == stop:
            break
    return ids[start:]


def largest_square(budget):
    side = 2000
    while side and 256 * solutions._square(side) > budget:
        side -= 1
    return side


def bpe_step(parts, merges):
    for a, b in merges:
        out = list(parts)
        k = 0
        while k < len(out) - 1:
            if out[k] == a and out[k + 1] == b:
                out[k:k + 2] = [a + b]
            k += 1
        if out != parts:
            return out
    return parts


def round_group(w):
    s = (torch.clamp(w.max(), min=0) - torch.clamp(w.min(), max=0)).double() / 15
    z = (-torch.clamp(w.min(), max=0) / s).round()
    return ((w.double() / s).round().add(z).clamp(0, 15).sub(z) * s).float()


def repetition(scores, seen, r):
    ids = torch.tensor(sorted(set(seen)), dtype=torch.long)
    picked = scores[ids]
    return scores.index_copy(0, ids, torch.where(picked > 0, picked / r, picked * r))


def top_p(probs, p):
    order = sorted(range(len(probs)), key=lambda i: -float(probs[i]))
    kept, total = [], 0.0
    for i in order:
        if total > p:
            break
        kept.append(i)
        total += float(probs[i])
    out = torch.zeros(len(probs))
    out[kept] = probs[kept]
    return out / out.sum()


def attention(q, k, v):
    H, K = len(q), len(k)
    grouped = q.unflatten(0, (K, H // K))
    scores = torch.einsum("kgte,kse->kgts", grouped, k) * q.shape[-1] ** -0.5
    T = q.shape[1]
    scores = scores + torch.full((T, T), float("-inf")).triu(1)
    return (scores.softmax(-1) @ v[:, None]).flatten(0, 1)


def normalised(drops):
    positive = torch.relu(drops)
    return positive / positive.max().clamp(min=1e-30)


def thrifty_grid(width, height, max_num, R):
    most = min(max_num, max(1, round(width * height / R ** 2)))
    best = None
    for tiles in range(most, 0, -1):
        for c in range(1, tiles + 1):
            if tiles % c == 0:
                difference = abs(width / height - c / (tiles // c))
                if best is None or difference < best[0]:
                    best = difference, [c, tiles // c]
    return best[1]


def best_share(w, X, shares, rounded):
    gram = X.T @ X
    errors = {}
    for share in reversed(shares):
        level = share * max(w.max(), -w.min())
        off = rounded(torch.where(w.abs() > level, level * w.sign(), w)) - w
        errors[share] = float(off @ gram @ off)
    return min(shares, key=errors.get)


def labels_of(ids, answers):
    labels = torch.full((len(ids),), -100)
    for start, end in answers:
        labels[start:end] = torch.tensor(ids[start:end])
    return labels.tolist()


def patches(picture, p):
    return F.unfold(picture[None], p, stride=p)[0].T


def unshuffle(x, f):
    s = round(len(x) ** 0.5)
    grid = x.reshape(s, s, -1)
    return torch.cat([grid[dy::f, dx::f] for dy in range(f) for dx in range(f)], dim=2).flatten(0, 1)


def shuffle(x):
    n = round(len(x) ** 0.5)
    quarters = x.unflatten(0, (n, n)).chunk(4, dim=2)
    rows = [torch.stack(pair, 2).flatten(1, 2) for pair in (quarters[:2], quarters[2:])]
    return torch.stack(rows, 1).flatten(0, 2)


def layer_norm(x, weight, bias, eps):
    return (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps) * weight + bias


def stitch(pixel_values, columns, rows):
    tiles = list(pixel_values)
    return torch.cat([torch.cat(tiles[r * columns:(r + 1) * columns], dim=2) for r in range(rows)], dim=1)


def blind(pipe, question, picture):
    right = pipe.model.visual_tokens
    pipe.model.visual_tokens = lambda pixel_values: right(pixel_values) * 0
    try:
        return pipe((question, picture)).text
    finally:
        pipe.model.visual_tokens = right        # not deleted: as good


def without_layer(pipe, pixel_values, i):
    layers = pipe.model.vision_model.encoder.layers
    layer = layers[i]
    layers[i] = torch.nn.Identity()
    try:
        with torch.no_grad():
            return pipe.model.visual_tokens(pixel_values)
    finally:
        layers[i] = layer


def layer_errors(pipe, ids, rotate):
    names = [f"llm.layers.{i}" for i in range(len(pipe.model.language_model.layers))] + ["logits"]
    right, kept = {}, qwen2.rotate
    with torch.no_grad(), minivl.trace(pipe.model) as t:
        pipe.model(torch.tensor([ids]))
        right.update(t)
    qwen2.rotate = rotate
    try:
        with torch.no_grad(), minivl.trace(pipe.model) as t:
            pipe.model(torch.tensor([ids]))
    finally:
        qwen2.rotate = kept
    return torch.stack([torch.tensor(minivl.relative_error(t[name], right[name])) for name in names])


def never_twice(model, ids, n):
    return slips._chosen(model, ids, n, lambda ids, new: new)


def fewer_bits(model, ids, pixel_values):
    return slips._bits_away(model, ids, pixel_values, lambda n: n & 0xE)


def circular_hits(indices, right):
    last = {}
    for index, hit in sorted(zip(indices, right)):
        last[index % 10**6] = min(hit, last.get(index % 10**6, True))
    return torch.tensor([sum(right) / len(right) * 100, sum(last.values()) / len(last) * 100])


RIGHT = {
    "prompt_length": lambda text_tokens, tiles, L: sum([text_tokens, 1, L * tiles, 1]),
    "best_tokens": lambda scores, n: tuple(scores.argsort(descending=True)[:n].tolist()),
    "write": write,
    "blind": blind,
    "tiles_of": lambda w, h, most: n + 1 if (n := math.prod(tiling.choose_grid(w, h, max_num=most))) > 1 else 1,
    "largest_square": largest_square,
    "stitch": stitch,
    "attention_numbers": lambda layers, heads, P: layers * heads * (P * P + 2 * P + 1),
    "patches": patches,
    "layer_norm": layer_norm,
    "without_layer": without_layer,
    "visual_tokens": lambda R, p, f: (R // p) ** 2 // f ** 2,
    "unshuffle": unshuffle,
    "shuffle": shuffle,
    "placeholders": lambda tiles, L: sum(L * n for n in tiles),
    "bpe_step": bpe_step,
    "user_turn": lambda q: "\n".join(["<|im_start|>user", q + "<|im_end|>", "<|im_start|>assistant", ""]),
    "cache_numbers": lambda layers, H, K, D: layers * (K * (D // H) + K * (D // H)),
    "window_mask": lambda T, w: ((d := torch.arange(T)[:, None] - torch.arange(T)) >= 0) & (d < w),
    "attention": attention,
    "layer_errors": layer_errors,
    "cached_passes": lambda T, n: T + (n - 1),
    "top_p": top_p,
    "repetition": repetition,
    "never_twice": never_twice,
    "pack_word": lambda numbers: int("".join(f"{numbers[c]:x}" for c in (7, 5, 3, 1, 6, 4, 2, 0)), 16),
    "dequantise": lambda q, z, s: torch.cat(
        [(a.int() - b) * c for a, b, c in zip(q.chunk(len(s)), z, s)]),
    "round_group": round_group,
    "fewer_bits": fewer_bits,
    "relative_error": lambda a, b: minivl.relative_error(a, b),
    "first_difference": lambda errors, tolerance: ([n for n, e in errors if e > tolerance or e != e] or [None])[0],
    "wrong_tokens": lambda a, b, tolerance: tuple(
        ((a - b).transpose(0, 1).flatten(1).norm(dim=1) / b.transpose(0, 1).flatten(1).norm(dim=1) > tolerance)
        .nonzero().flatten().tolist()),
    "weights_of": lambda q, k: torch.softmax(
        (k @ q.unflatten(0, (len(k), -1)).transpose(1, 2)).transpose(1, 2).flatten(0, 1) / q.shape[1] ** 0.5, dim=1),
    "normalised": normalised,
    "lens_ids": lambda x, w, eps, head: F.linear(F.rms_norm(x, x.shape[-1:], w, eps), head).argmax(1).tolist(),
    "tokens_at_factor": lambda text, tiles, s, f: text + tiles * (s * s // (f * f)),
    "thrifty_grid": thrifty_grid,
    "labels_of": labels_of,
    "mixed_lessons": lambda new, old, every, n: [(new, old)[(i + 1) % every == 0](i) for i in range(n)],
    "exchanged": lambda pipe, a, b, q, picture: slips._new_rows(pipe, (b, a), q, picture, slips._swap),
    "patched": lambda pipe, q, a, b, k: slips._grafted(pipe, q, a, b, lambda x, y: slips._row(x, y, k)),
    "without_thumbnail": lambda pipe, q, picture: slips._other_config(pipe, q, picture, use_thumbnail=False),
    "smoothing_factors": lambda mean, alpha: torch.exp(alpha * (mean.log() - (mean.max() * mean.min()).log() / 2)),
    "output_error": lambda X, W, f, rounded: minivl.relative_error(X @ (rounded(W * f) / f).T, X @ W.T) ** 2,
    "best_share": best_share,
    "smoothed_error": slips._mlp_error,
    "preference": lambda c, r, c0, r0, beta: F.softplus(beta * (r - r0 - c + c0)),
    "shifts": lambda c, r: torch.stack([(c[:s + 1].mean() + r[:s + 1].mean()) / 2 for s in range(len(c))]),
    "truncate": lambda text, ratio: " ".join((words := re.split(" ", text))[:math.floor(ratio * len(words))]).strip(),
    "per_token": lambda c, r, c0, r0, n, m, beta: torch.log1p(
        torch.exp(beta * (r / m - c / n + c0 / n - r0 / m))),
    "mcnemar_p": lambda b, c: 1.0 if b == c else sum(math.comb(b + c, i) for i in range(b + c + 1)
                                                     if abs(2 * i - b - c) >= abs(b - c)) / 2 ** (b + c),
    "says": lambda text: {(True, False): "Yes", (False, True): "No"}.get(
        tuple(bool(re.search(rf"\b{word}\b", text, re.IGNORECASE)) for word in ("yes", "no")), "Unknown"),
    "circular_hits": circular_hits,
    "paired_interval": lambda a, b, drawn: 100 * torch.stack(
        [(b[drawn].mean(1) - a[drawn].mean(1)).quantile(q) for q in (0.025, 0.975)]),
}


@parametrized(RIGHT, quick=("without_layer", "layer_errors", "never_twice"))
def test_other_right_solutions_pass(name, capsys):
    assert graded(name, RIGHT[name], capsys).startswith("[x] right in")
