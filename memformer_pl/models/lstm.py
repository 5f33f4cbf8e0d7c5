"""An LSTM (Hochreiter & Schmidhuber 1997), the first row of the paper's table: one hidden and one cell vector per
layer, updated at every token.

B  lanes     L  tokens in a segment     T  tokens of a piece     N  layers     D  width     V  vocabulary
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from memformer_pl.contract import ABSENT, DecodingCache, Segment, SegmentModel, SegmentOutput, select_lanes
from memformer_pl.errors import LARGEST, LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers import TokenEmbedding, draw_keep, draw_seeds, drop


class LSTMState(NamedTuple):
    """State of an LSTM."""

    hidden: Float[Tensor, "B N D"]
    cell: Float[Tensor, "B N D"]
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


def packed_rows(x: Float[Tensor, "B L D"], counts: Int[Tensor, " B"]) -> PackedSequence:
    """The first rows of each lane, as many as ``counts`` says, in torch's packed form."""
    return pack_padded_sequence(x, counts, batch_first=True, enforce_sorted=False)


def full_precision() -> torch.autocast:
    """Disable autocast for the layers on a CPU: without AVX-512, oneDNN has no LSTM below float32, and torch calls it
    nevertheless."""
    return torch.autocast("cpu", enabled=False)


class LSTMLayer(nn.LSTM):
    """One layer of torch's LSTM, with initial maps of unit gain and a bias of 1 on the forget gate and 0 elsewhere.

    It always stays in training mode, which changes no output, since the layer has no dropout: a gradient may be needed
    in evaluation too, and cuDNN computes it only in training mode.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, batch_first=True)
        with torch.no_grad():
            for weight in (self.weight_ih_l0, self.weight_hh_l0):
                nn.init.normal_(weight, std=dim**-0.5)
            for bias in (self.bias_ih_l0, self.bias_hh_l0):
                nn.init.zeros_(bias)
            self.bias_ih_l0[dim : 2 * dim] = 1.0

    def train(self, mode: bool = True) -> "LSTMLayer":
        """Stay in training mode."""
        return super().train(True)

    def step(
        self, x: Float[Tensor, "B D"], hidden: Float[Tensor, "B D"], cell: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Hidden and cell state after one token."""
        weights = self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0
        after: tuple[Tensor, Tensor] = torch.lstm_cell(x, (hidden, cell), *weights)
        return after


class LSTM(SegmentModel[LSTMState]):
    """Predict each token from all tokens before it, by a stack of recurrent layers; gradients cross segments.

    The losses of a document in segments equal those of one pass. The last token of a segment is the first input of the
    next one, so only the first token of a document is predicted without a token before it.

    Ours: one table for input and output, with a norm before the output, as in all models of this package, so a layer is
    as wide as a token. Dropout applies to the input of each layer (Zaremba et al. 2014), not to the last output.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens and of each layer's two states.
        layers: Number of layers.
        segment_length: The most tokens that a segment may hold.
        dropout: On the input of each layer.
    """

    unread = ("last",)

    def __init__(
        self, *, vocab_size: int, dim: int, layers: int = 2, segment_length: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        require_sizes(most=LARGEST_WIDTH, dim=dim)
        require_sizes(most=LARGEST, layers=layers)
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.dim, self.layers, self.dropout = dim, layers, dropout
        self.embedding = TokenEmbedding(vocab_size=vocab_size, dim=dim)
        self.blocks = nn.ModuleList(LSTMLayer(dim) for _ in range(layers))

    def initial_state(self, lanes: int) -> LSTMState:
        """Zeros, and no token before the first."""
        nothing = self.embedding.start.new_zeros(lanes, self.layers, self.dim)
        return LSTMState(nothing, nothing, nothing.new_full((lanes,), ABSENT, dtype=torch.int64))

    def step(self, segment: Segment, state: LSTMState) -> tuple[SegmentOutput, LSTMState]:
        """Predict the segment, and compute the next state."""
        x, next_state = self._run(segment, state)
        return self.embedding.output(x, segment), next_state

    def advance_step(self, segment: Segment, state: LSTMState) -> LSTMState:
        """The next state: all layers, no logits."""
        return self._run(segment, state)[1]

    @torch.no_grad()
    def prefill(self, state: LSTMState, lanes: int) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Read the last token, or START."""
        nothing = state.last.new_empty(lanes, 0)
        cache = self._next_token(self.embedding(nothing, state.last)[:, 0], (state.hidden, state.cell))
        return self.embedding.logits(cache[0][:, -1]), cache

    @torch.no_grad()
    def decode(
        self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Run the next tokens, one by one."""
        vectors = self.embedding.vectors(tokens)
        for x, exists in zip(vectors.unbind(1), token_mask.unbind(1), strict=True):
            cache = select_lanes(exists, self._next_token(x, cache), cache)
        return self.embedding.logits(cache[0][:, -1]), cache

    def _run(self, segment: Segment, state: LSTMState) -> tuple[Float[Tensor, "B L D"], LSTMState]:
        """The output of the last layer before each token, and the next state."""
        # packed, so that each lane stops at its last token; the state of a lane without tokens is discarded
        arrived = segment.token_mask.sum(1).clamp(min=1)
        x = self.embedding(segment.tokens[:, :-1], state.last)
        seeds = draw_seeds(segment, rate=self.dropout, training=self.training)
        keep = draw_keep(seeds, x, rate=self.dropout, part=0, branches=[1] * self.layers)
        counts = arrived.cpu()
        packed = packed_rows(drop(x, keep[0]), counts)
        hiddens, cells = [], []
        with full_precision():
            for n, (layer, *entering) in enumerate(
                zip(self.blocks, state.hidden.unbind(1), state.cell.unbind(1), strict=True)
            ):
                if n and (kept := keep[n]) is not None:
                    packed = packed._replace(data=packed.data * packed_rows(kept[0], counts).data)
                packed, (hidden, cell) = layer(packed, tuple(field[None] for field in entering))
                hiddens.append(hidden[0])
                cells.append(cell[0])
        x, _ = pad_packed_sequence(packed, batch_first=True, total_length=segment.tokens.shape[1])
        return x, LSTMState(torch.stack(hiddens, dim=1), torch.stack(cells, dim=1), segment.last_token)

    def _next_token(self, x: Float[Tensor, "B D"], cache: DecodingCache) -> DecodingCache:
        """The two states of each layer ``[B, N, D]`` after one more token."""
        after = []
        with full_precision():
            for layer, hidden, cell in zip(self.blocks, *(field.unbind(1) for field in cache), strict=True):
                assert isinstance(layer, LSTMLayer)
                x, cell = layer.step(x, hidden, cell)
                after.append((x, cell))
        # autocast may have lowered the precision, and the next call may run without it
        return tuple(torch.stack(fields, dim=1).to(cache[0].dtype) for fields in zip(*after, strict=True))
