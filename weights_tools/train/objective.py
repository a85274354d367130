"""What is learned of a conversation: labels on the answers, logits where a label stands.

    ids -> labels (IGNORE elsewhere) -> padded on the right -> logits float32[n, V] and tokens int64[n]

B conversations, T tokens, n tokens that are learned, V vocabulary, D language width, N tiles, R tile side.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from minivl.model import MiniVL
from minivl.tokenizer import Tokenizer

IGNORE = -100           # label of a token that is not learned, as in cross_entropy


def labels_of(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the ids themselves where an answer stands, its <|im_end|> included, and IGNORE elsewhere.

    Masked: system and user turns, the header "<|im_start|>assistant\\n" and the newline after <|im_end|>.
    Source: InternVL internvl/train/dataset.py:711-810 @2410d1d.
    """
    header = [tokenizer.id("<|im_start|>"), *tokenizer.encode("assistant\n")]
    end = tokenizer.id("<|im_end|>")
    labels = []
    inside = False
    for i, id in enumerate(ids):
        inside = inside and id != header[0]     # an empty answer is only its header, see minivl.prompt
        labels.append(id if inside else IGNORE)
        if id == end:
            inside = False
        elif ids[i + 1 - len(header):i + 1] == header:
            inside = True
    return labels


def ids_and_labels(rows: list[list[int]], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad conversations on the right: ids of each -> ids and labels, both int64[B, T]."""
    T = max(map(len, rows))
    ids = [row + [0] * (T - len(row)) for row in rows]
    labels = [labels_of(row, tokenizer) + [IGNORE] * (T - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def supervised(labels: torch.Tensor) -> torch.Tensor:
    """Mark the positions whose next token is learned: int64[B, T] -> bool[B, T-1]."""
    return labels[:, 1:] != IGNORE


def answer_logits(model: MiniVL, ids, labels, pixel_values, times: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits float32[n, V] at the n positions before a learned token, and these tokens int64[n].

    ids, labels int64[B, T]; pixel_values float[N, 3, R, R], perhaps no tile. Row after row: those of a row are
    supervised(labels).sum(1) in number. Right padding needs no mask: nothing real stands after it. The head runs only
    where an answer is learned. times: how often the rows go through the same tiles, in the same order, which are looked
    at once.
    """
    visual = model.visual_tokens(pixel_values).repeat(times, 1, 1) if len(pixel_values) else None
    x = model.language_model.body(model.embed(ids, visual))                 # (B, T, D)
    wanted = supervised(labels)                                             # (B, T-1)
    return model.language_model.head(x[:, :-1][wanted]).float(), labels[:, 1:][wanted]


def drift(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Compute KL(as it was || as it is) of logits float[n, V], added up: a scalar."""
    return F.kl_div(now.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)
