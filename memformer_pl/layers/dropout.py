"""Dropout whose numbers are a function of a seed and a place, and not of a random stream.

So the two passes of replay, a decoder that reads several segments in one batch, a compiled block and a captured graph
all drop the same entries, and nothing has to be restored. The numbers of a place are those of SplitMix64 (Steele, Lea
& Flood 2014), of which each 64 bits decide four entries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.contract import Segment

PARTS = 1 << 16
"""A probability is rounded to a multiple of ``1 / PARTS``; the mean of the factors is exactly 1."""
STREAM = 1 << 40
"""Distance between the numbers of two parts of a step."""

GAMMA, FIRST, SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""The constants of SplitMix64, as signed numbers."""

Keep = Float[Tensor, "N B L D"]
"""Factors of the entries of ``N`` branches: 0 for a dropped entry, and ``1 / (1 - rate)`` for the others."""


def draw_seeds(segment: Segment, *, rate: float, training: bool) -> Int[Tensor, " S"] | None:
    """The seeds of a segment, or one from the default stream of the device; None if nothing is dropped."""
    return segment_seeds(segment) if training and rate else None


def segment_seeds(segment: Segment) -> Int[Tensor, " S"]:
    """The seeds of a segment, or one from the default stream of the device."""
    if segment.seeds is not None:
        return segment.seeds
    return torch.randint(1 << 62, (1,), device=segment.tokens.device)


def draw_keep(
    seeds: Int[Tensor, " S"] | None, like: Float[Tensor, "B L D"], *, rate: float, part: int, branches: Sequence[int]
) -> list[Keep | None]:
    """Draw the factors of several blocks at once.

    Args:
        seeds: One for each segment whose lanes are concatenated in ``like``; None to drop nothing.
        like: A tensor of the shape, dtype and device of each branch.
        rate: Probability of dropping an entry.
        part: Number of a part of the step; each part has numbers of its own.
        branches: Number of branches of each block.

    Returns:
        The factors of each block; None for all if nothing is dropped.
    """
    if seeds is None:
        return [None] * len(branches)
    segments, count = len(seeds), sum(branches)
    lanes, length, dim = len(like) // len(seeds), *like.shape[1:]
    dropped = min(round(rate * PARTS), PARTS - 1)
    entries = count * lanes * length * dim
    bits = random_bits(seeds, first=part * STREAM, count=-(-entries // 4)).view(torch.int16)[:, :entries]
    # straight into floating point: twice as fast as by way of booleans
    ones = torch.ge(bits, dropped - PARTS // 2, out=torch.empty(bits.shape, dtype=like.dtype, device=like.device))
    keep = ones.mul_(PARTS / (PARTS - dropped)).view(segments, count, lanes, length, dim)
    return list(torch.split(keep.transpose(0, 1).flatten(1, 2), list(branches)))


def random_bits(seeds: Int[Tensor, " S"], *, first: int, count: int) -> Int[Tensor, "S count"]:
    """The numbers ``first`` to ``first + count - 1`` of the SplitMix64 stream of each seed, 64 random bits each."""
    return bits_at(seeds[:, None], torch.arange(first + 1, first + 1 + count, device=seeds.device))


def bits_at(seeds: Int[Tensor, "*#shape"], places: Int[Tensor, "*#shape"]) -> Int[Tensor, "*shape"]:
    """The numbers of SplitMix64 at places counted from 1, 64 random bits each."""
    bits: Tensor = (_traced if torch.compiler.is_compiling() else _split_mix)(seeds, places)
    return bits


def _split_mix(seeds: Tensor, places: Tensor) -> Tensor:
    z = torch.add(seeds, places, alpha=GAMMA)
    z = _mixed(z, 30).mul_(FIRST)
    z = _mixed(z, 27).mul_(SECOND)
    return _mixed(z, 31)


def _mixed(z: Int[Tensor, "*any"], shift: int) -> Int[Tensor, "*any"]:
    """``z ^ (z >> shift)`` of unsigned numbers: torch shifts the sign in, which the mask removes."""
    return z.bitwise_right_shift(shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(z)


@torch.library.custom_op("memformer_pl::split_mix", mutates_args=())
def _traced(seeds: Tensor, places: Tensor) -> Tensor:
    """The same in a compiled block, where torch would compute these products wrongly.

    Its C++ leaves their overflow undefined, and its code for CUDA may take 32 bits (pytorch issue 183901).
    """
    return _split_mix(seeds, places)


@_traced.register_fake
def _shaped(seeds: Tensor, places: Tensor) -> Tensor:
    return torch.empty_like(seeds + places)


def add_update(
    x: Float[Tensor, "B L D"], update: Float[Tensor, "B L D"], keep: Keep | None, branch: int
) -> Float[Tensor, "B L D"]:
    """``x`` and the update of a branch, some entries of which are dropped."""
    if keep is None:
        return x + update
    out: Tensor = _AddKept.apply(x, update, keep[branch])  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out


def drop(x: Float[Tensor, "B L D"], keep: Keep | None) -> Float[Tensor, "B L D"]:
    """``x``, some entries of which are dropped."""
    return x if keep is None else x * keep[0]


class _AddKept(torch.autograd.Function):
    """``x + update * keep`` in one operation forward and one backward; ``keep`` carries no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, update: Tensor, keep: Tensor) -> Tensor:
        return torch.addcmul(x, update, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (keep,) = ctx.saved_tensors
        return grads[0], (grads[0] * keep).to(ctx.dtype), None
