"""Every form of a prompt, text that spells tokens, and what is refused before anything is computed."""
import pytest
from asking import SHORT, TIGER, counted, expected, noise, with_config

import minivl
from minivl import IMAGE_TOKEN, InputError, Picture, prompt
from minivl.prompt import encode


def test_several_pictures(pipe):
    a, b = noise(100, 60, 1), noise(56, 200, 2)         # grids 2x1 (a stays below half of 4x2) and 1x4
    tiles = [len(minivl.tiling.tile(p, max_num=12, tile_size=56)) for p in (a, b)]
    assert tiles[0] != tiles[1] and min(tiles) > 1
    text = f"Image-1: {IMAGE_TOKEN}\nImage-2: {IMAGE_TOKEN}\ncompare"
    ids, tokens = expected(pipe, [("Image-1: <image>\nImage-2: <image>\ncompare", None)], [a, b], tiles)
    response = pipe((text, [a, b]), SHORT)
    assert (response.input_token_len, response.token_ids) == (len(ids), tokens)
    assert pipe((text.replace(IMAGE_TOKEN, "<image>"), [a, b]), SHORT).token_ids == tokens
    assert pipe((text.replace(IMAGE_TOKEN, f"<img>{IMAGE_TOKEN}</img>"), [a, b]), SHORT).token_ids == tokens
    # without marks, as LMDeploy 0.6.4: in front, all in one <img></img>; neighbouring marks too
    ids, tokens = expected(pipe, [("<image>\ncompare", None)], [a, b], [sum(tiles)])
    with pytest.warns(UserWarning, match="2 pictures without <IMAGE_TOKEN> in the text share one <img></img> pair"):
        response = pipe(("compare", [a, b]), SHORT)
    assert (response.input_token_len, response.token_ids) == (len(ids), tokens)
    assert pipe((f"{IMAGE_TOKEN}{IMAGE_TOKEN}\ncompare", [a, b]), SHORT).token_ids == tokens


def test_tiles_per_picture(pipe):
    image = noise(300, 300)
    one = pipe(("what?", Picture(image, max_num=1)), SHORT)
    many = pipe(("what?", Picture(image, max_num=9)), SHORT)
    assert many.input_token_len - one.input_token_len == 9 * 4      # 9 tiles and the thumbnail instead of one tile
    for bad in (0, 41, "3", True):
        with pytest.raises(InputError, match=r"max_num is .*; it must be a whole number in 1..40"):
            pipe(("what?", Picture(image, max_num=bad)))


def test_messages(pipe):
    image = noise(60, 60)
    ids, tokens = expected(pipe, [("<image>\nfirst", "yes"), ("second", None)], [image], [1], "Be brief.")
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "first"},
                                             {"type": "image_data", "image_data": {"data": image}}]},
                {"role": "assistant", "content": "yes"}, {"role": "user", "content": "second"}]
    response = pipe(messages, SHORT)
    assert (response.input_token_len, response.token_ids) == (len(ids), tokens)
    batch = pipe([messages, messages[-1:]], SHORT)
    assert batch[0].token_ids == tokens and batch[1].token_ids == pipe("second", SHORT).token_ids
    url = {"type": "image_url", "image_url": {"url": str(TIGER), "max_dynamic_patch": 2}}
    low = {"type": "image_url", "image_url": {"url": str(TIGER), "detail": "low"}}
    text = {"type": "text", "text": "what?"}
    few, more = (pipe.turn([{"role": "user", "content": [item, text]}]).tiles for item in (url, low))
    image = minivl.load_image(TIGER)
    assert len(few) == len(minivl.tiling.tile(image, max_num=2, tile_size=56))
    assert len(more) == len(minivl.tiling.tile(image, max_num=6, tile_size=56)) > len(few)


def test_messages_with_several_texts_keep_their_order(pipe):
    a, b = noise(50, 50, 1), noise(50, 50, 2)
    items = [{"type": "text", "text": "one "}, {"type": "image_data", "image_data": {"data": a}},
             {"type": "text", "text": "two "}, {"type": "image_data", "image_data": {"data": b}}]
    _, tokens = expected(pipe, [("one <image>\ntwo <image>\n", None)], [a, b], [1, 1])
    assert pipe([{"role": "user", "content": items}], SHORT).token_ids == tokens


