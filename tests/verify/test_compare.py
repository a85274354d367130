"""compare: agreement is seen, differences are seen where they are, and what cannot be compared is refused."""
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, tensors_of
from PIL import Image
from safetensors import safe_open

import minivl
from minivl.config import Config
from minivl.files.find import SHIPPED
from minivl.limits import InputError
from minivl.tracing import indices
from weights_tools.files import save_safetensors
from weights_tools.verify import __main__ as cli
from weights_tools.verify import compare, inputs, report
from weights_tools.verify.recording import Recording, picks, shrink, weights_digest

ROOT = Path(__file__).parents[2]
TIGER = GOLDEN / "tiger.jpeg"


@pytest.fixture(scope="module")
def golden():
    """(folder, trace, model) of the original code's recording."""
    folder = GOLDEN / "qwen2-awq"
    facts = json.loads((folder / "case.json").read_text())
    model = minivl.load(folder)
    model.img_context_token_id = facts["image_token_id"]
    return folder, Recording.open(folder / "expected.safetensors"), model


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """A trace of the tiny checkpoint in the form the reference writes, recorded from minivl itself: (path, facts)."""
    pipe = minivl.pipeline(tiny)
    config, tokenizer = pipe.model.config, pipe.tokenizer
    image = minivl.load_image(TIGER)
    tiles = minivl.tiling.tile(image, max_num=6, tile_size=config.force_image_size)
    messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
    per_tile = config.num_image_token
    prompt = minivl.prompt.render(messages, [len(tiles)], tokens_per_tile=per_tile).replace("<IMG_CONTEXT>", "")
    ids = torch.tensor([minivl.prompt.encode(tokenizer, messages, [len(tiles)], tokens_per_tile=per_tile)])
    pixels = minivl.tiling.to_pixel_values(tiles)
    with torch.no_grad(), minivl.trace(pipe.model) as t:
        pipe.model(ids, pixels)
    greedy = minivl.generate(pipe.model, ids, pixels, max_new_tokens=4, ignore_eos=True)[0]
    with torch.no_grad():       # without the cache
        full = pipe.model(torch.cat([ids, greedy[None]], 1), pixels)[0, ids.shape[1] - 1:-1]
    facts = {"reference": "minivl", "prompt": prompt, "tiles": [len(tiles)], "messages": messages, "max_num": 6,
             "logits_from": 0, "dtype": "float32", "weights": weights_digest(tiny),
             "pictures": [compare.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()],
             "image_token_id": tokenizer.id("<IMG_CONTEXT>"), "stop": tokenizer.id("<|im_end|>")}
    path = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    save_safetensors({**t, "input_ids": ids, "pixel_values": pixels, "greedy": greedy.clone(),
                      "greedy_scores": full.max(-1).values}, path, {"trace": json.dumps(facts)})
    return path, facts


def change(path, to, tensors=(), facts=(), drop=()):
    """A copy of a trace with other tensors and facts."""
    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()["trace"])
    kept = {**tensors_of(path), **dict(tensors)}
    kept = {name: tensor for name, tensor in kept.items() if name not in drop}
    return save_safetensors(kept, to, {"trace": json.dumps({**old, **dict(facts)})})


# ---- agreement ------------------------------------------------------------------------------------------------------

def test_agrees_with_the_original(golden):
    folder, trace, model = golden
    result = compare.compare(folder, trace, model=model)
    assert result.agrees and len(result.rows) == 11 and len(result.tokens) == 12
    assert max(row.error for row in result.rows) < 1e-5
    assert result.logits["rank"] == 1 and abs(result.logits["kl"]) < 1e-6
    assert "agrees with the trace" in report.text(result)


