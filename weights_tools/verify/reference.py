"""Run other people's code on a checkpoint and record every stage: python reference.py FOLDER REQUEST TRACE

    REQUEST (json: pictures, messages, limits) -> the reference's own tiles, prompt and ids -> its own model -> TRACE

The reference is transformers' InternVL (its vision tower, projector and Qwen2; InternLM2 is its Llama with other names
and q, k, v in one tensor, as transformers' own converter has it), or, only with --trust-remote-code, the
modelling code inside the checkpoint's folder. This file runs in an environment of its own (`make reference`) and
imports nothing of minivl: what both share could not be checked. All that is said here about weights, tiles, prompts and
stages is therefore written a second time, from the sources named. `weights_tools.verify` starts it.

Weights stay in their files: a layer is read, dequantised and cast when its turn comes, and forgotten afterwards, so
that the 4B runs in a few GB. `--resident GB`: models up to this size are kept.

TRACE is one safetensors file: the stages by the names of minivl.tracing, pixel_values, input_ids, greedy and
greedy_scores (the answer's tokens and their scores), and as metadata everything that tells what was run on what. Exit
codes: 0, or 2 with one line on stderr.
"""
import argparse
import ctypes
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KNOWN = "5.23"          # of transformers
LAST_LOGITS = 32        # positions whose logits are kept of a long prompt: all of 3,000 x 151,674 would be 2 GB


class CannotRun(Exception):
    """What the user can correct, with the next step."""


class Enough(Exception):
    """All that is wanted is recorded, the rest of the model need not run."""


# ---- files ----------------------------------------------------------------------------------------------------------

def weight_files(folder: Path) -> list:
    """Find the files that hold weights. Source of the order: shared facts of the released repositories."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            files = json.loads((folder / index).read_text())["weight_map"].values()
            return [folder / name for name in sorted(set(files))]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
    raise CannotRun(f"{folder} has no model.safetensors or pytorch_model.bin; give a checkpoint's folder")


class Weights:
    """Released names -> tensors, read when asked for. int4 linears answer to their `.weight`."""

    ORDER = (0, 16, 4, 20, 8, 24, 12, 28)     # shift of column 8c + j in word c; AutoAWQ packing_utils.py @88e4c76b

    def __init__(self, folder: Path):
        self.read = {}
        for path in weight_files(folder):
            if path.suffix == ".safetensors":
                file = safe_open(path, "pt")
                self.read |= {name: partial(file.get_tensor, name)
                              for name in file.keys()}      # noqa: SIM118  no dict
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                self.read |= {name: partial(tensors.__getitem__, name) for name in tensors}

    def digest(self) -> str:
        """Compute a sha256 over all tensors by name, with dtype and shape: the same for every form of the files."""
        total = hashlib.sha256()
        for name in sorted(self.read):
            tensor = self.read[name]().contiguous()
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
        return total.hexdigest()

    def __call__(self, name: str, dtype) -> torch.Tensor:
        if name in self.read:
            return self.read[name]().to(dtype)
        prefix = name.removesuffix("weight")
        if not name.endswith("weight") or prefix + "qweight" not in self.read:
            raise CannotRun(f"the checkpoint has no tensor {name}")
        words, zeros, scales = (self.read[prefix + part]() for part in ("qweight", "qzeros", "scales"))
        q = torch.empty(words.shape[0], scales.shape[1])
        z = torch.empty(scales.shape)
        for j, shift in enumerate(self.ORDER):
            q[:, j::8] = (words >> shift & 15).float()
            z[:, j::8] = (zeros >> shift & 15).float()
        q = q.view(len(z), -1, z.shape[1]).sub_(z[:, None]).mul_(scales[:, None].float())
        return q.flatten(0, 1).T.to(dtype)


# ---- inputs, as the reference makes them ----------------------------------------------------------------------------

def tiles_of(image, size: int, least: int, most: int, thumbnail: bool):
    """Cut one RGB picture by transformers' processor on Pillow: float32[tiles, 3, size, size]."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )
    processor = GotOcr2ImageProcessorPil(size={"height": size, "width": size}, image_mean=list(MEAN),
                                         image_std=list(STD), crop_to_patches=most > 1, min_patches=least,
                                         max_patches=most)
    tiles = processor(image, return_tensors="pt")["pixel_values"]
    return tiles if thumbnail or len(tiles) == 1 else tiles[:-1]      # the processor knows no use_thumbnail


