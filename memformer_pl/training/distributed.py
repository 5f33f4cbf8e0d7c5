"""Communication between the processes of a run: sums, gradients, and the lanes of a checkpoint.

With one process, every function returns what it was given.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from memformer_pl.contract import grow_to
from memformer_pl.errors import UsageError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def concat_over_ranks(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, of one shape, along their last axis."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=-1)


def max_over_ranks(numbers: Sequence[int], device: torch.device) -> list[int]:
    """Take the largest of each number over all ranks."""
    if world_size() == 1:
        return list(numbers)
    largest = torch.tensor(numbers, device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return [int(number) for number in largest]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all ranks, with one all-reduce for each dtype.

    A parameter without a gradient counts as zero, so that all ranks send the same number of values.
    """
    if world_size() == 1:
        return
    trained = sorted((p for p in parameters if p.requires_grad), key=lambda p: str(p.dtype))
    for _, group in groupby(trained, key=lambda p: p.dtype):
        bucket = list(group)
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket])
        distributed.all_reduce(flat)
        for parameter, total in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
            parameter.grad = total.view_as(parameter)


def unsynchronized(strategy: object) -> AbstractContextManager[None]:
    """Keep backward calls on their rank, whatever the strategy of the trainer: gradients are summed once."""
    block_sync = getattr(strategy, "block_backward_sync", None)
    return nullcontext() if block_sync is None else block_sync()


def gather(value: T) -> list[T]:
    """Collect the values of all ranks, in order."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all_gather_object fills every entry


def gather_lanes(state: Iterable[Tensor]) -> list[Tensor]:
    """Concatenate the lanes of all ranks, for each field of a state; rows of zeros fill up what has grown less."""
    fields_of_rank = [tensor.detach().cpu() for tensor in state]
    return [_concat(fields) for fields in zip(*gather(fields_of_rank), strict=True)]


def _concat(fields: Sequence[Tensor]) -> Tensor:
    rows = [max(sizes) for sizes in zip(*(field.shape[1:] for field in fields), strict=True)]
    return torch.cat([grow_to(rows, field) for field in fields])


def lanes_of_rank(state: Sequence[Tensor]) -> list[Tensor]:
    """Select the lanes of this rank from the state of all ranks.

    Raises:
        UsageError: The number of processes does not divide the number of lanes.
    """
    lanes = len(state[0]) if state else 0
    if lanes % world_size():
        raise UsageError(
            f"{lanes} lanes cannot be shared among {world_size()} processes: use a number that divides {lanes}"
        )
    return [tensor.tensor_split(world_size())[rank()] for tensor in state]