def test_whole_chain_on_a_recorded_trace(tiny, recorded, tmp_path, capsys):
    path, _ = recorded
    code = cli.main([str(tiny), str(TIGER), "--trace", str(path), "--html", str(tmp_path / "r.html"),
                     "--json", str(tmp_path / "r.json")])
    out = capsys.readouterr().out
    assert code == 0 and "all 4 tokens are the same" in out
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["agrees"] and [r["stage"] for r in data["rows"]][:5] == list(compare.INPUTS)
    assert [r["stage"] for r in data["rows"]][5:9] == ["vit.embeddings", "vit.layers.0", "vit.layers.1", "vit.layers.2"]

    class Reader(HTMLParser):
        open_tags, text = [], ""

        def handle_starttag(self, tag, attrs):
            fetched = [value for key, value in attrs if key in ("src", "href") and not value.startswith("data:")]
            assert not fetched
            if tag not in ("meta", "img", "line", "circle", "path", "polyline"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert tag in ("circle", "path", "line", "polyline") or self.open_tags.pop() == tag

    reader = Reader()
    page = (tmp_path / "r.html").read_text()
    reader.feed(page)
    assert reader.open_tags == [] and page.count("<svg") == 1 and page.count('class="map"') == 7


def test_a_shrunk_trace_says_the_same(tiny, recorded, tmp_path):
    path, _ = recorded
    small = shrink(Recording.open(path), tmp_path / "small.safetensors")
    assert small.stat().st_size < 40_000 < path.stat().st_size
    result = compare.compare(tiny, Recording.open(small), pictures=[TIGER])
    assert result.agrees and len(result.rows) == 18 and result.rows[-2].shape == list(tensors_of(path)["logits"].shape)
    for bad, n in (("vit.layers.1", 3), ("logits", 7)):
        values = tensors_of(small)[bad].clone()
        values[n] += 1
        changed = change(small, tmp_path / "w.safetensors", {bad: values})
        wrong = compare.compare(tiny, Recording.open(changed), pictures=[TIGER])
        assert wrong.first.stage == bad
        flat = int(picks(tensors_of(path)[bad].numel())[n])
        assert wrong.first.at == [int(i) for i in torch.unravel_index(torch.tensor(flat), tensors_of(path)[bad].shape)]


def test_indices_of_an_element():
    x = torch.arange(2 * 3 * 5).view(2, 3, 5)
    assert all(int(x[tuple(indices(flat, x.shape))]) == flat for flat in range(30)) and indices(0, ()) == []


def test_no_command_waits_for_sympy():
    """What compares imports no more than it needs: 0.5 s for each process."""
    code = ("import sys, torch; from minivl.tracing import first_mismatch; a = torch.ones(2, 3); "
            "print(first_mismatch({'x': a}, {'x': 2 * a}), 'sympy' in sys.modules)")
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True).stdout
    assert "largest difference at [0, 0]" in said and said.endswith("False\n"), said


def test_only_some_stages(tiny, recorded, monkeypatch):
    ran = []
    monkeypatch.setattr(minivl.qwen2 if hasattr(minivl, "qwen2") else sys.modules["minivl.qwen2"], "attention_mask",
                        lambda *a: ran.append(1))
    result = compare.compare(tiny, Recording.open(recorded[0]), stages=["vit.layers.*", "projector"])
    found = [row.stage for row in result.rows if row.stage not in compare.INPUTS]
    assert found == ["vit.layers.0", "vit.layers.1", "vit.layers.2", "projector"]
    assert not ran and result.tokens == []      # the decoder did not run


def test_local_errors_do_not_add_up(golden, tiny, recorded, tmp_path):
    """With the reference's result passed on, a stage has only its own error."""
    folder, trace, model = golden
    result = compare.compare(folder, trace, model=model, local=True)
    assert result.agrees and len(result.rows) == 11 and "the answer (--local)" in result.skipped
    norm = model.vision_model.encoder.layers[0].norm1.weight
    norm.data *= 1.5
    try:
        assert len([row for row in compare.compare(folder, trace, model=model).rows if not row.agrees]) > 5
        result = compare.compare(folder, trace, model=model, local=True)
    finally:
        norm.data /= 1.5
    assert [row.stage for row in result.rows if not row.agrees] == ["vit.layers.0"]
    assert compare.compare(folder, trace, model=model).agrees       # the hooks are gone
    small = shrink(Recording.open(recorded[0]), tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="is shrunk; only the stages of a whole trace can be passed on"):
        compare.compare(tiny, Recording.open(small), pictures=[TIGER], local=True)


