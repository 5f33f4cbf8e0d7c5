"""A Memformer that fails on purpose."""

import math
from typing import Any

import torch
from torch import Tensor

from memformer_pl.contract import Segment, SegmentOutput
from memformer_pl.models import Memformer
from memformer_pl.models.memformer import MemformerState


class Scaled(torch.autograd.Function):
    """The same values, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Faulty(Memformer):
    """Fails in one lane of the segments in ``failing``, in the way that ``fault`` names."""

    fault: str | None = None
    lane = 1
    failing: list[Tensor]
    """The tokens of the segments that fail."""

    def fails(self, segment: Segment) -> bool:
        return any(segment.tokens is tokens for tokens in self.failing)

    def step(self, segment: Segment, state: MemformerState) -> tuple[SegmentOutput, MemformerState]:
        output, next_state = super().step(segment, state)
        if not self.fails(segment):
            return output, next_state
        lane = torch.zeros_like(segment.token_mask)
        lane[self.lane] = segment.token_mask[self.lane]
        losses, auxiliary = output.token_losses, output.auxiliary_loss
        if self.fault == "nan loss":
            losses = losses * torch.where(lane, math.nan, 1.0)
        elif self.fault == "infinite loss" or (self.fault == "fleeting loss" and torch.is_grad_enabled()):
            losses = losses + torch.where(lane, math.inf, 0.0)
        elif self.fault == "nan auxiliary":
            auxiliary = auxiliary + math.nan
        elif self.fault in ("nan gradient", "infinite gradient"):
            factor = math.nan if self.fault == "nan gradient" else math.inf
            losses = torch.where(lane, Scaled.apply(losses, factor), losses)
        return output._replace(token_losses=losses, auxiliary_loss=auxiliary), self.spoil(segment, next_state)

    def advance_step(self, segment: Segment, state: MemformerState) -> MemformerState:
        return self.spoil(segment, super().advance_step(segment, state))

    def spoil(self, segment: Segment, next_state: MemformerState) -> MemformerState:
        if self.fault != "nan memory" or not self.fails(segment):
            return next_state
        memory = next_state.memory.clone()
        memory[self.lane] = math.nan
        return next_state._replace(memory=memory)
