"""The shipped small model: whole, of this recipe, and it really sees."""
import hashlib
import io
import json
import re
from functools import partial

import pytest
import torch
from PIL import Image

import minivl
from minivl.demo import SAMPLES, TOUR, demo, in_terminal
from minivl.files.find import SHIPPED
from minivl.files.formats import open_weights, safetensors_header
from minivl.tokenizer import Tokenizer
from weights_tools.nano import evaluate, recipe, ship, train, world
from weights_tools.nano.draw import draw
from weights_tools.quantize import Recipe, quantize_folder, quantize_linear, steps_off
from weights_tools.quantize.prompts import from_nano
from weights_tools.quantize.rounding import HALF_A_STEP

NANO = SHIPPED["nano"].parent


@pytest.fixture(scope="module")
def nano():
    return minivl.pipeline("nano", minivl.EngineConfig(max_batch_size=25))


def test_the_package_holds_it_all():
    size = sum(p.stat().st_size for p in NANO.rglob("*") if p.is_file())
    assert 10e6 < size <= ship.LIMIT == 16_000_000
    for twin in SHIPPED.values():
        assert {"config.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json", "model.safetensors",
                "generation_config.json"} <= {p.name for p in twin.iterdir()}
        for name, text in recipe.small_files(awq=twin.name == "awq").items():
            assert json.loads((twin / name).read_text("utf-8")) == json.loads(text) if name.endswith(".json") else (
                (twin / name).read_text("utf-8") == text), name


def test_architecture_is_the_released_one():
    model = minivl.load("nano")
    assert 3e6 <= sum(p.numel() for p in model.parameters()) <= 5e6
    vision, llm = model.config.vision_config, model.config.llm_config
    assert (vision.norm_type, vision.hidden_act, vision.qkv_bias, vision.patch_size) == ("layer_norm", "gelu", True, 14)
    assert model.config.num_image_token == 16 and model.config.use_thumbnail and model.config.max_dynamic_patch == 6
    assert llm.num_key_value_heads < llm.num_attention_heads
    assert not llm.hidden_size % 128 and not llm.intermediate_size % 128
    assert model.img_context_token_id == llm.vocab_size - 7
    assert llm.vocab_size == model.language_model.lm_head.out_features
    awq = minivl.load("nano-awq")
    assert awq.config.quantization_config.group_size == 128
    assert awq.language_model.model.layers[0].mlp.up_proj.qweight.dtype == torch.int32


def test_files_card_and_scores_are_of_this_recipe():
    digest = recipe.sha256()
    for twin in SHIPPED.values():
        assert safetensors_header(twin / "model.safetensors")[1]["recipe"] == digest
    card, scores = (NANO / "README.md").read_text("utf-8"), json.loads((NANO / "scores.json").read_text())
    assert digest in card and scores["recipe"] == digest
    names = [name for name in scores if isinstance(scores[name], dict)]
    assert evaluate.table(names, [scores[name] for name in names]) in card


def test_the_card_s_method_hurts_no_group_of_nano():
    assert f"by the method {ship.METHOD})" in (NANO / "README.md").read_text("utf-8")
    for layer in minivl.load("nano").language_model.layers:
        for name, module in layer.linears.items():
            weight = module.weight.detach()     # smoothing changes no sign
            assert steps_off(weight, *quantize_linear(weight, rounding=ship.METHOD)).max() < HALF_A_STEP, name


@pytest.mark.slow
def test_the_shipped_int4_can_be_made_again(tmp_path):
    """But for the last bits of what calibration sees, which depend on the machine: 2 of 2 million numbers here."""
    tokenizer = Tokenizer.load(SHIPPED["nano"])
    config = minivl.config.Config.load(SHIPPED["nano"])
    made = {}
    for how in (Recipe(ship.METHOD), Recipe("smooth")):
        made[how.method] = open_weights(quantize_folder(SHIPPED["nano"], tmp_path / how.method, how,
                                                            prompts=partial(from_nano, 64, config, tokenizer)))
    shipped = open_weights(SHIPPED["nano-awq"])
    assert made[ship.METHOD].keys() == shipped.keys()
    for name, tensor in shipped.items():
        assert (made[ship.METHOD][name].read() != tensor.read()).float().mean() < 0.01, name
    name = "language_model.model.layers.0.mlp.up_proj.scales"      # another method would be noticed
    assert (made["smooth"][name].read() != shipped[name].read()).float().mean() > 0.2


