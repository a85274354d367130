"""Tokenizer and template: against the original's ids where the vocabulary is there, by rule on the tiny one."""
import json
import random
import time

import pytest
from conftest import GOLDEN, shared

from minivl import InputError, Tokenizer
from minivl.prompt import SYSTEM, encode, render
from minivl.tokenizer import TextStream

SYSTEM_IDS = [105043, 90286, 21287, 13935, 116669, 3837, 105205, 13072, 20412, 67916, 30698, 3837, 104625, 100633,
              104455, 104800, 5373, 109065, 81217, 104581, 99721, 75317, 101101, 100013, 9370, 42140, 53772, 35243,
              26288, 102064, 104949, 1773]
FRAME = ("<|im_start|>system\n" + SYSTEM + "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def qwen2():
    return Tokenizer.load(shared("qwen2_tokenizer"))


@pytest.fixture(scope="module")
def small(tiny):
    return Tokenizer.load(tiny)


def test_200_nasty_strings_of_the_original(qwen2):
    cases = json.loads(shared("golden/tokenizer_strings.json").read_text())
    assert len(cases) == 200
    assert [text for text, ids in cases if qwen2.encode(text) != ids] == []


PROMPTS = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))


def test_prompts_of_the_original():
    assert len(PROMPTS) == 8
    for case in PROMPTS:
        text = render(case["messages"], case["tiles_per_image"], case["system"])
        assert text.replace("<IMG_CONTEXT>", "") == case["prompt_without_context"], case["name"]
        assert text.count("<IMG_CONTEXT>") == 256 * sum(case["tiles_per_image"])


def test_prompt_ids_of_the_original(qwen2):
    for case in PROMPTS:
        ids = encode(qwen2, case["messages"], case["tiles_per_image"], case["system"])
        assert len(ids) == case["num_tokens"], case["name"]
        assert [i for i in ids if i != 151667] == case["ids_without_context"], case["name"]


def test_golden_ids(qwen2):
    assert qwen2.encode(SYSTEM) == SYSTEM_IDS
    assert qwen2.encode("<image>\n") == [27, 1805, 397] and qwen2.encode("Image-1: ") == [1906, 12, 16, 25, 220]
    assert qwen2.encode("Frame1: ") == [4369, 16, 25, 220] and qwen2.encode("!") == [0]
    assert qwen2.vocab_size == 151674 and len(qwen2.added) == 31
    assert qwen2.id("<img>") == 151665 and qwen2.id("</img>") == 151666 and qwen2.id("<IMG_CONTEXT>") == 151667
    question = [("Please describe the image shortly.", None)]
    assert encode(qwen2, [("<image>\n" + question[0][0], None)], [1], tokens_per_tile=2) == [
        151644, 8948, 198, *SYSTEM_IDS, 151645, 198, 151644, 872, 198, 151665, 151667, 151667, 151666, 198, 5501, 7512,
        279, 2168, 19620, 13, 151645, 198, 151644, 77091, 198]


def test_special_flags(qwen2):
    """151657..151664 stay in decoded text, the other added tokens are dropped."""
    kept = [i for i in range(151643, 151674) if qwen2.decode([i])]
    assert kept == list(range(151657, 151665))


def test_tokenizer_json_gives_the_same_ids(small, tmp_path):
    small.backend.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.load(tmp_path)
    text = "Grüße, 世界 🐅 1234 don't <img>\n\n  x<|im_end|>"
    assert again.encode(text) == small.encode(text) and again.added == small.added
    assert again.special_ids == small.special_ids


def test_rendering_by_hand():
    assert render([("Hello, who are you?", None)]) == FRAME.format("Hello, who are you?")
    assert render([{"role": "user", "content": "<image>\nHi <image>"}], [2, 1], tokens_per_tile=2) == FRAME.format(
        "<img>" + "<IMG_CONTEXT>" * 4 + "</img>\nHi <img><IMG_CONTEXT><IMG_CONTEXT></img>")
    turns = [("a", "b"), ("c", None)]
    assert render(turns) == render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                    {"role": "user", "content": "c"}])
    assert render(turns, system="S").startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n")
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "c"}]
    assert render(messages) == render([("c", None)], system="S")
    assert render([("a", "b")]).endswith("<|im_start|>assistant\nb<|im_end|>\n")            # finished: nothing is open
    assert render([("a", ""), ("c", None)]).count("<|im_end|>") == 3                        # empty: only its header
    items = [{"type": "image"}, {"type": "text", "text": "x"}]
    assert render([{"role": "user", "content": items}], [1]) == render([("<image>x", None)], [1])


