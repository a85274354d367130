"""One recipe, whichever files a tokenizer comes from: what is read, what is ignored, what is refused."""
import copy
import itertools
import json
import random

import pytest
import tokenizers

import minivl.tokenizer as minivl_tokenizer
from minivl import InputError, Tokenizer
from minivl.tokenizer import TextStream, read_listing

TEXTS = ["Grüße, 世界 🐅 1234 don't <img>\n\n  x<|im_end|>", "e\u0301 and \u00e9, \ufb01 \u212b", "word " * 200, "",
         "<tool_call> <|im_start|>user\n \t\r\n 12345"]
FIXED = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0, "pad_token": "!"}
TRUNCATION = {"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0}


@pytest.fixture(scope="module")
def parts(tiny):
    """The four files of the tiny tokenizer, parsed (merges.txt as text)."""
    known = Tokenizer.load(tiny)
    return {"vocab.json": json.loads((tiny / "vocab.json").read_text()),
            "merges.txt": (tiny / "merges.txt").read_text(),
            "added_tokens.json": json.loads((tiny / "added_tokens.json").read_text()),
            "tokenizer.json": json.loads(known.backend.to_str())}


def put(folder, parts, *names, **more):
    """Write some of the files, and more as key=value: tokenizer_config={...}."""
    folder.mkdir(exist_ok=True)
    for name in names:
        text = parts[name] if name == "merges.txt" else json.dumps(parts[name])
        (folder / name).write_text(text)
    for name, value in more.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def ids_of(tokenizer):
    return [tokenizer.encode(text, plain=plain) for text in TEXTS for plain in (False, True)]


def edited(parts, path, value):
    """tokenizer.json with the value at "model.dropout" replaced."""
    data = copy.deepcopy(parts["tokenizer.json"])
    *way, last = path.split(".")
    place = data
    for key in way:
        place = place[key]
    place[last] = value
    return data


TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
BOS = {**TEMPLATE, "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, *TEMPLATE["single"]],
       "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [569], "tokens": ["<|endoftext|>"]}}}
NFC = {"type": "NFC"}


@pytest.mark.parametrize("path, value", [
    ("truncation", TRUNCATION), ("truncation", {**TRUNCATION, "max_length": 0}),
    ("padding", {"strategy": {"Fixed": 64}, **FIXED}), ("padding", {"strategy": {"Fixed": 10 ** 12}, **FIXED}),
    ("padding", {"strategy": "BatchLongest", **FIXED, "pad_to_multiple_of": 10 ** 9}), ("padding", "nonsense"),
    ("normalizer", None), ("normalizer", {"type": "Sequence", "normalizers": []}),
    ("normalizer", {"type": "Sequence", "normalizers": [NFC]}),
    ("post_processor", None), ("post_processor", TEMPLATE), ("post_processor.trim_offsets", True),
    ("decoder.trim_offsets", False), ("model.continuing_subword_prefix", ""), ("model.end_of_word_suffix", ""),
    ("model.dropout", 0.0), ("model.unk_token", "!"), ("model.fuse_unk", True), ("model.byte_fallback", True),
    ("version", "9.9"), ("new key", {"type": "anything"})])
def test_what_is_saved_along_changes_no_id(tiny, parts, tmp_path, path, value):
    folder = put(tmp_path / "json", parts, tokenizer=edited(parts, path, value))
    assert ids_of(Tokenizer.load(folder)) == ids_of(Tokenizer.load(tiny))


def test_merges_as_pairs_and_as_strings(tiny, parts, tmp_path):
    pairs = parts["tokenizer.json"]["model"]["merges"]
    for n, merges in enumerate(([list(m) for m in pairs], [" ".join(m) for m in pairs])):
        folder = put(tmp_path / str(n), parts, tokenizer=edited(parts, "model.merges", merges))
        assert ids_of(Tokenizer.load(folder)) == ids_of(Tokenizer.load(tiny))
    data = copy.deepcopy(parts["tokenizer.json"])
    del data["model"]["type"]               # as very old files have it
    assert ids_of(Tokenizer.load(put(tmp_path / "old", parts, tokenizer=data))) == ids_of(Tokenizer.load(tiny))


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", " \n"), lambda text: text.replace("\n", "\t\n"), lambda text: text + " \n\n",
    lambda text: text.replace("\n", "\r\n"), lambda text: "  " + text.replace("\n", "\n "),
    lambda text: text.replace(" ", "  ").replace("#version:  ", "#version: "),
    lambda text: text.partition("\n")[2]])
