"""LMDeploy's configurations, as people have written them: taken, told or refused by name, and never a TypeError."""
import copy
import dataclasses
import inspect
import re
import warnings

import pytest

from minivl import EngineConfig, GenerationConfig, InputError
from minivl.lmdeploy import ENGINE, GENERATION, REFUSED

# Every field of v0.6.4 (TurbomindEngineConfig, PytorchEngineConfig, GenerationConfig) with its default there.
TURBOMIND = {"dtype": "auto", "model_format": None, "tp": 1, "session_len": None, "max_batch_size": None,
             "cache_max_entry_count": 0.8, "cache_chunk_size": -1, "cache_block_seq_len": 64,
             "enable_prefix_caching": False, "quant_policy": 0, "rope_scaling_factor": 0.0, "use_logn_attn": False,
             "download_dir": None, "revision": None, "max_prefill_token_num": 8192, "num_tokens_per_iter": 0,
             "max_prefill_iters": 1}
PYTORCH = {"dtype": "auto", "tp": 1, "session_len": None, "max_batch_size": None, "cache_max_entry_count": 0.8,
           "prefill_interval": 16, "block_size": 64, "num_cpu_blocks": 0, "num_gpu_blocks": 0, "adapters": None,
           "thread_safe": False, "enable_prefix_caching": False, "eager_mode": False, "custom_module_map": None,
           "download_dir": None, "revision": None, "quant_policy": 0}
ASKED = {"n": 1, "max_new_tokens": 512, "do_sample": False, "top_p": 1.0, "top_k": 50, "min_p": 0.0, "temperature": 0.8,
         "repetition_penalty": 1.0, "ignore_eos": False, "random_seed": None, "stop_words": None, "bad_words": None,
         "stop_token_ids": None, "bad_token_ids": None, "min_new_tokens": None, "skip_special_tokens": True,
         "spaces_between_special_tokens": True, "logprobs": None, "response_format": None, "logits_processors": None,
         "output_logits": None, "output_last_hidden_state": None}

# And later ones.
LATER = {**ASKED, "include_stop_str_in_output": False, "with_cache": False, "preserve_cache": False,
         "migration_request": None}
LATER_TURBOMIND = {**TURBOMIND, "dp": 1, "device_num": None, "attn_tp_size": None, "attn_dp_size": None,
                   "mlp_tp_size": None, "mlp_dp_size": None, "outer_dp_size": None, "devices": None,
                   "empty_init": False, "communicator": "nccl", "hf_overrides": None, "enable_metrics": True}
LATER_PYTORCH = {**PYTORCH, "dp": 1, "dp_rank": 0, "ep": 1, "distributed_executor_backend": None, "empty_init": False,
                 "enable_microbatch": False, "enable_eplb": False, "enable_mp_engine": False,
                 "mp_engine_backend": "mp", "model_format": None, "enable_metrics": True, "hf_overrides": None,
                 "disable_vision_encoder": False, "logprobs_mode": None}


@pytest.mark.parametrize("cls, values", [(EngineConfig, TURBOMIND), (EngineConfig, PYTORCH), (GenerationConfig, ASKED),
                                         (GenerationConfig, LATER), (EngineConfig, LATER_TURBOMIND),
                                         (EngineConfig, LATER_PYTORCH)])
