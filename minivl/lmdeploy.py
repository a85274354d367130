"""Take LMDeploy's configurations as they are written: fields that mean nothing here are told or refused, by name.

Source: LMDeploy messages.py, v0.6.4 to that of 2025 (TurbomindEngineConfig, PytorchEngineConfig, GenerationConfig).
"""
from __future__ import annotations

import difflib
import functools
import warnings
from dataclasses import fields

from minivl.limits import InputError

CACHE = "the cache of keys and values grows as it is needed, session_len bounds it"
DEVICE = "one device computes, device=... names it"
WHOLE = "a prompt is read in one piece, max_batch_size bounds how many at once"
# field -> (LMDeploy's default, which asks for nothing, and what minivl does instead of any other value)
ENGINE = {
    "model_format": (None, "the format is read from the checkpoint"),
    "tp": (1, DEVICE), "dp": (1, DEVICE), "ep": (1, DEVICE), "dp_rank": (0, DEVICE), "communicator": ("nccl", DEVICE),
    "distributed_executor_backend": (None, DEVICE), "should_execute_dummy_batch": (False, DEVICE),
    "devices": (None, DEVICE), "device_num": (None, DEVICE), "attn_tp_size": (None, DEVICE),
    "attn_dp_size": (None, DEVICE), "mlp_tp_size": (None, DEVICE), "mlp_dp_size": (None, DEVICE),
    "outer_dp_size": (None, DEVICE), "enable_microbatch": (False, DEVICE), "enable_eplb": (False, DEVICE),
    "enable_mp_engine": (False, DEVICE), "mp_engine_backend": ("mp", DEVICE),
    "empty_init": (False, "a pipeline holds its weights from the start"),
    "disable_vision_encoder": (False, "the tower is part of every checkpoint"),
    "enable_metrics": (True, "an answer counts its own tokens"),
    "cache_max_entry_count": (0.8, CACHE), "cache_chunk_size": (-1, CACHE), "cache_block_seq_len": (64, CACHE),
    "block_size": (64, CACHE), "num_cpu_blocks": (0, CACHE), "num_gpu_blocks": (0, CACHE),
    "quant_policy": (0, "keys and values are kept in the model's dtype"),
    "enable_prefix_caching": (False, "a session keeps what it has read, other prompts do not share it"),
    "max_prefill_token_num": (8192, WHOLE), "num_tokens_per_iter": (0, WHOLE), "max_prefill_iters": (1, WHOLE),
    "prefill_interval": (16, WHOLE), "thread_safe": (False, "answers are computed in the thread that asks"),
    "eager_mode": (False, "precision chooses how the layers run"),
}
APART = "one process reads the prompt and writes the answer"
GENERATION = {
    "spaces_between_special_tokens": (True, "the text is what the tokenizer gives"),
    "with_cache": (False, APART), "preserve_cache": (False, APART), "migration_request": (None, APART),
}
# These would change the answer, or where it comes from: no other value than LMDeploy's default is taken.
REFUSED = {
    "rope_scaling_factor": (0.0, "positions beyond the trained ones are not supported, leave it out"),
    "use_logn_attn": (False, "the released models are not trained with it, leave it out"),
    "adapters": (None, "lora=FILE takes one of weights_tools.lora; merge others into their checkpoint first (in PEFT: "
                 "merge_and_unload)"),
    "custom_module_map": (None, "change the modules of pipeline(...).model"),
    "device_type": (None, "give device='cuda' or 'cpu'"),
    "download_dir": (None, "set HF_HOME, or fetch the files with python -m weights_tools.download --to FOLDER"),
    "logits_processors": (None, "bad_token_ids bans tokens, minivl.generation.steps takes your own sampler"),
    "include_stop_str_in_output": (False, "the text ends before the stop word, add it yourself"),
    "hf_overrides": (None, "write the values into config.json"),
    "logprobs_mode": (None, "logprobs=n gives log-probabilities of the unmodified scores"),
    "output_logits": (None, "logprobs=n gives the n best of each step; minivl.load(...)(ids) all scores"),
    "output_last_hidden_state": (None, "minivl.trace(model) gives every stage by name"),
}
SAME = {"dtype": "auto", "max_batch_size": None}        # fields of both, whose default LMDeploy writes so


def takes_names_of_lmdeploy(unused: dict[str, tuple]):
    """Make a dataclass take LMDeploy's field names: `unused` with a warning, those of REFUSED and unknown ones not."""
    def decorate(cls):
        initialise = cls.__init__
        own = [field.name for field in fields(cls)]

        @functools.wraps(initialise)
        def __init__(self, *args, **values):
            for name in [n for n in values if n not in own]:
                value = values.pop(name)
                default, instead = unused.get(name) or REFUSED.get(name) or (None, None)
                if instead is None:
                    words = set(name.split("_"))      # seed is near random_seed, migration_request not near ignore_eos
                    near = (difflib.get_close_matches(name, own, 1, 0.7)
                            or [field for field in own if words <= set(field.split("_"))])
                    raise InputError(f"{cls.__name__} has no field {name}; "
                                     + (f"do you mean {near[0]}?" if near else f"it has {', '.join(own)}"))
                if value == default:
                    continue
                if name not in unused:
                    raise InputError(f"{cls.__name__} has no {name}, which was given as {value!r}: {instead}")
                warnings.warn(f"{name}={value!r} has no effect in minivl: {instead}", stacklevel=2)
            initialise(self, *args, **{n: v for n, v in values.items() if n not in SAME or v != SAME[n]})
        cls.__init__ = __init__
        return cls
    return decorate
