"""The page of pairs: what differs is marked, strangers' texts stay texts, nothing is fetched."""
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from minivl import InputError
from weights_tools.mpo.show import SIDE, difference, main


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (900, 600), "green").save(tmp_path / "pictures" / "a.png")
    return tmp_path


def pairs(folder, *rows):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def page(folder, *argv):
    assert main([*map(str, argv), "--html", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text("utf-8")


def test_difference():
    chosen, rejected = difference("There are two red cars.\n\nFinal answer: 2",
                                  "There are three cars.\n\nFinal answer: 3")
    assert chosen == "There are <ins>two red</ins> cars.\n\nFinal answer: <ins>2</ins>"
    assert rejected == "There are <del>three</del> cars.\n\nFinal answer: <del>3</del>"
    assert difference("图中有两只猫", "图中有三只猫") == ("图中有<ins>两</ins>只猫", "图中有<del>三</del>只猫")
    assert difference("a <b>", "") == ("<ins>a &lt;b&gt;</ins>", "")
    many = "the cat " * 150
    assert difference(f"x {many}", f"y {many}") == (f"<ins>x</ins> {many}", f"<del>y</del> {many}")
    assert difference("a b c", "a c") == ("a <ins>b</ins> c", "a c")


def test_texts_come_back_whole():
    for chosen, rejected in (("a  b\n c ", " a b"), ("\n\n", "x"), ("&amp; <i>", "& <i>"), ("两 a只", "a 两")):
        for marked, text in zip(difference(chosen, rejected), (chosen, rejected)):
            found = []
            parser = HTMLParser()
            parser.handle_data = found.append
            parser.feed(marked)
            parser.close()
            assert "".join(found) == text


ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>\" '"


def test_page(folder):
    path = pairs(folder, {"image": "a.png", "question": ATTACK, "chosen": f"{ATTACK} 1", "rejected": f"{ATTACK} 2",
                          "answer_gt": ATTACK},
                 {"question": "half a letter \ud800", "chosen": "x", "rejected": ""})
    text = page(folder, path, "--root", folder / "pictures")
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(text)
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe"}
    (image,) = [attributes for tag, attributes in tags if tag == "img"]
    assert image["src"].startswith("data:image/jpeg;base64,") and image["width"] == str(SIDE) and not any(
        name.startswith("on") for _, attributes in tags for name in attributes)
    assert not re.search(r"https?:|url\(|@import", text) and "color-scheme: light dark" in text
    assert "2 of 2 pairs" in text and "pairs.jsonl, line 2" in text and len(text) < 30_000


def test_a_sample_of_all_files(folder):
    rows = [{"question": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(30)]
    path = pairs(folder, *rows)
    entry = {"root": "pictures", "annotation": "pairs.jsonl", "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps({"one": entry, "other": entry}), "utf-8")
    argv = folder / "meta.json", "-n", 12
    text = page(folder, *argv)
    assert "12 of 60 pairs" in text and text.count("<article>") == 12 and "one, line" in text and "other, line" in text
    assert text == page(folder, *argv) != page(folder, *argv, "--seed", 1)
    for line, question in re.findall(r"<h2>\w+, line (\d+)</h2><pre>q(\d+)", text):
        assert int(line) == int(question) + 1
    assert page(folder, path, "-n", 99).count("<article>") == 30


def test_bad_input(folder):
    path = pairs(folder, {"question": "q", "chosen": "a", "rejected": "b", "image": "a.png"})
    with pytest.raises(InputError, match=r"line 1: there is no picture .*a\.png"):
        page(folder, path)
    (folder / "pictures" / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r"pairs\.jsonl, line 1: .*a\.png"):
        page(folder, path, "--root", folder / "pictures")
    assert not (folder / "page.html").exists()
    with pytest.raises(InputError, match="--root has no effect beside meta.json"):
        page(folder, "meta.json", "--root", folder)
    with pytest.raises(InputError, match="-n is 0"):
        page(folder, path, "-n", 0)
