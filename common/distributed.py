"""Data-parallel training under torchrun; one process needs none of it and pays nothing for it.

Every rank computes the same global batch plan and takes its own slice (`shard`), so a run on two ranks equals a run on
one at the same global batch. Gradients are averaged after `backward` in one flat all-reduce: unlike the DDP wrapper
this also serves losses that differentiate twice (gradient alignment) or run several forwards a step.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.config import UserError


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the group that torchrun announces (NCCL on GPUs, else gloo), if any; yields this rank's device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield device
    finally:
        if not gpu:  # gloo now and then aborts a process whose peer hangs up while it does so itself: one after another
            time.sleep(0.1 * min(dist.get_rank(), 8))
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(global_batch: Tensor) -> Tensor:
    """This rank's equal, contiguous part of the first axis. Raises `UserError` where it does not divide evenly."""
    if len(global_batch) % world_size():
        raise UserError(f"batch size must be a multiple of the {world_size()} processes, got {len(global_batch)}")
    return global_batch.chunk(world_size())[rank()]


@torch.no_grad()
def average_(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in place, by one all-reduce per dtype."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        for tensor, mean in zip(group, flat.div_(world_size()).split([t.numel() for t in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def synchronize(model: nn.Module) -> None:
    """Average gradients and floating-point buffers (batch-norm statistics) over ranks, between backward and step."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    average_(gradients + [buffer for buffer in model.buffers() if buffer.is_floating_point()])


def mean(value: float) -> float:
    """The mean of a number over the ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    average_([tensor])
    return tensor.item()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank, so that all ranks stop at the same step."""
    return mean(float(flag)) > 0
