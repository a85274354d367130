"""Short names of the released models: what they stand for, wherever a model is named; what a misspelt one is told."""
import contextlib
import itertools
import os

import pytest

import minivl
from minivl import InputError
from minivl import __main__ as cli
from minivl.family import VARIANTS, hint
from minivl.files import find as finding
from minivl.files.find import find, hub_id_of
from weights_tools import download, inspect
from weights_tools.bench import beside, workers
from weights_tools.quantize import __main__ as quantize
from weights_tools.verify import __main__ as verify

SIZES = ("1b", "2b", "4b", "8b", "26b", "38b", "78b")


def test_the_24_released_models_and_no_other():
    """The card and its documentation: int4 releases of all but 1B and 2B, plain and MPO."""
    wanted = {size + mpo + awq for size, mpo, awq in itertools.product(SIZES, ("", "-mpo"), ("", "-awq"))
              if not (awq and size in ("1b", "2b"))}
    assert set(VARIANTS) == wanted and len(wanted) == 24
    for name, one in VARIANTS.items():
        assert one.name == name
        assert one.hub_id == f"OpenGVLab/InternVL2_5-{name.upper()}"
    assert VARIANTS["4b-mpo-awq"].hub_id == "OpenGVLab/InternVL2_5-4B-MPO-AWQ"


def test_a_hub_id_stays_and_case_does_not_matter():
    assert hub_id_of("some/Model") == "some/Model"
    assert {hub_id_of(name) for name in ("4b-mpo-awq", "4B-MPO-AWQ", "4B-mpo-Awq")} == {
        "OpenGVLab/InternVL2_5-4B-MPO-AWQ"}


class Asked(Exception):
    """What the hub was asked for."""


@pytest.mark.parametrize("way", [
    find, minivl.load, minivl.pipeline, lambda name: cli.main(["chat", "-m", name, "-p", "hello"]),
    lambda name: cli.main(["demo", name]), lambda name: cli.main(["demo", "-m", name]), inspect.inspect,
    download.download, lambda name: quantize.main([name, "out", "--method", "rtn"]),
    lambda name: verify.main([name, "x.png"]),
    lambda name: verify.record(name, [], "hello", "trace", max_num=1),
    lambda name: workers.bench(name, ["exact"]), lambda name: beside.main([name])])
def test_wherever_a_model_is_named(way, monkeypatch, tmp_path):
    def ask(hub_id, revision, **more):
        raise Asked(hub_id)
    for module in (finding, inspect, download):
        monkeypatch.setattr(module, "hub_info", ask)
        monkeypatch.setattr(module, "hub_errors", lambda *args: contextlib.nullcontext())       # lets all through
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Asked, match="^OpenGVLab/InternVL2_5-26B-MPO$"):
        way("26b-mpo")


def test_a_local_folder_of_that_name_wins(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny, "4b")
    assert str(find("4b")) == "4b"
    assert inspect.inspect("4b").problems == {"missing": [], "unexpected": [], "misshapen": [], "dtype": []}
    assert len(minivl.load("4b").language_model.model.layers) == 3
    with pytest.raises(InputError, match="InternVL2_5-8B is not in the local cache"):
        find("8b")
    with pytest.raises(InputError, match="fetch OpenGVLab/InternVL2_5-4B,"):     # or a second run could not go on
        download.download("4b", to="4b")


@pytest.mark.parametrize("name, meant", [
    ("4b-mpo-aqw", "4b-mpo-awq"), ("8b_awq", "8b-awq"), ("4B-MPO-AQW", "4b-mpo-awq"), ("4bmpo", "4b-mpo"),
    ("26-awq", "26b-awq"), ("78b-mop", "78b-mpo"), ("InternVL2_5-38B-MPO", "38b-mpo"), ("nano-aqw", "nano-awq"),
    ("InternVL2.5-8B", "8b")])
def test_a_misspelt_name_is_told_the_nearest(name, meant, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for way in (find, inspect.inspect):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(InputError) as error:
            way(name)
        assert str(error.value) == f"{name} does not exist; is {meant} meant?"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(InputError) as error:        # before any request
        inspect.inspect(name)
    assert str(error.value) == f"{name} does not exist; is {meant} meant?"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=f"^{name} is no name on the hub; is {meant} meant.$"):
        download.download(name)


@pytest.mark.parametrize("name", ["nowhere", "tokenizer", "./build/4b-mpo-aqw", "3", "/tmp/4b", "a/b/4b", ""])
def test_what_is_far_from_every_name_is_told_the_kinds(name):
    assert hint(name, ("nano", "nano-awq")) == ""
    with pytest.raises(InputError, match="does not exist; give a folder with config.json and weights, nano, nano-awq, "
                                         "a short name like 4b-mpo-awq .* or a hub id like OpenGVLab/"):
        hub_id_of(name, local=True)


@pytest.mark.parametrize("name, instead", [("1b-awq", "1b"), ("2b-mpo-awq", "2b-mpo"), ("2B-AWQ", "2b"),
                                           ("InternVL2_5-1B-MPO-AWQ", "1b-mpo")])
def test_what_was_never_released_in_int4(name, instead):
    with pytest.raises(InputError, match=rf"the {instead[:2].upper()} is not released in int4, only 4B, 8B, 26B, 38B "
                                         rf"and 78B are; take {instead}, or make one .*quantize$"):
        find(name)


def test_a_model_among_the_pictures(capsys):
    assert cli.main(["chat", "4B-awq", "-p", "hello"]) == 2
    assert "4B-awq is a model, not a picture; give it with -m: -m 4B-awq" in capsys.readouterr().err


def test_the_help_names_them(capsys):
    with pytest.raises(SystemExit):
        cli.main(["chat", "--help"])
    assert "4b-mpo-awq" in capsys.readouterr().out
