"""Several processes that train one model together, each with a part of its weights; in a process alone nothing changes.

    torchrun --nproc-per-node 8 -m weights_tools.mpo.train CHECKPOINT DATA OUT --device cuda

Each layer of tower and decoder is gathered when it is computed, and what is outside them while the whole is (FSDP2).
The pairs of a step are dealt over the processes, gradients averaged. Files are written by the first process alone, from
whole tensors, so that a checkpoint, and a state, look as if one process had made them.
Source: torch.distributed.fsdp.fully_shard; the mean of rewards: TRL 0.10.1 trl/trainer/utils.py:629-653.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from minivl.files.load import opened, read_tensors
from minivl.model import MiniVL
from weights_tools.mpo.loss import RewardShift
from weights_tools.train.objective import answer_logits

# ---- processes ------------------------------------------------------------------------------------------------------


def start(device: str) -> str:
    """Join the processes that torchrun has started, if it has; return the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    return device


def stop():
    """Leave them, at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """Return (number of this process, processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait():
    """Wait until all processes have come this far."""
    if dist.is_initialized():
        dist.barrier()


def agreed(value: Callable[[], bool]) -> bool:
    """Return what the first process finds."""
    found = torch.tensor(float(value()))
    if dist.is_initialized():
        dist.broadcast(found, 0)
    return bool(found)


def mean(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over the processes."""
    if not dist.is_initialized():
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def gathered(values: torch.Tensor, rows: int) -> list[torch.Tensor]:
    """Collect float32[n, k] of each process, padded to float32[rows, k]."""
    if not dist.is_initialized():
        return [values]
    padded = torch.zeros(rows, values.shape[1])
    padded[:len(values)] = values
    found = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(found, padded)
    return found


class SharedShift(RewardShift):
    """The reward shift of all processes: each update takes the plain mean of their means."""

    def update(self, rewards: torch.Tensor) -> float:
        return super().update(mean(rewards.detach().float().mean()))


# ---- a model in parts -----------------------------------------------------------------------------------------------

def load(folder: str | Path, device: str) -> MiniVL:
    """Load a float checkpoint in float32, of each tensor this process's part. It is called as `forward` says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model, stored = opened(Path(folder))
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for layer in (*model.vision_model.encoder.layers, *model.language_model.layers):
        fully_shard(layer, mesh=mesh)
    model.forward = partial(answers, model)     # what is gathered at the call of the whole stays for all of it
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    state = {}
    for name, parameter in model.state_dict().items():
        tensor = read_tensors([name], stored, torch.device("cpu"), torch.float32)[name]
        state[name] = part_of(tensor.to(device), parameter)
    model.load_state_dict(state, assign=True)
    return model


def answers(model: MiniVL, ids, labels, pixels, times: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute answer_logits; without a picture look at a blank one all the same, first.

    The processes wait for each other at every layer, so none can leave the tower out, or come to it later.
    """
    if len(pixels):
        return answer_logits(model, ids, labels, pixels, times)
    R = model.config.force_image_size
    blank = model.visual_tokens(torch.zeros(1, model.config.vision_config.num_channels, R, R))
    logits, tokens = answer_logits(model, ids, labels, pixels, times)
    return logits + 0 * blank.sum(), tokens


def forward(model: MiniVL, *batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for answer_logits with a model of `load`."""
    return model(*batch)


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Cut this process's part out of a whole tensor, as it is cut in another one."""
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put tensors together again, on the CPU: name -> whole tensor, in the first process only. All must call it."""
    found = {}
    for name, tensor in state.items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if world()[0] == 0:
            found[name] = full.cpu()
    return found


class WholeModel:
    """A model of `load` whose state is that of a whole one."""

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict:
        """Put the weights together."""
        return whole(self.model.state_dict())

    def load_state_dict(self, state: dict):
        """Take this process's part of whole weights."""
        parts = self.model.state_dict()
        self.model.load_state_dict({name: part_of(tensor.to(parts[name].device), parts[name])
                                    for name, tensor in state.items()})


class WholeOptimiser:
    """An optimiser over parts whose state is that of one over whole tensors."""

    def __init__(self, optimiser: torch.optim.Optimizer):
        self.optimiser = optimiser

    def state_dict(self) -> dict:
        """Put the state together."""
        state = self.optimiser.state_dict()
        return {**state, "state": {i: whole(one) for i, one in state["state"].items()}}

    def load_state_dict(self, saved: dict):
        """Take this process's part."""
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        cut = lambda tensor, p: part_of(tensor.to(p.device), p) if tensor.shape == p.shape else tensor
        state = {i: {name: cut(tensor, parameters[i]) for name, tensor in one.items()}
                 for i, one in saved["state"].items()}
        self.optimiser.load_state_dict({**saved, "state": state})
