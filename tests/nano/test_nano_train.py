"""Nano's world and its training: answers follow from the picture, labels, overfitting, exact resume, refusals."""
import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from minivl import InputError, Picture, load, pipeline, tiling, video_prompt
from minivl.files.formats import safetensors_header
from minivl.prompt import IMAGE
from minivl.tokenizer import Tokenizer
from weights_tools.nano import data, differences, draw, evaluate, recipe, train, warmup, world
from weights_tools.train import objective

TINY = recipe.Stage("tiny", 6, 4e-3, {"shapes": 1, "texts": 1}, wide=0.3, batch=5, warmup=2)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return recipe.save(recipe.initial(), tmp_path_factory.mktemp("nano") / "untrained", {})


@pytest.fixture(scope="module")
def tokenizer(untrained):
    return Tokenizer.load(untrained)


# ---- the world ------------------------------------------------------------------------------------------------------

def test_an_example_is_its_seed_and_index():
    assert world.example("a", 7) == world.example("a", 7) != world.example("a", 8)
    one, two = (draw.draw(world.example("a", 12).pictures[0]).tobytes() for _ in range(2))
    assert one == two


def test_every_task_is_met_and_every_picture_is_marked():
    tasks = Counter()
    for i in range(1500):
        example = world.example("tasks", i)
        assert example.turns
        marks = [turn.question.count(IMAGE) for turn in example.turns]
        assert marks[0] == len(example.pictures) and not any(marks[1:])
        tasks.update(turn.task for turn in example.turns)
    assert set(evaluate.TARGETS) - {"read new words", "read letters"} == set(tasks)


def scene(*things):
    return world.Scene(tuple(draw.Thing(kind, colour, row, column, size) for kind, colour, row, column, size in things))


def test_answers_say_what_is_there():
    s = scene(("star", "red", 0, 0, "large"), ("ring", "orange", 1, 1, "small"), ("star", "blue", 2, 1, "small"))
    asked = {}
    for seed in range(3000):
        rng = random.Random(seed)
        for question in (world.describe, world.colour, world.kind, world.where, world.size, world.count, world.yes_no,
                         world.false_premise, world.reason):
            if turn := question(rng, s):
                assert asked.setdefault(turn.question, turn.answer) == turn.answer, turn.question
    for question, answer in {
        "Describe the picture.": "In the top left corner there is a large red star, in the middle a small orange ring "
                                 "and at the bottom a small blue star.",
        "What colour is the ring?": "The ring is orange.",
        "Where is the red star?": "The red star is in the top left corner.",
        "How many stars are there?": "The number of stars is two.",
        "How many small shapes are there?": "The number of small shapes is two.",
        "How many green shapes are there?": "The number of green shapes is zero.",
        "Is there a blue ring?": "A blue ring is not in the picture, so no.",
        "Is there an orange ring?": "An orange ring is in the picture, so yes.",
        "Where is the heart?": "The heart is not in the picture.",
        "What is on the right?": "On the right there is nothing.",
        "What is in the middle?": "In the middle there is a small orange ring.",
        "Are there five shapes?": "The number of shapes is three, so no.",
        "Is the ring small or large?": "The ring is small.",
        "How many shapes are below the ring?": "The ring is in the middle. The other shapes are in the top left corner "
                                               "and at the bottom. One is below it.\nFinal Answer: 1",
        "Which shape is directly above the ring?": None,        # nothing is there: not asked
        "What colour is the shape directly below the ring?":
            "The ring is in the middle. The shape directly below it is a small blue star.\nFinal Answer: blue",
        "Are there more red shapes than blue shapes?":
            "The number of red shapes is one. The number of blue shapes is one. One is not more than one.\n"
            "Final Answer: no",
        "How many stars and rings are there together?":
            "The number of stars is two. The number of rings is one. Two plus one is three.\nFinal Answer: 3",
    }.items():
        assert asked.get(question) == answer, question


