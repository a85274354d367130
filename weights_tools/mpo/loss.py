"""The loss of MPO: which answer is better, how good each is, and how to write the better one.

    L = 0.8 L_p + 0.2 L_q + 1.0 L_g

    L_p = -log s(b ((lp_c - lr_c) - (lp_r - lr_r)))             preference, DPO: chosen above rejected
    L_q = -log s(r_c - d) - log s(d - r_r)                      quality, BCO: chosen above d, rejected below
    L_g = -sum of log p over the chosen answers' tokens / their number          generation, SFT

s is the logistic function, b = 0.1 is beta. lp_c, lp_r: log-probabilities of the chosen and the rejected answer under
the model that learns, lr_c, lr_r: under the one it began as. r_c = b (lp_c - lr_c) and r_r = b (lp_r - lr_r) are
rewards: how much more probable an answer became. d is the reward shift: the mean of all rewards so far, RewardShift.

B pairs, T tokens, V vocabulary. Source: MPO arXiv:2411.10442, equations 1 to 5; DPO arXiv:2305.18290; BCO
arXiv:2404.04656; InternVL internvl_chat/internvl/train/trainer_dpo.py:139-302 @2410d1d over TRL 0.10.1
trl/trainer/dpo_trainer.py:1169-1344, trl/trainer/utils.py:570-653.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

IGNORE = -100           # label of a token that is not learned, as in cross_entropy


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the log-probabilities of each row's learned tokens: float[B, T, V], int64[B, T] -> float32[B], int64[B].

    logits[:, t] score labels[:, t + 1]. The second result counts the tokens. A sum, not a mean: a longer answer weighs
    more.
    """
    learned = labels[:, 1:] != IGNORE                                                   # (B, T-1)
    wanted = labels[:, 1:].clamp(min=0)[..., None]                                      # (B, T-1, 1)
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, wanted)[..., 0]           # (B, T-1)
    return (logps * learned).sum(-1), learned.sum(-1)


def generation(logps: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Compute L_g of the chosen answers' sums and counts, both [B]: a scalar, the mean over all of the batch's tokens.

    As in the original trainer, where a long answer counts more than a short one beside it. With one pair at a time, as
    the card was trained, it is the paper's 1 / |y_c|.
    """
    return -logps.sum() / counts.sum()


class RewardShift:
    """The reward shift d: the mean of the mean rewards of all batches so far, each batch counted once.

    Without it a drift of all rewards, up or down, would look like quality. The original forgets it when a training is
    stopped; here it can be kept: state_dict, load_state_dict.
    """

    def __init__(self):
        self.value = 0.0
        self.count = 0

    def update(self, rewards: torch.Tensor) -> float:
        """Take the rewards of a batch into the mean, chosen and rejected together; return the new mean."""
        self.count += 1
        self.value += (float(rewards.detach().float().mean()) - self.value) / self.count
        return self.value

    def state_dict(self) -> dict:
        """Return what a stopped training needs to go on."""
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict):
        """Go on from what state_dict returned."""
        self.value = state["value"]
        self.count = state["count"]


@dataclass
class Losses:
    """What `mpo` returns. Rewards have no gradients: they are for looking at."""
    total: torch.Tensor             # a scalar
    preference: torch.Tensor        # float32[B]
    quality: torch.Tensor           # float32[B]
    generation: torch.Tensor        # a scalar
    chosen_rewards: torch.Tensor    # float32[B]
    rejected_rewards: torch.Tensor  # float32[B]
    shift: float = field(default=0.0)   # d, that this batch was judged by

    @property
    def accuracy(self) -> float:
        """Return the share of pairs whose chosen answer gained more than the rejected one."""
        return float((self.chosen_rewards > self.rejected_rewards).float().mean())

    @property
    def margin(self) -> float:
        """Return how much more the chosen answers gained than the rejected ones, on average."""
        return float((self.chosen_rewards - self.rejected_rewards).mean())


def mpo(policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, reference_chosen: torch.Tensor,
        reference_rejected: torch.Tensor, generation: torch.Tensor, shift: RewardShift, *, beta: float = 0.1,
        weights: tuple[float, float, float] = (0.8, 0.2, 1.0)) -> Losses:
    """Compute the loss of B pairs from their log-probabilities, each float32[B], and L_g, a scalar.

    `shift` is updated before it is used, so a batch is part of its own mean; where the second weight is 0 it is not
    touched. weights: of L_p, L_q and L_g.
    """
    chosen = beta * (policy_chosen - reference_chosen)                                  # (B)
    rejected = beta * (policy_rejected - reference_rejected)                            # (B)
    preference = -F.logsigmoid(chosen - rejected)                                       # (B)
    delta = shift.update(torch.cat([chosen, rejected])) if weights[1] else shift.value
    quality = -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)            # (B)
    w_p, w_q, w_g = weights
    # A weight of 0 takes its term out, also where that is NaN: L_g of a batch without a learned token, say.
    total = sum(w * term for w, term in ((w_p, preference.mean()), (w_q, quality.mean()), (w_g, generation)) if w)
    return Losses(total, preference, quality, generation, chosen.detach(), rejected.detach(), delta)