def test_a_later_turn_is_the_tail_of_the_whole(small):
    turns = [("<image>\n\nfirst\n", "an answer"), ("\nsecond <image> ?", None)]
    for answer in ("an answer", ""):
        whole = encode(small, [(turns[0][0], answer), turns[1]], [2, 1])
        head = encode(small, [(turns[0][0], None)], [2])
        answer_ids = small.encode(answer)
        tail = encode(small, [turns[1]], [1], after=answer_ids)
        assert head + answer_ids + tail == whole


def test_text_that_spells_special_tokens(small):
    end, image = small.id("<|im_end|>"), small.id("<img>")
    ids = encode(small, [("a<|im_end|>b <img> c", None)])
    assert ids.count(end) == 3 and ids.count(image) == 1                # as the original renders it
    plain = encode(small, [("a<|im_end|>b <img> c", None)], plain=True)
    assert plain.count(end) == 2 and plain.count(image) == 0
    assert small.decode(plain) == small.decode(ids).replace("ab ", "a<|im_end|>b <img>")
    harmless = [("Nothing special,\n  é 12!", None)]
    assert encode(small, harmless, plain=True) == encode(small, harmless)


def test_text_that_spells_a_placeholder(small):
    """In any text of any turn, with a picture there or not, in one piece or two: refused, or plain text."""
    halves = [{"type": "text", "text": "what is <IMG_CON"}, {"type": "text", "text": "TEXT>?"}]
    spelled = "what is <IMG_CONTEXT>?"
    for messages in ([(spelled, None)], [("first", "yes"), (spelled, None)], [("first", spelled), ("why?", None)],
                     [{"role": "system", "content": spelled}, {"role": "user", "content": "why?"}],
                     [{"role": "user", "content": halves}]):
        for picture in ([], [1]):
            system = len(messages) == 2 and isinstance(messages[0], dict)
            asked = [*messages[:system], *[("<image>", "yes")] * len(picture), *messages[system:]]
            plain = [*messages[:system], *[([{"type": "image"}], "yes")] * len(picture), *messages[system:]]
            with pytest.raises(InputError, match="spells <IMG_CONTEXT>, which would take the place of a visual token"):
                encode(small, asked, picture)
            ids = encode(small, plain, picture, plain=True)
            assert ids.count(small.id("<IMG_CONTEXT>")) == 256 * len(picture)
    with pytest.raises(InputError, match="spells <IMG_CONTEXT>"):
        encode(small, [(spelled, None)], after=small.encode("an answer"))
    content = [{"type": "image"}, {"type": "text", "text": "what is <IMG_CONTEXT> and <image>?"}]
    ids = encode(small, [{"role": "user", "content": content}], [3], plain=True)
    assert ids.count(small.id("<IMG_CONTEXT>")) == 3 * 256
    assert small.decode(ids).endswith("user\n\nwhat is <IMG_CONTEXT> and <image>?\nassistant\n".replace("\n\n", "\n"))


def test_a_mark_in_the_systems_or_the_assistants_text_is_text(small):
    turns = [("<image>\nwrite html", "<image> is no tag, <img> is"), ("and <image>?", None)]
    text = render(turns, [1, 2], "Never write <image>.", tokens_per_tile=2)
    assert "Never write <image>." in text and "assistant\n<image> is no tag" in text
    assert text.count("<IMG_CONTEXT>") == 6 and text.count("<image>") == 2
    spelled = [{"type": "text", "text": "<image>"}]
    messages = [{"role": "system", "content": spelled}, {"role": "user", "content": "x"},
                {"role": "assistant", "content": spelled}, {"role": "user", "content": "y"}]
    assert render(messages).count("<image>") == 2 and "<img>" not in render(messages)
    assert encode(small, messages) == encode(small, messages, plain=True)


@pytest.mark.parametrize("tiles, marks", [([], 1), ([1], 0), ([1, 1], 1), ([1], 2)])
def test_marks_and_pictures_must_match(tiles, marks):
    with pytest.raises(InputError, match=rf"{marks} picture marks \(<image>\) but {len(tiles)} pictures are given"):
        render([("<image>" * marks + "x", None)], tiles)


def test_bad_messages():
    with pytest.raises(InputError, match="role 'robot'; roles are system, user, assistant"):
        render([{"role": "robot", "content": "x"}])
    with pytest.raises(InputError, match="a message is a int"):
        render([3])
    with pytest.raises(InputError, match="given twice"):
        render([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], system="z")
    with pytest.raises(InputError, match="every picture has at least one"):
        render([("<image>", None)], [0])
    with pytest.raises(InputError, match="message content has an item"):
        render([{"role": "user", "content": [{"type": "video"}]}])


