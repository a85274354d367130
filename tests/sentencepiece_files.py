"""Write small SentencePiece models, whole or wrong, for tests of what reads them."""
import struct

from minivl.sentencepiece import BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

ADDED = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>", "<img>",
         "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
TRAINER = {3: 2, 35: 1}             # model_type: BPE; byte_fallback
NORMALIZER = {1: b"identity", 3: 0, 4: 0, 5: 1}     # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces


def varint(number):
    """Seven bits a byte, the lowest first."""
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def field(number, value):
    """One field: an int as a varint, a float as 4 bytes, bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(fields):
    """number -> value, in this order."""
    return b"".join(field(number, value) for number, value in fields.items())


def piece(text, score=0.0, kind=NORMAL):
    return field(1, message({1: text.encode(), 2: float(score), 3: kind}))


def pieces(words):
    """[(text, score, type)] in the released order: three names, bytes, words from best to worst score, six unused."""
    return [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL), *((text, 0, BYTE) for text in BYTES),
            *((text, -n, NORMAL) for n, text in enumerate(words)),
            *((f"[UNUSED_TOKEN_{n}]", 0, USER_DEFINED) for n in range(140, 146))]


def model(listed, trainer=TRAINER, normalizer=NORMALIZER):
    """The bytes of tokenizer.model."""
    return b"".join(piece(*one) for one in listed) + field(2, message(trainer)) + field(3, message(normalizer))


def added(count):
    """added_tokens.json beside a model of `count` pieces."""
    return {token: count - 6 + n for n, token in enumerate(ADDED)}
