"""Random weights in the exact released format: names, shapes, dtypes and files of a real checkpoint, no download.

    size -> config.json -> MiniVL on `meta` (names and shapes) -> one random tensor per name -> files.save_checkpoint

A tensor depends on the seed and its name alone, so files of either format and any number of shards hold the same ones.
The scales keep activations near 1 through all layers: answers are nonsense, but finite nonsense in float16 too.
"""
from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import struct
import sys
import time
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, trainers

from minivl import family, options
from minivl.awq import pack
from minivl.config import Config
from minivl.family import TOWERS, internlm2, qwen2
from minivl.internlm2_tokenizer import FORCED
from minivl.limits import InputError, is_there, reading
from minivl.model import MiniVL
from minivl.prompt import SYSTEM
from minivl.sentencepiece import BYTE, BYTES, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED
from minivl.tokenizer import PATTERN, Tokenizer
from weights_tools import run
from weights_tools.files import check_free_of_weights, save_checkpoint

TOWER_TINY = {**TOWERS["300M"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 56}       # 4 x 4 patches, 4 visual tokens
SIZES = {   # vision_config, llm_config: what differs between the sizes
    "tiny": (TOWER_TINY, qwen2("tiny", 128, 256, 3, 4, 2, vocab_size=600)),
    "tiny-internlm2": (TOWER_TINY, internlm2("tiny", 128, 256, 3, 4, kv_heads=2, vocab_size=600)),
    **{size: (TOWERS[tower], decoder) for size, (tower, decoder) in family.SIZES.items()}}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# The released sub-configs are full dumps of such settings, which a reader of config.json must pass over.
LEGACY = {"_attn_implementation_autoset": True, "bad_words_ids": None, "chunk_size_feed_forward": 0, "do_sample": False,
          "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "length_penalty": 1.0, "num_beams": 1, "pruned_heads": {},
          "output_attentions": False, "return_dict": True, "temperature": 1.0, "top_k": 50, "typical_p": 1.0}
ADDED_TOKENS = (    # their order is their ids, after the vocabulary: 151643..151673 in the released files
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>",
    "</quad>", "<ref>", "</ref>", "<box>", "</box>")
# The same of an InternLM2 decoder: the first six take the last ids of the vocabulary, 92538..92543.
ADDED_TOKENS_INTERNLM2 = (
    "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json")
# What SentencePiece's messages say, number of the field -> value: BPE with byte_fallback; no add_dummy_prefix, no
# remove_extra_whitespaces, but escape_whitespaces.
TRAINER = {3: 2, 35: 1}
NORMALIZER = {1: b"identity", 3: 0, 4: 0, 5: 1}
TOKENIZER_FILES_INTERNLM2 = ("tokenizer.model", "tokenizer_config.json", "added_tokens.json")
# The linears that add to the residual stream, by the names in the files: Qwen2's, InternLM2's, the tower's.
BRANCH_ENDS = re.compile(r"\.(o_proj|down_proj|wo|w2|attn\.proj|fc2)\.")
CHUNK = 2**22           # random numbers at a time: they stay in the CPU's cache on their way to half precision
# Zero points 6..9 have the mean 7.5 of q in 0..15. With 7..9 every weight is a little negative on average, and a common
# mean of the activations then grows from layer to layer: to 60 times their size in 36 layers.
ZEROS = range(6, 10)
INT4_STD = math.sqrt((16**2 - 1) / 12 + (len(ZEROS)**2 - 1) / 12)       # of q - z, both uniform


def synthesize(out: str | Path, size: str = "tiny", *, awq: bool = False, format: str = "safetensors",
               shard_gb: float = 2.0, tokenizer: str | Path | None = None, seed: int = 0, dtype: str | None = None,
               group_size: int = 128, config_quirk: str = "llm", overwrite: bool = False) -> Path:
    """Write a whole checkpoint of random weights to the folder `out` and return it.

    `tokenizer`: folder with the released vocabulary, needed by the large sizes with a Qwen2 decoder; those with an
    InternLM2 decoder take a made-up one without it. False: none, such a model can be measured but not talked to.
    `shard_gb`: most 10^9 bytes in a file.
    `dtype` "float16" or "bfloat16" of all that is not int4; None: float16 with `awq`, else bfloat16, as released.
    `config_quirk` "top": quantization_config where third-party copies have it, not inside llm_config.
    """
    config = config_json(size, awq=awq, dtype=dtype, group_size=group_size, config_quirk=config_quirk)
    if not 0 < shard_gb < 1e6:
        raise InputError(f"shards of {shard_gb} GB cannot be; the released files have at most 2")
    if "tiny" in size and tokenizer:
        raise InputError(f"size {size} has a tokenizer of its own with 600 tokens; leave --tokenizer out")
    out = Path(out)
    check_free_of_weights(out, overwrite)
    texts = {"config.json": json_text(config), **generation_and_preprocessor(size, config)}
    small = {name: text.encode("utf-8") for name, text in texts.items()}
    if tokenizer is not False:
        small |= _tokenizer(size, tokenizer, config["llm_config"])
    wanted = meta_tensors(config)
    layers = {"vision_model": config["vision_config"]["num_hidden_layers"],
              "language_model": config["llm_config"]["num_hidden_layers"], "mlp1": 1}

    def make(name):
        return random_tensor(name, wanted[name], seed=seed, layers=layers[name.split(".")[0]], group_size=group_size)

    save_checkpoint(wanted, out, make=make, format=format, shard_bytes=int(shard_gb * 1e9), overwrite=overwrite,
                    small=small)
    return out


# ---- config.json and its neighbours ---------------------------------------------------------------------------------

def config_json(size: str, *, awq: bool = False, dtype: str | None = None, group_size: int = 128,
                config_quirk: str = "llm") -> dict:
    """Make config.json of one size as a dict, with the keys of the released files."""
    if size not in SIZES:
        raise InputError(f"size {size!r} is not one of {', '.join(SIZES)}")
    dtype = dtype or ("float16" if awq else "bfloat16")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if config_quirk not in ("llm", "top"):
        raise InputError(f"config quirk {config_quirk!r} is not one of llm, top")
    if not awq and (config_quirk != "llm" or group_size != 128):
        raise InputError("the config quirk and the group size belong to quantization_config, which only AWQ files "
                         "have; add --awq or leave them out")
    vision, llm = SIZES[size]
    widths = llm["hidden_size"], llm["intermediate_size"]
    if group_size < 1 or any(width % group_size for width in widths):
        raise InputError(f"group size {group_size} must divide the in features of every decoder linear, {widths[0]} "
                         f"and {widths[1]} for {size}; the released files have 128")
    ids = added_tokens(llm)
    block = {"quantization_config": quantization_block(group_size)} if awq else {}
    return {
        "_commit_hash": None, "_name_or_path": f"InternVL2_5-{size}-random", "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": vision["image_size"],
        "llm_config": {
            **LEGACY, "attention_dropout": 0.0, "attn_implementation": "eager",
            "bos_token_id": ids.get("<|endoftext|>"), "eos_token_id": ids["<|im_end|>"], "hidden_act": "silu",
            "initializer_range": 0.02, "max_position_embeddings": 32768, "max_window_layers": 70,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
            "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": dtype,
            "use_cache": not awq,           # calibration switched it off before saving; it says nothing about inference
            "use_sliding_window": False, **llm, **(block if config_quirk == "llm" else {})},
        "max_dynamic_patch": 12, "min_dynamic_patch": 1, "model_type": "internvl_chat", "pad2square": False,
        "ps_version": "v2", **(block if config_quirk == "top" else {}), "select_layer": -1, "template": "internvl2_5",
        "tie_word_embeddings": False, "torch_dtype": dtype, "transformers_version": None, "use_backbone_lora": 0,
        "use_llm_lora": 0, "use_thumbnail": True,
        "vision_config": {
            **LEGACY, **vision, "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "drop_path_rate": 0.0,
            "dropout": 0.0, "hidden_act": "gelu", "initializer_factor": 0.1, "initializer_range": 1e-10,
            "layer_norm_eps": 1e-06, "model_type": "intern_vit_6b",        # this name stands in both towers' configs
            "num_channels": 3, "patch_size": 14, "torch_dtype": dtype, "use_flash_attn": True},
    }


def added_tokens(llm: dict) -> dict[str, int]:
    """Give the added tokens of an llm_config their ids, the last of the vocabulary."""
    tokens = ADDED_TOKENS_INTERNLM2 if llm.get("model_type") == "internlm2" else ADDED_TOKENS
    return {token: llm["vocab_size"] - len(tokens) + i for i, token in enumerate(tokens)}


def generation_and_preprocessor(size: str, config: dict) -> dict[str, str]:
    """Write generation_config.json and preprocessor_config.json."""
    ids = added_tokens(config["llm_config"])
    # The released 38B file does not list <|endoftext|>; InternLM2 has none.
    ends = sorted(ids[token] for token in ("<|im_start|>", "<|im_end|>"))
    ends += [ids["<|endoftext|>"]] if "<|endoftext|>" in ids and size != "38B" else []
    return {
        "generation_config.json": json_text({"_from_model_config": True, "eos_token_id": ends,
                                         "transformers_version": "4.45.1"}),
        "preprocessor_config.json": json_text(preprocessor_config(config["force_image_size"]))}


def preprocessor_config(side: int) -> dict:
    """Make preprocessor_config.json of the released files, for tiles of `side` pixels."""
    return {"crop_size": side, "do_center_crop": True, "do_normalize": True, "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": side}


def quantization_block(group_size: int) -> dict:
    """Make `quantization_config` as LMDeploy writes it."""
    return {"bits": 4, "group_size": group_size, "quant_method": "awq", "version": "gemm", "zero_point": True}


def json_text(data: dict) -> str:
    """Write the text of a JSON file of a checkpoint."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


# ---- tokenizer ------------------------------------------------------------------------------------------------------

TRAINING_TEXT = """\
A picture is cut into tiles. Each tile is cut into patches, and every patch becomes a vector. The vision tower lets
every patch look at every other patch, layer after layer. Then four neighbouring patches become one visual token, and
the projector carries it into the language of the decoder. There it takes the place of a placeholder in the prompt,
between the words of the question. The decoder reads the prompt from left to right and writes the answer, one token at
a time. What do you see in this image? There is a red square on the left and a blue circle on the right. Please
describe the picture shortly. How many green triangles are there? There are three small triangles and one large yellow
star. Which colour is the circle above the square? It is white. Read the number in the picture: 0 1 2 3 4 5 6 7 8 9.
The answer is no. Is the black cat under the table or behind the chair? I can't see a cat, but there's a dog with a
ball in front of it.
"""


TEXTS = [TRAINING_TEXT, "system\nuser\nassistant\nImage-1: Frame1: ", SYSTEM]


def _tokenizer(size: str, folder, llm: dict) -> dict[str, bytes]:
    """Make the tokenizer's files: a made-up one, or copies of a folder's."""
    internlm2 = llm["model_type"] == "internlm2"
    if folder is None and (internlm2 or size == "tiny"):
        made = train_sentencepiece(TEXTS, llm["vocab_size"]) if internlm2 else tiny_tokenizer()
        return {name: text if isinstance(text, bytes) else text.encode("utf-8") for name, text in made.items()}
    return _copied_tokenizer(size, folder, llm["vocab_size"], TOKENIZER_FILES_INTERNLM2 if internlm2 else
                             TOKENIZER_FILES)


def tiny_tokenizer() -> dict[str, str]:
    """Train a byte-level BPE of 256 bytes, 313 merges, 31 added tokens: its three files."""
    return train_tokenizer(TEXTS, SIZES["tiny"][1]["vocab_size"])


def train_tokenizer(texts: list[str], vocab_size: int) -> dict[str, str]:
    """Train a byte-level BPE of the Qwen2 recipe: vocab.json, merges.txt, added_tokens.json, each as text.

    `vocab_size` counts the 31 added tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    size = vocab_size - len(ADDED_TOKENS)
    # All 256 bytes first: whatever the text, there is a token for it.
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                   show_progress=False))
    model = json.loads(backend.to_str())["model"]
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    if len(vocabulary) != size:
        raise InputError(f"the texts give {len(vocabulary)} tokens, {size} are wanted; give more text")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"vocab.json": json.dumps(vocabulary, ensure_ascii=False) + "\n",
            "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
            "added_tokens.json": json_text({token: size + i for i, token in enumerate(ADDED_TOKENS)})}


