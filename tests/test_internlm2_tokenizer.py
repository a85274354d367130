"""InternLM2's tokenizer: against the original's ids and texts, and by rule on models made here."""
import json
import random
import shutil
import time

import pytest
from conftest import GOLDEN
from sentencepiece_files import ADDED, NORMALIZER, added, model, pieces

from minivl import GenerationConfig, InputError, Tokenizer, internlm2_tokenizer
from minivl import tokenizer as minivl_tokenizer
from minivl.chat.answers import Answer
from minivl.chat.requests import Turn
from minivl.prompt import encode
from minivl.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED
from minivl.tokenizer import TextStream, read_listing

FOLDER = GOLDEN / "internlm2-tokenizer"
FORMS = {"": FOLDER, "_dummy_prefix": FOLDER / "dummy-prefix"}
each_form = pytest.mark.parametrize("form", FORMS)


def cases(name, form):
    return json.loads((FOLDER / f"{name}{form}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def known():
    """form -> tokenizer"""
    return {form: Tokenizer.load(folder) for form, folder in FORMS.items()}


@pytest.fixture
def golden(known):
    return known[""]


def streamed(tokenizer, ids, skip=True):
    stream = TextStream(tokenizer, skip)
    return "".join([stream.push(i) for i in ids]) + stream.finish()


def put(folder, listed, tokens=None, config=None, **rules):
    """Write a tokenizer's files."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model(listed, **rules))
    (folder / "added_tokens.json").write_text(json.dumps(added(len(listed)) if tokens is None else tokens))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# ---- the original's word --------------------------------------------------------------------------------------------

@each_form
def test_100_strings_of_the_original_both_ways(known, form):
    tokenizer, strings = known[form], cases("strings", form)
    assert len(strings) == 100
    for case in strings:
        assert tokenizer.begin + tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded_with_special"], case["text"]


@each_form
def test_30_sequences_of_ids_of_the_original(known, form):
    sequences = cases("decode", form)
    assert len(sequences) == 30
    for case in sequences:
        for key, skip in (("decoded", True), ("decoded_with_special", False)):
            assert known[form].decode(case["ids"], skip_special_tokens=skip) == case[key], case["ids"]
            assert streamed(known[form], case["ids"], skip) == case[key], case["ids"]


def test_ids_of_the_added_tokens(golden):
    assert list(golden.added) == ["<unk>", "<s>", "</s>", *ADDED] and golden.vocab_size == 618
    assert [golden.id(t) for t in ("<|plugin|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>",
                                   "</box>")] == [603, 607, 608, 609, 610, 611, 617]
    assert golden.special_ids == {0, 1, 2, *range(603, 618)}
    assert golden.unused(620) == [618, 619] and golden.unused(618) == []


# ---- the beginning --------------------------------------------------------------------------------------------------

@each_form
def test_the_beginning_comes_once(known, form):
    """In front of a prompt, plain or not, with pictures, system, history; never of a text or of a later turn."""
    tokenizer = known[form]
    assert tokenizer.begin == [1] and tokenizer.encode("Hi")[0] != 1 and tokenizer.encode("") == []
    tokenizer.begin.append(5)
    assert tokenizer.begin == [1]
    answer = tokenizer.encode(" yes .")
    for plain in (False, True):
        for messages, tiles, system in (
                ([("Hi", None)], [], None), ([("<image>\nHi", "yes"), ("So?", None)], [2], "S"),
                ([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], [], None)):
            if plain and tiles:
                messages = [([{"type": "image"}, {"type": "text", "text": "\nHi"}], "yes"), ("So?", None)]
            ids = encode(tokenizer, messages, tiles, system, tokens_per_tile=3, plain=plain)
            assert ids[:2] == [1, tokenizer.id("<|im_start|>")] and ids.count(1) == 1
        later = encode(tokenizer, [("So?", None)], after=answer, plain=plain)
        assert later[0] == tokenizer.id("<|im_end|>") and 1 not in later
        assert encode(tokenizer, [("So?", None)], after=[], plain=plain)[0] == tokenizer.id("<|im_start|>")


def test_a_later_turn_is_the_tail_of_the_whole(golden):
    first, second = ("<image>\n\nfirst\n", None), ("\nsecond <image> ?", None)
    for text in ("an answer", "boat .", ""):
        whole = encode(golden, [(first[0], text), second], [2, 1])
        assert encode(golden, [first], [2]) + golden.encode(text) + encode(
            golden, [second], [1], after=golden.encode(text)) == whole


# ---- text that spells tokens ----------------------------------------------------------------------------------------

def test_what_spells_a_piece_that_is_never_merged(golden):
    """Its id, as in SentencePiece, though an added token took it; in plain text its characters."""
    assert golden.encode("[UNUSED_TOKEN_145]") == [608] == golden.encode("<|im_start|>")
    assert golden.encode("a[UNUSED_TOKEN_140][UNUSED_TOKEN_141") == [
        *golden.encode("a"), 603, *golden.encode("[UNUSED_TOKEN_141")]
    assert set(golden.encode("[UNUSED_TOKEN_145]", plain=True)).isdisjoint(golden.added.values())
    assert golden.decode(golden.encode("x[UNUSED_TOKEN_145]", plain=True)) == "x[UNUSED_TOKEN_145]"
    with pytest.raises(InputError, match="no token .*UNUSED_TOKEN_140"):
        golden.id("[UNUSED_TOKEN_140]")


@each_form
def test_plain_text_never_becomes_an_added_token(known, form):
    tokenizer = known[form]
    names = [*tokenizer.added, *(f"[UNUSED_TOKEN_{n}]" for n in range(140, 146)), "<0x0A>"]
    for name in names:
        ids = tokenizer.encode(f"x{name}y", plain=True)
        assert not set(ids) & {*tokenizer.added.values()} and 3 + 10 not in ids
        assert tokenizer.decode(ids) == f"x{name}y"


def test_other_pieces_that_are_never_merged_stay_whole_in_plain_text(tmp_path):
    listed = pieces(["ab", "bc", "\u2581", *"abc12[]"])
    listed[-6:-6] = [("[a b]".replace(" ", "\u2581"), 0, USER_DEFINED), ("bc1", 0, USER_DEFINED), ("c", -9, NORMAL)][:2]
    tokenizer = Tokenizer.load(put(tmp_path / "x", listed))
    where = {text: i for i, (text, *_) in enumerate(listed)}
    for plain in (False, True):
        got = tokenizer.encode("abc12[a b]2", plain=plain)
        assert got == [where["a"], where["bc1"], where["2"], where["[a\u2581b]"], where["2"]]
        assert tokenizer.decode(got) == "abc12[a b]2"


def test_the_longest_of_several_is_taken(tmp_path):
    listed = pieces(["\u2581", *"abc"])
    listed[-6:-6] = [(text, 0, USER_DEFINED) for text in ("ab", "abca", "ca")]
    tokenizer = Tokenizer.load(put(tmp_path / "x", listed))
    assert tokenizer.decode(tokenizer.encode("abcab")) == "abcab"
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("abcabab c")] == [b"abca", b"b", b"ab", b" ", b"c"]


# ---- merges ---------------------------------------------------------------------------------------------------------

def by_hand(listed, text):
    """SentencePiece's rule: of all neighbours whose whole is a piece, merge those with the best score, leftmost."""
    score = {t: s for t, s, kind in listed if kind == NORMAL}
    parts = [*text]
    while True:
        whole = [(-score[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in score]
        if not whole:
            return parts
        _, i = min(whole)
        parts[i:i + 2] = ["".join(parts[i:i + 2])]


def test_merges_follow_the_scores(tmp_path):
    """Random vocabularies of overlapping words, some not reachable, their scores in any order."""
    rng = random.Random(0)
    for n in range(6):
        words = sorted({"".join(rng.choice("abc") for _ in range(rng.choice((2, 2, 3, 4)))) for _ in range(14)})
        rng.shuffle(words)
        listed = pieces([*words, *"abc\u2581"])
        tokenizer = Tokenizer.load(put(tmp_path / str(n), listed))
        for _ in range(60):
            text = "".join(rng.choice("abc") for _ in range(rng.randrange(1, 14)))
            assert [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text)] == by_hand(listed, text), text


def test_only_ordinary_pieces_are_merged(tmp_path):
    """Not into a control piece, a byte, or one whose id an added token has."""
    listed = pieces(["<s", "</", "s>", "<0", "x0A>", "[UNUSED_TOKEN_140", "\u2581", *"<s>/0xA["])
    listed[:3] = [(text, 0, kind) for text, _, kind in listed[:3]]
    listed.insert(-6, ("<s</", 0, CONTROL))
    listed[-6:] = [(text, score, NORMAL) for text, score, _ in listed[-6:]]
    tokenizer = Tokenizer.load(put(tmp_path / "x", listed))
    for text in ("<s>", "</s>", "<0x0A>", "<s</", "[UNUSED_TOKEN_140]"):
        ids = tokenizer.encode(text, plain=True)
        assert len(ids) > 1 and not set(ids) & {0, 1, 2, 13, *tokenizer.added.values()}, text
        assert tokenizer.decode(ids) == text
    control = next(i for i, one in enumerate(listed) if one[0] == "<s</")
    assert tokenizer.decode([control]) == "" and tokenizer.token_bytes(control) == b""


def test_a_vocabulary_of_the_released_size(tmp_path):
    """92,544 pieces: read, merges found, built in seconds; what is encoded comes back."""
    rng = random.Random(0)
    letters = [chr(0x4E00 + n) for n in range(5000)] + [chr(n) for n in range(33, 127)] + ["\u2581"]
    words = dict.fromkeys(rng.choice(letters[-95:]) + rng.choice(letters[-95:]) for _ in range(5000))
    some = [*words]
    while len(words) < 92_544 - 265 - len(letters):
        word = rng.choice(some) + rng.choice(some if rng.random() < 0.5 else letters)
        words.setdefault(word[:16])
        some += [word] if len(word) <= 14 and len(some) < 20_000 else []
    folder = put(tmp_path / "x", pieces([*words, *(c for c in letters if c not in words)]))
    start = time.process_time()
    tokenizer = Tokenizer.load(folder)
    assert time.process_time() - start < 8           # 2 s on a machine at rest
    assert tokenizer.vocab_size == 92_553 and tokenizer.id("<img>") == 92_544 and tokenizer.id("<|im_end|>") == 92_542
    text = "The boat, 一丁丂 and \n\x00 🐅 e\u0301"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids) < 92_538


# ---- decoding -------------------------------------------------------------------------------------------------------

TIDY = ["\u2581", "\u2581\u2581", "\u2581.", "'", "n", "t", "s", "v", "e", "r", "m", "a", ".", ",", "?", "!", "\u2581'",
        "\u2581n", "'t", "'s", "re", "ve", "\u4e16"]


@pytest.mark.parametrize("prefix", [0, 1])
def test_streams_give_what_decode_gives(tmp_path, prefix):
    """All ids, tidied ones, broken bytes, shown tokens; and what was given out never has to be taken back."""
    listed = pieces(TIDY)
    folder = put(tmp_path / "x", listed, normalizer={**NORMALIZER, 3: prefix})
    more = {**added(len(listed)), "<point>": len(listed) + 9}
    (folder / "added_tokens.json").write_text(json.dumps(more))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.id("<point>") not in tokenizer.special_ids
    rng = random.Random(prefix)
    words = [*range(259, 259 + len(TIDY))]
    shown = [*range(len(listed) - 6, len(listed) + 10), 0, 1, 2]
    for _ in range(800):
        pool = rng.choice((words, words[:10], [*words, *shown], [*words[:4], *range(200, 259)],
                           range(tokenizer.vocab_size)))
        ids = [rng.choice(pool) for _ in range(rng.randrange(25))]
        for skip in (True, False):
            assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip_special_tokens=skip) == reference(
                tokenizer, listed, ids, skip, prefix), ids


def reference(tokenizer, listed, ids, skip, prefix):
    """The original's two functions, all at once instead of token by token."""
    names = {i: token for token, i in tokenizer.added.items()}

    def run(tokens):
        out = bytearray()
        for k, i in enumerate(tokens):
            text = listed[i][0].replace("\u2581", " ")
            out += bytes([i - 3]) if 3 <= i < 259 else text[prefix and k == 0 and text[0] == " ":].encode()
        return whole_characters(bytes(out))

    def text_of(tokens):
        out, part, after = "", [], False
        for i in tokens:
            if i in names:
                out += " " * (not after) + run(part) + names[i]
                part, after = [], True
            else:
                part.append(i)
                after = False
        out += run(part)
        for old, new in internlm2_tokenizer.TIDIED:
            out = out.replace(old, new)
        return out

    texts, part = [], []
    for i in [i for i in ids if not (skip and i in tokenizer.special_ids)]:
        if i in names and (i not in tokenizer.special_ids or i >= len(listed)):
            texts += [text for text in [text_of(part)] if text] + [names[i]]
            part = []
        else:
            part.append(i)
    return " ".join(texts + ([text_of(part)] if part else []))


def whole_characters(data):
    """Each byte that begins no valid character is one U+FFFD."""
    out = ""
    while data:
        for size in range(1, 5):
            try:
                out += data[:size].decode()
            except UnicodeDecodeError:
                continue
            data = data[size:]
            break
        else:
            out, data = out + "\ufffd", data[1:]
    return out


def test_a_stream_waits_for_no_longer_than_it_has_to(golden):
    def pieces_of(text):
        stream = TextStream(golden)
        return [stream.push(golden.id(c)) if c != "\u2581" else stream.push(golden.id(c)) for c in text]
    assert pieces_of("boat") == [*"boat"]                                   # no n, v or r is waited with in a word
    assert pieces_of("a\u2581b") == ["a", "", " b"]
    assert pieces_of("a\u2581.") == ["a", "", "."]
    stream = TextStream(golden)
    got = [stream.push(3 + b) for b in "\u4e16".encode()]
    assert got == ["", "", "\u4e16"] and not stream.incomplete
    assert stream.push(3 + 0xE4) == "" and stream.incomplete and stream.push(golden.id("a")) == "\ufffda"
    assert stream.push(golden.id("\u2581")) == "" and stream.incomplete and stream.finish() == " "


@pytest.mark.parametrize("text", [" ", "n ", " '", "'", "a", "[UNUSED_TOKEN_14", "\n"])
def test_time_grows_as_the_text_does(golden, text):
    start = time.process_time()
    for plain in (False, True):
        ids = golden.encode(text * (30_000 // len(text)), plain=plain)
    for skip in (False, True):
        golden.decode([*ids, 607], skip_special_tokens=skip)
    assert time.process_time() - start < 6


@pytest.mark.parametrize("words, text, ids", [
    (["."], "a", 1), ([" "], "a", 1), (["a."], "", 0), (["zz"], "a.", 3), ([" ."], "a.", 3)])
def test_a_stop_word_in_what_was_waited_with(golden, words, text, ids):
    """At the end by length and by a stop token, before it; and the ids left are those of the text left."""
    tokens = [golden.id("a"), golden.id("\u2581"), golden.id(".")]
    for most, more in ((3, []), (9, [607])):
        for skip in (True, False):
            config = GenerationConfig(stop_words=words, skip_special_tokens=skip)
            answer = Answer(Turn([1], [], config, most, 0), golden, {607}, 0)
            given = ""
            for token in [*tokens, *more]:
                if answer.finish_reason is None:
                    given += answer.push(token, None)
            assert answer.finish_reason == ("length" if words in (["zz"], [" ."], [" "]) and most == 3 else "stop")
            if words == [" "]:      # the text is "a.", the space is gone before anybody sees it
                assert given == answer.text == "a."
            else:
                assert given == answer.text == text and len(answer.token_ids) == ids
            assert golden.decode(answer.token_ids) == answer.text


def test_a_stop_word_inside_a_text_that_was_waited_with(golden):
    """With special tokens shown, all of it comes at the end; the ids are spelled anew up to the stop word."""
    config = GenerationConfig(stop_words=["to"], skip_special_tokens=False)
    answer = Answer(Turn([1], [], config, 50, 0), golden, {607}, 0)
    for token in [*golden.encode("one boat to see"), 607]:
        if answer.finish_reason is None:
            answer.push(token, None)
    assert answer.text == "one boat " == golden.decode(answer.token_ids) and answer.finish_reason == "stop"


def test_which_tokens_contain_a_text(golden):
    for text in (" a", "th", "\n", "<img>"):
        found = golden.containing(text)
        assert found and all(text.encode() in golden.token_bytes(i) for i in found)
    assert golden.token_bytes(3 + 0xE4) == b"\xe4" and golden.token_bytes(609) == b"<img>"
    assert 259 in golden.containing(" a") and golden.token_bytes(259) == b" a"


def test_bad_text_and_ids(golden):
    with pytest.raises(InputError, match="half a surrogate pair at character 2"):
        golden.encode("ab\ud800")
    for bad in (-1, 618, 2 ** 40):
        with pytest.raises(InputError, match=rf"id {bad} is not in the vocabulary \(0..617\)"):
            golden.decode([bad])
    with pytest.raises(InputError, match="there is room for 100; use a shorter text"):
        golden.encode("1 " * 10_000, most=100)


# ---- files ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "x", ignore=shutil.ignore_patterns("*dummy*", "*strings*", "decode*"))


def edit(path, **change):
    data = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({k: v for k, v in {**data, **change}.items() if v is not ...}))


def test_either_file_may_list_the_added_tokens(folder, golden):
    for gone in ("added_tokens.json", "tokenizer_config.json"):
        moved = (folder / gone).read_bytes()
        (folder / gone).unlink()
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.added == golden.added and tokenizer.special_ids == golden.special_ids
        (folder / gone).write_bytes(moved)
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="the tokenizer has no <|im_start|>"):
        Tokenizer.load(folder)


def test_what_a_model_needs_without_a_tokenizer(folder, golden):
    listing = read_listing(folder)
    assert listing.vocab_size == 618 and listing.unused(620) == [618, 619]
    assert listing.added == golden.added


def test_a_tokenizer_json_beside_it_adds_nothing(folder, golden):
    text = golden.backend.to_str()
    (folder / "tokenizer.json").write_text(text)
    assert Tokenizer.load(folder).encode("the boat") == golden.encode("the boat")
    data = json.loads(text)
    a, b = golden.backend.id_to_token(300), golden.backend.id_to_token(301)
    data["model"]["vocab"].update({a: 301, b: 300})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="tokenizer.json and tokenizer.model in .* differ in 2 tokens"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("names", [["vocab.json"], ["merges.txt"], ["vocab.json", "merges.txt"]])
def test_files_of_both_families_are_refused(folder, tiny, names):
    for name in names:
        shutil.copy(tiny / name, folder)
    with pytest.raises(InputError, match=f"tokenizer.model, of InternLM2, and {' and '.join(names)}, of Qwen2; keep"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("change, message", [
    ({"<|plugin|>": 300}, "id 300 is .* in tokenizer.model and the added token '<.plugin.>'"),
    ({"<|plugin|>": 5}, "id 5 is '<0x02>' in tokenizer.model and the added token '<.plugin.>'"),
    ({"<img>": 607}, "give id 607 to '<img>' and to|go on with id 610"), ({"<s>": 7}, "'<s>' has id"),
    ({"<box>": 700}, "609 pieces, and the added tokens go on with id 617;"),
    ({"<more>": 619}, "609 pieces, and the added tokens go on with id 619;"),
    ({"<more>": 0}, "give id 0 to '<unk>' and to '<more>'"),
    ({"<img>": 607, "<|im_end|>": 609}, "609 pieces and <.im_end.> has id 609, in the released ones it is one of the"),
    ({"\u2581a": 259}, "id 259 is '.a' in tokenizer.model and the added token '.a'"),
    ({"\u2581a": 618}, "has id 618 in .* and 259 in tokenizer.model")])
def test_added_tokens_that_do_not_fit(folder, change, message):
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "added_tokens.json", **change)
    with pytest.raises(InputError, match=message):
        Tokenizer.load(folder)


def test_a_model_with_more_or_fewer_pieces(tmp_path):
    """Of another vocabulary size: the added tokens are those of the released model."""
    words = ["\u2581", *"abcdefgh"]
    listed = pieces(words)
    for other in (listed[:-8] + listed[-6:], listed[:-6] + [("zz", 0, NORMAL)] + listed[-6:], listed[:-6], listed[:-1]):
        with pytest.raises(InputError, match="tokenizer.model"):
            Tokenizer.load(put(tmp_path / "x", other, added(len(listed))))
    Tokenizer.load(put(tmp_path / "x", listed, added(len(listed))))


def test_unused_pieces(tmp_path):
    """Those that nothing is merged into are as good as any; others would need another algorithm."""
    listed = pieces(["ab", "\u2581", *"ab"])
    odd = [(text, score, UNUSED if text.startswith("[") or text == "b" else kind) for text, score, kind in listed]
    tokenizer = Tokenizer.load(put(tmp_path / "x", odd))
    assert tokenizer.decode(tokenizer.encode("ab a")) == "ab a"
    odd = [(text, score, UNUSED if text == "ab" else kind) for text, score, kind in listed]
    with pytest.raises(InputError, match="tokenizer.model in .* marks piece 259, 'ab', as unused, though pieces 261 a"):
        Tokenizer.load(put(tmp_path / "x", odd))


@pytest.mark.parametrize("key, value", [("add_bos_token", False), ("add_bos_token", None), ("add_eos_token", True),
                                        ("bos_token", "</s>"), ("bos_token", None), ("bos_token", {"content": "<x>"}),
                                        ("sp_model_kwargs", {"enable_sampling": True})])
def test_another_recipe_is_refused(folder, key, value):
    edit(folder / "tokenizer_config.json", **{key: value})
    with pytest.raises(InputError, match=f"^{key} of tokenizer_config.json in .* is not the recipe of InternLM2"):
        Tokenizer.load(folder)


def test_what_changes_nothing_is_taken(folder, golden):
    for change in ({"add_bos_token": ...}, {"bos_token": {"content": "<s>"}}, {"bos_token": ...},
                   {"sp_model_kwargs": {}}, {"model_max_length": 5}, {"clean_up_tokenization_spaces": True}):
        edit(folder / "tokenizer_config.json", **change)
        assert Tokenizer.load(folder).encode("the boat") == golden.encode("the boat")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_that_would_change_the_text_are_refused(folder, flag):
    listed = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    listed["609"][flag] = True
    edit(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    with pytest.raises(InputError, match=f"{flag} of '<img>' of the added tokens"):
        Tokenizer.load(folder)


def test_more_than_any_tokenizer_has(folder, monkeypatch):
    for name, most, message in ((("MAX_TOKENS"), 600, "609 pieces in tokenizer.model, at most 600"),
                                ("MAX_ADDED", 17, "18 added tokens, at most 17"),
                                ("MAX_ADDED_CHARS", 100, "characters in added tokens, at most 100")):
        with monkeypatch.context() as patch:
            patch.setattr(minivl_tokenizer, name, most)
            with pytest.raises(InputError, match=message):
                Tokenizer.load(folder)
    monkeypatch.setattr(internlm2_tokenizer, "MAX_MERGES", 100)
    with pytest.raises(InputError, match="tokenizer.model in .* has over 100 pairs of pieces"):
        Tokenizer.load(folder)
