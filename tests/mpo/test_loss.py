"""MPO's loss against the original trainer's values and gradients, and against what must hold anyway."""
import json
import math

import pytest
import torch
from conftest import shared

from minivl.files.formats import open_safetensors
from weights_tools.mpo.loss import IGNORE, RewardShift, generation, mpo, sequence_logps

INPUTS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def tensors(step):
    return [torch.tensor(step[name]) for name in INPUTS] + [torch.tensor(step["sft_in"])]


def close(got, want):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_the_original_s_values_step_by_step():
    compared = 0
    for run in json.loads((shared("golden/mpo") / "logps.json").read_text()):
        shift = RewardShift()
        for step in run["steps"]:
            want = step["expected"]
            weights = [run["weights"][name] or 0.0 for name in ("sigmoid", "bco_pair", "sft")]
            found = mpo(*tensors(step), shift, beta=run["beta"], weights=weights)
            for got, name in ((found.preference, "sigmoid"), (found.quality, "bco_pair"), (found.total, "total"),
                              (found.chosen_rewards, "chosen_rewards"), (found.rejected_rewards, "rejected_rewards"),
                              (found.accuracy, "accuracies"), (found.margin, "margins")):
                close(got, want[name] if name in want else want["metrics"][f"rewards/{name}"])
                compared += 1
            assert shift.value == pytest.approx(want["delta"], abs=2e-6) and found.shift == shift.value
    assert compared == 7 * 16


def test_several_ranks_share_one_shift():
    """Each gives the mean of its pairs; the step's value is the plain mean of those."""
    for run in json.loads((shared("golden/mpo") / "distributed.json").read_text()):
        shift = RewardShift()
        for steps in zip(*run["ranks"]):
            means = torch.stack([0.1 * torch.cat([c - rc, r - rr]).mean()
                                 for c, r, rc, rr, _ in map(tensors, steps)])
            delta = shift.update(means)
            for step in steps:
                assert delta == pytest.approx(step["expected"]["delta"], abs=2e-6)
                fixed = RewardShift()
                fixed.value = delta
                fixed.update = lambda rewards, delta=delta: delta
                close(mpo(*tensors(step), fixed).total, step["expected"]["total"])


def test_from_logits_with_gradients():
    folder = shared("golden/mpo")
    stored = {name: tensor.read().clone() for name, tensor in open_safetensors(folder / "logits.safetensors").items()}
    for case in json.loads((folder / "logits.json").read_text()):
        shift = RewardShift()
        for number, want in enumerate(case["steps"]):
            part = {name: stored[f"{case['name']}.{number}.{name}"]
                    for name in ("policy_logits", "ref_logits", "labels", "grad_policy_logits")}
            logits = part["policy_logits"].requires_grad_()
            policy, counts = sequence_logps(logits, part["labels"])
            reference, _ = sequence_logps(part["ref_logits"], part["labels"])
            assert counts.tolist() == want["num_supervised"]
            close(policy, want["policy_logps"])
            close(reference, want["ref_logps"])
            half = len(policy) // 2
            sft = generation(policy[:half], counts[:half])
            close(sft, want["sft"])
            found = mpo(policy[:half], policy[half:], reference[:half], reference[half:], sft, shift)
            close(found.total, want["total"])
            assert shift.value == pytest.approx(want["delta"], abs=2e-6)
            found.total.backward()
            torch.testing.assert_close(logits.grad, part["grad_policy_logits"], rtol=1e-5, atol=1e-6)


def test_gradients_against_finite_differences():
    B = 3
    values = [torch.randn(B, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    reference = [torch.randn(B, dtype=torch.float64) for _ in range(2)]

    def total(chosen, rejected):
        shift = RewardShift()
        shift.update(torch.tensor([0.3]))
        shift.update = lambda rewards: 0.3          # no gradient flows through it, so it must not move here
        return mpo(chosen, rejected, *reference, -chosen.sum() / 7, shift, beta=0.5).total
    assert torch.autograd.gradcheck(total, values)


def test_a_model_that_is_its_own_reference():
    logps = torch.randn(5), torch.randn(5)
    found = mpo(*logps, *logps, torch.tensor(0.0), RewardShift())
    assert float(found.total) == pytest.approx(1.2 * math.log(2)) and found.shift == 0 and found.margin == 0


def test_what_is_not_learned_does_not_count():
    logits = torch.randn(2, 6, 11)
    labels = torch.tensor([[IGNORE, IGNORE, 3, 0, IGNORE, 5], [IGNORE] * 6])
    sums, counts = sequence_logps(logits, labels)
    assert counts.tolist() == [3, 0] and sums[1] == 0
    slow = sum(logits[0, t - 1].double().log_softmax(-1)[labels[0, t]] for t in (2, 3, 5))
    assert float(sums[0]) == pytest.approx(float(slow), rel=1e-6)
    nothing = generation(sums[1:], counts[1:])
    assert nothing.isnan()
    total = mpo(sums[1:], sums[1:], sums[1:], sums[1:], nothing, RewardShift(), weights=(0.8, 0.2, 0.0)).total
    assert total.isfinite()


def test_the_shift_can_be_kept():
    shift, other = RewardShift(), RewardShift()
    for i in range(4):
        shift.update(torch.tensor([float(i), 1.0]))
    other.load_state_dict(json.loads(json.dumps(shift.state_dict())))
    nine = torch.tensor([9.0])
    assert shift.update(nine) == other.update(nine) == pytest.approx((0.5 + 1 + 1.5 + 2 + 9) / 5)
    before = shift.value
    mpo(*(torch.zeros(2),) * 4, torch.tensor(0.0), shift, weights=(1.0, 0.0, 0.0))
    assert shift.value == before and shift.count == 5
