"""Altered JSON files of a checkpoint: as bytes, or with values and keys at random places replaced, doubled or gone."""
import copy
import json
import random

from fuzz import bytes, seeds

VALUES = (None, True, False, -1, 0, 1, 2, 7, 10**12, -10**12, 2**31, 2**63, 0.5, -0.5, 1e308, float("nan"),
          float("inf"), "", "x", "\ud800", "x" * 100_000, [], {}, [[]], [None], {"type": "Sequence"}, ["a b c"],
          10**300)
# A tokenizer.json is a small program of the tokenizers library: parts of it that take time or memory without end.
GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
BACKTRACKS = {"Regex": "(a+)+$"}
HOSTILE = {
    "padding": [{"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "x"}],
    "truncation": [{"max_length": 0, "strategy": "LongestFirst", "stride": 2**63, "direction": "Left"}],
    "normalizer": [{"type": "Sequence", "normalizers": [GROWS] * 4}, {"type": "Prepend", "prepend": "a" * 10**6},
                   {"type": "Replace", "pattern": BACKTRACKS, "content": ""}],
    "pre_tokenizer": [{"type": "Split", "pattern": BACKTRACKS, "behavior": "Isolated", "invert": False}],
    "decoder": [GROWS, {"type": "Sequence", "decoders": [GROWS] * 4}],
    "post_processor": [{"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10**4,
                        "pair": [], "special_tokens": {}}],
}


def cases(seed, n):
    """Alter every file as often; a third as bytes, the others as parsed."""
    rng = random.Random(seed)
    files = seeds.json_files()
    parsed = {name: json.loads(data) for name, data in files.items() if name.endswith(".json")}
    for k in range(n):
        name = rng.choice([*files])
        if name not in parsed or rng.random() < 0.33:
            for kind, data in bytes.cases(seed * n + k, 1, [files[name], files[rng.choice([*files])]], 3000):
                yield f"{name} {kind}", data
        else:
            data = copy.deepcopy(parsed[name])
            if name == "tokenizer.json" and rng.random() < 0.3:
                part = rng.choice([*HOSTILE])
                data[part] = rng.choice(HOSTILE[part])
                yield f"{name} hostile {part}", json.dumps(data).encode()
                continue
            kinds = {alter(data, rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))}
            yield f"{name} {' '.join(sorted(kinds))}", json.dumps(data).encode()


def alter(data, rng):
    """Change one place of a parsed file; the kind of change."""
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    kind = rng.choice(("value", "value", "scaled", "gone", "moved", "new"))
    old = place[key]
    if kind == "gone":
        del place[key]
    elif kind == "scaled" and isinstance(old, (int, float)) and not isinstance(old, bool):
        place[key] = rng.choice((old * 2, old * 1000, old + 1, -old, old * 10**6, float(old)))
    elif kind == "moved" and len(keys) > 1:
        other = rng.choice(keys)
        place[key], place[other] = place[other], old
    elif kind == "new" and isinstance(place, dict):
        name = rng.choice(("quantization_config", "rope_scaling", "\ud800", f"{key}s"))
        place[name] = copy.deepcopy(rng.choice(VALUES))
    else:
        place[key] = copy.deepcopy(rng.choice(VALUES))
    return kind