def rendered(messages: list, tiles: list, per_tile: int, system: str | None = None) -> str:
    """Write the prompt as text.

    Source: InternVL conversation.py:238-247, 393-402, modeling_internvl_chat.py:343-398 @2410d1d.
    """
    text = f"<|im_start|>system\n{SYSTEM if system is None else system}<|im_end|>\n"
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        if message["content"]:      # an empty message is only its header
            text += f"{message['content']}<|im_end|>\n"
    if messages[-1]["role"] == "user":
        text += "<|im_start|>assistant\n"
    for n in tiles:
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * (per_tile * n)}</img>", 1)
    return text


class SlowInternLM2:
    """SentencePiece's own library on tokenizer.model, the added tokens cut out of the text first, <s> in front.

    Source: InternVL internvl/model/internlm2/tokenization_internlm2.py @2410d1d, which does this through transformers.
    """

    def __init__(self, folder: Path):
        from sentencepiece import SentencePieceProcessor
        self.pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.added = json.loads((folder / "added_tokens.json").read_text("utf-8"))

    def convert_tokens_to_ids(self, token: str) -> int:
        """Look up an added token."""
        return self.added[token]

    def encode(self, text: str, add_special_tokens: bool) -> list:
        """Encode a text, with <s>; `add_special_tokens` is transformers' and means other tokens."""
        longest_first = sorted(self.added, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = [[self.added[part]] if part in self.added else self.pieces.encode(part) for part in parts if part]
        return [self.pieces.bos_id(), *(i for part in ids for i in part)]


def tokenizer_of(folder: Path):
    """Make transformers' Qwen2 tokenizer from vocab.json, merges.txt and added_tokens.json, or InternLM2's."""
    if (folder / "tokenizer.model").exists():
        return SlowInternLM2(folder)
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    if lacking := [name for name in ("vocab.json", "merges.txt", "added_tokens.json") if not (folder / name).exists()]:
        raise CannotRun(f"{folder} lacks {', '.join(lacking)}, from which the reference makes its tokenizer; copy them "
                        "there from the model's repository")
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text("utf-8").split("\n")
              if line.strip() and not line.strip().startswith("#version:")]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    added = json.loads((folder / "added_tokens.json").read_text("utf-8"))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(added, key=added.get)])
    wrong = {token: (tokenizer.convert_tokens_to_ids(token), id) for token, id in added.items()
             if tokenizer.convert_tokens_to_ids(token) != id}
    if wrong:
        raise CannotRun(f"transformers' tokenizer gives added tokens other ids than added_tokens.json: {wrong}")
    return tokenizer


# ---- the model ------------------------------------------------------------------------------------------------------

# For a missing key, as in the original: configuration_internvl_chat.py, configuration_intern_vit.py @2410d1d.
TOP_DEFAULTS = {"downsample_ratio": 0.5, "min_dynamic_patch": 1, "use_thumbnail": False}
VISION_DEFAULTS = {
    "hidden_size": 3200, "num_hidden_layers": 48, "num_attention_heads": 25, "intermediate_size": 12800,
    "qkv_bias": False, "qk_normalization": True, "hidden_act": "gelu", "norm_type": "rms_norm", "layer_norm_eps": 1e-6,
    "image_size": 224, "patch_size": 14, "num_channels": 3}
DECODER_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling",
                "rope_parameters")


def read_config(folder: Path) -> dict:
    """Read config.json, with the original classes' defaults for the keys of tower and top level that are left out."""
    config = TOP_DEFAULTS | json.loads((folder / "config.json").read_text("utf-8-sig"))
    config["vision_config"] = VISION_DEFAULTS | config["vision_config"]
    if config.get("force_image_size") is None:
        config["force_image_size"] = config["vision_config"]["image_size"]
    return config


