"""Load a checkpoint into the model. Nothing in a checkpoint is ever executed.

    folder or hub id -> config.json -> MiniVL on `meta` -> names, shapes and dtypes checked against the files' headers
    -> memory-mapped tensors, one by one to dtype and device -> load_state_dict(strict=True, assign=True)
"""
from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from minivl import fast
from minivl.config import Config, left_out, read_json
from minivl.files.adapters import put_on, read_adapter
from minivl.files.find import find
from minivl.files.formats import DTYPES, StoredTensor, open_weights
from minivl.forks import check_process
from minivl.limits import InputError, first_of, is_there
from minivl.memory import full_memory_told
from minivl.model import MiniVL
from minivl.tokenizer import Listing, Tokenizer, read_listing

KEPT = (".scales",)                                     # rounding a scale would change 128 weights at once
# By the names of Qwen2 and of InternLM2. The fast layers keep both in half precision, see minivl.fast.
HEADS = ("language_model.lm_head.weight", "language_model.output.weight")
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.model.tok_embeddings.weight")
KEPT_HALF = HEADS + EMBEDDINGS
# Tables that old versions of transformers saved and new ones drop: the model computes them itself.
FREQUENCIES = r"language_model\.model\.(?:layers\.\d+\.(?:self_attn|attention)\.)?rotary_emb\.inv_freq"
TABLE = re.compile(rf"{FREQUENCIES}|(?:vision_model|language_model)\.(?:.+\.)?position_ids")


def load(path_or_id: str | os.PathLike, *, revision: str | None = None, device: str | torch.device | None = None,
         dtype: str | torch.dtype | None = None, precision: str | None = None,
         tokenizer: Tokenizer | None = None, lora: str | os.PathLike | None = None) -> MiniVL:
    """Load a released checkpoint as a model in eval mode.

    path_or_id: local folder, or hub id such as "OpenGVLab/InternVL2_5-4B-MPO-AWQ", or short "4b-mpo-awq" (downloaded,
    with `revision`); or the shipped "nano" or "nano-awq".
    device: default "cpu". dtype: torch dtype or its name; default float32 on the CPU, elsewhere float16 for AWQ and
    bfloat16 otherwise. AWQ words and scales stay as released whatever the dtype.
    precision: None: modules as released, to be read, verified and changed. "exact" or "fast": see minivl.fast.
    tokenizer: of this checkpoint, if it is read already; else its files are read for the ids that the model needs.
    lora: file, or folder, of what weights_tools.lora learned on this checkpoint; see minivl/lora.py.
    """
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):
        raise InputError(f"torch {torch.__version__} is too old: before 2.6 a pickle could run code even with "
                         "weights_only=True; install torch 2.6 or later")
    check_process()
    folder = find(path_or_id, revision=revision)
    config = Config.load(folder)
    device = _device(device)
    dtype = _dtype(dtype, device, config, precision)
    if precision not in (None, "exact", "fast"):
        raise InputError(f"precision {precision!r} is not one of exact, fast, None")
    model, tensors = _opened(folder, config)
    adapter = None if lora is None else read_adapter(lora, model, tensors)
    half = precision is not None and (device.type, dtype) == ("cpu", torch.float32) and fast.keeps_half(model)
    if half and fast.has_compiler() and fast.relays(model):
        fast.warm(config.quantization_config.group_size // 8, config.llm_config.hidden_size,
                  tensors[_one_of(HEADS, tensors)].dtype, precision == "fast" and fast.products()[1])
    kept = KEPT + (KEPT_HALF if half else ())
    # Nothing else may hold the tensors: what `prepare` replaces must leave the memory.
    size = sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in model.state_dict().values())
    with full_memory_told(device, f"{size / 1e9:.1f} GB of weights", "take a smaller or an AWQ model, or device='cpu'"):
        names = tqdm(model.state_dict(), desc="loading", unit="tensor", delay=2, leave=False, disable=None)
        model.load_state_dict(read_tensors(names, tensors, device, dtype, kept), strict=True, assign=True)
        model.img_context_token_id, model.eos_token_ids, model.unused_ids = _token_ids(
            folder, config, tokenizer or read_listing(folder))
        if adapter:
            put_on(model, adapter)
        return (fast.prepare(model, precision) if precision else model).eval()


