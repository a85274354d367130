"""Where quantisation hurts: no error where nothing was lost, the one linear that was damaged, and direct numbers."""
import json
import re

import pytest
import torch

import minivl
from minivl import InputError
from minivl.awq import AWQLinear
from minivl.config import Config
from minivl.files.find import find
from minivl.files.formats import open_weights
from minivl.tokenizer import Tokenizer
from weights_tools import quantize as q
from weights_tools.dequantize import dequantize
from weights_tools.files import save_checkpoint, small_files
from weights_tools.quantize import prompts
from weights_tools.quantize.hurts import measure
from weights_tools.quantize.hurts.__main__ import main
from weights_tools.quantize.hurts.measure import OUTLIERS, Linear, Watched
from weights_tools.quantize.hurts.report import html
from weights_tools.quantize.hurts.report import text as text_of
from weights_tools.synthesize import synthesize

SIZES = ("tiny", "tiny-internlm2")
TEXT = "the quick brown fox jumps over the lazy dog, and nobody asks it why. " * 12


@pytest.fixture(scope="module", params=SIZES)
def source(request, tmp_path_factory):
    return synthesize(tmp_path_factory.mktemp(request.param) / "float", request.param, dtype="bfloat16")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def shown(source, text):
    """prompts() for `measure`: pieces of a text."""
    tokenizer = Tokenizer.load(source)
    return lambda: prompts.from_text(text, tokenizer, most=2, length=150)


@pytest.fixture(scope="module")
def smoothed(source, shown, tmp_path_factory):
    """An AWQ checkpoint of the source, smoothed, and the float checkpoint that computes the same."""
    folder = tmp_path_factory.mktemp("smoothed")
    awq = q.quantize_folder(source, folder / "awq", q.Recipe("smooth", 32), prompts=shown)
    return awq, dequantize(awq, folder / "float", "float32")


def changed(folder, out, change):
    """Write a checkpoint again after change(tensors), which may alter them in place."""
    tensors = {name: stored.read().clone() for name, stored in open_weights(folder).items()}
    change(tensors)
    save_checkpoint(tensors, out, small=small_files(folder))
    return out


def test_nothing_lost_is_no_error(smoothed, shown):
    awq, exact = smoothed
    report = measure(exact, [awq], shown)
    twin = report.twins[0]
    assert (twin.start, twin.same, twin.group_size) == (0, 1, 32)
    assert max(max(one.weight, one.output) for one in twin.linears) < 1e-6
    assert max(max(one.own, one.alone) for one in twin.growth) < 1e-5 and twin.kl_99 < 1e-9
    assert report.bytes > 2 * twin.bytes and (report.prompts, report.tokens) == (2, 300)
    layers = minivl.load(awq).language_model.layers
    assert [one.at for one in twin.linears] == [f"layers.{i}.{name}" for i, layer in enumerate(layers)
                                                for name in layer.linears]


def test_a_report_of_no_error_at_all(source, shown):
    report = measure(source, [source, source], shown)
    assert all(one.output == one.weight == 0 for twin in report.twins for one in twin.linears)
    assert all(twin.kl == 0 and twin.same == 1 and twin.growth[-1].own == 0 for twin in report.twins)
    assert "<svg" in html(report) and text_of(report).count("hurt most") == 2
    json.dumps(report.json(), allow_nan=False)


def test_smoothing_alone_is_no_error(source, shown, tmp_path):
    """With factors from 1/100 to 100, in float32."""
    layers = minivl.load(source).language_model.layers

    def smooth(tensors):
        for name in tensors:
            tensors[name] = tensors[name].float()
        for i, layer in enumerate(layers):
            prefix = f"language_model.model.layers.{i}."
            here = {name: tensors[prefix + name] for name in layer.state_dict()}
            largest = {name: 10 ** torch.empty(linear.in_features).uniform_(-4, 4)
                       for name, linear in layer.linears.items()}
            q.smooth_layer(here, largest, layer.FEEDS, 32)
    twin = measure(source, [changed(source, tmp_path / "twin", smooth)], shown).twins[0]
    assert max(max(one.weight, one.output) for one in twin.linears) < 2e-6
    assert max(max(one.own, one.alone) for one in twin.growth) < 1e-5 and twin.kl_99 < 1e-9
    before, after = (open_weights(folder) for folder in (source, tmp_path / "twin"))
    for name, stored in before.items():     # it did move something: all norms and most linears
        if ".layers.0." in name and "vision" not in name and stored.shape[0] != 1 and not name.endswith("bias"):
            same = torch.equal(stored.read().float(), after[name].read())
            assert same == name.endswith((".o_proj.weight", ".wo.weight")), name