def test_blanks_around_the_lines_of_merges(tiny, parts, tmp_path, change):
    """An editor leaves them; the original reads over them: Qwen2Tokenizer strips each line."""
    names = ("vocab.json", "merges.txt", "added_tokens.json")
    folder = put(tmp_path / "x", {**parts, "merges.txt": change(parts["merges.txt"])}, *names, "tokenizer.json")
    assert ids_of(Tokenizer.load(folder)) == ids_of(Tokenizer.load(tiny))       # beside tokenizer.json: the same merges
    (folder / "tokenizer.json").unlink()
    assert ids_of(Tokenizer.load(folder)) == ids_of(Tokenizer.load(tiny))


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


GROWING = {"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 10 ** 4)] * 4}
BOMB = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def nested(depth):
    value = NFC
    for _ in range(depth):
        value = {"type": "Sequence", "normalizers": [value]}
    return value


@pytest.mark.parametrize("path, value", [
    ("normalizer", {"type": "Lowercase"}), ("normalizer", {"type": "NFKC"}), ("normalizer", GROWING),
    ("normalizer", replace({"Regex": "(a|a)*$"}, "")), ("normalizer", nested(100)), ("normalizer", "NFC"),
    ("normalizer", {"type": "Sequence", "normalizers": [NFC, {"type": "Strip", "strip_left": True}]}),
    ("pre_tokenizer", None), ("pre_tokenizer", BOMB), ("pre_tokenizer", {"type": "ByteLevel"}),
    ("pre_tokenizer.pretokenizers", [BOMB, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]),
    ("pre_tokenizer.pretokenizers", []), ("pre_tokenizer.pretokenizers", None), ("pre_tokenizer.pretokenizers", 5),
    ("post_processor", BOS), ("post_processor", {"type": "BertProcessing"}),
    ("decoder", None), ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
    ("model.type", "WordPiece"), ("model.dropout", 0.1), ("model.ignore_merges", True),
    ("model.continuing_subword_prefix", "##"), ("model.end_of_word_suffix", "</w>")])
def test_another_recipe_is_refused(parts, tmp_path, path, value):
    part = path.replace(".pretokenizers", "")
    for names in ((), ("vocab.json", "merges.txt", "added_tokens.json")):       # beside the other files too
        folder = put(tmp_path / f"with{len(names)}", parts, *names, tokenizer=edited(parts, path, value))
        with pytest.raises(InputError, match=f"^{part} of tokenizer.json in .* is not the recipe of Qwen2"):
            Tokenizer.load(folder)


@pytest.mark.parametrize("key, value", [("pattern", {"Regex": r"\p{N}{1,3}|\s+"}), ("pattern", {"String": " "}),
                                        ("behavior", "Removed"), ("invert", True), ("add_prefix_space", True),
                                        ("use_regex", True), ("use_regex", None)])
def test_another_split_is_refused(parts, tmp_path, key, value):
    data = copy.deepcopy(parts["tokenizer.json"])
    split, byte_level = data["pre_tokenizer"]["pretokenizers"]
    (split if key in split else byte_level)[key] = value
    with pytest.raises(InputError, match="pre_tokenizer of tokenizer.json"):
        Tokenizer.load(put(tmp_path / "x", parts, tokenizer=data))


@pytest.mark.parametrize("config, key", [({"add_prefix_space": True}, "add_prefix_space"),
                                         ({"add_bos_token": True, "bos_token": "<|endoftext|>"}, "add_bos_token"),
                                         ({"add_eos_token": True, "eos_token": "<|im_end|>"}, "add_eos_token")])
def test_a_config_that_adds_something_is_refused(parts, tmp_path, config, key):
    with pytest.raises(InputError, match=f"{key} of tokenizer_config.json"):
        Tokenizer.load(put(tmp_path / "x", parts, "tokenizer.json", tokenizer_config=config))
    harmless = {"add_prefix_space": False, "add_bos_token": True, "bos_token": None, "padding_side": "left",
                "model_max_length": 12}
    Tokenizer.load(put(tmp_path / "x", parts, tokenizer_config=harmless))


# ---- which files ----------------------------------------------------------------------------------------------------

def config_of(parts, **special):
    """tokenizer_config.json as transformers 4 writes it."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"added_tokens_decoder": {
        str(t["id"]): {"content": t["content"], **flags, "special": special.get(t["content"], t["special"])}
        for t in parts["tokenizer.json"]["added_tokens"]}}


def test_every_complete_choice_of_files_gives_the_same_tokenizer(tiny, parts, tmp_path):
    parts = {**parts, "tokenizer_config.json": config_of(parts)}
    known, complete = Tokenizer.load(tiny), 0
    for n, names in enumerate(itertools.chain(*(itertools.combinations(parts, k) for k in range(6)))):
        folder = put(tmp_path / str(n), parts, *names)
        base = {"vocab.json", "merges.txt"} <= set(names)
        if "tokenizer.json" in names or base and {"added_tokens.json", "tokenizer_config.json"} & set(names):
            got = Tokenizer.load(folder)
            assert ids_of(got) == ids_of(known) and got.added == known.added, names
            assert got.special_ids == known.special_ids, names
            complete += 1
        else:
            with pytest.raises(InputError, match="lists no added tokens" if base else "neither vocab.json and"):
                Tokenizer.load(folder)
    assert complete == 16 + 3


def test_files_of_different_models_are_refused(parts, tmp_path):
    everything = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json")
    vocabulary, added = parts["vocab.json"], parts["added_tokens.json"]
    swapped = {**vocabulary, "A": vocabulary["B"], "B": vocabulary["A"]}
    with pytest.raises(InputError, match=r"vocab.json and tokenizer.json in .* differ in 2 tokens .*'A' is 33 and 32"):
        Tokenizer.load(put(tmp_path / "a", parts, *everything, vocab=swapped))
    lines = parts["merges.txt"].splitlines()
    other = {**parts, "merges.txt": "\n".join([lines[0], lines[2], lines[1], *lines[3:]])}
    with pytest.raises(InputError, match=r"merges.txt \(313\) and tokenizer.json \(313\) in .* hold different merges"):
        Tokenizer.load(put(tmp_path / "b", other, *everything))
    box = {**added, "<box>": added["</box>"], "</box>": added["<box>"]}
    with pytest.raises(InputError, match="has id .* in added_tokens.json and .* in tokenizer.json"):
        Tokenizer.load(put(tmp_path / "c", parts, *everything, added_tokens=box))
    moved = {"added_tokens_decoder": {"700": {"content": "<box>"}}}
    with pytest.raises(InputError, match="'<box>' has id .* and 700 in tokenizer_config.json"):
        Tokenizer.load(put(tmp_path / "d", parts, "tokenizer.json", tokenizer_config=moved))
    for name, taken in (("e", {**added, "<more>": added["<box>"]}), ("f", {**added, "<more>": 5})):
        with pytest.raises(InputError, match="give id .* to .* and to '<more>'"):
            Tokenizer.load(put(tmp_path / name, parts, "vocab.json", "merges.txt", added_tokens=taken))
    with pytest.raises(InputError, match="'!' has id .* in the added tokens and 0 in vocab.json"):
        Tokenizer.load(put(tmp_path / "g", parts, "vocab.json", "merges.txt", added_tokens={**added, "!": 600}))


def test_a_stale_file_beside_a_newer_one(parts, tmp_path):
    """Tokens that only one of the files lists are known, too: an old added_tokens.json beside a grown tokenizer."""
    grown = copy.deepcopy(parts["tokenizer.json"])
    grown["added_tokens"].append({**grown["added_tokens"][-1], "id": 600, "content": "<new>"})
    folder = put(tmp_path / "x", parts, "vocab.json", "merges.txt", "added_tokens.json", tokenizer=grown)
    assert Tokenizer.load(folder).encode("<new>") == [600]


@pytest.mark.parametrize("change, message", [
    (lambda p: p["vocab.json"].pop("Ġ"), "has tokens for 255 of the 256 bytes"),
    (lambda p: p["vocab.json"].update({"A": -1}), "must map tokens to ids"),
    (lambda p: p["vocab.json"].update({"A": 2 ** 40}), "must map tokens to ids"),
    (lambda p: p["vocab.json"].update({"A": True}), "must map tokens to ids"),
    (lambda p: p["vocab.json"].update({"": 900}), "an empty token"),
    (lambda p: p["added_tokens.json"].update({"\ud800": 900}), "half a surrogate pair"),
    (lambda p: p.update({"merges.txt": "#version: 0.2\nA A\n"}), "1 of 1 merges .the first is 'A A'. do not join"),
    (lambda p: p.update({"merges.txt": "A\n"}), "do not join two tokens"),
    (lambda p: p.update({"merges.txt": "A B C\n"}), "do not join two tokens")])
def test_damaged_parts(parts, tmp_path, change, message):
    damaged = copy.deepcopy(parts)
    change(damaged)
    with pytest.raises(InputError, match=message):
        Tokenizer.load(put(tmp_path / "x", damaged, "vocab.json", "merges.txt", "added_tokens.json"))


def test_no_damage_of_tokenizer_json_ends_in_another_error(tiny, parts, tmp_path):
    """Random places of the file get random values: an InputError, or the right ids."""
    chosen, known = random.Random(0), ids_of(Tokenizer.load(tiny))
    values = [None, True, -1, 10 ** 12, 0.5, "", "x", "\ud800", [], {}, [[]], {"type": "Sequence"}, [None], ["a b c"]]
    small = copy.deepcopy(parts["tokenizer.json"])
    outcomes = set()
    for _ in range(150):
        data = copy.deepcopy(small)
        place = data
        while True:
            key = chosen.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], (dict, list)) and place[key] and chosen.random() < 0.8:
                place = place[key]
                continue
            place[key] = chosen.choice(values)
            break
        try:
            got = Tokenizer.load(put(tmp_path / "x", parts, tokenizer=data))
            outcomes.add(ids_of(got) == known)      # False: the value at hand took an added token away
        except InputError:
            outcomes.add("refused")
    assert {"refused", True} <= outcomes


# ---- flags ----------------------------------------------------------------------------------------------------------

def with_token(parts, content="<point>", **flags):
    """tokenizer.json of a fine-tune that added a token with id 600."""
    data = copy.deepcopy(parts["tokenizer.json"])
    token = {"id": 600, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}
    data["added_tokens"].append({**token, **flags})
    return data


def shown(tokenizer, text):
    """Decoded text, which must be that of a stream too."""
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    streamed = "".join([stream.push(i) for i in ids]) + stream.finish()
    assert streamed == tokenizer.decode(ids)
    return streamed


@pytest.mark.parametrize("content", ["<point>", "<größe>", "世界🐅", "Ġx"])
def test_what_is_not_special_stays_visible_whichever_file_says_so(parts, tmp_path, content):
    three = ("vocab.json", "merges.txt", "added_tokens.json")
    text = f"a {content}<box>b"
    for special in (False, True):
        data = with_token(parts, content, special=special)
        config = {"added_tokens_decoder": {"600": {"content": content, "special": special}}}
        wanted = "a b" if special else f"a {content}b"
        for n, (names, files) in enumerate([
                ((), {"tokenizer": data}), (three, {"tokenizer": data}), (three, {"tokenizer_config": config}),
                (("tokenizer.json",), {"tokenizer_config": config})]):
            folder = put(tmp_path / f"{special}{n}", parts, *names, **files)
            assert shown(Tokenizer.load(folder), text) == wanted


def test_whose_word_on_a_flag_counts(parts, tmp_path):
    """As in transformers: tokenizer_config.json before tokenizer.json; what the config names is special in any case."""
    hidden = with_token(parts, special=True)
    says = {"600": {"content": "<point>", "special": False}}
    for n, (config, visible) in enumerate([
            ({}, False), ({"added_tokens_decoder": says}, True), ({"added_tokens_decoder": {}}, False),
            ({"added_tokens_decoder": says, "additional_special_tokens": ["<point>"]}, False),
            ({"added_tokens_decoder": says, "extra_special_tokens": {"point_token": "<point>"}}, False),
            ({"added_tokens_decoder": says, "pad_token": {"content": "<point>"}}, False),
            ({"added_tokens_decoder": says, "pad_token": None, "eos_token": 5}, True)]):
        folder = put(tmp_path / str(n), parts, tokenizer=hidden, tokenizer_config=config)
        assert shown(Tokenizer.load(folder), "a<point>b") == ("a<point>b" if visible else "ab"), config


def test_without_a_word_on_flags_the_released_list_counts(parts, tmp_path):
    added = {**parts["added_tokens.json"], "<point>": 600}
    tokenizer = Tokenizer.load(put(tmp_path / "x", parts, "vocab.json", "merges.txt", added_tokens=added))
    assert shown(tokenizer, "<point><box><tool_call><|im_start|>x") == "<point><tool_call>x"


def test_the_other_flags_are_the_files_too(parts, tmp_path):
    tokenizer = Tokenizer.load(put(tmp_path / "x", parts, tokenizer=with_token(parts, lstrip=True, rstrip=True)))
    assert tokenizer.encode("a  <point> \nb") == [*tokenizer.encode("a"), 600, *tokenizer.encode("b")]
    single = Tokenizer.load(put(tmp_path / "y", parts, tokenizer=with_token(parts, "point", single_word=True)))
    assert 600 in single.encode("a point b") and 600 not in single.encode("apointb")
    composed = with_token(parts, "<\u00e9>", normalized=True)
    normalized = Tokenizer.load(put(tmp_path / "z", parts, tokenizer=composed))
    assert normalized.encode("<e\u0301>") == [600]


@pytest.mark.parametrize("bad", [{"special": "yes"}, {"content": 5}, {"content": None}, {"id": "5"}, {"id": None},
                                 {"id": 1.5}, {"content": ""}])
def test_bad_added_tokens(parts, tmp_path, bad):
    with pytest.raises(InputError):
        Tokenizer.load(put(tmp_path / "x", parts, tokenizer=with_token(parts, **bad)))
    for i in ("x", "-1", "1.5", "9" * 5000, "１"):
        config = {"added_tokens_decoder": {i: {"content": "<point>"}}}
        with pytest.raises(InputError, match="tokenizer_config.json in .* must map tokens to ids"):
            Tokenizer.load(put(tmp_path / "y", parts, "tokenizer.json", tokenizer_config=config))
    with pytest.raises(InputError, match="added_tokens_decoder of tokenizer_config.json"):
        Tokenizer.load(put(tmp_path / "z", parts, "tokenizer.json", tokenizer_config={"added_tokens_decoder": [1]}))


# ---- ids without a token --------------------------------------------------------------------------------------------

def test_holes_in_the_ids(tiny, parts, tmp_path):
    known = Tokenizer.load(tiny)
    moved = {t: i + 1000 * (t == "<box>") for t, i in parts["added_tokens.json"].items()}
    folder = put(tmp_path / "x", parts, "vocab.json", "merges.txt", added_tokens=moved)
    tokenizer = Tokenizer.load(folder)
    hole = known.id("<box>")
    assert tokenizer.unused(601) == [hole, 600] and tokenizer.unused(5) == [] == known.unused(600)
    assert read_listing(folder).unused(601) == [hole, 600]
    assert tokenizer.encode("a<box>b") == [hole + 1000 if i == hole else i for i in known.encode("a<box>b")]
    assert ids_of(tokenizer) == ids_of(known)
    with pytest.raises(InputError, match=f"id {hole} is not in the vocabulary"):
        tokenizer.decode([hole])
    assert tokenizer.containing("<box>") == [hole + 1000]


def test_added_tokens_between_those_of_the_vocabulary(tiny, parts, tmp_path):
    """As InternLM2 has them: the ids of the vocabulary go on after the added tokens."""
    known, first = Tokenizer.load(tiny), min(parts["added_tokens.json"].values())
    shift = {i: i + 31 * (100 + 200 <= i < first) - (first - 300) * (i >= first) for i in range(600)}
    folder = put(tmp_path / "x", parts, "merges.txt", vocab={t: shift[i] for t, i in parts["vocab.json"].items()},
                 added_tokens={t: shift[i] for t, i in parts["added_tokens.json"].items()})
    assert ids_of(Tokenizer.load(folder)) == [[shift[i] for i in ids] for ids in ids_of(known)]


# ---- bounds ---------------------------------------------------------------------------------------------------------

def test_more_than_any_tokenizer_has(parts, tmp_path, monkeypatch):
    three = ("vocab.json", "merges.txt", "added_tokens.json")
    monkeypatch.setattr(minivl_tokenizer, "MAX_TOKENS", 600)
    monkeypatch.setattr(minivl_tokenizer, "MAX_ADDED", 40)
    monkeypatch.setattr(minivl_tokenizer, "MAX_ADDED_CHARS", 900)
    monkeypatch.setattr(minivl_tokenizer, "MAX_FILES", 100_000)
    Tokenizer.load(put(tmp_path / "x", parts, *three))
    added, merges = parts["added_tokens.json"], parts["merges.txt"]
    for n, (message, files) in enumerate([
            (r"has 631 added tokens, at most 40", {"added_tokens.json": {f"<{i}>": i for i in range(631)}}),
            (r"characters in added tokens, at most 900", {"added_tokens.json": {**added, "x" * 900: 600}}),
            (r"tokens in its vocabulary, at most 600", {"vocab.json": {**parts["vocab.json"],
                                                                      **{f"qq{i}": 600 + i for i in range(200)}}}),
            (r"lines in merges.txt, at most 600", {"merges.txt": merges + "\n" * 600}),
            (r"have \d+ bytes together, at most 100000", {"vocab.json": {**parts["vocab.json"], "x" * 99_000: 568}})]):
        with pytest.raises(InputError, match=message):
            Tokenizer.load(put(tmp_path / str(n), {**parts, **files}, *three))
    pairs = parts["tokenizer.json"]["model"]["merges"]
    with pytest.raises(InputError, match=r"merges in tokenizer.json, at most 600"):
        Tokenizer.load(put(tmp_path / "m", parts, tokenizer=edited(parts, "model.merges", (pairs * 600)[:601])))


def test_messages_clip_tokens(parts, tmp_path):
    long = "y" * 100_000
    for n, (vocab, added) in enumerate([({long: 5}, {}), ({long: 600}, {long: 601}), ({}, {long: 5})]):
        changed = {"vocab.json": {**parts["vocab.json"], **vocab},
                   "added_tokens.json": {**parts["added_tokens.json"], **added}}
        with pytest.raises(InputError) as caught:
            Tokenizer.load(put(tmp_path / str(n), {**parts, **changed}, "vocab.json", "merges.txt",
                               "added_tokens.json"))
        assert len(str(caught.value)) < 500
    nested = {"type": "Sequence"}
    for _ in range(400):
        nested = {"type": "Sequence", "normalizers": [nested, "z" * 1000]}
    with pytest.raises(InputError, match="normalizer of tokenizer.json") as caught:
        Tokenizer.load(put(tmp_path / "n", parts, tokenizer=edited(parts, "normalizer", nested)))
    assert len(str(caught.value)) < 500


def test_a_panic_of_the_library_is_an_input_error():
    """Its Rust panics as a BaseException; a bug of ours, Ctrl-C and our own errors stay what they are."""
    class PanicException(BaseException):
        pass
    for inner, outer in ((PanicException("x"), InputError), (Exception("x"), InputError),
                         (InputError("mine"), InputError), (KeyboardInterrupt(), KeyboardInterrupt),
                         (SystemExit(), SystemExit)):
        with pytest.raises(outer) as caught, minivl_tokenizer.library_errors("said by us"):
            raise inner
        assert isinstance(inner, outer) == (caught.value is inner)
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
            "post_processor": None, "decoder": None, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))       # a real one, if the library still panics here
    with pytest.raises(InputError, match="said by us"), minivl_tokenizer.library_errors("said by us"):
        backend.encode("a" * 100 + "!")


def test_texts_of_far_too_many_tokens_are_refused_early(tiny, monkeypatch):
    tokenizer, longest = Tokenizer.load(tiny), []
    ids_of = Tokenizer._ids_of

    def seen(self, text, plain):
        longest.append(len(text))
        return ids_of(self, text, plain)
    monkeypatch.setattr(Tokenizer, "_ids_of", seen)
    for text in ("1" * 30_000, "\U0001d160" * 30_000, "\u0301" * 30_000, "<|im_start|>" * 3_000, "a b " * 8_000):
        for plain in (False, True):
            longest.clear()
            with pytest.raises(InputError, match="there is room for 100; use a shorter text"):
                tokenizer.encode(text, plain=plain, most=100)
            assert max(longest) < 20_000
            assert tokenizer.encode(text, plain=plain, most=10 ** 7) == ids_of(tokenizer, text, plain)


def test_half_a_surrogate_pair_in_what_is_looked_for(tiny):
    with pytest.raises(InputError, match="half a surrogate pair at character 1"):
        Tokenizer.load(tiny).containing("a\ud800")


def test_what_was_found_for_many_texts_is_not_kept_for_ever(tiny):
    tokenizer = Tokenizer.load(tiny)
    first = tokenizer.containing("a")
    for n in range(300):
        tokenizer.containing(f"a{n}")
    assert len(tokenizer._containing) <= minivl_tokenizer.WORDS_KEPT and tokenizer.containing("a") == first
