"""B'MOJO (Zancato et al. 2024, arXiv 2407.06324): attention to the last tokens, to what a fading memory returned before
them, and to tokens that were hard to predict.

B  lanes     L  tokens in a segment     T  tokens of a piece     N  layers     D  width     V  vocabulary
W  tokens of the window     F  rows that fade: 2 W     M  stored tokens     E  errors that are carried: M + W, or 0
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.contract import ABSENT, DecodingCache, Segment, SegmentOutput
from memformer_pl.errors import LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers import BlockConfig
from memformer_pl.layers.eidetic_memory import EideticBlock, EideticCarried, Picks
from memformer_pl.models.memory_layers import Carried, MemoryLayers, by_layer, stacked


class BMojoState(NamedTuple):
    """State of B'MOJO."""

    hidden: Float[Tensor, "B N D"]
    """Of each layer's fading memory; at least float32."""
    recent: Float[Tensor, "B N W D"]
    """The last tokens as they enter each layer's attention, right-aligned."""
    faded: Float[Tensor, "B N F D"]
    """What the fading memory returned at the last tokens, right-aligned."""
    stored: Float[Tensor, "B N M D"]
    """Stored tokens, right-aligned, in the order of their document."""
    places: Int[Tensor, "B N M"]
    """Of stored tokens in their document; ``ABSENT`` where there is none."""
    errors: Float[Tensor, "B N E"]
    """Of the prediction of stored tokens, and then of the last tokens; at least float32. They choose, without
    gradient."""
    steps: Int[Tensor, "B N"]
    """Tokens of the document that each layer has read."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


class BMojo(MemoryLayers[BMojoState]):
    """Predict each token from all tokens before it, by layers that see the last tokens as they are, older ones as a
    fading memory has summed them up, and a few that they have stored.

    A token attends, in one softmax, to the ``window`` last tokens, its own included; to what the fading memory returned
    at as many tokens before these; and to ``stored`` older tokens. One projection makes the keys and values of all. The
    fading memory has a vector: ``h <- a h + (1 - a) W x`` with ``a = sigmoid(U x + b)``, and returns ``V h``. With
    ``stored=0`` this is the paper's B'MOJO-F, as in the public code; what the fading memory returns reaches the
    output by these keys and values alone. All that is carried has full gradient, but what is stored is chosen without.
    The last token of a segment is the first input of the next one.

    Ours: the paper stores tokens whose successor is hard to predict from the fading memory, and leaves open how it
    predicts and what it keeps; no public code stores any. Here a linear map of what the fading memory returned predicts
    the next input of the layer, and those of the largest mean squared error are stored. A token is a candidate from the
    moment at which it leaves the window, and each token sees the ``stored`` best candidates up to then, the earlier of
    equals, so what it sees does not depend on segments. The map learns from that error alone, and no other parameter
    does; the error is ``auxiliary_loss``, a mean over layers and tokens. Stored tokens all stand ``2 window`` tokens
    away. Time scales of the fading memory begin between 2 and 512 tokens. The blocks of this package.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens.
        heads: Attention heads; must divide ``dim`` into even widths.
        window: Tokens that a token sees as they are, its own included, and as the fading memory has summed them up. A
            layer carries ``(3 * window + stored + 1) * dim`` numbers, and a few for what is stored.
        stored: The most older tokens that a layer stores; 0 for none.
        picks: ``innovation`` stores the tokens that were predicted worst, ``first`` the first ones of a document,
            ``recent`` the last ones that have left the window, and ``random`` some by their places in the document
            alone.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        segment_length: The most tokens that a segment may hold.
        dropout: On the output of each branch of a layer, and on embeddings.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        window: int = 64,
        stored: int = 32,
        picks: Picks = "innovation",
        ffn_dim: int | None = None,
        feed_forward: dict[str, Any] | None = None,
        layers: int = 12,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        require_sizes(most=LARGEST_WIDTH, window=window)
        require_sizes(least=0, most=LARGEST_WIDTH, stored=stored)
        if picks not in get_args(Picks):
            raise UsageError(f"picks must be one of {', '.join(get_args(Picks))}, got {picks!r}")
        self.window, self.stored, self.picks = window, stored, picks
        self.blocks = nn.ModuleList(
            EideticBlock(each, window=window, stored=stored, picks=picks, layer=n, segment_length=segment_length)
            for n, each in enumerate(block.of_layers(layers))
        )

    def initial_state(self, lanes: int) -> BMojoState:
        """Zeros, nothing stored, and no token before the first."""
        start, layers = self.embedding.start, self.layers
        exact = torch.promote_types(start.dtype, torch.float32)
        errors = self.stored + self.window if self._predicts() else 0
        return BMojoState(
            start.new_zeros(lanes, layers, self.dim, dtype=exact),
            start.new_zeros(lanes, layers, self.window, self.dim),
            start.new_zeros(lanes, layers, 2 * self.window, self.dim),
            start.new_zeros(lanes, layers, self.stored, self.dim),
            start.new_full((lanes, layers, self.stored), ABSENT, dtype=torch.int64),
            start.new_zeros(lanes, layers, errors, dtype=exact),
            start.new_zeros(lanes, layers, dtype=torch.int64),
            start.new_full((lanes,), ABSENT, dtype=torch.int64),
        )

    def output(self, x: Float[Tensor, "B L D"], segment: Segment, carried: Sequence[Carried]) -> SegmentOutput:
        """The output, with the mean error of the prediction of the tokens that exist."""
        output = super().output(x, segment, carried)
        if not self._predicts():
            return output
        errors = torch.stack([after[-1] for after in carried]).mean(0)
        there = segment.token_mask
        return output._replace(auxiliary_loss=torch.where(there, errors, 0.0).sum() / there.sum().clamp(min=1))

    def begin_cache(self, state: BMojoState) -> DecodingCache:
        """The state, with keys and values for the rows that attention sees, and the tokens of the segment so far."""
        layers = []
        for block, fields in zip(self.blocks, by_layer(state[:-1]), strict=True):
            assert isinstance(block, EideticBlock)
            layers.append(block.as_keys_values(EideticCarried(*fields)))
        return *stacked(layers), torch.zeros_like(state.steps)

    def decode_block(
        self, block: nn.Module, x: Float[Tensor, "B T D"], carried: Carried, token_mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], Carried]:
        """Run a block on the next tokens of a segment."""
        assert isinstance(block, EideticBlock)
        *fields, place = carried
        x, after = block.decode(x, tuple(fields), token_mask, place)
        return x, (*after, place + token_mask.sum(1))

    def _predicts(self) -> bool:
        return self.stored > 0 and self.picks == "innovation"
