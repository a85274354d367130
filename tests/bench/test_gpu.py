"""The GPU script: all of it but the device runs here, with tiny sizes; on a GPU `pytest -m gpu` runs its proof."""
import json

import pytest
import torch

from weights_tools.bench import __main__ as command
from weights_tools.bench import gpu


@pytest.mark.slow
def test_the_whole_script_on_the_cpu(tmp_path, capsys):
    code = command.main(["--device", "cpu", "--size", "tiny", "--questions", "2", "--parts", "proof", "speed", "--json",
                         str(tmp_path / "new" / "my.json")])
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "new" / "my.json").read_text())
    assert code == 0 and all(row["good"] is not False for row in rows), said
    named = " ".join(row["what"] for row in rows)
    for what in ("qwen2, float32", "qwen2-awq, bfloat16", "12 greedy tokens", "vit6b-internlm2, fast", "service, nano",
                 "steps of MPO", "MPO of a LoRA", "an edit of qwen2.MLP",
                 "nano, float32, fast", "nano-awq, bfloat16, fast", "fast: load", "fast: 7 tiles", "fast: a prompt of",
                 "fast: new tokens, 4 prompts", "generate, sampled", "released: new tokens, 1 prompt",
                 "of 1 tiles alone"):
        assert what in named, what
    assert said.count("|") > 4 * len(rows)
    assert not torch.is_inference_mode_enabled()


def test_what_is_wrong_is_a_row_and_an_exit_code(tmp_path, monkeypatch, capsys):
    """Another result in one stage, a part that breaks: the others go on."""
    monkeypatch.setattr(gpu.qwen2.RMSNorm, "forward", lambda self, x: self.weight * x)
    monkeypatch.setattr(gpu, "service", lambda report, device: 1 / 0)
    for part in ("answers", "questions", "edits", "learning", "full"):
        monkeypatch.setattr(gpu, part, lambda *how: None)
    assert command.main(["--device", "cpu", "--parts", "proof"]) == 1
    said = capsys.readouterr()
    assert "ZeroDivisionError" in said.out and "WRONG" in said.out and "rows are WRONG" in said.err


def test_without_a_checkpoint_or_device_it_says_what_to_name():
    with pytest.raises(command.InputError, match="name a checkpoint folder or hub id, or --device cuda"):
        command.main([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_proof_on_a_gpu(tmp_path):
    report = gpu.run("cuda", count=40, out=tmp_path / "gpu.json", parts=("proof",))
    assert not report.failed