def test_changes_are_said_place_by_place():
    star = draw.Thing("star", "red", 0, 1, "large")
    at = world.PLACES[0][1]
    for now, said in ((star, "nothing changed"), (None, "the red star disappeared"),
                      (replace(star, colour="blue"), "the star changed from red to blue"),
                      (replace(star, kind="ring"), "the red star became a ring"),
                      (replace(star, size="small"), "the red star became smaller")):
        assert world.changed(star, now, at) == f"At the top {said}"
    assert world.changed(None, None, at) == "At the top nothing changed"
    assert world.changed(None, replace(star, colour="orange"), at) == "At the top an orange star appeared"
    for seed in range(300):         # both kinds of example: what is said follows from the two pictures
        for kind in ("compare", "changes"):
            example = world.example(seed, 0, {kind: 1})
            (then, now), answers = ({(t.row, t.column): t for t in p.shapes} for p in example.pictures), example.turns
            for turn in answers:
                cell = next(((r, c) for r in range(3) for c in range(3)
                             if turn.answer.startswith(world.PLACES[r][c].capitalize() + " ")), None)
                if "something" in turn.answer:
                    assert {cell for cell in then.keys() | now.keys() if then.get(cell) != now.get(cell)} == {
                        (r, c) for r in range(3) for c in range(3) if world.PLACES[r][c] in re.split(
                            ", | and ", turn.answer.removesuffix(" something changed.").lower())}
                elif cell:
                    said = world.changed(then.get(cell), now.get(cell), world.PLACES[cell[0]][cell[1]])
                    assert turn.answer.split(", it is now")[0].rstrip(".") == said
                elif turn.answer == "Nothing changed.":
                    assert then == now
                else:
                    assert "number of shapes" in turn.answer