def test_a_damaged_linear_is_hurt_most(smoothed, shown, tmp_path):
    """Linears of layer 1, beside a parent that the undamaged twin equals: both ends, and the one into the last."""
    awq, exact = smoothed
    names = list(minivl.load(awq).language_model.layers[1].linears)
    names = [names[0], *names[-4:]]
    folders = []
    for name in names:
        def noise(tensors, name=name):
            scales = tensors[f"language_model.model.layers.1.{name}.scales"]
            scales *= 1 + 0.5 * torch.randn(scales.shape)
        folders.append(changed(awq, tmp_path / name, noise))
    report = measure(exact, folders, shown)
    for name, twin in zip(names, report.twins):
        worst, second = twin.worst(2)
        assert worst.at == f"layers.1.{name}" and worst.output > 0.1 and worst.weight > 0.1
        into_down = name.endswith((".up_proj", ".w3"))      # what its rows have in common looks like smoothing
        assert second.output < (worst.output if into_down else 1e-6), (name, second.at)
        first, here, last = twin.growth
        assert max(first.own, first.alone, last.alone) < 1e-5 < 1e-3 < min(here.own, last.own), name
        assert here.own == pytest.approx(here.alone, rel=1e-3)
        assert twin.kl > 1e-6 and twin.kl_99 > twin.kl


def test_against_whole_models_in_memory(source, smoothed, shown):
    """Numbers of a smoothed twin, computed with both models whole, all prompts, plain loops."""
    twin = measure(source, smoothed[:1], shown).twins[0]
    parent, other = minivl.load(source), minivl.load(smoothed[0])
    layers, others = parent.language_model.layers, other.language_model.layers
    given = {}
    streams = {}
    for which, model in (("parent", parent), ("other", other)):
        for i, layer in enumerate(model.language_model.layers):
            layer.register_forward_hook(lambda m, args, out, key=(which, i): streams.setdefault(key, []).append(
                (args, out[0])))
            for name, linear in layer.linears.items() if which == "parent" else ():
                linear.register_forward_hook(lambda m, args, out, key=(i, name): given.setdefault(key, []).append(
                    (args[0][0], out[0])))
    logits = [], []
    with torch.no_grad():
        for ids, _ in shown():
            for model, found in zip((parent, other), logits):
                found.append(model(torch.tensor([ids]))[0].double().log_softmax(-1))
        p, r = map(torch.cat, logits)
        kl = (p.exp() * (p - r)).sum(-1)
        assert (twin.kl, twin.kl_99) == pytest.approx((float(kl.mean()), float(kl.quantile(0.99))), rel=1e-3)
        assert twin.same == pytest.approx(float((p.argmax(-1) == r.argmax(-1)).double().mean()), abs=1e-9)
        for i, growth in enumerate(twin.growth):
            own, alone = [], []
            for (args, y), (_, z) in zip(list(streams["parent", i]), list(streams["other", i])):
                own += [float((b - a).norm() / a.norm()) for a, b in zip(y, z)]
                alone += [float((b - a).norm() / a.norm()) for a, b in zip(y, others[i](*args)[0])]
            assert growth.own == pytest.approx(sum(own) / len(own), rel=1e-3)
            assert growth.alone == pytest.approx(sum(alone) / len(alone), rel=1e-3)
        for found in twin.linears:
            layer = layers[found.layer]
            norm = {reader: before for before, readers in layer.FEEDS for reader in readers}.get(found.name, "")
            x, y = (torch.cat(part) for part in zip(*given[found.layer, found.name]))
            linear, made = layer.linears[found.name], others[found.layer].linears[found.name]
            if "norm" in norm:
                x = x * others[found.layer].get_submodule(norm).weight / layer.get_submodule(norm).weight
            elif norm:
                x = x * rows_factor(layer, others[found.layer], norm)
            z = made(x)
            if found.name.endswith(("up_proj", "w3")):
                z = z / rows_factor(layer, others[found.layer], found.name)
            product = y - linear.bias if linear.bias is not None else y
            assert found.output == pytest.approx(float((z - y).norm() / product.norm()), rel=1e-3), found.at


def rows_factor(layer, other, name):
    """How much smaller the rows of up_proj are in another layer, given that its norm is another one, too: slowly."""
    norm = next(before for before, readers in layer.FEEDS if name in readers)
    moved = other.get_submodule(norm).weight / layer.get_submodule(norm).weight
    up = other.get_submodule(name)
    assert isinstance(up, AWQLinear)
    rows = torch.stack([up(unit * moved) for unit in torch.eye(up.qweight.shape[0])], 1)        # (O, I)
    weight = layer.get_submodule(name).weight
    return torch.stack([torch.dot(a, b) / torch.dot(a, a) for a, b in zip(weight, rows)])


def test_errors_of_channels_add_up():
    """For inputs that meet in no channel the squares of the channels' errors are that of the whole."""
    linear, twin = torch.nn.Linear(24, 16), torch.nn.Linear(24, 16)
    twin.bias = linear.bias
    watched = Watched(linear, twin, None, None)
    x = torch.eye(24) * torch.arange(1.0, 25)
    with torch.no_grad():
        for part in x.split(5):
            watched.see(linear, (part[None],), linear(part)[None])
        found = watched.found(3, "mlp.up_proj")
        wanted = (twin(x) - linear(x)).norm() / (x @ linear.weight.T).norm()
    assert found.output == pytest.approx(float(wanted), rel=1e-5)
    assert float(found.lost.norm()) == pytest.approx(found.output, rel=1e-5)
    assert found.largest.tolist() == list(range(1, 25))
    assert [one["channel"] for one in found.outliers()] == [23, 22, 21, 20, 19]
    assert found.outliers()[0]["part"] == pytest.approx(float(found.lost[23] ** 2 / found.lost.norm() ** 2), rel=1e-4)