def opened(folder: Path) -> tuple[MiniVL, dict[str, StoredTensor]]:
    """Open a checkpoint of any size: its model without weights, on `meta`, and its stored tensors, which fit it.

    For what needs a part of the weights at a time: `read_tensors` reads the parts.
    """
    config = Config.load(folder)
    model, tensors = _opened(folder, config)
    model.img_context_token_id, model.eos_token_ids, model.unused_ids = _token_ids(folder, config, read_listing(folder))
    return model.eval(), tensors


def _opened(folder: Path, config: Config) -> tuple[MiniVL, dict[str, StoredTensor]]:
    with torch.device("meta"), WithoutNormal():
        model = MiniVL(config)
    tensors = open_weights(folder)
    check_weights(model, tensors, folder)
    return model, tensors


class WithoutNormal(TorchFunctionMode):
    """Leave out nn.Embedding's random numbers: on `meta` torch imports half its compiler for them, 1 s, for nothing.

    Holds for this thread alone and inside a `with` only. A patched nn.Embedding.reset_parameters would be seen by every
    thread of the process: an embedding made in another one meanwhile would stay without numbers.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **kwargs)


def read_tensors(names: Iterable[str], tensors: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype,
                 kept: tuple = KEPT) -> dict[str, torch.Tensor]:
    """Read tensors, one by one, to device and dtype; integers, and names that end with one of `kept`, keep theirs."""
    state = {}
    for name in names:
        tensor = tensors[name].read()
        if not tensor.is_floating_point():
            state[name] = tensor.to(device)
            continue
        _refuse_non_finite(name, tensor, "the file is damaged; download it again")
        moved = tensor.to(device, tensor.dtype if name.endswith(kept) else dtype)
        if torch.finfo(moved.dtype).max < torch.finfo(tensor.dtype).max:
            _refuse_non_finite(name, moved, f"its values exceed {moved.dtype}; load with dtype='bfloat16' or 'float32'")
        state[name] = moved
    return state


def _device(device) -> torch.device:
    try:
        device = torch.device("cpu" if device is None else device)
        torch.empty(0, device=device).cpu()         # fails on `meta` too
        return device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):       # unknown name, or not on this machine
        raise InputError(f"device {str(device)!r} cannot be used here; give cpu, or cuda, cuda:1, mps where torch has "
                         "them") from None


def _dtype(dtype, device: torch.device, config: Config, precision: str | None = None) -> torch.dtype:
    if dtype is None:
        if device.type == "cpu":
            return torch.float32        # the contract: greedy tokens in float32 on the CPU
        # torch's int4 product, which "fast" takes, computes in bfloat16
        return torch.float16 if config.quantization_config and precision != "fast" else torch.bfloat16
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    dtype = known.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in known.values():
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    return dtype


# ---- against the model ----------------------------------------------------------------------------------------------

def check_weights(model: MiniVL, tensors: dict[str, StoredTensor], folder: Path):
    """Refuse tensors that do not fit the model, with one error: what kind of checkpoint it is, or what is wrong."""
    wanted = model.state_dict()
    _refuse_other_kinds(tensors, wanted, folder)
    problems = [f"missing: {n} {list(wanted[n].shape)}" for n in wanted if n not in tensors]
    problems += [f"unexpected: {n} {list(t.shape)}" for n, t in tensors.items()
                 if n not in wanted and not TABLE.fullmatch(n)]
    problems += [f"unexpected: {line}" for line in wrong_tables(
        {n: t.read() for n, t in tensors.items() if TABLE.fullmatch(n)}, model.config)]
    for name in wanted.keys() & tensors.keys():
        want, found = wanted[name], tensors[name]
        if tuple(want.shape) != found.shape:
            problems.append(f"shape: {name} is {list(found.shape)} in the file, {list(want.shape)} in the model")
        elif want.is_floating_point() != found.dtype.is_floating_point or found.dtype not in DTYPES.values() or (
                not want.is_floating_point() and want.dtype != found.dtype):
            problems.append(f"dtype: {name} is {found.dtype} in the file, the model takes "
                            f"{'a float' if want.is_floating_point() else want.dtype}")
    if problems:
        hint = ""
        if any(".qweight" in p for p in problems):
            hint = (" config.json and weights disagree about AWQ: compare quantization_config with the tensors."
                    if model.config.quantization_config else
                    " The weights are AWQ but config.json has no quantization_config.")
        raise InputError(f"the weights in {folder} do not fit its config.json, {len(problems)} problems:\n  "
                         + first_of(sorted(problems)) + ("\n" + hint.strip() if hint else "")
                         + "".join(f"\n{line}" for line in wrong_defaults(problems, read_json(folder / "config.json"))))


def wrong_tables(tables: dict[str, torch.Tensor], config: Config) -> list[str]:
    """Say which tensors that TABLE names hold other numbers than the model computes, a line each.

    inv_freq (E/2): theta^(-2i/E), up to what float16 or bfloat16 keeps of it. position_ids: 0, 1, 2, ...
    """
    lines = []
    theta = config.llm_config.rope_theta
    size = config.llm_config.hidden_size // config.llm_config.num_attention_heads
    computed = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    for name, table in tables.items():
        if name.endswith("position_ids"):
            if not torch.equal(table.flatten().double(), torch.arange(table.numel(), dtype=torch.float64)):
                lines.append(f"{name} {list(table.shape)} does not count 0, 1, 2, ...")
        elif table.shape != computed.shape or not torch.allclose(table.double(), computed, rtol=2**-8, atol=2**-24):
            lines.append(f"{name} {list(table.shape)} is not of {size // 2} pairs with rope_theta {theta:g}, which "
                         "config.json gives; write the rope_theta of the training there")
    return lines


def _refuse_other_kinds(tensors: dict[str, StoredTensor], wanted: dict[str, torch.Tensor], folder: Path):
    """Refuse, in one sentence, weights that are no damaged checkpoint but a whole one of another kind."""
    marks = ("base_model.model.", ".lora_", ".base_layer.", ".modules_to_save.")
    lora = [n for n in tensors if any(mark in n for mark in marks)]
    if lora:
        raise InputError(f"the weights in {folder} are a LoRA checkpoint ({len(lora)} names like {lora[0]}), merge it "
                         "first: PEFT's merge_and_unload() and save_pretrained, or InternVL's own tools/merge_lora.py")
    renamed = [n for n in tensors if "vision_tower." in n or "multi_modal_projector." in n]
    if renamed:
        raise InputError(f"the weights in {folder} have the names of transformers' own classes ({renamed[0]}), as the "
                         "-hf repositories; convert them back with python -m weights_tools.convert FOLDER OUT, or take "
                         "the original release, the repository without -hf")
    head, embedding = _one_of(HEADS, wanted), _one_of(EMBEDDINGS, wanted)
    before = {n.removesuffix(head) for n in tensors if n.endswith("." + head)}
    prefix = min(before, default="")
    if len(before) == 1 and {prefix + n for n in wanted} == {
            n for n in tensors if not TABLE.fullmatch(n.removeprefix(prefix))}:
        cut = f"t = {{n[{len(prefix)}:]: x for n, x in t.items()}}"
        raise InputError(f"the names of the weights in {folder} all begin with {prefix!r}, which a wrapper such as "
                         "torch.compile or DistributedDataParallel puts there; save the model inside it, or take that "
                         f"away once: {_write_once(folder, cut)}")
    if wanted.keys() - tensors.keys() == {head}:
        raise InputError(f"the weights in {folder} lack {head}, which was tied to the embedding and not saved. The "
                         "original class never ties the two and would begin with a random head; if they were one in "
                         f"training, write it once: {_write_once(folder, f't[{head!r}] = t[{embedding!r}]')}")


def _one_of(names: tuple[str, ...], tensors: Iterable[str]) -> str:
    """Pick the name that this decoder has."""
    return next(name for name in names if name in tensors)


def _write_once(folder: Path, change: str) -> str:
    """Spell the command that writes the weights of a folder again, after a change of the dict t of its tensors."""
    return ("python -c \"from minivl.files.formats import open_weights; "
            "from weights_tools.files import save_checkpoint; "
            f"f = {str(folder)!r}; t = {{n: s.read() for n, s in open_weights(f).items()}}; {change}; "
            "save_checkpoint(t, f, overwrite=True)\"")


SHOWN_BY = {        # a key that config.json may leave out: the problem with a tensor that shows its default to be wrong
    "vision_config.norm_type": r"(missing|unexpected): vision_model.*\.norm1\.bias",
    "vision_config.qkv_bias": r"(missing|unexpected): vision_model.*\.attn\.qkv\.bias",
    "vision_config.qk_normalization": r"(missing|unexpected): vision_model.*\.attn\.q_norm\.",
    "vision_config.num_hidden_layers": r"(missing|unexpected): vision_model.*\.norm1\.weight",
    "vision_config.hidden_size": r"shape: vision_model.*\.class_embedding",
    "vision_config.intermediate_size": r"shape: vision_model.*\.fc1\.bias",
    "vision_config.image_size": r"shape: vision_model.*\.position_embedding",
    "vision_config.patch_size": r"shape: vision_model.*\.patch_embedding\.weight",
    "vision_config.num_channels": r"shape: vision_model.*\.patch_embedding\.weight",
    "llm_config.vocab_size": r"shape: language_model.*\.(embed_tokens|tok_embeddings)\.",
    "llm_config.hidden_size": r"shape: language_model\.model\.norm\.",
    "llm_config.intermediate_size": r"shape: language_model.*\.(gate_proj|w1)\.(weight|scales)",
    "llm_config.num_hidden_layers": r"(missing|unexpected): language_model.*\.(input_layernorm|ffn_norm)\.weight",
    "llm_config.num_key_value_heads": r"shape: language_model.*\.(k_proj\.bias|wqkv\.)",
    "llm_config.bias": r"(missing|unexpected): language_model.*\.wqkv\.bias",
    "quantization_config.group_size": r"shape: .*\.scales"}


def wrong_defaults(problems: list[str], config: dict) -> list[str]:
    """Name the keys of a parsed config.json that the tensors show to be wrong, a line each.

    Those that it leaves out and whose defaults do not fit, and a vocab_size that was not changed with the rows.
    """
    lines = []
    rows = {found[1] for p in problems if (found := re.match(
        r"shape: language_model\.(?:model\.(?:embed_tokens|tok_embeddings)|lm_head|output)\.weight is \[(\d+), ", p))}
    given = config["llm_config"].get("vocab_size")
    if len(rows) == 1 and given is not None:
        lines.append(f"config.json gives llm_config.vocab_size {given}, the embedding or head has {min(rows)} rows: if "
                     "the weights are the ones you mean, correct vocab_size in config.json.")
    for key, default in left_out(config).items():
        shown = next((p for p in sorted(problems) if key in SHOWN_BY and re.match(SHOWN_BY[key], p)), None)
        if shown:
            lines.append(f"config.json leaves out {key}; its default in the original class, {default!r}, does not fit "
                         f"{shown.split()[1]}: write the model's own value into config.json.")
    return lines


def _refuse_non_finite(name: str, tensor: torch.Tensor, why: str):
    if tensor.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(tensor.detach()))      # NaN passes through aminmax; no temporary copy
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{name} holds NaN or infinity ({low}..{high}); {why}")


def _token_ids(folder: Path, config: Config,
               tokens: Tokenizer | Listing) -> tuple[int | None, tuple[int, ...], tuple[int, ...]]:
    """Find (id of <IMG_CONTEXT> or None, ids that end an answer, ids without a token) of a checkpoint."""
    vocabulary = config.llm_config.vocab_size
    added = tokens.added
    if tokens.vocab_size > vocabulary:
        raise InputError(f"the tokenizer has ids up to {tokens.vocab_size - 1}, the model's vocab_size is "
                         f"{vocabulary}; tokenizer and weights are of different models")
    # The released generation_config.json lists <|im_end|>, <|im_start|> and <|endoftext|>; the original's chat() stops
    # at <|im_end|> alone. The union is safe: none of them can be part of an answer.
    eos = {added["<|im_end|>"]} if "<|im_end|>" in added else set()
    said = {"llm_config.eos_token_id in config.json": read_json(folder / "config.json")["llm_config"]}
    if is_there(folder / "generation_config.json"):
        said["eos_token_id in generation_config.json"] = read_json(folder / "generation_config.json")
    for where, source in said.items():
        ids = source.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        good = [type(i) is int and 0 <= i < vocabulary for i in ids]
        eos.update(i for i, fits in zip(ids, good) if fits)
        strange = [f"a {type(i).__name__}" if isinstance(i, (list, dict)) else repr(i)
                   for i, fits in zip(ids, good) if not fits and i is not None]
        if strange:
            warnings.warn(f"{where} of {folder} holds {first_of(strange, ', ', 3)}, which is no token id (a whole "
                          f"number in 0..{vocabulary - 1}): no answer ends there; correct it if one should",
                          stacklevel=3)
    return added.get("<IMG_CONTEXT>"), tuple(sorted(eos)), tuple(tokens.unused(vocabulary))
