"""What nano is and how it is trained: sizes, tokenizer, stages, and the sha256 of it all.

    SIZES -> config.json          world text -> vocab.json, merges.txt          STAGES -> train.py
"""
from __future__ import annotations

import functools
import hashlib
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minivl.config import Config
from minivl.limits import InputError
from minivl.model import MiniVL
from minivl.prompt import SYSTEM
from minivl.tokenizer import Tokenizer
from weights_tools import synthesize
from weights_tools.files import save_checkpoint
from weights_tools.nano import warmup, world
from weights_tools.nano.draw import TILE

SEED = 0
VISION = {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 5,
          "image_size": TILE}
LLM = {"_name_or_path": "nano", "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4,
       "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 800,
       "max_position_embeddings": 2048}     # widths are multiples of 128, the group of AWQ


@dataclass(frozen=True)
class Stage:
    """One stretch of training. It starts from the files of the one before and ends with files of its own."""
    name: str
    steps: int
    lr: float               # of the matrices (Muon); all else learns with half of it (AdamW)
    mix: dict               # kind of example (world.KINDS) -> share
    wide: float             # share of pictures of several tiles
    batch: int = 64         # conversations a step
    warmup: int = 100       # steps until the learning rate is reached
    floor: float = 0.0      # share of the learning rate left at the end of the cosine
    weight_decay: float = 0.05
    half: bool = True       # matrix products in bfloat16 (autocast), weights and all else in float32
    # "squares": vision tower and projector alone, see warmup.py; "differences": answers, and see differences.py.
    task: str = "answers"
    tower: float = 0.0      # learning rate of tower and projector beside answers, as a share of the decoder's

    def __post_init__(self):
        unknown = set(self.mix) - set(world.KINDS)
        if unknown:
            raise InputError(f"stage {self.name}: {', '.join(sorted(unknown))} in the mix; kinds of examples are "
                             f"{', '.join(world.KINDS)}")
        for key, low, high in (("steps", 1, 10**7), ("lr", 1e-9, 1), ("wide", 0, 1), ("batch", 1, 10**5),
                               ("warmup", 0, self.steps), ("floor", 0, 1), ("weight_decay", 0, 1), ("tower", 0, 1)):
            if not low <= getattr(self, key) <= high:
                raise InputError(f"stage {self.name}: {key} is {getattr(self, key)}, it must be in {low}..{high}")
        if self.task not in ("answers", "squares", "differences"):
            raise InputError(f"stage {self.name}: task is {self.task!r}; tasks are answers, squares and differences")
        if not self.mix or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise InputError(f"stage {self.name}: the shares of the mix are {self.mix}; they must be positive")


SQUARES = {"shapes": 20, "texts": 30, "print": 20, "page": 28, "texture": 2}
_narrow = {"wide": 0.0, "batch": 16, "floor": 0.7}
# The tower sees; then one drill after the other, with what was learned before mixed in; then all together, the rate
# falling to nearly nothing. Mixed from the start, none of it was learned in several times as many steps: see NOTES.md.
STAGES = (
    Stage("squares", 8000, 4e-3, SQUARES, wide=0.25, batch=48, half=False, task="squares"),
    Stage("find", 600, 4e-3, {"find": 1}, **_narrow),
    Stage("first words", 1400, 4e-3, {"find": 15, "exist": 30, "name": 15, "spell": 40}, wide=0.0, batch=16, floor=0.5),
    Stage("reading", 1500, 4e-3, {"texts": 65, "spell": 15, "find": 10, "exist": 10}, **_narrow),
    Stage("by place", 600, 4e-3, {"by place": 70, "find": 10, "texts": 20}, **_narrow),
    Stage("by two", 500, 4e-3, {"by two": 60, "by place": 10, "find": 10, "texts": 20}, **_narrow),
    Stage("count", 800, 4e-3, {"count": 60, "by two": 10, "by place": 5, "find": 5, "texts": 20}, **_narrow),
    Stage("judge", 800, 4e-3, {"judge": 50, "count": 15, "by two": 10, "by place": 5, "texts": 20}, **_narrow),
    Stage("compare", 500, 4e-3, {"compare": 60, "by two": 10, "count": 10, "texts": 20}, wide=0.0, batch=20, floor=0.7),
    Stage("video", 500, 4e-3, {"video": 50, "compare": 15, "by two": 15, "texts": 20}, **_narrow),
    Stage("follow", 600, 4e-3, {"follow": 35, "reason": 35, "by two": 10, "texts": 20}, **_narrow),
    Stage("together", 5600, 3e-3,
          {"find": 4, "by place": 10, "by two": 10, "count": 10, "judge": 10, "shapes": 14, "texts": 24, "compare": 6,
           "video": 5, "follow": 4, "reason": 5, "texture": 1, "talk": 1}, wide=0.1, batch=16, floor=0.02),
    Stage("pairs", 1500, 2e-3, {"compare": 36, "video": 24, "reason": 14, "shapes": 12, "texts": 14},
          wide=0.0, batch=16, floor=0.02),
    Stage("open", 1600, 3e-3,
          {"count": 18, "by place": 8, "judge": 10, "shapes": 20, "texts": 24, "print": 12, "compare": 4, "video": 4},
          wide=0.15, batch=16, floor=0.6, tower=0.15),
    Stage("changes", 1500, 4e-3, {"changes": 45, "compare": 12, "describe": 12, "reason": 12, "video": 9, "texts": 10},
          wide=0.0, batch=16, floor=0.5),
    Stage("spot", 700, 4e-3, {"changes": 42, "compare": 42, "texts": 8, "reason": 8}, wide=0.0, batch=24, floor=0.6),
    Stage("everything", 5400, 3e-3,
          {"shapes": 12, "by place": 3, "by two": 4, "count": 9, "judge": 8, "describe": 5, "texts": 19, "print": 7,
           "compare": 12, "changes": 6, "video": 8, "follow": 5, "reason": 9, "texture": 1, "talk": 2},
          wide=0.12, batch=16, floor=0.02, tower=0.15),
    Stage("differences", 1000, 3e-3, {"compare": 40, "changes": 20, "video": 25, "shapes": 8, "texts": 7},
          wide=0.0, batch=16, floor=0.5, task="differences"),
    Stage("once more", 11000, 3e-3,
          {"shapes": 12, "by place": 4, "by two": 4, "count": 12, "judge": 9, "describe": 4, "texts": 22, "print": 7,
           "compare": 9, "changes": 2, "video": 6, "follow": 6, "reason": 11, "texture": 1, "talk": 1},
          wide=0.12, batch=16, floor=0.02, tower=0.15, task="differences"),
    Stage("same", 800, 4e-3, {"same": 70, "judge": 10, "texts": 20}, wide=0.0, batch=16, floor=0.5),
    Stage("last", 3000, 2e-3,
          {"same": 5, "shapes": 12, "by place": 4, "by two": 4, "count": 10, "judge": 9, "describe": 4, "texts": 20,
           "print": 10, "compare": 7, "changes": 1, "video": 5, "follow": 6, "reason": 11, "texture": 1, "talk": 1},
          wide=0.12, batch=16, floor=0.01, tower=0.15, task="differences"))