def test_small_print_stays_inside_a_tile_and_is_lost_in_the_thumbnail():
    for seed in range(200):
        rng = random.Random(seed)
        empty = world.Scene((), **draw.geometry(rng, draw.Style(world.TRAINED), wide=True))
        thing = draw.small_print(rng, draw.Style(world.TRAINED), empty)
        (width, height), (columns, rows) = draw.text_size(thing), empty.grid
        x, y = thing.shift[0] * columns * draw.TILE, thing.shift[1] * rows * draw.TILE
        assert int((x - width / 2) // draw.TILE) == int((x + width / 2) // draw.TILE)
        assert int((y - height / 2) // draw.TILE) == int((y + height / 2) // draw.TILE)
        assert min(thing.radius / columns, thing.radius / rows) <= 7     # pixels of a whole letter in the thumbnail


def test_held_out_words_are_never_written_in_training():
    assert len(world.HELD_OUT) > 80 and not set(world.HELD_OUT) & set(world.TRAINED)
    style = draw.Style(world.TRAINED, made_up=0)
    written = {draw.a_text(random.Random(i), style)[1] for i in range(3000)}
    assert not written & set(world.HELD_OUT) and len(written & set(world.TRAINED)) > 200


def test_marks_lie_on_what_they_mark():
    for seed in range(60):
        rng = random.Random(seed)
        s = world.Scene((), grid=rng.choice(((1, 1), (2, 1))), scale=rng.uniform(1, 1.5))
        s = s.with_(draw.shape(rng, (0, rng.randrange(3)), rng.choice([k for k in draw.SHAPES if k != "ring"]), "red"),
                    draw.row_text(rng, draw.Style(world.TRAINED), s, 2, "word", "HHHHH"))
        image = draw.draw(s)
        for thing, letter, x, y in draw.marks(s):
            pixel = image.getpixel((int(x * image.width), int(y * image.height)))
            near = sum(abs(p - q) for p, q in zip(pixel, draw.COLOURS[thing.colour]))
            assert near < 220, (seed, letter, pixel, thing)     # the bar of an H is at its middle


def test_squares_of_the_warmup():
    s = world.Scene((draw.Thing("star", "blue", 2, 2, "small"), draw.Thing("word", "red", 0, text="AB", radius=28)))
    found = warmup.targets(s).view(4, 4, 16)
    blue, red = (1 + list(draw.COLOURS).index(colour) for colour in ("blue", "red"))
    first, second = (1 + warmup.LETTERS.index(letter) for letter in "AB")
    assert found[3, 3].tolist() == [0] * 10 + [1 + draw.SHAPES.index("star"), 1, 3, 3, blue, 16]
    assert found[0, 1].tolist()[4:] == [first, 0, 0, 0, 0, 0, 0, 0, 0, 1, red, 2]
    assert found[0, 2].tolist()[4:] == [0, second, 0, 0, 0, 0, 0, 0, 0, 1, red, 3]
    letters = [(r, c, warmup.LETTERS[int(v) - 1]) for r in range(4) for c in range(4) for v in found[r, c, :4] if v]
    assert letters == [(0, 1, "A"), (0, 2, "B")]
    scores = torch.zeros(1, 16, sum(n for _, n in warmup.FIELDS))
    assert warmup.loss_and_hits(scores, found.view(1, 16, 16))[1]["letter"] == 0


def test_squares_of_a_tile_are_those_of_its_part_of_the_picture():
    whole = world.Scene((draw.Thing("star", "blue", 2, 2, "small"), draw.Thing("word", "red", 0, text="AB", radius=28),
                         draw.Thing("print", "black", 0, text="XYZ", radius=12, shift=(0.75, 0.5))), grid=(2, 1))
    thumbnail = warmup.targets(whole)
    letters = [warmup.LETTERS.index(c) + 1 for c in "XYZ"]
    assert not torch.isin(thumbnail[:, :10], torch.tensor(letters)).any()       # small print is for the tiles
    tiles = {n: warmup.targets(whole, (n / 2, 0, (n + 1) / 2, 1)) for n in (0, 1)}
    assert (tiles[0][:, -5:-2] == warmup.IGNORE).all() and (tiles[1][:, -5:-2] == warmup.IGNORE).all()
    assert not torch.isin(tiles[0][:, :10], torch.tensor(letters)).any()
    assert [[v for v in tiles[1][:, 4 + n].tolist() if v][-1] for n in range(3)] == letters      # nth of the line
    assert tiles[1][:, -6].max() == 1 + draw.SHAPES.index("star") and tiles[0][:, -6].max() == 0
    # Twice as far to the right.
    assert tiles[1].view(4, 4, -1)[3, 2, -6] > 0 and thumbnail.view(4, 4, -1)[3, 3, -6] > 0
    for n in range(2):      # the tile itself: what the picture shows there
        shown = dict(zip("tn", warmup.views(whole, random.Random(n))))
        assert torch.equal(shown["t"][1], thumbnail) and any(torch.equal(shown["n"][1], t) for t in tiles.values())
    scores = torch.zeros(1, 16, sum(n for _, n in warmup.FIELDS), requires_grad=True)
    loss, _ = warmup.loss_and_hits(scores, tiles[1].view(1, 16, 16))
    loss.backward()
    first = sum(n for _, n in warmup.FIELDS[:-5])
    assert not scores.grad[..., first:first + 3 + 4 + 4].any() and scores.grad[..., :first].any()


# ---- what the model reads -------------------------------------------------------------------------------------------

def test_the_pipeline_asks_as_training_does(untrained):
    pipe, kinds = pipeline(untrained), Counter()
    for i in range(120):
        example = world.example("prompts", i)
        question, pictures = example.turns[0].question, [draw.draw(s) for s in example.pictures]
        last = question.split("\n")[-1]
        kind = "video" if "Frame1" in question else len(pictures)
        if kind == "video":
            prompt = video_prompt(last, pictures)
        elif len(pictures) == 2:
            prompt = (question.replace(IMAGE, "<IMAGE_TOKEN>"), [Picture(p, example.max_num) for p in pictures])
        else:
            prompt = (last, Picture(pictures[0], example.max_num)) if pictures else question
        open_question = replace(example, turns=(world.Turn(question, None, ""),))
        assert pipe.turn(prompt).ids == data.ids_of(open_question, data.tiles_of(example), pipe.tokenizer), question
        kinds[kind] += 1
    assert set(kinds) == {"video", 0, 1, 2}


def test_labels_are_the_answers_and_their_end(tokenizer):
    example = world.Example((), (world.Turn("Hi", "Hello there.", ""), world.Turn("<|im_end|>", "", ""),
                                 world.Turn("And?", "No.", "")))
    ids = data.ids_of(example, [], tokenizer)
    labels = objective.labels_of(ids, tokenizer)
    assert all(label in (objective.IGNORE, id) for id, label in zip(ids, labels))
    learned = tokenizer.decode([x for x in labels if x != objective.IGNORE], skip_special_tokens=False)
    assert learned == "Hello there.<|im_end|>No.<|im_end|>"
    runs = "".join("x" if x != objective.IGNORE else " " for x in labels).split()
    assert len(runs) == 2               # the newline after <|im_end|> is not learned


def test_the_system_message_is_cheap(tokenizer):
    assert len(data.ids_of(world.Example((), (world.Turn("Hi", "Hi", ""),)), [], tokenizer)) < 35
    assert len(tokenizer.encode('It says "LAMP".')) == 9          # a written word is spelled


def test_pixels_are_those_of_the_package():
    tiles = [t for picture in data.tiles_of(world.example("px", 3)) for t in picture]
    assert torch.equal(tiling.normalise(data.pixels(tiles)), tiling.to_pixel_values(tiles))


def test_logits_of_a_padded_batch_are_those_of_each_alone(untrained, tokenizer):
    model = load(untrained)
    examples = [e for e in (world.example("pad", i) for i in range(6)) if e.pictures]
    tiles = [data.tiles_of(e) for e in examples]
    rows = [data.ids_of(e, t, tokenizer) for e, t in zip(examples, tiles)]
    assert len({len(r) for r in rows}) > 2
    ids, labels, x = data.collate(rows, tiles, tokenizer)
    with torch.no_grad():
        together, wanted = objective.answer_logits(model, ids, labels, tiling.normalise(x))
        alone = [objective.answer_logits(model, *(t if i < 2 else tiling.normalise(t) for i, t in enumerate(
            data.collate([row], [t], tokenizer)))) for row, t in zip(rows, tiles)]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), rtol=1e-4, atol=1e-4)
    assert torch.equal(wanted, torch.cat([w for _, w in alone]))