def hf_config(config: dict):
    """Translate the released config.json into transformers' InternVLConfig.

    Its names: convert_internvl_weights_to_hf.py @015d3b27. The decoder's keys are read by transformers itself.
    """
    from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Qwen2Config
    vision, llm = VISION_DEFAULTS | config["vision_config"], config["llm_config"]
    if llm["architectures"][0] not in ("Qwen2ForCausalLM", INTERNLM2):
        raise CannotRun(f"transformers has no {llm['architectures'][0]} of its own")
    vision_config = InternVLVisionConfig(
        hidden_size=vision["hidden_size"], num_hidden_layers=vision["num_hidden_layers"],
        num_attention_heads=vision["num_attention_heads"], intermediate_size=vision["intermediate_size"],
        attention_bias=vision["qkv_bias"], use_qk_norm=vision["qk_normalization"], hidden_act=vision["hidden_act"],
        norm_type=vision["norm_type"], layer_norm_eps=vision["layer_norm_eps"], image_size=vision["image_size"],
        patch_size=vision["patch_size"], num_channels=vision["num_channels"])
    given = {**{key: llm[key] for key in DECODER_KEYS if key in llm}, "tie_word_embeddings": False}
    if llm["architectures"][0] == INTERNLM2:        # its defaults: configuration_internlm2.py @2410d1d
        text_config = LlamaConfig(**{"vocab_size": 103168, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
                                     "rope_theta": 10000.0} | given, attention_bias=llm.get("bias", True))
    else:
        text_config = Qwen2Config(**given, use_sliding_window=False)
    return InternVLConfig(vision_config=vision_config, text_config=text_config,
                          downsample_ratio=config["downsample_ratio"], tie_word_embeddings=False)


