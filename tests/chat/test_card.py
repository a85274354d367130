"""What the model card shows runs: its own snippets where it lies beside the checkout, and the same calls without it."""
import re
import warnings

import pytest
import torch
from asking import TIGER, noise
from conftest import shared

import minivl
from minivl import IMAGE_TOKEN, EngineConfig, GenerationConfig, Response, Session
from minivl.config import Config
from minivl.files.find import find
from minivl.files.load import WithoutNormal
from minivl.model import MiniVL
from weights_tools.synthesize import config_json

CARD = "OpenGVLab/InternVL2_5-4B-MPO-AWQ"
MODELS = ["nano", "4B"]


@pytest.fixture
def behind(tiny, monkeypatch):
    """Put a model behind the card's name. The 4B: its config without weights, asked everything but to compute."""
    def put(name):
        folder = tiny if name == "4B" else find(name)
        monkeypatch.setattr(minivl.chat.pipeline, "find", lambda asked, revision: folder if asked == CARD else None)
        if name == "4B":
            with torch.device("meta"), WithoutNormal():
                model = MiniVL(Config.from_json(config_json("4B", awq=True)))
            small = minivl.load(tiny)
            model.img_context_token_id, model.eos_token_ids = small.img_context_token_id, small.eos_token_ids
            monkeypatch.setattr(minivl.chat.pipeline, "load", lambda folder, **options: model)
            monkeypatch.setattr(minivl.chat.pipeline, "write", one_token)
    return put


def one_token(model, answers, session=None, unused=()):
    """Stand for the model: an answer of one token, and a cache as long as if it had been read."""
    for answer in answers:
        assert answer.turn.start + len(answer.turn.ids) < 8192
        yield answer.push(model.eos_token_ids[0] - 1, torch.zeros(9))
        answer.push(next(iter(answer.stop_ids)), torch.zeros(9))
        if session is not None:
            session.cache.length = answer.turn.start + len(answer.turn.ids)


def card_pipeline():
    return minivl.pipeline(CARD, backend_config=EngineConfig(session_len=8192))


def one_picture():
    return [card_pipeline()(("what is in the picture?", minivl.load_image(TIGER)))]


def two_pictures():
    prompt = f"First: {IMAGE_TOKEN}\nSecond: {IMAGE_TOKEN}\nhow do they differ?"
    return [card_pipeline()((prompt, [minivl.load_image(TIGER), noise(1600, 1200)]))]


def several_prompts():
    return card_pipeline()([("what is this?", picture) for picture in (minivl.load_image(TIGER), noise(300, 2000))])


def two_turns():
    pipe = card_pipeline()
    gen_config = GenerationConfig(top_k=40, top_p=0.8, temperature=0.8)
    session = pipe.chat(("what is this?", minivl.load_image(TIGER)), gen_config=gen_config)
    first = session.response
    session = pipe.chat("and what does it do?", session=session, gen_config=gen_config)
    assert isinstance(session, Session) and len(session.history) == 2
    return [first, session.response]


@pytest.mark.parametrize("model", MODELS)
def test_the_calls_of_the_card(behind, model):
    behind(model)
    for call in (one_picture, two_pictures, several_prompts, two_turns):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            answers = call()
        assert len(answers) == (1 if "picture" in call.__name__ else 2)
        assert all(isinstance(answer, Response) and answer.generate_token_len > 0 for answer in answers)
        cut = [w for w in told if "session_len 8192 is more than this model's 2048 positions" in str(w.message)]
        assert len(cut) == (model == "nano")        # the 4B has more positions than the card asks for
        assert all(w.filename == __file__ for w in cut)


@pytest.mark.parametrize("model", MODELS)
def test_every_lmdeploy_snippet_of_the_card(behind, model, monkeypatch, capsys):
    """Only the import lines and the engine-config class are changed; the network is replaced by the same pictures."""
    found = re.findall(r"```python\n(.*?)```", shared("MODEL_CARD.md").read_text(), re.S)
    assert len(found) == 5 and "from openai import" in found.pop()      # of a server, which minivl does not have
    behind(model)
    monkeypatch.setattr(minivl.media.pictures, "fetch",
                        lambda url, **_: shared("images/" + url.split("/")[-1]).read_bytes())
    for code in found:
        used = re.findall(r"^from lmdeploy\S* import (.*)$", code, re.M)
        names = sorted({n.strip() for line in used for n in line.split(",")})
        code = re.sub(r"^from lmdeploy.*$", "", code, flags=re.M).replace("TurbomindEngineConfig", "EngineConfig")
        code = f"from minivl import {', '.join(names).replace('TurbomindEngineConfig', 'EngineConfig')}\n" + code
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)     # the card's own sampling values without do_sample
            exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 5