# ---- training -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_one_batch_can_be_learned_by_heart(tokenizer):
    stage = recipe.Stage("heart", 60, 4e-3, {"shapes": 1, "texts": 1}, wide=0, batch=4, warmup=5)
    model = recipe.initial().train()
    model.img_context_token_id = tokenizer.id("<IMG_CONTEXT>")
    batch, opts = data.Batches(stage, 0, tokenizer)[0], train.optimisers(model, stage)
    losses = [train.train_step(model, batch, opts, train.rate(stage, i))[0] for i in range(stage.steps)]
    assert losses[0] > 5 and losses[-1] < 0.05
    ids, labels, x = batch[0]
    logits, wanted = objective.answer_logits(model, ids, labels, tiling.normalise(x))
    assert torch.equal(logits.argmax(-1), wanted)


def test_differences_are_those_the_answers_name():
    """Squares say "changed" exactly in the places that the answers about them name."""
    squares = [(r, c) for r in range(4) for c in range(4)]
    for i in range(80):
        example = world.example("differ", i, {"changes": 1})
        marked = {(differences.PLACE[r], differences.PLACE[c])
                  for (r, c), t in zip(squares, differences.targets(example)) if t[2] == 1}
        answers = {t.question: t.answer for t in example.turns[1:]}
        for r, c in ((r, c) for r in range(3) for c in range(3)):
            answer = answers.get(f"What changed {world.PLACES[r][c]}?")
            if answer is not None:
                assert ("nothing changed" not in answer) == ((r, c) in marked), answer
    for i in range(80):
        example = world.example("differ", i, {"compare": 1})
        wanted = differences.targets(example)
        turn = example.turns[0].answer
        moved = "it is now" in turn
        cells = {(differences.PLACE[r], differences.PLACE[c]) for (r, c), t in zip(squares, wanted) if t[2] == 1}
        assert len(cells) == (0 if turn == "Nothing changed." else 2 if moved else 1), turn
        first = {(t.row, t.column): t for t in example.pictures[0].shapes}
        for (r, c), (shape, colour, _) in zip(squares, wanted.tolist()):
            old = first.get((differences.PLACE[r], differences.PLACE[c]))
            expected = (1 + draw.SHAPES.index(old.kind), 1 + list(draw.COLOURS).index(old.colour)) if old else (0, 0)
            assert (shape, colour) == expected
    assert (differences.targets(world.example("differ", 0, {"texts": 1})) == differences.IGNORE).all()