def train_sentencepiece(texts: list[str], vocab_size: int) -> dict[str, str | bytes]:
    """Train a SentencePiece BPE as InternLM2 has: tokenizer.model, tokenizer_config.json, added_tokens.json.

    `vocab_size` counts the 15 added tokens. What the texts do not fill is filled with characters of private use.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    added = added_tokens({"vocab_size": vocab_size, "model_type": "internlm2"})
    room = min(added.values()) - 3 - len(BYTES)
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=min(room, 3000), show_progress=False))
    learned_by = json.loads(backend.to_str())["model"]
    merged = ["".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in learned_by["merges"]]
    single = sorted(learned_by["vocab"].keys() - set(merged))
    learned = [*dict.fromkeys(merged), *single]     # the earlier merged, the higher the score; characters are lowest
    private = itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFA00), range(0x100000, 0x10FA00))
    learned += map(chr, itertools.islice(private, room - len(learned)))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = {**FORCED, **added}
    config = {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": True, "add_eos_token": False,
              "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>",
              "clean_up_tokenization_spaces": False, "model_max_length": 8192,
              "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in special.items()}}
    pieces = released_pieces(learned)
    model = sentencepiece_model(pieces, {**TRAINER, 4: len(pieces)})        # vocab_size, as SentencePiece notes it
    return {"tokenizer.model": model, "tokenizer_config.json": json_text(config),
            "added_tokens.json": json_text(added)}


def released_pieces(words: list[str]) -> list[tuple[str, float, int]]:
    """List (text, score, type) in the released order: three names, bytes, words by falling score, six unused."""
    return [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL),
            *((text, 0.0, BYTE) for text in BYTES), *((text, -float(n), NORMAL) for n, text in enumerate(words)),
            *((f"[UNUSED_TOKEN_{n}]", 0.0, USER_DEFINED) for n in range(140, 146))]


def sentencepiece_model(pieces: list[tuple[str, float, int]], trainer: dict = TRAINER,
                        normalizer: dict = NORMALIZER) -> bytes:
    """Write (text, score, type) of each piece as tokenizer.model; see minivl/sentencepiece.py, which reads it.

    trainer, normalizer: what their messages say, number of the field -> value.
    """
    listed = [field(1, message({1: text.encode("utf-8"), 2: float(score), 3: kind})) for text, score, kind in pieces]
    return b"".join(listed) + field(2, message(trainer)) + field(3, message(normalizer))


def message(fields: dict[int, int | float | bytes]) -> bytes:
    """Write a message of protobuf: number -> value, in this order."""
    return b"".join(field(number, value) for number, value in fields.items())


def field(number: int, value: int | float | bytes) -> bytes:
    """Write one field: an int as a varint, a float as 4 bytes, bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(number: int) -> bytes:
    """Write a number with seven bits a byte, the lowest first."""
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def _copied_tokenizer(size: str, folder, wanted: int, names: tuple[str, ...]) -> dict[str, bytes]:
    if folder is None:
        raise InputError(f"size {size} needs the real Qwen2 vocabulary ({', '.join(names)}, as in every "
                         "released checkpoint of the family); give its folder with --tokenizer")
    missing = [name for name in names if not is_there(Path(folder) / name)]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}; for size {size} --tokenizer takes a folder with "
                         f"{', '.join(names)}")
    found = Tokenizer.load(folder).vocab_size
    if found != wanted:
        raise InputError(f"the tokenizer in {folder} has {found} tokens, size {size} has {wanted}; take the one of an "
                         "InternVL2.5 checkpoint of that size")
    with reading(folder):
        return {name: (Path(folder) / name).read_bytes() for name in names}