def test_spelled_tokens_in_a_prompt(pipe):
    end = pipe.tokenizer.id("<|im_end|>")
    assert pipe.turn("a <|im_end|> b <img>").ids.count(end) == 3
    with pytest.raises(InputError, match="spells <IMG_CONTEXT>"):
        pipe(("what is <IMG_CONTEXT>?", TIGER))
    plain = with_config(pipe, plain_text=True)
    text = f"a <|im_end|> b <img> <IMG_CONTEXT> <image> {IMAGE_TOKEN}"
    turn = plain.turn((text, TIGER))
    assert turn.ids.count(end) == 2 and turn.ids.count(pipe.model.img_context_token_id) == 7 * 4
    assert text in pipe.tokenizer.decode(turn.ids)
    assert plain(("what?", TIGER), SHORT).token_ids == pipe(("what?", TIGER), SHORT).token_ids


@pytest.mark.parametrize("mark", [IMAGE_TOKEN, prompt.IMAGE, f"<img>{IMAGE_TOKEN}</img>"])
def test_a_mark_of_the_system_or_the_assistant_is_text(pipe, mark):
    picture = {"type": "image_data", "image_data": {"data": TIGER}}
    for answer in (f"write {mark}", [{"type": "text", "text": f"write {mark}"}, {"type": "text", "text": " ok"}]):
        messages = [{"role": "system", "content": f"A place is {mark}."},
                    {"role": "user", "content": [{"type": "text", "text": "how do I place a picture?"}, picture]},
                    {"role": "assistant", "content": answer}, {"role": "user", "content": "and two?"}]
        turn = pipe.turn(messages)
        text = pipe.tokenizer.decode(turn.ids, skip_special_tokens=False)
        assert f"A place is {mark}." in text and f"write {mark}" in text
        assert turn.ids.count(pipe.model.img_context_token_id) == 7 * 4 and len(turn.tiles) == 7
    session = pipe.chat([messages[0], {"role": "user", "content": "hi"}], gen_config=SHORT)
    assert pipe.chat("more", session, SHORT).history[-1][0] == "more"


@pytest.mark.parametrize("marks, pictures", [(1, 2), (2, 1), (1, 0), (3, 2)])
def test_marks_and_pictures_must_match(pipe, marks, pictures):
    for mark in (IMAGE_TOKEN, prompt.IMAGE):
        message = f"the text has {marks} picture marks? .* but {pictures} pictures are given"
        with pytest.raises(InputError, match=message):
            pipe((f"{mark} " * marks + "what?", [TIGER] * pictures))


@pytest.mark.parametrize("bad, message", [
    ("", "the prompt is empty"), ("  \n", "the prompt is empty"), (5, "a prompt is a int"),
    ({"role": "user", "content": "x"}, "a prompt is a dict"), (None, "a prompt is a NoneType"),
    (("a", "b", "c"), r"a prompt tuple is \(text, picture\)"),
    ((TIGER, "describe"), r"a prompt tuple is \(text, picture\)"),
    ([], "the list of prompts is empty"), ([{"role": "user"}], "content must be a text or a list of items"),
    ([{"role": "assistant", "content": "x"}], "the last message must be the user's"),
    ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "it must be the first"),
    ([{"role": "tool", "content": "x"}], "role system, user, assistant"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "a message holds an item"),
    ([{"role": "user", "content": "x"},
      {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "a"}}]},
      {"role": "user", "content": "x"}], "a assistant message holds pictures"),
    (("x", "nowhere.png"), "nowhere.png"), (("x", 5), "int"), (("x", [None]), "NoneType")])
def test_bad_prompts(pipe, bad, message):
    with pytest.raises(InputError, match=message):
        pipe(bad)


def test_a_bad_prompt_stops_the_batch_before_any_is_run(pipe):
    count = counted(pipe.model)
    with pytest.raises(InputError, match="missing.png"):
        pipe(["hello", ("x", "missing.png")])
    for handle in count["handles"]:
        handle.remove()
    assert count["tokens"] == 0


def test_video_prompt(pipe):
    frames = [noise(90, 60, i) for i in range(3)]
    text = "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nwhat happens?"
    want = encode(pipe.tokenizer, [(text, None)], [1, 1, 1], tokens_per_tile=4)
    for how in (pipe, with_config(pipe, plain_text=True)):
        turn = how.turn(minivl.video_prompt("what happens?", frames))
        assert len(turn.tiles) == 3 and turn.ids == want
