"""A model whose slots keep fixed shares of their content."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memformer_pl.contract import Segment, SegmentModel, SegmentOutput
from memformer_pl.layers.probe import Probe

RETENTION = (0.0, 0.4, 0.9, 1.0)
"""Slot 0 copies tokens, slot 3 never changes."""


class PlantedState(NamedTuple):
    memory: Tensor


class Planted(SegmentModel[PlantedState]):
    """Four slots of two numbers, which keep a fixed share of themselves and give the rest to the first token."""

    def __init__(self, *, vocab_size: int, segment_length: int) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        self.values = nn.Embedding(vocab_size, 2)
        self.retention, self.writing = Probe(), Probe()

    def initial_state(self, lanes: int) -> PlantedState:
        return PlantedState(torch.tensor([[1.0, 0.0]]).expand(lanes, 4, 2))

    def step(self, segment: Segment, state: PlantedState) -> tuple[SegmentOutput, PlantedState]:
        kept = torch.tensor(RETENTION).expand(len(segment.tokens), 1, -1)
        first = nn.functional.one_hot(torch.tensor(0), segment.tokens.shape[1])
        writing = self.writing((1 - kept)[..., None] * first)
        memory = self.retention(kept)[:, 0, :, None] * state.memory
        memory = memory + torch.einsum("bhml,bld->bmd", writing, self.values(segment.tokens))
        losses = segment.token_mask * state.memory.square().mean()
        return SegmentOutput(losses, torch.zeros_like(segment.token_mask), losses.new_zeros(())), PlantedState(memory)
