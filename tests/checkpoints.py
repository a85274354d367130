"""Read, write, edit and damage a small released checkpoint (the fixture `copy`), for tests of what reads it."""
import json

import pytest
import torch

import minivl
from minivl import InputError
from minivl.files.formats import open_weights
from weights_tools.files import save_safetensors

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def logits(folder, **options):
    with torch.no_grad():
        return minivl.load(folder, **options)(IDS)


def raw(path):
    """name -> tensor, copied, so that the file may be rewritten."""
    return {name: t.read().clone() for name, t in open_weights(path).items()}


def write(folder, tensors, name="model.safetensors"):
    save_safetensors(tensors, folder / name)


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, message):
    with pytest.raises(InputError, match=message) as error:
        minivl.load(folder)
    assert " at 0x" not in str(error.value)
    return str(error.value)