def test_lmdeploys_defaults_ask_for_nothing(cls, values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cls(**values) == cls()


OTHER = {"tp": 2, "cache_max_entry_count": 0.2, "quant_policy": 8, "model_format": "awq", "cache_block_seq_len": 128,
         "enable_prefix_caching": True, "max_prefill_token_num": 4096, "cache_chunk_size": 1, "num_tokens_per_iter": 5,
         "max_prefill_iters": 2, "block_size": 32, "num_cpu_blocks": 5, "num_gpu_blocks": 5, "prefill_interval": 1,
         "thread_safe": True, "eager_mode": True, "dp": 2, "ep": 2, "dp_rank": 1, "communicator": "native",
         "distributed_executor_backend": "ray", "should_execute_dummy_batch": True, "devices": [0, 1],
         "device_num": 2, "attn_tp_size": 2, "attn_dp_size": 2, "mlp_tp_size": 2, "mlp_dp_size": 2, "outer_dp_size": 2,
         "enable_microbatch": True, "enable_eplb": True, "enable_mp_engine": True, "mp_engine_backend": "ray",
         "empty_init": True, "disable_vision_encoder": True, "enable_metrics": False}


@pytest.mark.parametrize("name", ENGINE)
def test_fields_without_effect_are_told(name):
    with pytest.warns(UserWarning, match=re.escape(f"{name}={OTHER[name]!r}") + " has no effect in minivl: ") as told:
        assert EngineConfig(session_len=100, **{name: OTHER[name]}) == EngineConfig(session_len=100)
    assert [w.filename for w in told] == [__file__]
    with pytest.raises(InputError, match=f"GenerationConfig has no field {name}; "):
        GenerationConfig(**{name: OTHER[name]})


def test_the_same_for_generation():
    for name, (default, _) in GENERATION.items():
        with pytest.warns(UserWarning, match=f"{name}={not default} has no effect in minivl"):
            assert GenerationConfig(max_new_tokens=3, **{name: not default}).max_new_tokens == 3
    with pytest.warns(UserWarning, match="top_k has no effect") as told:
        GenerationConfig(top_k=40)
    assert [w.filename for w in told] == [__file__]


ENGINES = ("rope_scaling_factor", "use_logn_attn", "adapters", "custom_module_map", "device_type", "download_dir",
           "hf_overrides", "logprobs_mode")


@pytest.mark.parametrize("name, value, hint", [
    ("rope_scaling_factor", 2.0, "positions beyond"), ("use_logn_attn", True, "leave it out"),
    ("adapters", {"a": "path"}, "merge_and_unload"), ("custom_module_map", {"a": "b"}, r"pipeline\(...\).model"),
    ("device_type", "cuda", "give device='cuda'"), ("download_dir", "/big/disk", "HF_HOME"),
    ("logits_processors", [abs], "bad_token_ids"), ("output_logits", "all", "logprobs=n"),
    ("output_last_hidden_state", "all", "trace"), ("include_stop_str_in_output", True, "ends before the stop word"),
    ("logprobs_mode", "raw_logits", "unmodified"), ("hf_overrides", {"a": 1}, "config.json")])
def test_fields_that_would_change_the_answer_are_refused(name, value, hint):
    with pytest.raises(InputError, match=f"Config has no {name}, which was given as .*: .*{hint}"):
        (EngineConfig if name in ENGINES else GenerationConfig)(**{name: value})
    assert name in REFUSED


@pytest.mark.parametrize("cls, name, hint", [
    (EngineConfig, "sesion_len", "do you mean session_len?"), (EngineConfig, "batch_size", "max_batch_size?"),
    (EngineConfig, "zzz", "it has session_len, max_batch_size, "), (GenerationConfig, "max_tokens", "max_new_tokens?"),
    (GenerationConfig, "seed", "random_seed?"), (GenerationConfig, "eos_token_id", "stop_token_ids?"),
    (GenerationConfig, "migration_requests", "it has n, max_new_tokens, "),
    (GenerationConfig, "num_beams", "it has n, "), (GenerationConfig, "early_stopping", "it has n, "),
    (EngineConfig, "length", "it has session_len, "),
    (GenerationConfig, "penalty", "repetition_penalty?"), (GenerationConfig, "temprature", "temperature?")])
def test_unknown_names(cls, name, hint):
    with pytest.raises(InputError, match=f"{cls.__name__} has no field {name}; .*{hint.replace('?', '.')}"):
        cls(**{name: 5})


def test_it_stays_a_dataclass():
    config = EngineConfig(100, 2)
    assert (config.session_len, config.max_batch_size) == (100, 2)
    assert dataclasses.replace(config, max_batch_size=3) == EngineConfig(100, 3) and copy.deepcopy(config) == config
    assert list(inspect.signature(EngineConfig).parameters)[:2] == ["session_len", "max_batch_size"]
    with pytest.raises(InputError, match="EngineConfig.session_len is 0; it must be a whole number"):
        EngineConfig(session_len=0)
