"""cost: what is computed follows from what was measured, and what is measured is what a step does."""
import subprocess
import sys

import pytest
import torch

from minivl import InputError
from minivl.config import Config
from minivl.model import MiniVL
from weights_tools.mpo import cost
from weights_tools.synthesize import config_json

WORK = cost.Work(tokens=24, answer=8, tiles=2, half=False)


@pytest.fixture(scope="module", params=["tiny", "tiny-internlm2"])
def size(request):
    return request.param


def test_shapes_are_those_of_the_whole_model(size):
    config = config_json(size)
    model = MiniVL(Config.from_json(config))
    shape = cost.shape_of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layers == len(model.language_model.layers)
    layers = [*model.language_model.layers, *model.vision_model.encoder.layers]
    assert shape.parameters == shape.outside + sum(p.numel() for layer in layers for p in layer.parameters())
    places = (config["force_image_size"] // 14) ** 2 + 1
    assert shape.kept(WORK) == 4 * (shape.layers * 2 * 24 * config["llm_config"]["hidden_size"]
                                    + shape.tower_layers * 2 * places * config["vision_config"]["hidden_size"])


MEASURED = """
import sys
from weights_tools.mpo import cost
from weights_tools.synthesize import config_json
for half in (False, True):
    found = cost.measure(config_json(sys.argv[1]), cost.Work(24, 8, 2, half), "cpu")
    assert all(one.seconds > 0 and (one.peak > 0 or name == "AdamW") for name, one in found.items()), found
"""


def test_every_part_of_a_step_is_learned(size):
    model = cost.one_layer(config_json(size), "cpu")
    for forward in cost.parts(model, WORK, "cpu").values():
        forward().float().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_every_part_of_a_step_is_measured(size):
    """In a process of its own, as the command is: torch's profiler may see nothing after what other tests did."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURED, size], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_left_as_memory_happens_to_be(size):
    """Numbers near 0 would be denormal, and take a hundred times as long."""
    for name, p in cost.one_layer(config_json(size), "cpu").named_parameters():
        assert p.isfinite().all() and p.abs().median() > 1e-3, name


def test_the_highest_point_of_some_work():
    def work():
        x = torch.zeros(250_000)        # 1 MB
        y = torch.zeros(500_000)
        del x, y
        torch.zeros(125_000)
    assert cost.highest("cpu", work) == 3_000_000


def test_the_loss_at_the_start_is_the_known_one():
    """Policy and reference are the same: 1.2 times ln 2, as the losses' weights are 0.8 and 0.2 + 0.2; and the mean."""
    model = cost.one_layer(config_json("tiny"), "cpu")
    with torch.no_grad():
        model.language_model.head.weight.zero_()
        total = cost.parts(model, WORK, "cpu")["head and loss"]()
    vocabulary = model.language_model.head.out_features
    assert abs(total.item() - 1.2 * torch.tensor(2.0).log() - torch.tensor(float(vocabulary)).log()) < 1e-4


def test_a_step_adds_its_parts_up():
    shape = cost.Shape(1000, 100, 300, 6, 2, 2.5, 5, lambda work: 40)
    one = dict.fromkeys(("decoder layer", "tower layer", "patches", "projector", "embeddings", "head and loss"),
                        cost.Cost(1.0, 2.0, 8))
    one = {**one, "AdamW": cost.Cost(0.5, 0.0, 0)}
    assert cost.pair_seconds(shape, one) == 3 * (6 + 2 + 1 + 1 + 2.5 + 2.5)
    assert cost.step_seconds(shape, one, 4) == 4 * 45 + 5
    alone = cost.memory(shape, one, WORK)
    assert alone["one process"] == 16 * 1000 + 40 + 2.5 * 8
    assert alone["each of 8"] == 16 * 1000 / 8 + 8 * (300 + 2 * 100) + 40 + 2.5 * 8
    assert cost.at_full_size(shape, one)["embeddings"] == pytest.approx(8 + 4 * 5 * 0.6)
    rounded = cost.memory(shape, one, cost.Work(24, 8, 2, True))
    assert rounded["one process"] - alone["one process"] == 2 * 995 and rounded["each of 8"] == alone["each of 8"]


def test_two_measurements_go_on_as_a_parabola():
    a_and_b = lambda T: 3 * T + 0.5 * T * T
    assert cost.scaled(a_and_b(10), a_and_b(20), (10, 20), 80) == pytest.approx(a_and_b(80))
    assert cost.scaled(30.0, 50.0, (10, 20), 80) == pytest.approx(200)     # never less than in proportion


def test_the_command(capsys):
    assert cost.main(["tiny", "--tokens", "16", "24", "--answer", "4", "--dtype", "float32", "--pairs", "3"]) == 0
    said, errors = capsys.readouterr()
    rows = [line.split(":")[0] for line in said.splitlines() if line.startswith("| ")][1:]
    assert set(rows) == {"| measured", "| computed"} and "step of 3 pairs" in said and "for 8,192 tokens" in said
    assert errors == ""


def test_what_means_nothing_is_refused():
    for words, match in ((["5B"], "5B"), (["--pairs", "0"], "--pairs is 0"), (["--tokens", "99", "999"], "--tokens 99"),
                         (["--tokens", "999", "--longest", "9999"], "longest")):
        with pytest.raises(InputError, match=match):
            cost.arguments(words)
