"""Losses of the tokens of a segment, from logits or from hidden states and the token embedding.

B  lanes     L  tokens in a segment     D  width     V  vocabulary     N  rows: tokens of all lanes
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.contract import Segment, SegmentOutput

LARGEST = 1 << 23
"""The most logits that are held at once; 32 MiB of float32. With fewer, each piece would read the whole table, and
add to its gradient, for a few rows."""


def output_from_logits(logits_BLV: Float[Tensor, "B L V"], segment: Segment) -> SegmentOutput:
    """The output of a model that computes logits for every token of a segment.

    Losses are at least float32: the next bfloat16 after 7 nats is 7.03.
    """
    losses_N, correct_N = _losses(logits_BLV.flatten(0, 1), segment.tokens.flatten())
    return _output(losses_N, correct_N, segment)


def output_from_table(
    x_BLD: Float[Tensor, "B L D"], table_VD: Float[Tensor, "V D"], segment: Segment, *, rows: int | None = None
) -> SegmentOutput:
    """The same for logits that are products of hidden states with the rows of a table.

    At most ``LARGEST`` logits, and those of at most ``rows`` tokens if given, exist at once: they are computed in
    pieces, and once more in the backward pass. The ``linear_cross_entropy`` of newer releases of torch is as fast, but
    does not return the most likely token.
    """
    rows = max(1, min(LARGEST // len(table_VD), rows or segment.tokens.numel()))
    if segment.tokens.numel() <= rows:
        return output_from_logits(F.linear(x_BLD, table_VD), segment)
    dtype = F.linear(x_BLD[:0], table_VD[:0]).dtype  # another one under autocast
    apply: Any = _LossesInPieces.apply
    losses_N, correct_N = apply(x_BLD.flatten(0, 1), table_VD, segment.tokens.flatten(), rows, dtype)
    return _output(losses_N, correct_N, segment)


def _output(losses_N: Float[Tensor, " N"], correct_N: Bool[Tensor, " N"], segment: Segment) -> SegmentOutput:
    losses_BL = losses_N.view_as(segment.tokens).masked_fill(~segment.target_mask, 0.0)
    return SegmentOutput(losses_BL, correct_N.view_as(segment.tokens) & segment.target_mask, losses_BL.new_zeros(()))


def _losses(
    logits_NV: Float[Tensor, "N V"], tokens_N: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """The loss of each token, and whether it was the most likely one."""
    losses_N = F.cross_entropy(_at_least_float32(logits_NV), tokens_N, reduction="none")
    return losses_N, logits_NV.detach().argmax(-1) == tokens_N


def _at_least_float32(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return x.float() if x.dtype.itemsize < 4 else x


def _pieces(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of ``rows`` rows of all tensors, side by side."""
    for start in range(0, len(tensors[0]), rows):
        yield tuple(tensor[start : start + rows] for tensor in tensors)


class _LossesInPieces(torch.autograd.Function):
    """:func:`_losses` of ``x @ table.T``, some rows at a time. The backward pass needs only the logarithm of the sum
    of exponentials of each row; each piece adds to one gradient of the table, at least float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Float[Tensor, "N D"],
        table_VD: Float[Tensor, "V D"],
        tokens_N: Int[Tensor, " N"],
        rows: int,
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
        losses, correct, log_sums = [], [], []
        with torch.autocast(
            x_ND.device.type, enabled=False
        ):  # autocast would cache a cast of the table without a graph
            table = table_VD.to(dtype)
            for x, tokens in _pieces(rows, x_ND, tokens_N):
                logits = x.to(dtype) @ table.T
                loss, right = _losses(logits, tokens)
                losses.append(loss)
                correct.append(right)
                log_sums.append(loss + _at_least_float32(logits.gather(1, tokens[:, None])[:, 0]))
        ctx.save_for_backward(x_ND, table_VD, tokens_N, torch.cat(log_sums))
        ctx.rows, ctx.dtype = rows, dtype
        right_N = torch.cat(correct)
        ctx.mark_non_differentiable(right_N)
        return torch.cat(losses), right_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_ND, table_VD, tokens_N, log_sums_N = ctx.saved_tensors
        table_grad, x_grads = torch.zeros_like(_at_least_float32(table_VD)), []
        with torch.autocast(x_ND.device.type, enabled=False):
            table = table_VD.to(ctx.dtype)
            for x, tokens, log_sums, grad in _pieces(ctx.rows, x_ND, tokens_N, log_sums_N, grads[0]):
                x, target = x.to(ctx.dtype), tokens[:, None]
                slope = _at_least_float32(x @ table.T).sub_(log_sums[:, None]).exp_()
                slope.scatter_(1, target, slope.gather(1, target) - 1).mul_(grad[:, None])
                slope = slope.to(ctx.dtype)
                x_grads.append(slope @ table)
                if slope.dtype == table_grad.dtype:
                    table_grad.addmm_(slope.T, x)
                else:
                    table_grad.add_(slope.T @ x)
        return torch.cat(x_grads).to(x_ND.dtype), table_grad.to(table_VD.dtype), None, None, None
