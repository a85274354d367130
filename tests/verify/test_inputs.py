"""inputs: what four engines feed the model, side by side."""
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

import minivl
from minivl.config import Config
from minivl.limits import InputError
from weights_tools.verify import __main__ as cli
from weights_tools.verify import inputs

TIGER = GOLDEN / "tiger.jpeg"


def test_four_engines_side_by_side(tiny, tmp_path, capsys):
    assert cli.main([str(tiny), str(TIGER), "--inputs", "-p", "What is this?"]) == 0
    out = capsys.readouterr().out
    assert [line.split(" ==")[0][3:] for line in out.split("\n") if line.startswith("== ")] == [
        "original chat", "LMDeploy 0.6.4", "LMDeploy 0.16", "transformers"]
    assert out.count(minivl.prompt.SYSTEM) == 3 and out.count("against the original: the same ids and pixels") == 1
    config, tokenizer = Config.load(tiny), minivl.Tokenizer.load(tiny)
    fed = inputs.engines(config, tokenizer, [TIGER], "What is this?")
    ours = minivl.prompt.encode(tokenizer, [("<image>\nWhat is this?", None)], fed[0].tiles,
                                tokens_per_tile=config.num_image_token)
    assert fed[0].ids == ours == fed[1].ids != fed[2].ids
    assert fed[2].prompt.index("What is this?") < fed[2].prompt.index("<img>")
    two = inputs.engines(config, tokenizer, [TIGER, TIGER], "Compare.")
    assert [one.prompt.count("<img>") for one in two] == [2, 1, 2, 2]
    with pytest.raises(InputError, match="give the bare question"):
        inputs.engines(config, tokenizer, [TIGER], "<image> What?")


def test_rotation_marks_and_transparency(tiny, tmp_path):
    config, tokenizer = Config.load(tiny), minivl.Tokenizer.load(tiny)
    image = Image.open(TIGER).resize((90, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    clear.save(tmp_path / "clear.png")
    turned = inputs.engines(config, tokenizer, [tmp_path / "turned.jpg"], "What?")
    white = inputs.engines(config, tokenizer, [tmp_path / "clear.png"], "What?")
    assert turned[1].pixel_error == [0.0] != turned[3].pixel_error and any("EXIF" in r for r in turned[3].remarks)
    assert white[3].pixel_error == [0.0] and any("PIL image handed over is put on white" in r for r in white[3].remarks)
    for name, opened, word in (("turned.jpg", inputs.upright, "EXIF"),
                               ("clear.png", inputs.on_white, "transparency on white")):
        tiles = inputs.cut(opened(Image.open(tmp_path / name)), config, 12)
        theirs = minivl.tiling.to_pixel_values(tiles)
        assert word in inputs.known_opening(tmp_path / name, theirs, config, 12)
        assert inputs.known_opening(tmp_path / name, torch.zeros_like(theirs), config, 12) == ""
    soft = minivl.tiling.to_pixel_values(inputs.cut(minivl.load_image(TIGER), config, 6))
    assert "another bicubic filter" in inputs.known_opening(TIGER, soft + 0.001 * torch.randn(soft.shape), config, 6)
