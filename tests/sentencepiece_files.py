"""Small SentencePiece models, whole or wrong, for tests of what reads them, by the writer of weights_tools."""
from minivl.sentencepiece import NORMAL
from weights_tools.synthesize import ADDED_TOKENS_INTERNLM2 as ADDED
from weights_tools.synthesize import NORMALIZER, TRAINER, field, message, varint
from weights_tools.synthesize import released_pieces as pieces
from weights_tools.synthesize import sentencepiece_model as model

__all__ = ["ADDED", "NORMALIZER", "TRAINER", "added", "field", "message", "model", "piece", "pieces", "varint"]


def piece(text, score=0.0, kind=NORMAL):
    return field(1, message({1: text.encode(), 2: float(score), 3: kind}))


def added(count):
    """added_tokens.json beside a model of `count` pieces."""
    return {token: count - 6 + n for n, token in enumerate(ADDED)}
