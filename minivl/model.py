"""The parts composed: tiles through the tower, unshuffled, projected, merged into the prompt, decoded.

    pixel_values -> vision_model -> drop CLS -> pixel_unshuffle -> mlp1 -> visual tokens
    input_ids -> embed_tokens -> visual tokens over the placeholders -> language_model -> logits

B prompts, T tokens, N tiles of all prompts together, R tile side, L visual tokens per tile, D language width.
Source: InternVL modeling_internvl_chat.py:53-94, 273-291, 400-431 @2410d1d.
"""
from functools import partial

import torch
from torch import nn

from minivl.awq import AWQLinear
from minivl.config import Config
from minivl.forks import check_process
from minivl.internlm2 import InternLM2ForCausalLM
from minivl.limits import InputError
from minivl.memory import full_memory_told
from minivl.pixel_unshuffle import PixelUnshuffle
from minivl.projector import projector
from minivl.qwen2 import Qwen2ForCausalLM
from minivl.vit import InternVisionModel


class MiniVL(nn.Module):
    """The whole model. Attribute names are the released tensor names; `minivl.load` fills it."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        quantization = config.quantization_config
        linear = partial(AWQLinear, group_size=quantization.group_size) if quantization else nn.Linear
        self.vision_model = InternVisionModel(config.vision_config)
        self.pixel_unshuffle = PixelUnshuffle()
        self.mlp1 = projector(config.vision_config.hidden_size, config.llm_config.hidden_size)
        decoder = {"Qwen2ForCausalLM": Qwen2ForCausalLM, "InternLM2ForCausalLM": InternLM2ForCausalLM}
        self.language_model = decoder[config.llm_config.architectures[0]](config.llm_config, linear)
        self.img_context_token_id = None    # the placeholder <IMG_CONTEXT>; `load` sets these three from the files
        self.eos_token_ids = ()             # generation stops at these
        self.unused_ids = ()                # rows of the head that no token has: never chosen

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the computation: that of every weight but int4 words and scales."""
        return self.mlp1[0].weight.dtype

    @property
    def device(self) -> torch.device:
        """Return the device that holds the weights."""
        return self.mlp1[0].weight.device

    def visual_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turn normalised tiles float[N, 3, R, R] into visual tokens float[N, L, D]."""
        check_process()
        R = self.config.force_image_size
        channels = self.config.vision_config.num_channels
        if not isinstance(pixel_values, torch.Tensor):
            raise InputError(f"pixel_values are a {type(pixel_values).__name__}; make them with "
                             "minivl.tiling.to_pixel_values")
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (channels, R, R):
            raise InputError(f"pixel_values have shape {tuple(pixel_values.shape)}, the model takes "
                             f"[tiles, {channels}, {R}, {R}]; cut the tiles with minivl.tiling.tile(tile_size={R})")
        with full_memory_told(self.device, f"{len(pixel_values)} tiles at once", "look at fewer together"):
            x = self.vision_model(pixel_values.to(self.device, self.dtype))    # (N, 1+P, C)
            x = self.pixel_unshuffle(x[:, 1:])                                 # (N, L, 4C), CLS dropped
            return self.mlp1(x)                                                # (N, L, D)

    def embed(self, input_ids: torch.Tensor, visual_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Embed int[B, T] as float[B, T, D], with the visual tokens float[N, L, D], in order, over the placeholders."""
        check_process()
        vocabulary = self.config.llm_config.vocab_size
        if not isinstance(input_ids, torch.Tensor):
            raise InputError(f"input_ids are a {type(input_ids).__name__}; give a tensor of integers [prompts, tokens]")
        if input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.dtype not in (torch.int64, torch.int32):
            raise InputError(f"input_ids have shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; the model "
                             "takes int64 or int32 [prompts, tokens], at least one of each")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocabulary:
            raise InputError(f"input_ids span {low}..{high}, the vocabulary has ids 0..{vocabulary - 1}; "
                             "is the tokenizer that of this checkpoint?")
        B, T = input_ids.shape
        told = partial(full_memory_told, self.device, f"{B} prompts of {T} tokens", "ask for fewer or shorter ones")
        with told():
            x = self.language_model.embeddings(input_ids.to(self.device))       # (B, T, D)
        if visual_tokens is None:
            return x
        if self.img_context_token_id is None:
            raise InputError("the id of <IMG_CONTEXT> is not known, the checkpoint has no tokenizer files; "
                             "set model.img_context_token_id")
        placeholders = (input_ids == self.img_context_token_id).to(self.device)         # (B, T)
        N, L = visual_tokens.shape[:2]
        wanted = int(placeholders.sum())
        given = N * L
        if wanted != given:
            raise InputError(f"the prompt has {wanted} <IMG_CONTEXT> placeholders but {N} tiles x {L} give {given} "
                             "visual tokens; render the prompt with the same tile counts as the pictures")
        with told():
            return x.masked_scatter(placeholders[..., None], visual_tokens.to(x.dtype))

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits float32[B, T, V] of int[B, T] and float[N, 3, R, R]. Differentiable; no cache, no padding."""
        visual_tokens = None if pixel_values is None else self.visual_tokens(pixel_values)
        return self.language_model(self.embed(input_ids, visual_tokens))
