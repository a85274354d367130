"""The reader of tokenizer.model: every part of a good file, every kind of a bad one."""
import random
import time

import pytest
from conftest import GOLDEN
from sentencepiece_files import NORMALIZER, TRAINER, field, message, model, piece, pieces, varint

from minivl import InputError, sentencepiece
from minivl.sentencepiece import BYTE, BYTES, NORMAL, UNUSED, USER_DEFINED, Piece, read_model

WORDS = pieces(["ab", "abc", "\u2581", "a", "b", "c", "\n"])
COUNT = len(WORDS)


@pytest.fixture
def read(tmp_path):
    """Read bytes as tokenizer.model."""
    def read(data):
        (tmp_path / "tokenizer.model").write_bytes(data)
        return read_model(tmp_path / "tokenizer.model")
    return read


def test_what_was_written_is_read(read):
    found = read(model(WORDS))
    assert found.pieces == [Piece(text, float(score), kind) for text, score, kind in WORDS]
    assert found.dummy_prefix is False
    for normalizer in ({**NORMALIZER, 3: 1}, {4: 0}):       # a dummy prefix is the default
        assert read(model(WORDS, normalizer=normalizer)).dummy_prefix is True


def test_the_golden_files():
    for folder, prefix in (("", False), ("dummy-prefix", True)):
        found = read_model(GOLDEN / "internlm2-tokenizer" / folder / "tokenizer.model")
        assert found.dummy_prefix is prefix and len(found.pieces) == 609
        assert [p.text for p in found.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
        assert found.pieces[603] == ("[UNUSED_TOKEN_140]", 0.0, USER_DEFINED)


def test_fields_without_a_meaning_here_are_skipped(read):
    strange = [varint(200 << 3) + varint(2 ** 63), varint(201 << 3 | 1) + b"12345678", field(202, b"any \xff bytes"),
               field(203, 1.5), field(0, b"")]
    known = read(model(WORDS))
    assert read(b"".join(strange) + model(WORDS) + b"".join(strange)) == known
    more = b"".join(field(1, message({1: t.encode(), 2: float(s), 3: k}) + strange[1]) for t, s, k in WORDS)
    assert read(more + model([])) == known


def test_defaults_and_what_is_there_twice(read):
    """As in protobuf: a missing type is NORMAL, a missing score 0, the last value counts, messages are joined."""
    bare = field(1, field(1, b"zz"))
    assert read(model(WORDS) + bare).pieces[-1] == ("zz", 0.0, NORMAL)
    twice = field(1, field(1, b"xx") + field(3, 9) + field(1, b"zz") + field(3, UNUSED))
    assert read(model(WORDS) + twice).pieces[-1] == ("zz", 0.0, UNUSED)
    parted = model(WORDS, {3: 1, 35: 1}) + field(2, message({3: 2}))
    assert read(parted) == read(model(WORDS))


@pytest.mark.parametrize("kind, name", [(1, "unigram"), (3, "word"), (4, "char"), (9, "model_type 9")])
def test_another_algorithm_is_refused_by_its_name(read, kind, name):
    with pytest.raises(InputError, match=f"is a {name} model of {COUNT} pieces, InternLM2's is BPE .* take the"):
        read(model(WORDS, {**TRAINER, 3: kind}))
    with pytest.raises(InputError, match="is a unigram model"):         # protobuf's default
        read(model(WORDS, {35: 1}))


@pytest.mark.parametrize("trainer, normalizer, name", [
    ({35: 0}, {}, "byte_fallback"), ({24: 1}, {}, "treat_whitespace_as_suffix"), ({}, {4: 1}, "remove_extra_white"),
    ({}, {5: 0}, "escape_whitespaces"), ({}, {2: b"rules"}, "normalizer_spec.precompiled_charsmap")])
def test_other_rules_are_refused(read, trainer, normalizer, name):
    with pytest.raises(InputError, match=rf"tokenizer.model in .* has \d+ for .*{name}.*, InternLM2's has \d"):
        read(model(WORDS, {**TRAINER, **trainer}, {**NORMALIZER, **normalizer}))
    with pytest.raises(InputError, match="for normalizer_spec.remove_extra_whitespaces"):   # protobuf's default
        read(model(WORDS, normalizer={}))
    with pytest.raises(InputError, match="denormalizer_spec"):
        read(model(WORDS) + field(5, field(2, b"rules")))


def without(text):
    return [one for one in WORDS if one[0] != text]


@pytest.mark.parametrize("listed, message", [
    ([*WORDS, ("ab", 0, NORMAL)], f"pieces 259 and {COUNT} are both 'ab'"),
    ([*WORDS, ("<0x00>", 0, NORMAL)], f"pieces 3 and {COUNT} are both '<0x00>'"),
    ([*WORDS, ("", 0, NORMAL)], f"piece {COUNT} has 0 characters, 1 to 512"),
    ([*WORDS, ("x" * 513, 0, NORMAL)], f"piece {COUNT} has 513 characters"),
    ([*WORDS, ("xy", float("nan"), NORMAL)], "'xy', has score nan"),
    ([*WORDS, ("xy", float("-inf"), NORMAL)], "'xy', has score -inf"),
    ([*WORDS, ("xy", 0, 0)], "'xy', is of type 0"), ([*WORDS, ("xy", 0, 7)], "'xy', is of type 7"),
    ([*WORDS, ("xy", 0, 2 ** 60)], "is of type 1152921504606846976"),
    ([*WORDS, ("x", 0, 3)], "'x', is of type 3, and this character would vanish"),
    ([*WORDS, ("x", 0, 2)], "'x', is of type 2, and"), (without("\u2581"), "has no piece for the space among its 271;"),
    (without("<0x41>"), "has pieces for 255 of the 256 bytes and 0 other"),
    ([one for one in WORDS if one[2] != BYTE], "has pieces for 0 of the 256 bytes"),
    ([*without("<0x41>"), ("<0x41>", 0, NORMAL)], "for 255 of the 256"),
    ([*WORDS, ("<0xff>", 0, BYTE)], "256 of the 256 bytes and 1 other"), ([], "no piece for the space among its 0")])
def test_pieces_that_cannot_be(read, listed, message):
    with pytest.raises(InputError, match=message) as caught:
        read(model(listed))
    assert len(str(caught.value)) < 600 and "tokenizer.model in " in str(caught.value)


@pytest.mark.parametrize("data, message", [
    (b"\x0a", "the file ends inside a number"), (b"\x0a\x05ab", r"has 2 bytes left at byte \d+, a field there says 5;"),
    (b"\x08\x01", "field 1 of the file has wire type 0 instead of 2"), (b"\x0b", r"wire type 3 at byte \d"),
    (b"\x0f", "wire type 7"), (b"\xff" * 40, "over 10 bytes"), (b"\x08" + b"\xff" * 20, "over 10 bytes"),
    (b"\x0a" + varint(2 ** 69), "there says 590295810358705651712"), (b"\x0a" + varint(2 ** 63), "left at byte"),
    (b"\xcd\x0c123", "3 bytes left"), (b"\xc9\x0c1234567", "7 bytes left"), (b"PK\x03\x04" + bytes(99), "damaged"),
    (b'{"version": "1.0"}', "damaged"), (field(1, field(1, b"\xff")), f"the text of piece {COUNT} is not UTF-8"),
    (field(1, field(1, b"\xed\xa0\x80")), "not UTF-8"), (field(1, field(1, 5)), "field 1 of piece .* has wire type 0"),
    (field(1, field(2, 5)), "field 2 of piece .* has wire type 0 instead of 5"),
    (field(1, field(3, 1.0)), "field 3 of piece .* has wire type 5"), (field(2, field(3, b"x")), "of trainer_spec has"),
    (field(3, field(4, 0.0)), "of normalizer_spec has"), (b"", "is a unigram model of 0 pieces")])
def test_what_is_no_such_file(read, data, message):
    with pytest.raises(InputError, match=message) as caught:
        read(model(WORDS) + data if data else data)
    assert len(str(caught.value)) < 500


def test_every_cut_of_a_file_is_refused(read):
    """At the end of a field, too: the rules come last."""
    data = model(WORDS)
    for end in [*range(len(data) - 40, len(data)), *random.Random(0).sample(range(len(data)), 60)]:
        with pytest.raises(InputError, match="tokenizer.model in"):
            read(data[:end])


def test_files_that_are_not_read(read, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="has no tokenizer.model"):
        read_model(tmp_path / "tokenizer.model")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1477754\n"
    with pytest.raises(InputError, match=f"git-lfs pointer of {len(pointer)} bytes, .* run `git lfs pull`"):
        read(pointer)
    data = model(WORDS)
    monkeypatch.setattr(sentencepiece, "MAX_BYTES", len(data) - 1)
    with pytest.raises(InputError, match=f"has {len(data)} bytes, at most {len(data) - 1} are read"):
        read(data)


def test_time_grows_as_the_file_does(read):
    """A file of 300,000 fields, in one message and in messages inside each other's place: a second or two."""
    start = time.process_time()
    with pytest.raises(InputError):
        read(field(1, field(9, 1) * 150_000) + field(9, 1) * 150_000)
    with pytest.raises(InputError):
        read(piece("a") * 60_000)
    assert time.process_time() - start < 4
    assert len(BYTES) == 256
