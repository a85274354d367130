"""The loop: stopped anywhere it ends with the same weights, whatever its parts are; what it writes, what it refuses."""
import json
import os

import pytest
import torch
from torch import nn

from minivl import InputError
from weights_tools.train.loop import Loop
from weights_tools.train.optimisers import rate
from weights_tools.train.step import take_step

STEPS = 7


class RunningMean:
    """Something a step changes that is no module: preference training keeps a running mean of its rewards."""

    def __init__(self):
        self.mean = 0.0

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def learn(loop, stage, model, frozen, seen) -> RunningMean | None:
    """Run one stage: the mean of its losses, or None where it was stopped."""
    reward = RunningMean()
    opts = [torch.optim.AdamW(model.parameters(), lr=0.05), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)]

    def step(number, x):
        loss = take_step([(model(frozen(x)) - reward.mean).pow(2).mean()], opts[:1], rate(number, STEPS))
        reward.mean = 0.9 * reward.mean + 0.1 * (1 + loss)
        if seen is not None:
            seen.append((stage, number))
        return loss, len(x)

    def batches(first):
        return (torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(first, STEPS))

    finished = loop.run(stage, f"stage {stage}", STEPS, batches=batches, step=step, optimisers=opts,
                        watch=lambda: {"mean": reward.mean}, parts={"model": model, "reward": reward})
    return reward if finished else None


def trained(folder, recipe="a", stop_at=None, seen=None, save_every=250):
    """Two stages of a small problem; (finished, all that was learned)."""
    loop = Loop(folder, recipe, save_every=save_every, watch_every=3, stop_at=stop_at)
    choice = loop.keep("choice", lambda: os.urandom(4).hex())
    torch.manual_seed(3)
    frozen = nn.Linear(6, 6).requires_grad_(False)
    model = nn.Linear(6, 1)
    for stage in (1, 2):
        if (loop.folder / f"{stage}.pt").exists():
            model.load_state_dict(torch.load(loop.folder / f"{stage}.pt", weights_only=True))
            continue
        reward = learn(loop, stage, model, frozen, seen)
        if reward is None:
            return False, choice
        torch.save(model.state_dict(), loop.folder / f"{stage}.pt")
        loop.finish()
    return True, {**model.state_dict(), "mean": torch.tensor(reward.mean)}


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_stopped_anywhere_it_ends_the_same(tmp_path, stop_at):
    finished, whole = trained(tmp_path / "whole")
    assert finished
    seen = []
    calls = 0
    finished = False
    while not finished and calls < 3 * STEPS - 1:
        finished, parts = trained(tmp_path / "parts", stop_at=stop_at, seen=seen)
        calls += 1
    assert finished and calls > 2
    assert seen == [(stage, number) for stage in (1, 2) for number in range(STEPS)]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
        "1.pt", "2.pt", "choices.json", "log.jsonl"]


def test_killed_between_two_states_it_goes_on_from_the_last(tmp_path):
    """Killed in the middle of a step, or of writing a state: the last whole state counts."""
    whole = trained(tmp_path / "whole")[1]
    folder = tmp_path / "killed"

    class Killed(list):
        def append(self, at):
            super().append(at)
            if at == (1, 4):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(folder, seen=Killed(), save_every=2)
    (folder / ".incomplete-0123abcd").mkdir()
    (folder / ".incomplete-0123abcd" / "state.pt").write_bytes(b"half a file")
    seen = []
    finished, result = trained(folder, seen=seen, save_every=2)
    assert finished and seen[0] == (1, 4)
    assert not list(folder.glob(".*"))
    (folder / "stage-1" / ".incomplete-0123abcd").mkdir(parents=True)       # killed when all was in place
    (folder / "stage-1" / ".incomplete-0123abcd.json").write_text("[]")
    Loop(folder, "a")
    assert not list(folder.glob("stage-1/.*"))
    assert all(torch.equal(whole[name], result[name]) for name in whole)


def test_the_state_holds_the_parts_and_nothing_frozen(tmp_path):
    trained(tmp_path, stop_at=2)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state) == {"recipe", "stage", "step", "model", "reward", "optimisers"}
    assert (state["stage"], state["step"]) == (1, 2)
    assert set(state["model"]) == {"weight", "bias"} and state["model"]["weight"].shape == (1, 6)
    assert state["reward"]["mean"] > 0


def test_what_was_chosen_stays_chosen(tmp_path):
    _, first = trained(tmp_path, stop_at=2)
    _, second = trained(tmp_path, stop_at=2)
    assert first == second != trained(tmp_path / "other", stop_at=2)[1]


def test_what_was_chosen_holds_for_all_stages(tmp_path):
    """A fresh process finds each choice: before the first state, between two stages, and after the last."""
    def keep(**values):
        loop = Loop(tmp_path, "a")
        return [loop.keep(name, lambda value=value: value) for name, value in values.items()]

    assert keep(fast_half=True, threads=2) == [True, 2]
    assert keep(fast_half=False, threads=8) == [True, 2]
    Loop(tmp_path, "a").finish()
    assert keep(threads=8, fast_half=False, seed="later") == [2, True, "later"]
    assert keep(seed="again", threads=4) == ["later", 2]
    assert json.loads((tmp_path / "choices.json").read_text()) == {
        "recipe": "a", "fast_half": True, "threads": 2, "seed": "later"}


def test_a_state_from_before_choices_json_goes_on(tmp_path):
    trained(tmp_path, stop_at=2)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state, "choice": "of old"}, tmp_path / "state.pt")
    (tmp_path / "choices.json").unlink()
    seen = []
    assert trained(tmp_path, stop_at=1, seen=seen) == (False, "of old") and seen == [(1, 2)]
    loop = Loop(tmp_path, "a")
    assert loop.keep("choice", lambda: "new") == "of old" and loop.keep("threads", lambda: 3) == 3


def test_another_recipe_is_refused(tmp_path):
    trained(tmp_path, recipe="a", stop_at=2)
    with pytest.raises(InputError, match="another recipe .a, this one is b"):
        trained(tmp_path, recipe="b")
    (tmp_path / "state.pt").unlink()            # between two stages there is none
    with pytest.raises(InputError, match="another recipe .a, this one is b"):
        trained(tmp_path, recipe="b")


def test_the_log(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"stage": "stage 1", "st')       # killed in the midst of a line
    trained(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (f"stage {stage}", step) for stage in (1, 2) for step in (3, 6, 7)]
    assert set(lines[0]) == {"stage", "step", "loss", "mean", "seconds"}
    assert "stage stage 1 step 3 loss" in capsys.readouterr().out
