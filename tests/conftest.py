"""Shared by all tests: where the golden data lies, and tiny checkpoints made on the spot."""
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")    # no test may reach the hub

import pytest  # noqa: E402
import torch  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
# More of it, the real vocabulary and the model card's pictures lie in a folder beside some checkouts.
SHARED = Path(os.environ.get("MINIVL_GOLDEN") or Path(__file__).parents[2] / "shared")


def shared(path: str) -> Path:
    """A file of the full golden data, or a skip."""
    if not (SHARED / path).exists():
        pytest.skip(f"{path} of the full golden data is not here; MINIVL_GOLDEN names its folder")
    return SHARED / path


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