# ---- tensors --------------------------------------------------------------------------------------------------------

def meta_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Derive from config.json the shape and dtype of every tensor in the files: name -> tensor without values."""
    dtype = DTYPES[config["torch_dtype"]]
    with torch.device("meta"):
        return MiniVL(Config.from_json(config)).to(dtype).state_dict()      # .to leaves the int32 words as they are


def random_tensor(name: str, like: torch.Tensor, *, seed: int, layers: int, group_size: int = 128) -> torch.Tensor:
    """Draw random values in the shape and dtype of `like`. `layers`: of its part; more make branches smaller."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    out = torch.empty(like.shape, dtype=like.dtype)
    if name.endswith(".qweight"):       # eight numbers 0..15 a word: any word is good, signed as stored
        return out.random_(-2**31, 2**31, generator=generator)
    if name.endswith(".qzeros"):
        return pack(torch.randint(ZEROS.start, ZEROS.stop, (like.shape[0], 8 * like.shape[1]), generator=generator))
    # 2 * layers branches are added to the residual stream; so scaled, they all together add about one
    branch = (2 * layers) ** -0.5 if BRANCH_ENDS.search(name) else 1.0
    if name.endswith(".scales"):        # [I/g, O]
        std = branch * (like.shape[0] * group_size) ** -0.5
        return out.copy_(std / INT4_STD * torch.empty(like.shape).uniform_(0.8, 1.2, generator=generator))
    if re.search(r"\.ls[12]$", name):
        return out.copy_(torch.empty(like.shape).uniform_(0.1, 1.0, generator=generator))
    mean = 0.0
    std = 0.02                          # biases
    if re.search(r"norm\d?\.weight$|^mlp1\.0\.weight$", name):
        mean = 1.0
        std = 0.1
    elif name.endswith("_embedding"):   # of positions and CLS: small next to the patches, large enough to matter
        std = 0.2
    elif name.endswith(("embed_tokens.weight", "tok_embeddings.weight")):
        std = 0.65                      # as the visual tokens: the projector's GELU leaves 0.65 of a unit normal
    elif like.ndim > 1:
        std = branch * math.prod(like.shape[1:]) ** -0.5
    flat = out.view(-1)
    buffer = torch.empty(min(CHUNK, out.numel()))
    for start in range(0, len(flat), CHUNK):
        part = flat[start:start + CHUNK]
        part.copy_(buffer[:len(part)].normal_(mean, std, generator=generator))
    return out


