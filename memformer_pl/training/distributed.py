"""What the processes of a run tell each other: sums, gradients, and what goes into the one checkpoint.

With one process everything here returns what it was given.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from memformer_pl.errors import UsageError

T = TypeVar("T")


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return distributed.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def max_over_ranks(numbers: Sequence[int], device: torch.device) -> list[int]:
    """The largest of each number over all ranks."""
    if world_size() == 1:
        return list(numbers)
    most = torch.tensor(numbers, device=device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return [int(number) for number in most]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all ranks, in one message for each dtype.

    A parameter that took no part counts as a gradient of zero, so that all ranks send the same.
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


def gather(value: T) -> list[T]:
    """The values of all ranks, in order."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # every entry has been filled


def gather_lanes(state: Iterable[Tensor]) -> list[Tensor]:
    """A state with the lanes of all ranks."""
    own = [tensor.detach().cpu() for tensor in state]
    return [torch.cat(fields) for fields in zip(*gather(own), strict=True)]


def lanes_of_rank(state: Sequence[Tensor]) -> list[Tensor]:
    """The part of a state of all ranks that is this rank's.

    Raises:
        UsageError: The lanes cannot be shared out evenly.
    """
    lanes = len(state[0]) if state else 0
    if lanes % world_size():
        raise UsageError(f"{lanes} lanes cannot be shared out evenly among {world_size()} processes")
    return [tensor.tensor_split(world_size())[rank()] for tensor in state]