def test_the_last_picture_s_states_are_found():
    ids = torch.tensor([[5, *[7] * 16, 1, 2, *[7] * 16, 3, 3], [7] * 16 + [4] * 21, [4] * 37])
    hidden = torch.arange(37.0)[None, :, None].expand(3, -1, 2)
    found = differences.last_picture(hidden, ids, 7)
    assert found[:, :, 0].tolist()[:2] == [list(range(19, 35)), list(range(16))] and found.shape == (3, 16, 2)


@pytest.mark.slow
def test_differences_are_learned_halfway_through_the_decoder(tokenizer):
    stage = recipe.Stage("pairs", 40, 4e-3, {"changes": 1, "texts": 1}, wide=0, batch=4, warmup=5, task="differences",
                         tower=0.1)
    model = recipe.initial().train()
    model.img_context_token_id = tokenizer.id("<IMG_CONTEXT>")
    torch.manual_seed(0)
    head = differences.head(recipe.LLM["hidden_size"])
    batch, opts = data.Batches(stage, 0, tokenizer)[0], train.optimisers(model, stage, head)
    learned = [p for opt in opts for group in opt.param_groups for p in group["params"]]
    assert {*map(id, learned)} == {id(p) for p in (*model.parameters(), *head.parameters())}
    assert len(learned) == len({*map(id, learned)})
    losses = [train.train_step(model, batch, opts, train.rate(stage, i), head)[0] for i in range(stage.steps)]
    assert losses[-1] < 0.3 * losses[0]
    ids, labels, wanted, x = batch[0]
    with torch.no_grad(), differences.halfway(model) as states:
        objective.answer_logits(model, ids, labels, tiling.normalise(x))
    scores = head(differences.last_picture(states[0], ids, model.img_context_token_id))
    loss, hits = differences.loss_and_hits(scores, wanted)
    assert min(hits.values()) > 0.9 and set(hits) == {name for name, _ in differences.FIELDS}
    alone = differences.loss_and_hits(scores, torch.full_like(wanted, differences.IGNORE))
    assert alone[0] == 0 and alone[1] == {}