def test_roundings_add_up_where_the_stage_before_is_missing(tiny, tmp_path):
    """In half precision a stage alone must be equal; one whose predecessors ran on minivl's own results need not be."""
    model = minivl.load(tiny, dtype="bfloat16")
    ids = torch.full((1, 10), 7)
    ids[0, 2:6] = model.img_context_token_id
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad(), minivl.trace(model) as t:
        model(ids, pixels)
    shaken = (t["inputs_embeds"].float() * (1 + 0.01 * torch.randn(t["inputs_embeds"].shape))).bfloat16()
    with torch.no_grad(), minivl.trace(model, "llm.layers.0") as after:
        model.language_model(shaken)
    tensors = {"vit.embeddings": t["vit.embeddings"], "inputs_embeds": shaken, "llm.layers.0": after["llm.layers.0"],
               "input_ids": ids, "pixel_values": pixels}

    def compared(**more):
        path = save_safetensors({**tensors, **more}, tmp_path / "t.safetensors",
                                {"trace": json.dumps({"dtype": "bfloat16"})})
        return compare.compare(tiny, Recording.open(path), model=model, local=True)

    result = compared()
    assert result.agrees and [row.stage for row in result.rows] == ["vit.embeddings", "inputs_embeds", "llm.layers.0"]
    assert 1e-3 < result.rows[1].error < 6e-2 and result.rows[2].error == 0
    assert any(what.startswith("inputs_embeds alone (the trace lacks the stage before") for what in result.skipped)
    result = compared(projector=t["projector"])
    assert result.first.stage == "inputs_embeds" and not any("inputs_embeds" in what for what in result.skipped)
    assert any(what.startswith("projector alone") for what in result.skipped)


def test_last_logits_only(tiny, recorded, tmp_path):
    """Of a long prompt a trace holds the logits of the last positions."""
    path, _ = recorded
    logits = tensors_of(path)["logits"]
    facts = {"logits_from": logits.shape[1] - 5}
    cut = change(path, tmp_path / "t.safetensors", {"logits": logits[:, -5:].clone()}, facts=facts)
    result = compare.compare(tiny, Recording.open(cut), pictures=[TIGER])
    row = result.rows[-2]
    assert result.agrees and row.stage == "logits" and row.shape[1] == 5 and result.logits["rank"] == 1
    wrong = change(path, tmp_path / "w.safetensors", {"logits": logits[:, -6:-1].clone()}, facts=facts)
    assert compare.compare(tiny, Recording.open(wrong), pictures=[TIGER]).first.stage == "logits"


@pytest.mark.skipif(not SHIPPED["nano"].is_dir(), reason="nano is not trained yet: minivl/nano/float16 is missing")
def test_shipped_models_against_their_committed_traces(capsys):
    assert cli.main(["--nano"]) == 0
    out = capsys.readouterr().out
    assert out.count("\nagrees with transformers") == 2 and out.count("all 12 tokens are the same") == 2


# ---- differences ----------------------------------------------------------------------------------------------------

def test_the_first_stage_that_differs_is_named(golden):
    folder, trace, model = golden
    tower, decoder = model.vision_model, model.language_model
    for stage, parameter in (("vit.embeddings", tower.embeddings.class_embedding),
                             ("vit.layers.1", tower.encoder.layers[1].ls2), ("projector", model.mlp1[1].bias),
                             ("llm.layers.1", decoder.layers[1].input_layernorm.weight),
                             ("llm.norm", decoder.norm.weight), ("logits", decoder.head.weight)):
        old = parameter.data.clone()
        parameter.data[..., 0] += 0.5
        try:
            result = compare.compare(folder, trace, model=model)
        finally:
            parameter.data.copy_(old)
        assert result.first.stage == stage and not result.agrees
        assert f"first at {stage}" in report.verdict(result)
        assert stage == "logits" or "minivl/" in result.first.note
    assert compare.compare(folder, trace, model=model).agrees


def test_a_token_that_differs_is_told_with_its_margin(golden, tmp_path):
    folder, trace, model = golden
    tensors = tensors_of(trace.path)
    tensors["greedy"][5] += 1
    save_safetensors(tensors, tmp_path / "t.safetensors")
    result = compare.compare(folder, Recording.open(tmp_path / "t.safetensors"), model=model)
    assert result.first is None and result.parted == 5 and not result.agrees
    assert re.search(r"token 6 of the answer differs.*apart", report.verdict(result))
    assert "5 of 12 tokens agree" in report.text(result)