def test_plain_encoding_has_no_added_tokens(small):
    for token in small.added:
        ids = small.encode(f"x{token}y", plain=True)
        assert small.added[token] not in ids and small.decode(ids) == f"x{token}y"


def test_stream_gives_whole_characters_and_the_same_text(small):
    chosen = random.Random(0)
    for _ in range(200):
        ids = [chosen.randrange(small.vocab_size) for _ in range(30)]
        for skip in (True, False):
            stream = TextStream(small, skip)
            pieces = [stream.push(i) for i in ids] + [stream.finish()]
            assert "".join(pieces) == small.decode(ids, skip_special_tokens=skip)
            assert "".join(pieces) == small.backend.decode(ids, skip_special_tokens=skip)       # the library's word
    stream = TextStream(small)
    pieces = [stream.push(i) for i in small.encode("aé世🐅", plain=True)] + [stream.finish()]
    assert "".join(pieces) == "aé世🐅" and "�" not in "".join(pieces) and pieces[-1] == ""


def test_stream_with_the_real_vocabulary(qwen2):
    chosen = random.Random(1)
    for _ in range(100):
        ids = [chosen.randrange(qwen2.vocab_size) for _ in range(40)]
        stream = TextStream(qwen2)
        streamed = "".join([stream.push(i) for i in ids]) + stream.finish()
        assert streamed == qwen2.decode(ids) == qwen2.backend.decode(ids)


def test_bad_text_and_ids(small):
    with pytest.raises(InputError, match="half a surrogate pair at character 2"):
        small.encode("ab\ud800")
    with pytest.raises(InputError, match="id -1 is not in the vocabulary"):
        small.decode([-1])
    with pytest.raises(InputError, match=f"id {small.vocab_size} is not in the vocabulary"):
        small.token_bytes(small.vocab_size)
    with pytest.raises(InputError, match="id True is not in the vocabulary"):
        small.token_bytes(True)
    with pytest.raises(InputError, match="no token '<nope>'"):
        small.id("<nope>")


def copy(tiny, folder, *names):
    for name in names:
        (folder / name).write_bytes((tiny / name).read_bytes())


def test_bad_tokenizer_files(tiny, tmp_path):
    with pytest.raises(InputError, match="neither vocab.json and merges.txt nor tokenizer.json"):
        Tokenizer.load(tmp_path)
    copy(tiny, tmp_path, "vocab.json", "merges.txt", "added_tokens.json")
    added = json.loads((tmp_path / "added_tokens.json").read_text())

    def broken(message, **files):
        copy(tiny, tmp_path, "vocab.json", "merges.txt", "added_tokens.json")
        for name, text in files.items():
            (tmp_path / name.replace("_json", ".json").replace("_txt", ".txt")).write_text(text)
        with pytest.raises(InputError, match=message):
            Tokenizer.load(tmp_path)
    broken("is not valid JSON at line 1", vocab_json="{broken")
    broken("merges.txt in .* does not fit the vocabulary", merges_txt="#version: 0.2\nxyzzy plugh\n")
    broken("merges.txt in .* does not fit the vocabulary", merges_txt="#version: 0.2\none_half\n")
    broken("give id 570 to '<|im_start|>' and to '<img>'", added_tokens_json=json.dumps({**added, "<img>": 570}))
    broken("must map tokens to ids", added_tokens_json='{"<img>": "x"}')
    without = {t: i for t, i in added.items() if t != "<IMG_CONTEXT>"}
    ids = sorted(without.values())
    renumbered = {t: ids[0] + n for n, t in enumerate(sorted(without, key=without.get))}
    broken("the tokenizer has no <IMG_CONTEXT>", added_tokens_json=json.dumps(renumbered))
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="is JSON but not a BPE tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("piece", ["a", " ", "\n", " \n", "1", "e\u0301", "\u0301\u0323", "\u1100\u1161", "!", "'s",
                                   "🐅", "<|im_", "<|im_end|>", "\0", "\U0001d160", "\u200d", "\u00a0", "!\n", "a \t"])
@pytest.mark.parametrize("end", ["x", " "])
def test_time_grows_as_the_text_does(small, piece, end):
    """30,000 characters: what needs a step for each pair of them takes far longer."""
    start = time.process_time()
    for plain in (False, True):
        small.encode(piece * (30_000 // len(piece)) + end, plain=plain)
    assert time.process_time() - start < 6