def test_drills_ask_what_they_are_for():
    wanted = {"find": "|".join(draw.SHAPES), "by place": "top|bottom|left|right|middle", "count": "ow many|ount the",
              "by two": rf"({'|'.join([*draw.COLOURS, *draw.SIZES])}) ({'|'.join(draw.SHAPES)})", "judge": "."}
    for name, pattern in wanted.items():
        examples = [world.example("drill", i, {name: 1}) for i in range(60)]
        assert all(re.search(pattern, turn.question) for e in examples for turn in e.turns), name
        assert max(len(e.turns) for e in examples) == 6
        assert sum(len(e.turns) for e in examples) > 3 * len(examples), name
    counts = Counter(turn.task for i in range(60) for turn in world.example("drill", i, {"judge": 1}).turns)
    assert set(counts) == {"yes", "no", "false premise"} and min(counts.values()) > 20
    asked = Counter()
    for turn in (turn for i in range(60) for turn in world.example("drill", i, {"same": 1}).turns):
        question, answer = (re.search(r'"(\w+)"', text)[1] for text in (turn.question, turn.answer))
        assert turn.task == ("yes" if question == answer else "no") and turn.answer.endswith(f"so {turn.task}.")
        asked[turn.task, len(question) == len(answer) and sum(x != y for x, y in zip(question, answer)) < 2] += 1
    assert asked["yes", True] > 120 and asked["no", True] > 60 and asked["no", False] > 30 and asked.total() == 360


@pytest.mark.slow
def test_half_precision_keeps_the_weights_whole(tmp_path, monkeypatch):
    """Products in bfloat16 where the machine is fast at them and the stage allows it; weights stay float32."""
    dtypes = []
    step = train.train_step

    def seen(model, *args):
        linear = model.language_model.layers[0].mlp.gate_proj
        hook = linear.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
        result = step(model, *args)
        hook.remove()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return result
    monkeypatch.setattr(train, "train_step", seen)
    for fast, half in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(train, "half_is_faster", lambda device, fast=fast: fast)
        folder = train.train(tmp_path / f"{fast} {half}", (replace(TINY, steps=1, warmup=0, half=half),), watch_n=8)
        expected = torch.bfloat16 if fast and half else torch.float32
        assert set(dtypes) == {expected}
        assert safetensors_header(folder / "model.safetensors")[1]["products"] == str(expected)[6:]
        dtypes.clear()


def test_the_tower_learns_at_its_own_rate():
    model = recipe.initial()
    muon, adamw = train.optimisers(model, replace(TINY, tower=0.25))
    rates = {id(p): group["lr"] for opt in (muon, adamw) for group in opt.param_groups for p in group["params"]}
    assert set(rates) == {id(p) for p in model.parameters()}
    for name, p in model.named_parameters():
        assert rates[id(p)] == pytest.approx(TINY.lr * (1 if name.startswith("language_model.") else 0.25) * (
            1 if any(p is q for group in muon.param_groups for q in group["params"]) else 0.5)), name
    train.optimisers(model, TINY)
    assert not model.mlp1[1].weight.requires_grad and model.language_model.lm_head.weight.requires_grad
    train.optimisers(model, replace(TINY, task="squares"), warmup.head(256))
    assert model.mlp1[1].weight.requires_grad and not model.language_model.lm_head.weight.requires_grad


def test_first_words_leave_the_tower_alone(tmp_path):
    after = load(train.train(tmp_path, (TINY,), workers=0, watch_n=8))
    start = dict(recipe.initial().named_parameters())
    same = {n: torch.equal(p, start[n].half().float()) for n, p in after.named_parameters()}
    assert all(same[n] for n in same if not n.startswith("language_model."))
    assert not any(same[n] for n in same if n.startswith("language_model.") and n.endswith("proj.weight"))