def test_nan_and_shapes_do_not_agree(golden):
    folder, trace, model = golden
    made = compare.Report("", "", {}, "float32", 2e-5, "")
    want = trace["projector"]
    assert not compare.compare_stage(made, trace, "projector", want * float("nan")).agrees
    assert compare.compare_stage(made, trace, "projector", want).agrees
    wrong = compare.compare_stage(made, trace, "projector", want[:, 1:])
    assert not wrong.agrees and "the reference has shape" in wrong.note


def test_what_a_difference_looks_like():
    torch.manual_seed(0)
    b = torch.randn(3, 40, 16)
    assert compare.look(b.flip(0), b) == "the same numbers in another order"
    assert compare.look(b * 1.5, b).startswith("everything is 1.5 times the reference")
    a = b.clone()
    a[1, :, 4:6] += 1
    assert "1 of 3 tiles differ: 1" in compare.look(a, b) and "2 of 16 channels differ: 4, 5" in compare.look(a, b)
    a = b + torch.arange(40)[None, :, None] * 0.1 * torch.randn(3, 40, 16)
    assert "the first token agrees, the error grows with the position" in compare.look(a, b)
    assert "not finite" in compare.look(b / 0, b)
    assert compare.look(b + 0.1 * torch.randn(3, 40, 16), b) == ""


def test_one_token_among_many_large_ones(golden, tmp_path):
    """A token that is wrong by a hundredth, beside one that is a thousand times larger."""
    folder, trace, model = golden
    made = compare.Report("", "", {}, "float32", 2e-5, "")
    want = torch.randn(1, 300, 64)
    want[0, 0] *= 10_000
    big = change_golden(trace, tmp_path, {"projector": want})
    got = want.clone()
    got[0, 7] *= 1.01
    assert minivl.relative_error(got, want) < 2e-5
    row = compare.compare_stage(made, big, "projector", got)
    assert not row.agrees and "one token differs by 1.0e-02" in row.note and "1 of 300 tokens differ: 7" in row.note
    assert compare.compare_stage(made, big, "projector", want * (1 + 1e-6)).agrees


def change_golden(trace, tmp_path, tensors):
    return Recording.open(save_safetensors({**tensors_of(trace.path), **tensors}, tmp_path / "changed.safetensors"))


def test_inputs_that_differ(tiny, recorded, tmp_path):
    path, facts = recorded

    def compared(**changes):
        changed = change(path, tmp_path / "changed.safetensors", **changes)
        return compare.compare(tiny, Recording.open(changed), pictures=[TIGER])

    assert compared(facts={"tiles": [3]}).first.stage == "tiles"
    assert compared(facts={"stop": 1}).first.stage == "stop tokens"
    model = minivl.load(tiny)
    model.eos_token_ids = (*model.eos_token_ids, 17)
    assert compare.compare(tiny, Recording.open(path), pictures=[TIGER], model=model).first.stage == "stop tokens"
    ids = tensors_of(path)["input_ids"].clone()
    ids[0, 3] += 1
    result = compared(tensors={"input_ids": ids})
    assert result.first.stage == "input_ids" and "from number 3" in result.first.note
    pixels = tensors_of(path)["pixel_values"].flip(0)       # the model is then compared on the reference's pixels
    result = compared(tensors={"pixel_values": pixels})
    assert result.first.stage == "pixel_values" and "another order" in result.first.note


def test_known_differences_between_engines_are_named(tiny, recorded, tmp_path):
    path, facts = recorded
    fed = inputs.engines(Config.load(tiny), minivl.Tokenizer.load(tiny), [TIGER], "What is this?")
    theirs = re.sub(r"<IMG_CONTEXT x \d+>", "", fed[3].prompt)
    changed = change(path, tmp_path / "e.safetensors", facts={"prompt": theirs})
    result = compare.compare(tiny, Recording.open(changed), pictures=[TIGER])
    assert result.first.stage == "prompt" and "prompt of transformers, a known difference" in result.first.note


# ---- what cannot be compared ----------------------------------------------------------------------------------------