INTERNLM2 = "InternLM2ForCausalLM"
NAMES = (   # transformers' -> released; those with a dot in front stand inside a name
    ("model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("model.vision_tower.embeddings.patch_embeddings.projection", "vision_model.embeddings.patch_embedding"),
    ("model.vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    ("model.vision_tower.encoder.layer.", "vision_model.encoder.layers."),
    (".attention.projection_layer.", ".attn.proj."), (".attention.q_norm.", ".attn.q_norm."),
    (".attention.k_norm.", ".attn.k_norm."), (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."),
    (".lambda_1", ".ls1"), (".lambda_2", ".ls2"), ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("model.multi_modal_projector.linear_1.", "mlp1.1."), ("model.multi_modal_projector.linear_2.", "mlp1.3."),
    ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))


NAMES_INTERNLM2 = (     # Llama's -> released. Source: InternVL modeling_internlm2.py:250-365 @2410d1d
    ("model.language_model.embed_tokens.", "language_model.model.tok_embeddings."),
    ("lm_head.", "language_model.output."), ("model.language_model.", "language_model.model."),
    (".self_attn.o_proj.", ".attention.wo."), (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."), (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.up_proj.", ".feed_forward.w3."), (".mlp.down_proj.", ".feed_forward.w2."),
    *((f".self_attn.{part}_proj.", ".attention.wqkv.") for part in "qkv"))


def released_name(name: str, names: tuple = NAMES) -> tuple:
    """Translate transformers' name of a parameter: (released name, "q", "k", "v" of a tensor with all three, or None).

    Source: as hf_config.
    """
    which = next((part for part in "qkv" if f".attention.{part}_proj." in name or f".self_attn.{part}_proj." in name),
                 None)
    if which:
        name = name.replace(f".attention.{which}_proj.", ".attn.qkv.")
    for theirs, ours in names:
        name = name.replace(theirs, ours) if theirs.startswith(".") or name.startswith(theirs) else name
    return name, which if ".qkv." in name or ".wqkv." in name else None


def part_of(value: torch.Tensor, released: str, which: str, llm) -> torch.Tensor:
    """Cut the rows of q, k or v out of a tensor with all three: thirds in the tower, groups of kv heads in `wqkv`."""
    if ".wqkv." not in released:
        return value.chunk(3)["qkv".index(which)]
    K = llm.num_key_value_heads
    groups = value.unflatten(0, (K, llm.num_attention_heads // K + 2, -1))      # for each kv head: its q, then k, v
    return {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}[which].flatten(0, 2)


def transformers_model(folder: Path, config: dict, dtype: torch.dtype, resident: float, long: bool,
                       image_token: int) -> tuple:
    """Build transformers' InternVL, empty; its parts are filled when needed. (stages, forward) as in `run`."""
    from transformers import InternVLForConditionalGeneration
    hf = hf_config(config)
    # In float32 the textbook softmax, which shares nothing with minivl. In half precision torch's own kernel, as
    # minivl: both keep scores and softmax in float32 inside, so that what is left of a difference is a mistake.
    # Long prompts too: the scores of 10,000 tokens are 6 GB.
    hf._attn_implementation = "eager" if dtype == torch.float32 and not long else "sdpa"
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(hf).eval()
    rotary = model.model.language_model.rotary_emb
    model.model.language_model.rotary_emb = type(rotary)(hf.text_config)        # its table is a buffer, in no file
    model.config.image_token_id = model.model.config.image_token_id = image_token
    core = model.model
    parts = [core.vision_tower.embeddings, *core.vision_tower.encoder.layer, core.multi_modal_projector,
             core.language_model.embed_tokens, *core.language_model.layers, core.language_model.norm, model.lm_head]
    internlm2 = config["llm_config"]["architectures"][0] == INTERNLM2
    names = tuple(pair for pair in NAMES if "language_model" not in pair[1]) + NAMES_INTERNLM2 if internlm2 else NAMES
    fill_when_needed(model, parts, Weights(folder), dtype, resident, names)
    stages = {"vit.embeddings": (core.vision_tower.embeddings, "out"),
              **{f"vit.layers.{i}": (layer, "out") for i, layer in enumerate(core.vision_tower.encoder.layer)},
              "pixel_unshuffle": (core.multi_modal_projector, "in"), "projector": (core.multi_modal_projector, "out"),
              "inputs_embeds": (core.language_model, "in"),
              **{f"llm.layers.{i}": (layer, "out") for i, layer in enumerate(core.language_model.layers)},
              "llm.norm": (core.language_model.norm, "out"), "logits": (model.lm_head, "out")}

    def forward(ids, pixels, past, keep):
        return model(input_ids=ids, pixel_values=pixels, past_key_values=past, use_cache=True, logits_to_keep=keep)
    return stages, forward


def fill_when_needed(model: torch.nn.Module, parts: list, weights: Weights, dtype: torch.dtype, resident: float,
                     released_names: tuple):
    """Give empty parts their weights: now, or if they are more than `resident` GB, each when it runs, and only then."""
    names = {id(p): name for name, p in model.named_parameters()}
    missing = set(names.values()) - {names[id(p)] for part in parts for p in part.parameters()}
    if missing:
        raise CannotRun(f"this transformers has parts that are not known here: {sorted(missing)[:3]}; use version "
                        f"{KNOWN}")

    def tensor(name):
        released, which = released_name(name, released_names)
        value = weights(released, dtype)
        return value if which is None else part_of(value, released, which, model.config.text_config)

    def fill(part, *_):
        for module in part.modules():
            for key, p in list(module._parameters.items()):
                if p is None or not p.is_meta:
                    continue
                value = torch.nn.Parameter(tensor(names[id(p)]).contiguous(), requires_grad=False)
                if value.shape != p.shape:
                    raise CannotRun(f"{names[id(p)]} has shape {tuple(value.shape)} in the file, transformers wants "
                                    f"{tuple(p.shape)}")
                value.empty = p
                module._parameters[key] = value

    def free(part, *_):
        for module in part.modules():
            for key, p in list(module._parameters.items()):
                if hasattr(p, "empty"):
                    module._parameters[key] = p.empty

    small = sum(p.numel() for p in model.parameters()) * dtype.itemsize <= resident * 1e9
    for part in parts:
        if small:
            fill(part)
        else:
            part.register_forward_pre_hook(fill)
            part.register_forward_hook(free)


def remote_model(folder: Path, dtype: torch.dtype, image_token: int) -> tuple:
    """Build the model from the code inside the checkpoint's folder: (stages, forward) as in `run`.

    Its modules have the released names.
    """
    from transformers import AutoConfig, AutoModel
    code = json.loads((folder / "config.json").read_text("utf-8-sig")).get("auto_map", {})
    files = {value.split(".")[0] + ".py" for value in code.values()}
    missing = sorted(file for file in files if not (folder / file).exists())
    if missing or not code:
        raise CannotRun(f"{folder} holds no code ({', '.join(missing) or 'config.json has no auto_map'}); minivl's own "
                        "download leaves it out: fetch the *.py files of the repository into a folder with the weights "
                        "and give that folder")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for part in (config, config.llm_config):        # the weights arrive dequantised: the same function, without kernels
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    weights = Weights(folder)
    for name, p in model.named_parameters():        # parameters only: rounding RoPE's buffer would be a mistake
        p.data = weights(name, dtype).reshape(p.shape)
    llm = model.language_model
    stages = {"vit.embeddings": (model.vision_model.embeddings, "out"),
              **{f"vit.layers.{i}": (layer, "out") for i, layer in enumerate(model.vision_model.encoder.layers)},
              "pixel_unshuffle": (model.mlp1, "in"), "projector": (model.mlp1, "out"),
              "inputs_embeds": (llm.model, "in"),
              **{f"llm.layers.{i}": (layer, "out") for i, layer in enumerate(llm.model.layers)},
              "llm.norm": (llm.model.norm, "out"), "logits": (llm.get_output_embeddings(), "out")}

    def forward(ids, pixels, past, keep):
        if past is not None:
            return llm(input_ids=ids, past_key_values=past, use_cache=True)
        x = llm.get_input_embeddings()(ids)
        if pixels is not None:
            x = x.masked_scatter((ids == image_token)[..., None], model.extract_feature(pixels).to(x.dtype))
        return llm(inputs_embeds=x, past_key_values=None, use_cache=True)
    return stages, forward


# ---- the run --------------------------------------------------------------------------------------------------------

@dataclass
class Inputs:
    """What the model is given. `facts`: how it was made, for the trace."""
    ids: torch.Tensor               # int64[1, T]
    pixels: torch.Tensor | None     # float32[N, 3, R, R]
    image_token: int
    facts: dict


def inputs_like(path: str | Path, image_token: int) -> Inputs:
    """Take ids and pixels from another trace."""
    with safe_open(path, "pt") as file:
        return Inputs(file.get_tensor("input_ids"), file.get_tensor("pixel_values"), image_token, {"stop": None})


def inputs_of(folder: Path, config: dict, request: dict) -> Inputs:
    """Make ids and pixels from messages and pictures."""
    from PIL import Image
    size = config["force_image_size"]
    per_tile = int((size // config["vision_config"]["patch_size"]) ** 2 * config["downsample_ratio"] ** 2)
    images = [Image.open(path).convert("RGB") for path in request["pictures"]]
    tiles = [tiles_of(image, size, config["min_dynamic_patch"], request["max_num"], config["use_thumbnail"])
             for image in images]
    counts = [len(t) for t in tiles]
    tokenizer = tokenizer_of(folder)
    prompt = rendered(request["messages"], counts, per_tile, config.get("system_message"))
    facts = {"prompt": prompt.replace("<IMG_CONTEXT>", ""), "tiles": counts,
             "pictures": [hashlib.sha256(f"{im.size}".encode() + im.tobytes()).hexdigest() for im in images],
             "stop": tokenizer.convert_tokens_to_ids("<|im_end|>")}
    return Inputs(torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)]),
                  torch.cat(tiles) if tiles else None, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), facts)


def wanted_stages(stages: dict, patterns: list | None, pixels) -> list:
    """Choose the stages that the patterns name and that are computed at all."""
    idle = [pattern for pattern in patterns or () if not any(fnmatchcase(name, pattern) for name in stages)]
    if idle:
        raise CannotRun(f"no stage matches {', '.join(idle)}; stages are {', '.join(stages)}")
    wanted = [name for name in stages if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]
    if pixels is None:
        wanted = [name for name in wanted if not name.startswith(("vit", "pixel", "projector"))]
    return wanted


def record_stages(stages: dict, wanted: list, tensors: dict, logits: int, stop: bool) -> tuple:
    """Hook every stage, so that the prompt's pass fills `tensors`: (handles, progress bar).

    `logits`: of how many positions at the end. `stop`: raise Enough as soon as all that is wanted is there.
    """
    from tqdm import tqdm
    bar = tqdm(total=len(stages), desc="reference", unit="stage", disable=None)

    def save(name, value):
        value = value[0] if isinstance(value, tuple) else value
        bar.update()
        if name in wanted and name not in tensors:
            tensors[name] = (value[:, -logits:] if name == "logits" else value).detach().clone()
            if stop and all(name in tensors for name in wanted):
                raise Enough

    def after(name):
        return lambda _, args, out: save(name, out)

    def before(name):
        return lambda _, args, kwargs: save(name, args[0] if args else kwargs["inputs_embeds"])

    handles = [module.register_forward_hook(after(name)) if side == "out" else
               module.register_forward_pre_hook(before(name), with_kwargs=True)
               for name, (module, side) in stages.items()]
    return handles, bar


@torch.no_grad()
def greedy(forward: Callable, given: Inputs, dtype: torch.dtype, keep: int, tokens: int, handles: list) -> dict:
    """Read the prompt and write the most probable tokens after it: greedy int64[n], greedy_scores float32[n].

    Only the prompt's stages are recorded: `handles` are removed after it.
    """
    ids = given.ids
    pixels = None if given.pixels is None else given.pixels.to(dtype)
    past = None
    written = []
    scores = []
    for _ in range(max(1, tokens)):
        out = forward(ids, pixels, past, keep)
        for handle in handles:
            handle.remove()
        last = out.logits[0, -1]
        written.append(int(last.argmax()))
        scores.append(float(last.max()))
        ids = last.argmax().view(1, 1)
        pixels = None
        past = out.past_key_values
    return {"greedy": torch.tensor(written), "greedy_scores": torch.tensor(scores)}


def run(folder: Path, request: dict, trust_remote_code: bool, resident: float) -> tuple:
    """Record one run: (tensors, metadata).

    A model is two things here: `stages`, name -> (module, "in" or "out"), and `forward(ids, pixels, past, keep)`, which
    returns transformers' output with the logits of the last `keep` positions (0: all).
    """
    config = read_config(folder)
    dtype = getattr(torch, request.get("dtype", "float32"))
    tokens = request["max_new_tokens"]
    given = (inputs_like(request["like"], request["image_token_id"]) if "like" in request else
             inputs_of(folder, config, request))
    T = given.ids.shape[1]
    keep = T if T * config["llm_config"].get("vocab_size", 151936) <= 64_000_000 else LAST_LOGITS
    if trust_remote_code:
        stages, forward = remote_model(folder, dtype, given.image_token)
    else:
        stages, forward = transformers_model(folder, config, dtype, resident, T > 4000, given.image_token)
    wanted = wanted_stages(stages, request.get("stages"), given.pixels)
    tensors = {"input_ids": given.ids}
    if given.pixels is not None:
        tensors["pixel_values"] = given.pixels
    start = time.perf_counter()
    handles, bar = record_stages(stages, wanted, tensors, keep, stop=not tokens)
    try:
        answer = greedy(forward, given, dtype, 0 if keep == T else keep, tokens, handles)
        if tokens:
            tensors |= answer
    except Enough:
        pass
    bar.close()
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CannotRun(f"the reference's forward pass did not come by {missing[:4]}; this version of it is not known "
                        "here")
    return tensors, {**given.facts, **facts_of(folder, request, trust_remote_code), "logits_from": T - keep,
                     "image_token_id": given.image_token, "seconds": round(time.perf_counter() - start, 1)}


def facts_of(folder: Path, request: dict, trust_remote_code: bool) -> dict:
    """Tell what is run on what, for the trace."""
    import transformers
    return {"reference": "remote code" if trust_remote_code else "transformers",
            "dtype": request.get("dtype", "float32"), "max_num": request.get("max_num"),
            "messages": request.get("messages"), "weights": Weights(folder).digest(),
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__,
                         "python": platform.python_version()},
            "threads": torch.get_num_threads()}


def main(argv: list | None = None) -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("request", type=Path, help="json: pictures, messages, max_num, max_new_tokens, dtype, stages")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the modelling code inside FOLDER")
    parser.add_argument("--resident", type=float, default=4.0, metavar="GB",
                        help="models up to this size stay in memory")
    args = parser.parse_args(argv)
    try:
        import resource

        from safetensors.torch import save_file
        request = json.loads(args.request.read_text("utf-8"))
        tensors, facts = run(args.folder, request, args.trust_remote_code, args.resident)
        facts["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, args.trace, metadata={"trace": json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            raise CannotRun(f"{args.trace} cannot be written ({error}); free some space or choose another "
                            "disk") from None
    except (CannotRun, OSError, SafetensorError) as error:
        print(f"reference: {error}", file=sys.stderr)
        return 2
    except (ImportError, AttributeError, TypeError) as error:
        version = sys.modules["transformers"].__version__ if "transformers" in sys.modules else "missing"
        print(f"reference: {type(error).__name__}: {error}. transformers is {version}, this was written for {KNOWN}: "
              "`make reference` builds that environment. Code inside a checkpoint may need packages of its own: "
              f"{sys.executable} -m pip install ...", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
