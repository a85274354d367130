"""What the command line of a run is taken for, before anything is asked."""
from pathlib import Path
from types import SimpleNamespace

import made
import pytest

from minivl import InputError
from weights_tools.evaluate import __main__ as command
from weights_tools.evaluate.tasks import files, is_mpo

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("names, message", [
    ((), "has none of the files MMBench_DEV_EN_V11.tsv, MMStar.tsv"),
    (("--benchmark", "MMStar"), "has no MMStar.tsv, the questions of MMStar; put it there, or name its folder with"),
    (("--benchmark", "MMBench_TEST_CN_V11"), "has no MMBench_TEST_CN_V11.tsv"),
    (("--benchmark", "MMSta"), "'MMSta' is none of the datasets known"),
])
def test_files_that_are_not_there(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        command.main(["nano", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *names])


@pytest.mark.parametrize("name, int4", [("awq", True), ("float16", False)])
def test_int4_is_read_from_the_checkpoint(name, int4, tmp_path):
    args = command.arguments([str(ROOT / "minivl" / "nano" / name), "--out", str(tmp_path)])
    assert command.settings_of(args, "", None)["int4"] == int4


def test_a_file_named_twice_is_one(tmp_path):
    made.write(tmp_path, ["MMBench_V11", "MMStar"], n=1)
    names = ["MMBench_V11", "MMStar", "MMBench_DEV_EN_V11", "MMStar"]
    assert [path.stem for _, path in files(tmp_path, names)] == ["MMBench_DEV_EN_V11", "MMStar"]


def test_missing_columns(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in made.MAKERS["MMStar"](2)]
    made.tsv(tmp_path / "MMStar.tsv", rows)
    with pytest.raises(InputError, match="answer"):
        command.main(["nano", "--data", str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("option, message", [
    ("-n", "-n is 0; it must be 1 or more"), ("--workers", "--workers is 0"), ("--batch", "--batch is 0"),
    ("--limit-tiles", "--limit-tiles is 0"), ("--max-new-tokens", "--max-new-tokens is 0")])
def test_numbers_that_cannot_be(option, message):
    with pytest.raises(InputError, match=message):
        command.arguments(["m", "--out", "o", option, "0"])
    with pytest.raises(InputError, match="--max-new-tokens is 99999, the limit is 32768"):
        command.arguments(["m", "--out", "o", "--max-new-tokens", "99999"])


def test_the_name_says_whether_it_is_of_mpo():
    cache = "~/.cache/huggingface/hub/models--OpenGVLab--InternVL2_5-4B{}/snapshots/0123abcd"
    for name, mpo in (("OpenGVLab/InternVL2_5-4B-MPO-AWQ", True), ("4b-mpo/", True), ("runs/mpo/4b", False),
                      (cache.format("-MPO"), True), (cache.format("") + "/", False), ("snapshots/mpo", True),
                      ("my-important-4b", False), ("internvl2_5-1b-tempo", False), ("InternVL2_5-1B_mpo.v2", True)):
        assert is_mpo(SimpleNamespace(checkpoint=name, mpo_prompt="auto")) == mpo
        assert is_mpo(SimpleNamespace(checkpoint=name, mpo_prompt="yes"))
        assert not is_mpo(SimpleNamespace(checkpoint=name, mpo_prompt="no"))


def test_the_name_of_the_folder_one_stands_in(tmp_path, monkeypatch):
    (tmp_path / "InternVL2_5-1B-MPO").mkdir()
    monkeypatch.chdir(tmp_path / "InternVL2_5-1B-MPO")
    assert is_mpo(SimpleNamespace(checkpoint=".", mpo_prompt="auto"))
    assert not is_mpo(SimpleNamespace(checkpoint="..", mpo_prompt="auto"))