def test_refusals(tiny, recorded, tmp_path, monkeypatch):
    path, facts = recorded

    def refused(match, trace=path, checkpoint=tiny, **how):
        with pytest.raises(InputError, match=match):
            compare.compare(checkpoint, Recording.open(trace), **how)

    refused("other weights .*record again", change(path, tmp_path / "a.safetensors", facts={"weights": "0" * 64}))
    Image.new("RGB", (80, 60)).save(tmp_path / "other.png")
    refused("other pictures", pictures=[tmp_path / "other.png"])
    refused("other pictures", pictures=[TIGER, TIGER])
    refused("no stage of the trace matches vot", stages=["vot.*"])
    refused("is no file; record a trace first", tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    refused("is no safetensors file", tmp_path / "text")
    refused("a trace has input_ids and stages", save_safetensors({"x": torch.zeros(1)}, tmp_path / "x.safetensors"))
    small = shrink(Recording.open(path), tmp_path / "small.safetensors")
    refused("is shrunk: give the 1 pictures", small)
    monkeypatch.setenv("MINIVL_REFERENCE", str(tmp_path / "no" / "python"))
    with pytest.raises(InputError, match="there is no reference environment .*make reference"):
        cli.main([str(tiny), str(TIGER)])
    refused("recorded in float32, not in bfloat16; record again", dtype="bfloat16")
    for words, match in (([], "give a checkpoint"),
                         ([tiny, TIGER, "--trace", path, "-p", "What?"], "--prompt has no effect with --trace"),
                         ([tiny, TIGER, "-p", "<image> <image>"], "2 <image> marks but 1 pictures"),
                         ([tiny, TIGER, "--max-tiles", "0"], "--max-tiles is 0, it must be in 1..40"),
                         ([tiny, TIGER, "--stages", "a", "--layers", "1"], "give --layers or --stages"),
                         ([tiny, TIGER, "--html", tmp_path / "no" / "x.html"], "there is no folder"),
                         ([tiny, TIGER, "--record", tmp_path / "no" / "t"],
                          "no reference environment|there is no folder"),
                         ([tiny, tmp_path / "text"], "no reference environment|picture")):
        with pytest.raises(InputError, match=match):
            cli.main([str(word) for word in words])
    monkeypatch.delenv("MINIVL_REFERENCE")
    nan = float("nan")
    tiny_nan = compare.Report("", "", {}, "float32", 0.0, "", [compare.Row("logits", [1], nan, nan, [0], nan, False)])
    assert "nan" in report.text(tiny_nan) and "<svg" in report.html(tiny_nan)
    json.dumps(tiny_nan.json(), allow_nan=False)


def test_a_stage_that_is_missing(golden, tmp_path):
    folder, trace, model = golden
    tensors = tensors_of(trace.path)
    tensors["vit.layers.7"] = tensors["vit.layers.2"]
    save_safetensors(tensors, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="no stage matches .*vit.layers.7"):
        compare.compare(folder, Recording.open(tmp_path / "t.safetensors"), model=model)


@pytest.mark.slow
def test_exit_codes(tiny, recorded, tmp_path):
    """0 agrees, 1 differs, 2 could not run."""
    path, _ = recorded
    wrong = change(path, tmp_path / "w.safetensors", {"logits": tensors_of(path)["logits"] * 2})
    for trace, code in ((path, 0), (wrong, 1), (tmp_path / "none", 2)):
        command = [sys.executable, "-m", "weights_tools.verify", str(tiny), str(TIGER), "--trace", str(trace)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert code < 2 or done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not SHIPPED["nano"].is_dir(), reason="nano is not trained yet: minivl/nano/float16 is missing")
def test_options_count_beside_nano(tmp_path, capsys):
    """What --nano goes with has its effect; the rest is refused (tests/test_options.py has all pairs)."""
    assert cli.main(["--nano", "--tolerance", "1e-9"]) == 1
    assert capsys.readouterr().out.count("tolerance 1e-09") == 2
    assert cli.main(["--nano", "--stages", "projector", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert list(found) == ["nano", "nano-awq"]
    for result in found.values():
        assert "projector" in json.dumps(result) and "llm.layers.0" not in json.dumps(result)
    with pytest.raises(InputError, match="--html has no effect with --nano, .* give its name, a picture and --trace"):
        cli.main(["--nano", "--html", str(tmp_path / "x.html")])
    with pytest.raises(InputError, match="no such file"):
        cli.main([str(SHIPPED["nano"]), "https://example.org/x.png", "--record", str(tmp_path / "t")])