QUICK = (
    Stage("squares", 900, 4e-3, SQUARES, wide=0.0, task="squares"),
    Stage("find", 500, 4e-3, {"find": 1}, **_narrow),
    Stage("by place", 500, 4e-3, {"by place": 70, "find": 30}, **_narrow),
    Stage("first words", 900, 4e-3, {"find": 15, "exist": 15, "by place": 10, "spell": 60}, **_narrow),
    Stage("together", 1200, 3e-3, {"find": 10, "by place": 15, "judge": 15, "shapes": 30, "texts": 28, "talk": 2},
          wide=0.0, batch=16, floor=0.02))


def config_json(awq: bool = False) -> dict:
    """Make config.json: the released keys with nano's sizes."""
    data = synthesize.config_json("tiny", awq=awq, dtype="float16")
    data["vision_config"].update(VISION)
    data["llm_config"].update(LLM)
    first = LLM["vocab_size"] - len(synthesize.ADDED_TOKENS)
    data["llm_config"].update(bos_token_id=first, eos_token_id=first + 2, use_cache=True)
    data.update(_name_or_path="minivl-nano", force_image_size=TILE, max_dynamic_patch=6)
    return data


@functools.lru_cache
def tokenizer_files() -> dict:
    """Train the tokenizer on what is said in the world: vocab.json, merges.txt, added_tokens.json, tokenizer.json."""
    texts = world.vocabulary_text()
    texts += [SYSTEM + "\nsystem\nuser\nassistant\nImage-1: Frame1: "] * 1000   # so often that it becomes 7 tokens
    files = synthesize.train_tokenizer(texts, LLM["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_bytes(text.encode("utf-8"))
        return {**files, "tokenizer.json": Tokenizer.load(folder).backend.to_str() + "\n"}


def small_files(awq: bool = False) -> dict:
    """Write everything in a checkpoint folder but the weights: name -> text."""
    config = config_json(awq)
    return {"config.json": synthesize.json_text(config), **tokenizer_files(),
            **synthesize.generation_and_preprocessor("nano", config)}


def tokenizer() -> Tokenizer:
    """Make the tokenizer as it is read from its files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in small_files().items():
            (Path(folder) / name).write_bytes(text.encode("utf-8"))
        return Tokenizer.load(folder)


def initial(seed: int = SEED) -> MiniVL:
    """Make untrained nano, float32: matrices with the root of their inputs, branches into the residual smaller."""
    model = MiniVL(Config.from_json(config_json()))
    generator = torch.Generator().manual_seed(seed)
    depth = {"vision_model": 2 * VISION["num_hidden_layers"], "language_model": 2 * LLM["num_hidden_layers"]}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("ls1", "ls2")) or "norm" in name and name.endswith("weight") or name == "mlp1.0.weight":
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            elif name.endswith(("_embedding", "lm_head.weight")):
                p.normal_(0, 0.02, generator=generator)
            elif "embed_tokens" in name:
                p.normal_(0, 0.5, generator=generator)
            else:
                branch = name.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight"))
                std = math.prod(p.shape[1:]) ** -0.5 * (depth[name.split(".")[0]] ** -0.5 if branch else 1.0)
                p.normal_(0, std, generator=generator)
    return model


def save(model: MiniVL, folder, note: dict) -> Path:
    """Save the model as a float16 checkpoint folder as released. `note` goes into the weights' metadata."""
    tensors = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    save_checkpoint(tensors, folder, overwrite=True, metadata={k: str(v) for k, v in note.items()},
                    small={name: text.encode("utf-8") for name, text in small_files().items()})
    return Path(folder)


def sha256(stages=STAGES, seed: int = SEED) -> str:
    """Sum up the recipe: sizes, stages, tokenizer, and what 200 examples of the world say."""
    said = [[asdict(turn) for turn in world.example(seed, i).turns] for i in range(200)]
    recipe = {"seed": seed, "fields": warmup.FIELDS, "vision": VISION, "llm": LLM,
              "stages": [asdict(stage) for stage in stages], "world": said, "vocab": tokenizer_files()["vocab.json"]}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