ANSWERS = {     # sample -> question: answer, all of samples/README.md
    "shapes": {"describe this image": "In the top left corner there is a large red star, in the top right corner a "
                                      "small yellow star, in the middle a large blue circle and in the bottom right "
                                      "corner a large purple heart.",
               "How many stars are there?": "The number of stars is two.",
               "Is there a green circle?": "A green circle is not in the picture, so no.",
               "What colour is the heart?": "The heart is purple."},
    "count": {"How many shapes are there?": "The number of shapes is six.",
              "How many rings are there?": "The number of rings is three.",
              "How many orange shapes are there?": "The number of orange shapes is three."},
    "words": {"What does it say at the top?": 'At the top it says "OPEN".',
              "What is the number?": 'The number is "1955".',
              "What colour is the word?": "The word is blue."},
    "new-word": {"What does it say?": 'It says "MINIVL".', 'Does it say "MINI"?': 'It says "MINIVL", so no.'},
    "wide": {"describe this image": "On the left there is a large red heart, in the middle a large green triangle and "
                                    "on the right a large white circle.",
             "What is in the middle?": "In the middle there is a large green triangle."},
    "tall": {"describe this image": "At the top there is a large black cross and at the bottom a large yellow star.",
             "Where is the star?": "The star is at the bottom."},
    "small-print": {"What does the small print say?": 'The small print says "741".',
                    "What shape is in the top left corner?": "In the top left corner there is a circle."},
    "small-print-tall": {"What does the small print say?": 'The small print says "TEA".'},
    "reason": {"How many red shapes are left of the star? Think step by step.": "Final Answer: 2",
               "Are there more red shapes than blue shapes?": "Final Answer: yes"},
    "texture": {"describe this image": world.UNKNOWN_PICTURE}}


def test_samples_are_answered(nano):
    """A dozen pictures and a video, never seen in training. Not all answers are right, see the card; the tour's are."""
    assert len(list(SAMPLES.glob("*.png"))) >= 12
    assert {name: tuple(answers) for name, answers in ANSWERS.items()} == {
        name: questions for name, (_, questions) in ship.SAMPLES.items() if name not in ("before", "after")}
    right = wrong = 0
    for name, answers in ANSWERS.items():
        for question, answer in answers.items():
            said = nano((question, SAMPLES / f"{name}.png")).text
            good = said.endswith(answer) if answer.startswith("Final") else said == answer
            right, wrong = right + good, wrong + (not good)
            assert good or question not in dict(TOUR).get(f"{name}.png", ()), (question, said)
    assert right >= 18 and wrong <= 4, (right, wrong)
    pair = [SAMPLES / "before.png", SAMPLES / "after.png"]
    said = nano(("Image-1: <IMAGE_TOKEN>\nImage-2: <IMAGE_TOKEN>\nWhat changed?", pair)).text
    assert said == "On the right the square changed from red to blue."
    frames = minivl.load_video(SAMPLES / "video.webp", num_segments=8)
    assert nano(minivl.video_prompt("Which way does it move?", frames)).text == "The circle moves to the right."


@pytest.mark.parametrize("twin", ["nano", "nano-awq"])
def test_accuracy_is_near_what_the_card_says(twin):
    pipe = minivl.pipeline(twin, minivl.EngineConfig(max_batch_size=25))
    scores = json.loads((NANO / "scores.json").read_text())[{"nano": "float16", "nano-awq": "AWQ int4"}[twin]]
    for task in ("colour", "place", "yes", "no", "read words"):
        share, _ = evaluate.measure(pipe, task, 25, seed=evaluate.HELD_OUT)
        assert abs(share - scores[task]) < 0.2, task    # 25 of the 500 questions: 0.2 is two standard deviations


def test_it_looks(nano):
    """With the pictures exchanged, the same questions are answered wrongly."""
    share, _ = evaluate.measure(nano, "colour", 25, change=lambda part, pictures: evaluate.shuffled(0, part, pictures))
    assert share < 0.5


def test_talk_without_a_picture(nano):
    assert "nano" in nano("Who are you?").text
    assert "no picture" in nano("Describe the picture.").text


def test_a_conversation(nano):
    session = nano.chat(("What colour is the heart?", SAMPLES / "shapes.png"))
    assert session.response.text == "The heart is purple."
    nano.chat("Where is it?", session)
    assert session.response.text == "The heart is in the bottom right corner."


def test_demo(capsys):
    assert demo("nano-awq") == 0
    out = capsys.readouterr().out
    assert all(f"> {question}" in out for _, questions in TOUR for question in questions)
    assert re.search(r"^\d+ tokens/s", out, re.M) and "\x1b" not in out
    response = minivl.pipeline("nano-awq")((TOUR[0][1][0], str(SAMPLES / TOUR[0][0])))
    assert f"[{response.input_token_len} tokens read, {response.generate_token_len} written in" in out      # one count
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        demo("nano-awq", terminal)
    assert "\x1b[38;2;" in terminal.getvalue()


