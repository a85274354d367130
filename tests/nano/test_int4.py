"""Ways of making nano int4, compared: what is counted, and what each calibration shows the model."""
import pytest

from minivl import InputError, load
from minivl.config import Config
from minivl.files.find import SHIPPED
from minivl.tokenizer import Tokenizer
from weights_tools.nano import int4
from weights_tools.nano.train import accuracy

NANO = SHIPPED["nano"]


def test_each_kind_shows_what_it_says(monkeypatch):
    monkeypatch.setattr(int4, "SHOWN", 4)
    config, tokenizer = Config.load(NANO), Tokenizer.load(NANO)
    mark = tokenizer.id("<IMG_CONTEXT>")
    found = {kind: list(prompts(config, tokenizer)) for kind, prompts in int4.KINDS.items()}
    assert not any(tiles or mark in ids for ids, tiles in found["text only"]) and len(found["text only"]) == 4
    assert all(tiles and ids.count(mark) == 16 * len(tiles) for ids, tiles in found["pictures only"])
    assert sum(len(tiles) for _, tiles in found["pictures only"]) == sum(len(tiles) for _, tiles in found["both"]) > 0
    words = [tokenizer.decode([i for i in ids if i != mark]) for ids, _ in found["both"]]
    alone = [tokenizer.decode(ids) for ids, _ in found["text only"]]
    for text, whole in zip(alone, words):
        assert text.split("assistant")[1:] == whole.split("assistant")[1:]


def test_what_is_counted():
    tokenizer = Tokenizer.load(NANO)
    found = int4.compare({"a": load("nano"), "b": load("nano"), "int4": load("nano-awq")}, tokenizer, 16)
    assert found["a"] == found["b"] and found["a"]["KL"] == 0 < found["int4"]["KL"] < 0.01
    assert found["a"]["tasks"] == accuracy(load("nano"), tokenizer, "held out", 16)
    lines = int4.table(found).splitlines()
    assert len(lines) == 5 and lines[2].startswith("| a | ") and lines[2].endswith(" | 0.00000 |  |")


def test_bad_options():
    with pytest.raises(InputError, match="-n 0 must be 1 or more"):
        int4.arguments(["out", "-n", "0"])
