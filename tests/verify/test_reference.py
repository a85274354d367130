"""reference: it reads files by itself, so that it cannot share minivl's mistakes; where it is installed, it is run."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, shared, tensors_of

import minivl
from minivl.files.formats import open_weights
from minivl.limits import InputError
from weights_tools.files import save_checkpoint
from weights_tools.verify import __main__ as cli
from weights_tools.verify import compare, reference
from weights_tools.verify.recording import Recording, weights_digest

ROOT = Path(__file__).parents[2]
TIGER = GOLDEN / "tiger.jpeg"
needs_reference = pytest.mark.skipif(not (ROOT / ".reference" / "ready").exists(),
                                     reason="no reference environment, see `make reference`")


def test_reference_reads_weights_by_itself(tiny):
    source = Path(reference.__file__).read_text()
    assert not re.search(r"^\s*(from|import) (minivl|weights_tools)", source, re.M)
    weights = reference.Weights(Path(tiny))
    assert weights.digest() == weights_digest(tiny)
    model = minivl.load(tiny)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = model.get_submodule(f"language_model.model.layers.1.{name}")
        want = minivl.awq.dequantize(layer.qweight, layer.qzeros, layer.scales).T
        assert torch.equal(weights(f"language_model.model.layers.1.{name}.weight", torch.float32), want)
    with pytest.raises(reference.CannotRun, match="no tensor nonsense.weight"):
        weights("nonsense.weight", torch.float32)


def test_reference_renders_by_itself():
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."},
                {"role": "user", "content": "Sure? 你好"}]
    for system in (None, "Be brief."):
        ours = minivl.prompt.render(messages, [3], system, tokens_per_tile=4)
        assert reference.rendered(messages, [3], 4, system) == ours


def test_names_of_transformers():
    assert reference.released_name("model.vision_tower.encoder.layer.3.attention.k_proj.bias") == (
        "vision_model.encoder.layers.3.attn.qkv.bias", "k")
    assert reference.released_name("model.vision_tower.encoder.layer.0.lambda_2") == (
        "vision_model.encoder.layers.0.ls2", None)
    assert reference.released_name("model.language_model.layers.2.mlp.up_proj.weight") == (
        "language_model.model.layers.2.mlp.up_proj.weight", None)
    assert reference.released_name("lm_head.weight") == ("language_model.lm_head.weight", None)
    assert reference.released_name("model.multi_modal_projector.linear_2.bias") == ("mlp1.3.bias", None)


# ---- transformers itself --------------------------------------------------------------------------------------------

@needs_reference
@pytest.mark.parametrize("case", ["qwen2-awq", "qwen2", "vit6b-internlm2"])
def test_transformers_agrees(case, tmp_path):
    """transformers' own classes against the original code's recording, and minivl against both."""
    folder = GOLDEN / case if (GOLDEN / case).exists() else shared(f"golden/{case}")
    facts = json.loads((folder / "case.json").read_text())
    for resident in (4.0, 0.0):     # kept, and layer by layer
        path = cli.record(folder, [], "", tmp_path / "t.safetensors", max_num=6, max_new_tokens=12,
                          like=folder / "expected.safetensors", image_token_id=facts["image_token_id"],
                          resident=resident)
        got, want = tensors_of(path), tensors_of(folder / "expected.safetensors")
        assert minivl.first_mismatch(got, want, 1e-5) is None
        assert got["greedy"].tolist() == want["greedy"].tolist()
    assert compare.compare(folder, Recording.open(path)).agrees


@needs_reference
def test_transformers_reads_the_same_inputs(tiny, tmp_path, capsys):
    """Also from a config.json that newer tools saved again: with other names, without what equals the defaults."""
    folder = tmp_path / "again"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    llm, vision = config["llm_config"], config["vision_config"]
    for part, keys in ((config, "downsample_ratio min_dynamic_patch force_image_size select_layer pad2square"),
                       (vision, "num_channels patch_size hidden_act layer_norm_eps"),
                       (llm, "rope_scaling rms_norm_eps hidden_act max_position_embeddings")):
        for key in keys.split():
            del part[key]
    llm.update(rope_parameters={"rope_theta": llm["rope_theta"], "rope_type": "default"}, rope_theta=10000.0)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    assert cli.main([str(folder), str(TIGER), "-p", "Was ist das? 数字 1234"]) == 0
    assert "14 stages, all 8 tokens are the same" in capsys.readouterr().out


REMOTE = '''
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

class Config(PretrainedConfig):
    model_type = "internvl_chat"
    def __init__(self, llm_config=None, vision_config=None, **rest):
        super().__init__(**rest)
        self.llm_config, self.vision_config = Qwen2Config(**(llm_config or {})), vision_config or {}

class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, self.heads = c["hidden_size"], c["num_attention_heads"]
        self.norm1, self.norm2 = nn.LayerNorm(C, eps=1e-6), nn.LayerNorm(C, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(C, c["intermediate_size"]), nn.Linear(c["intermediate_size"], C)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))
    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        a = ((q * (C // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.ls1 * self.attn.proj(a.transpose(1, 2).reshape(B, N, C))
        return x + self.ls2 * self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))

class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        C = c["hidden_size"]
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, C))
        self.patch_embedding = nn.Conv2d(3, C, 14, 14)
        self.position_embedding = nn.Parameter(torch.zeros(1, (c["image_size"] // 14) ** 2 + 1, C))
    def forward(self, x):
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.position_embedding

class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        c, D = config.vision_config, config.llm_config.hidden_size
        self.vision_model = nn.Module()
        self.vision_model.embeddings, self.vision_model.encoder = Embeddings(c), nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        C = 4 * c["hidden_size"]
        self.mlp1 = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))
        self.language_model = Qwen2ForCausalLM(config.llm_config)
        self.post_init()
    def extract_feature(self, x):
        x = self.vision_model.embeddings(x)
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        x = x[:, 1:]
        s = int(x.shape[1] ** 0.5)
        x = x.reshape(len(x), s // 2, 2, s // 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(len(x), s * s // 4, -1)
        return self.mlp1(x)
'''


@needs_reference
def test_code_inside_a_checkpoint_runs_only_when_trusted(tiny, tmp_path, capsys):
    folder = tmp_path / "remote"
    shutil.copytree(tiny, folder)
    (folder / "modeling_remote.py").write_text(REMOTE + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_remote.Config", "AutoModel": "modeling_remote.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main([str(folder), str(TIGER)]) == 0 and not (tmp_path / "ran").exists()
    assert cli.main([str(folder), str(TIGER), "--trust-remote-code"]) == 0 and (tmp_path / "ran").exists()
    assert "agrees with remote code" in capsys.readouterr().out


@needs_reference
def test_half_precision_is_equal_bit_for_bit(tiny, tmp_path):
    """bfloat16, each stage alone: transformers rounds where minivl rounds."""
    path = cli.record(tiny, [TIGER], "What is this?", tmp_path / "t.safetensors", max_num=6, max_new_tokens=0,
                      dtype="bfloat16")
    result = compare.compare(tiny, Recording.open(path), pictures=[TIGER], dtype="bfloat16", local=True)
    assert result.agrees and len(result.rows) == 17
    assert {row.stage for row in result.rows if row.error} == set()


@needs_reference
def test_recording_in_other_forms(tiny, tmp_path, capsys, warm_reference):
    """Text only, two pictures, a part, shards of .bin."""
    for words, rows in ((["-p", "Hello"], 3 + 6), ([str(TIGER), str(TIGER), "--max-tiles", "1"], 5 + 12),
                        ([str(TIGER), "--stages", "vit.layers.1", "logits"], 5 + 2),
                        ([str(TIGER), "--stages", "vit.layers.*", "--local"], 5 + 3),
                        (["-p", "Hello", "--layers", "2"], 3 + 3),
                        ([str(TIGER), "--local", "--dtype", "bfloat16"], 5 + 12)):
        assert cli.main([str(tiny), *words, "--json", str(tmp_path / "r.json")]) == 0, words
        found = [row["stage"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]
                 if row["stage"] != "greedy_scores"]
        assert len(found) == rows, (words, found)
    tensors = {name: stored.read() for name, stored in open_weights(tiny).items()}
    shutil.copytree(tiny, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_checkpoint(tensors, tmp_path / "bin", format="bin", shard_bytes=200_000)
    assert len(list((tmp_path / "bin").glob("*.bin"))) > 1
    assert cli.main([str(tmp_path / "bin"), str(TIGER), "-p", "What? <image>"]) == 0
    with pytest.raises(InputError, match="exit code 2"):
        cli.main([str(tiny), str(TIGER), "--stages", "vot.*"])
    capsys.readouterr()