@pytest.mark.slow
def test_what_is_faster_is_measured_once_for_all_stages(tmp_path, monkeypatch):
    """Stopped in the second stage, and again between stages, by processes that would measure otherwise."""
    stages = tuple(replace(TINY, name=name, steps=2, warmup=0) for name in ("one", "two", "three"))
    for fast, stop_at in ((True, 3), (False, 1), (False, None)):
        monkeypatch.setattr(train, "half_is_faster", lambda device, fast=fast: fast)
        train.train(tmp_path, stages, watch_n=8, stop_at=stop_at)
    notes = [safetensors_header(tmp_path / f"stage-{n}" / "model.safetensors")[1]["products"] for n in (1, 2, 3)]
    assert notes == ["bfloat16"] * 3
    torch.save({"recipe": recipe.sha256(stages)}, tmp_path / "state.pt")
    train.train(tmp_path, stages, watch_n=8)        # as killed after the last stage's files
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["answers", "squares", "differences"])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, first):
    stages = (replace(TINY, task=first, mix={"shapes": 1, "texts": 1, "compare": 1}),
              replace(TINY, name="second", steps=3))
    whole = train.train(tmp_path / "whole", stages, workers=0, watch_n=8, watch_every=100)
    parts = tmp_path / "parts"
    for _ in range(2):      # killed in the first stage, then in the second
        train.train(parts, stages, workers=0, watch_n=8, watch_every=100, stop_at=4)
    resumed = train.train(parts, stages, workers=0, watch_n=8, watch_every=100)
    a, b = load(whole).state_dict(), load(resumed).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    before = load(tmp_path / "whole" / "stage-1").state_dict()
    assert not all(torch.equal(a[name], before[name]) for name in a)
    assert not (parts / "state.pt").exists()
    lines = [json.loads(line) for line in (parts / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 3]


def test_the_warmup_leaves_the_decoder_alone(tmp_path):
    after = load(train.train(tmp_path, (replace(TINY, task="squares"),), workers=0, watch_n=8))
    start = recipe.initial()
    same = {n: torch.equal(p, dict(start.named_parameters())[n].half().float()) for n, p in after.named_parameters()}
    assert all(same[n] for n in same if n.startswith("language_model."))
    assert not any(same[n] for n in same if n.endswith("qkv.weight") or n == "mlp1.1.weight")


@pytest.mark.slow
def test_teacher_forced_accuracy_is_greedy_accuracy(tmp_path, tokenizer):
    stage = recipe.Stage("some", 80, 4e-3, {"talk": 1}, wide=0, batch=8, warmup=5)
    folder = train.train(tmp_path, (stage,), workers=0, watch_n=8, watch_every=1000)
    model, pipe = load(folder), pipeline(folder)
    examples = [world.example("watch", i, mix=stage.mix) for i in range(16)]
    forced = train.accuracy(model, tokenizer, n=16, mix=stage.mix)["talk"]
    right = total = 0
    for example in examples:
        for i, turn in enumerate(example.turns):
            item = world.Example((), example.turns[:i + 1], 1)
            messages = evaluate.prompt(item, [], [t.answer for t in example.turns[:i]])
            right += pipe(messages).text == turn.answer
            total += 1
    assert forced == pytest.approx(right / total) and forced > 0


@pytest.mark.parametrize("change, says", [
    ({"mix": {"shape": 1}}, "shape in the mix; kinds of examples are find, exist, name"),
    ({"mix": {}}, "they must be positive"), ({"steps": 0}, "steps is 0"), ({"lr": 3.0}, "lr is 3.0"),
    ({"wide": 1.5}, "wide is 1.5"), ({"warmup": 7}, r"warmup is 7, it must be in 0\.\.6"),
    ({"task": "look"}, "task is 'look'"), ({"tower": 2.0}, "tower is 2.0")])
def test_a_bad_stage_is_refused(change, says):
    with pytest.raises(InputError, match=says):
        replace(TINY, **change)


def test_another_recipe_in_the_folder_is_refused(tmp_path):
    train.train(tmp_path, (TINY,), workers=0, watch_n=8, stop_at=2)
    with pytest.raises(InputError, match="another recipe"):
        train.train(tmp_path, (replace(TINY, lr=1e-3),), workers=0, watch_n=8)


def test_the_sha256_is_that_of_the_recipe():
    assert recipe.sha256() == recipe.sha256() != recipe.sha256(recipe.QUICK) != recipe.sha256(seed=1)


def test_an_infinite_loss_stops_the_training(tokenizer):
    model = recipe.initial()
    model.img_context_token_id = tokenizer.id("<IMG_CONTEXT>")
    model.language_model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan"):
        train.train_step(model, data.Batches(TINY, 0, tokenizer)[0], train.optimisers(model, TINY), 1.0)
