"""Altered tokenizer.model: any byte, the fields of its messages, the pieces themselves."""
import random

from sentencepiece_files import NORMALIZER, TRAINER, field, message, model, varint

from fuzz import bytes as any_bytes
from fuzz import seeds

NUMBERS = (0, 1, 2, 3, 4, 6, 7, 127, 128, 512, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**69)
TEXTS = ("", "a", "\u2581", "x" * 512, "x" * 513, "\0", "<unk>", "<s>", "<0x41>", "<0x0G>", "<|im_start|>", "<img>",
         "[UNUSED_TOKEN_140]", "\U0010ffff", "\ufffd", "the", "ab" * 200)
SCORES = (0.0, -0.0, 1.0, -1e38, 1e38, float("nan"), float("inf"), float("-inf"), 1e-45)


def cases(seed, n):
    """Alter by turns any byte, the fields of a written file, and the pieces before it is written."""
    rng = random.Random(seed)
    blind = any_bytes.cases(seed, n, seeds.sentencepiece(), 3000)
    for _ in range(n):
        kind = rng.choice((None, fields, pieces))
        yield kind(rng) if kind else next(blind)


def fields(rng):
    """Put something strange among the messages, or alter what they say of the rules."""
    listed = seeds.sentencepiece_pieces()
    trainer, normalizer = dict(TRAINER), dict(NORMALIZER)
    value = rng.choice((*NUMBERS, *SCORES, b"", b"identity", bytes(99), field(1, b"a") * 20))
    change = rng.choice(("trainer", "normalizer", "denormalizer", "among", "key", "nested", "twice", "order", "many"))
    if change == "trainer":
        trainer[rng.choice((3, 24, 35, 4, 40, 41, 99))] = value
    elif change == "normalizer":
        normalizer[rng.choice((1, 2, 3, 4, 5, 6, 99))] = value
    data = model(listed, trainer, normalizer)
    extra = {"denormalizer": field(5, field(rng.randrange(1, 6), value)), "among": field(rng.randrange(20), value),
             "key": varint(rng.choice(NUMBERS)) + rng.choice((b"", bytes(8), varint(2**31))),
             "nested": field(1, field(1, b"zz") + field(rng.randrange(1, 5), value)),
             "twice": data, "many": field(rng.randrange(1, 9), b"") * 100_000}.get(change, b"")
    if change == "order":
        data = data[::-1] if rng.random() < 0.1 else field(3, message(normalizer)) + data
    return f"field {change}", extra + data if rng.random() < 0.5 else data + extra


def pieces(rng):
    """Alter one to five pieces: text, score, type, place."""
    listed = list(seeds.sentencepiece_pieces())
    names = set()
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, other = (rng.randrange(len(listed)) for _ in range(2))
        text, score, kind = listed[place]
        change = rng.choice(("text", "score", "type", "swap", "gone", "new", "repeat", "numbers", "runs"))
        names.add(change)
        if change == "text":
            listed[place] = rng.choice(TEXTS), score, kind
        elif change == "score":
            listed[place] = text, rng.choice(SCORES), kind
        elif change == "type":
            listed[place] = text, score, rng.choice((*range(1, 7), *NUMBERS))
        elif change == "swap":
            listed[place], listed[other] = listed[other], listed[place]
        elif change == "gone":
            del listed[place:place + rng.choice((1, 1, 6, 300))]
        elif change == "new":
            new = rng.choice(TEXTS), rng.choice(SCORES), rng.randrange(1, 7)
            listed.insert(rng.choice((place, len(listed) - 6)), new)
        elif change == "repeat":
            listed[place:place] = listed[other:other + rng.choice((1, 2, 50))]
        elif change == "numbers":
            listed[-6:-6] = [(f"q{k}", -k, rng.choice((1, 4))) for k in range(2000)]
        elif change == "runs":      # each can be halved in as many ways as it has characters
            listed[-6:-6] = [("z" * k, -k, 1) for k in range(1, 513)]
        if not listed:
            break
    return f"pieces {' '.join(sorted(names))}", model(listed)