def test_a_picture_in_the_terminal():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    lines = in_terminal(image, 10).split("\n")
    assert len(lines) == 2 and all(line.count("\u2580") == 10 for line in lines) and "38;2;255;0;0" in lines[0]


def test_a_folder_called_nano_comes_first(tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(minivl.InputError, match="no config.json"):
        minivl.pipeline("nano")


def test_the_samples_are_drawn_from_their_scenes(tmp_path):
    ship.samples(tmp_path / "samples")
    for path in (tmp_path / "samples").glob("*.png"):
        new, old = (Image.open(p).convert("RGB") for p in (path, SAMPLES / path.name))
        assert new.size == old.size and hashlib.sha256(new.tobytes()).digest()
        difference = sum(abs(a - b) for a, b in zip(new.tobytes(), old.tobytes())) / len(new.tobytes())
        assert difference < 2, path.name        # another Pillow draws letters a little differently


@pytest.mark.slow
def test_evaluate_counts_right_answers(nano, capsys):
    items = evaluate.items("follow-up", 6)
    assert all(len(item.turns) >= 2 and item.turns[-1].task == "follow-up" for item in items)
    assert all(len(item.turns) == 1 for item in evaluate.items("count", 6))
    turn = world.Turn("q", "Two plus one is three.\nFinal Answer: 3", "reason")
    assert evaluate.is_right(turn, "I guess.\nFinal Answer: 3") and not evaluate.is_right(turn, "Final Answer: 31")
    assert not evaluate.is_right(turn, "3")
    assert evaluate.is_right(world.Turn("q", "Yes.", "yes"), "Yes.")
    assert not evaluate.is_right(world.Turn("q", "Yes.", "yes"), "yes.")
    share, results = evaluate.measure(nano, "talk", 10)
    assert share == sum(answer == item.turns[-1].answer for item, answer in results) / 10
    assert evaluate.main(["nano", "-n", "4", "--tasks", "talk", "colour"]) == 0
    assert set(json.loads(capsys.readouterr().out)["nano"]) == {"talk", "colour"}


def test_ablations_change_what_they_say(nano):
    examples = (world.example("ab", i) for i in range(100))
    example = next(e for e in examples if e.pictures and e.pictures[0].grid == (3, 2))
    image = draw(example.pictures[0])
    x = minivl.tiling.to_pixel_values(minivl.tiling.tile(image, max_num=6, tile_size=112))
    patches = torch.randn(len(x), 64, 160)
    right, wrong = nano.model.pixel_unshuffle(patches), evaluate.WrongOrder()(patches)
    assert right.shape == wrong.shape and not torch.equal(right, wrong)
    assert torch.equal(right.sort(-1).values, wrong.sort(-1).values)
    before = nano.model.config
    rows = evaluate.ablations(nano, 2)
    assert nano.model.config is before and type(nano.model.pixel_unshuffle).__name__ == "PixelUnshuffle"
    assert {what for what, *_ in rows} == {"one tile only (max_num=1)", "no thumbnail (pictures of several tiles)",
                                           "pixel unshuffle in the wrong channel order",
                                           "pictures exchanged between the questions"}
    part = [object() for _ in range(9)]
    mixed = evaluate.shuffled(0, part, list(range(9)))
    assert sorted(mixed) == list(range(9)) and all(i != m for i, m in enumerate(mixed))


def test_training_starts_from_the_recipe():
    assert train.rate(recipe.STAGES[0], 0) < train.rate(recipe.STAGES[0], 99)
    assert train.rate(recipe.STAGES[-1], 10**6 % 2) >= 0
    models = (recipe.initial(), minivl.load("nano"))
    assert len({sum(p.numel() for p in model.parameters()) for model in models}) == 1


@pytest.mark.parametrize("heading, number, then", [(ship.PREFERENCES, "MPO, beta 3", "## Limits"),
                                                   (ship.EIGHT, "NanoOCRBench", "## Ways to int4")])
def test_what_is_measured_by_other_commands_stays_with_its_weights(heading, number, then):
    card = NANO / "README.md"
    kept = ship.kept(card, heading, True)
    assert kept.startswith(heading) and kept in card.read_text("utf-8") and number in kept
    assert card.read_text("utf-8").split(kept)[1].startswith(then)
    lines = kept.splitlines()           # each table has a head
    assert all(lines[i - 1].startswith("|") for i, line in enumerate(lines) if line.startswith("|---"))
    other = ship.kept(card, heading, False)
    assert other.startswith(heading) and "Not measured with these weights" in other and number not in other