@pytest.mark.parametrize("channels", [3, 128, 129, 3000])
def test_a_drawing_keeps_the_largest_and_the_sum(channels):
    one = Linear(0, "x", 0.1, 0.1, torch.rand(channels), torch.rand(channels))
    drawn = one.drawn()
    assert len(drawn["channel"]) == len(drawn["largest"]) == len(drawn["lost"]) <= 128
    assert max(drawn["largest"]) == pytest.approx(float(one.largest.max()))
    assert float(torch.tensor(drawn["lost"]).norm()) == pytest.approx(float(one.lost.norm()), rel=1e-4)
    assert len(one.outliers()) == min(channels, OUTLIERS)


def test_nano_as_a_command(tmp_path, capsys):
    """Pictures, two twins, all three forms of the report."""
    other = tmp_path / "nano-rtn"
    q.quantize_folder(find("nano"), other, q.Recipe("rtn", 32))
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert main(["nano", "nano-awq", str(other), "--samples", "1", *files]) == 0
    out = capsys.readouterr().out
    assert "nano-awq: the linears hurt most" in out and re.search(r"nano-rtn +\d\.\d\d MB", out) and "layer 3" in out
    found = json.loads((tmp_path / "r.json").read_text())
    assert [twin["group_size"] for twin in found["twins"]] == [128, 32] and found["prompts"] == 2
    asked = [list(prompts.from_nano(2, Config.load(find("nano")), Tokenizer.load(find("nano")), seed))
             for seed in ("held out", "calibration")]
    ids = [id for prompt, _ in asked[0] for id in prompt]
    image = Tokenizer.load(find("nano")).added["<IMG_CONTEXT>"]
    assert found["tokens"] == len(ids) != sum(len(prompt) for prompt, _ in asked[1])     # others than in calibration
    assert found["scored"] == min(512, sum(id != image for id in ids)) < len(ids)
    for twin in found["twins"]:
        assert 0.001 < twin["kl"] < twin["kl_99"] < 3 and 0.8 < twin["same"] < 1 and twin["start"] == 0
        assert len(twin["linears"]) == 28 and len(twin["growth"]) == 4 and len(twin["most hurt"]) == 10
        assert all(0.01 < one["output"] < 0.3 for one in twin["linears"])
        outputs = {(one["layer"], one["name"]): one["output"] for one in twin["linears"]}
        hurt = [outputs[one["layer"], one["name"]] for one in twin["most hurt"]]
        assert hurt == sorted(outputs.values(), reverse=True)[:10]
    coarse, fine = found["twins"]
    assert sum(one["output"] for one in fine["linears"]) < 0.9 * sum(one["output"] for one in coarse["linears"])
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 2 + 2 + 2 * 10 * 2 and "A nano-awq" in page
    assert not re.search(r"<script|<link|(?:src|href)=.(?!data:)", page)


def test_what_cannot_be_compared(source, smoothed, text, tmp_path):
    awq, exact = smoothed
    size = SIZES[Config.load(source).llm_config.architectures[0] != "Qwen2ForCausalLM"]
    another = synthesize(tmp_path / "another", size, seed=1, awq=True, group_size=32)
    wide = tmp_path / "rope"
    wide.mkdir()
    for file in awq.iterdir():
        (wide / file.name).write_bytes(file.read_bytes())
    config = json.loads((wide / "config.json").read_text())
    config["llm_config"]["rope_theta"] = 5e5
    (wide / "config.json").write_text(json.dumps(config))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    shown = ["--text", str(text), "--samples", "3", "--length", "60"]
    for argv, words in (([awq, exact, *shown], "is quantised already; give the float checkpoint"),
                        ([source, "nano-awq", *shown], "was not made from .*llm_config.hidden_size 256, not 128"),
                        ([source, another, *shown], "all weights of its first layer are others"),
                        ([source, awq, wide, *shown], "llm_config.rope_theta 500000.0, not 1000000.0"),
                        ([source, awq], "nothing to compare on; give --pictures"),
                        ([source, awq, "--text", short], "give at least 128"),
                        ([source, awq, "--text", tmp_path / "none.txt"], "none.txt"),
                        ([source, awq, *shown, "--html", tmp_path / "no" / "x.html"], "there is no folder"),
                        ([source, awq, *shown, "--samples", "0"], "--samples 0 must be 1 or more"),
                        ([source, awq, "--length", "9"], "--length has no effect without --text")):
        with pytest.raises(InputError, match=words):
            main(list(map(str, argv)))