def arguments(argv: list | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what would have no effect."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.synthesize", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("out", metavar="OUT", help="folder to write; made if it does not exist")
    parser.add_argument("--size", choices=SIZES, default="tiny",
                        help="tiny or tiny-internlm2 (under 2 MB), or the shapes of a released model: on disk about "
                             "1.9, 4.4, 7.4, 16, 51, 77 and 157 GB for 1B to 78B, with --awq 1.3, 2.2, 3.3, 5.8, 23, "
                             "31 and 53 GB (default %(default)s)")
    parser.add_argument("--awq", action="store_true", help="int4 decoder linears, as the -AWQ releases have")
    parser.add_argument("--format", choices=["safetensors", "bin"], default="safetensors",
                        help="bin: pickled pytorch_model*.bin, as the -AWQ releases have (default safetensors)")
    parser.add_argument("--shard-gb", type=float, default=2.0, metavar="GB",
                        help="most 10^9 bytes of tensors in one file (default %(default)s)")
    parser.add_argument("--tokenizer", metavar="FOLDER",
                        help="folder with the released tokenizer: of Qwen2 needed for 1B, 4B, 38B and 78B; 2B, 8B and "
                             "26B get a made-up one without it")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same tensors (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="of all that is not int4 (default float16 with --awq, else bfloat16)")
    parser.add_argument("--group-size", type=int, default=128, metavar="N",
                        help="--awq: in features that share a scale and a zero point (default %(default)s)")
    parser.add_argument("--config-quirk", choices=["llm", "top"], default="llm",
                        help="--awq: where in config.json quantization_config is (default %(default)s, as released)")
    parser.add_argument("--overwrite", action="store_true", help="replace the weights that OUT already holds")
    args = parser.parse_args(argv)
    if not args.awq:
        options.refuse(options.given(parser, argv), ("group_size", "config_quirk"), "without --awq")
    if "tiny" in args.size:
        options.refuse(options.given(parser, argv), ("tokenizer",), f"with size {args.size}, which has a tokenizer of "
                       "its own")
    return args


def main(argv: list | None = None) -> int:
    """Run the command; its exit code."""
    asked = vars(arguments(argv))
    start = time.perf_counter()
    folder = synthesize(**asked)
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    print(f"{folder}: {asked['size']}{' AWQ' if asked['awq'] else ''}, random weights of seed {asked['seed']}, "
          f"{size / 1e9:.3f} GB, {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
