"""Shared by all tests: where the golden data lies, and tiny checkpoints made on the spot."""
import os
import shutil
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")    # no test may reach the hub
# Everything here is small: more threads gain nothing, and beside another program they wait (minivl/fast/threads.py).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"
# More of it, the real vocabulary and the model card's pictures lie in a folder beside some checkouts.
SHARED = Path(os.environ.get("MINIVL_GOLDEN") or Path(__file__).parents[2] / "shared")


def shared(path: str) -> Path:
    """A file of the full golden data, or a skip."""
    if not (SHARED / path).exists():
        pytest.skip(f"{path} of the full golden data is not here; MINIVL_GOLDEN names its folder")
    return SHARED / path


def tensors_of(path) -> dict[str, torch.Tensor]:
    """name -> tensor of one safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}        # noqa: SIM118  no dict


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def copy(tmp_path):
    """A writable copy of the golden AWQ checkpoint, which carries no digests (as released files do not)."""
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN / "qwen2-awq", folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny random AWQ checkpoint with its tokenizer."""
    from weights_tools.synthesize import synthesize
    return synthesize(tmp_path_factory.mktemp("tiny") / "awq", "tiny", awq=True)


@pytest.fixture(scope="session")
def pipe(tiny):
    from minivl import pipeline
    return pipeline(tiny)


@pytest.fixture(scope="session")
def warm_reference(tmp_path_factory):
    """Lets every recording of a test come from one process that has transformers imported: it is forked for each."""
    import warm  # beside the tests that ask for this

    from weights_tools.verify.__main__ import reference_python
    folder = tmp_path_factory.mktemp("warm")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen([str(reference_python()), "-W", "ignore", warm.__file__, str(folder / "socket")],
                              env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINIVL_REFERENCE", str(warm.client(folder)))
            yield
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


# ---- tiny checkpoints in every form that is released ----------------------------------------------------------------

FORMS = {       # name -> options; the shards of 0.3 MB make four files of the AWQ model, six of the other
    "plain": {}, "plain-shards": {"shard_gb": 0.0003}, "plain-bin": {"format": "bin"},
    "plain-bin-shards": {"format": "bin", "shard_gb": 0.0003}, "awq": {"awq": True},
    "awq-shards": {"awq": True, "shard_gb": 0.0003}, "awq-bin": {"awq": True, "format": "bin"},
    "awq-bin-shards": {"awq": True, "format": "bin", "shard_gb": 0.0003},
    "awq-top": {"awq": True, "config_quirk": "top"},
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """name of a form -> its folder, made once."""
    from weights_tools.synthesize import synthesize
    folder, done = tmp_path_factory.mktemp("forms"), {}

    def make(form):
        if form not in done:
            done[form] = synthesize(folder / form, "tiny", seed=3, **FORMS[form])
        return done[form]
    return make


def stored(folder) -> dict[str, torch.Tensor]:
    """name -> tensor of all weight files of a folder."""
    from minivl.files.formats import open_weights
    return {name: tensor.read().clone() for name, tensor in open_weights(folder).items()}


def same(a: dict, b: dict) -> bool:
    """Equal names, dtypes and numbers."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def logits(folder, **load):
    """What a tiny checkpoint computes for one question about a picture of three tiles."""
    import minivl
    from minivl.prompt import encode
    model, tokenizer = minivl.load(folder, **load), minivl.Tokenizer.load(folder)
    ids = encode(tokenizer, [{"role": "user", "content": "<image>\nWhat is this? 是什么🙂"}], [3],
                 tokens_per_tile=model.config.num_image_token)
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(torch.tensor([ids]), pixels)
