"""Titans (Behrouz et al. 2024, arXiv 2501.00663): a small network for each head, trained at every token by gradient
descent with momentum, alone or beside attention.

B  lanes     L  tokens in a segment     T  tokens of a piece     W  earlier tokens that attention sees, in J heads
N  layers     D  width     H  heads     K  width of a head     R  layers of a memory     F  hidden units of a memory
P  inputs of a convolution before the segment     C  its channels
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.contract import ABSENT, DecodingCache
from memformer_pl.errors import LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers import BlockConfig, init_weights
from memformer_pl.layers.delta_rule import require_chunk
from memformer_pl.layers.neural_memory_block import (
    BLOCKS,
    AttentionSizes,
    MemoryBegun,
    MemoryCarried,
    NeuralMemoryBlock,
)
from memformer_pl.layers.short_convolution import TAPS
from memformer_pl.models.memory_layers import Carried, MemoryLayers

CHUNK = 16
"""Tokens whose gradients are taken at the same weights by default, in a segment that has as many."""


Variant = Literal["lmm", "mac", "mag", "mal"]


class TitansState(NamedTuple):
    """State of Titans."""

    weights: Float[Tensor, "B N H R K F"]
    """Of the memories: the first layer as it maps a key, the second one transposed. At least float32."""
    momentum: Float[Tensor, "B N H R K F"]
    """Of the memories' gradient descent, the paper's surprise; at least float32."""
    inputs: Float[Tensor, "B N P C"]
    """The last inputs of each layer's convolution, the oldest first; zeros where there were none."""
    keys: Float[Tensor, "B N J W K"]
    """Keys of each layer's attention at the last tokens, without positions, right-aligned; no row with ``lmm`` and
    ``mac``."""
    values: Float[Tensor, "B N J W K"]
    filled: Int[Tensor, "B N"]
    """Number of filled rows of keys and values."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


class Titans(MemoryLayers[TitansState]):
    """Predict each token from all tokens before it, by layers whose memory is a network that learns as it reads
    (section 3.1), alone or with attention to the last tokens (section 4).

    Each head has a memory ``M_W``. At each token it takes the gradient ``G`` of ``|M_W(k) - v|^2``, adds it to its
    momentum, ``S <- eta S - theta G``, and the momentum to its weights, ``W <- (1 - alpha) W + S``; then it reads
    ``M_W(q)``. Theta, eta and alpha depend on the token. Queries and keys have unit length; queries, keys and values
    pass a convolution over four tokens. In a chunk, gradients are taken at the weights before its first token, while
    momentum and forgetting go on token by token (section 3.2). Gradients of the losses flow through all of it, so they
    are of second order in the memory, and cross segments. The last token of a segment is the first input of the next
    one, so only the first token of a document is predicted without a token before it.

    With ``mal``, attention follows the memory in each layer; with ``mag``, the memory gates what attention finds. It is
    attention to a sliding window, which reaches across segments, and to a few learned vectors. With ``mac``, attention
    sees the learned vectors, the tokens of its segment, and what memory, as it was before the segment, returns to each
    of them; what it finds teaches memory, and what memory then returns gates it.

    Ours: the blocks of this package, so a LayerNorm before each branch and a feed-forward with GELU. The paper leaves
    open, and here it is so: each head has a memory of its own; a memory of two layers has no biases and no residual
    connection, and divides its hidden units by the square root of their number, so that steps suit both kinds of
    memory; a token reads after it has written; chunks begin anew with each segment, so a segment that ``chunk`` does
    not divide ends with a shorter one; the weights of a new document are learned, and its momentum is zero; theta, eta
    and alpha are one number for each head, by sigmoid, of a bias and a map of the token; before training the bias is
    that of a theta of ``1 / (4 chunk)``, an eta of one half, and alphas over the heads from 0.001 to 0.1. Memory and
    attention each have a residual connection with ``mal``; with ``mag`` both are normed, and the memory's sigmoid is
    the gate; attention has rotary positions, and its learned vectors have none. With ``mac``, a token sees the reads of
    the tokens up to its own, each at the place of its token, so that no token asks for an earlier one; the first read
    has queries of its own, and its heads side by side are normed; what attention finds is normed before it teaches
    memory.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens.
        heads: Memories of a layer; must divide ``dim``.
        variant: ``lmm`` for the memory alone, ``mac``, ``mag`` or ``mal``.
        window: Tokens before its own that a token sees in attention, with ``mal`` and ``mag``.
        persistent: Learned vectors that attention sees, with all variants but ``lmm``.
        memory_hidden: Hidden units of a memory; by default four times the width of a head. With 0 a memory is a matrix
            alone. A layer carries ``4 * memory_hidden * dim`` numbers, or ``2 * dim * dim // heads`` with 0, and a few
            inputs of the convolution; with ``mal`` and ``mag``, ``2 * window * dim`` more.
        ffn_dim: Width of the hidden layer after the memory; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        segment_length: The most tokens that a segment may hold.
        chunk: Tokens whose gradients are taken at the same weights; by default 16, or a whole segment that is shorter.
            It changes what is learned, not only the cost: 1 is gradient descent token by token.
        dropout: On the output of each branch of a layer, and on embeddings.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        variant: Variant = "lmm",
        window: int = 64,
        persistent: int = 4,
        memory_hidden: int | None = None,
        ffn_dim: int | None = None,
        feed_forward: dict[str, Any] | None = None,
        layers: int = 12,
        segment_length: int = 64,
        chunk: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        require_chunk(chunk, segment_length=segment_length)
        self.memory_hidden = 4 * dim // heads if memory_hidden is None else memory_hidden
        require_sizes(least=0, most=LARGEST_WIDTH, memory_hidden=self.memory_hidden)
        if variant not in BLOCKS:
            raise UsageError(f"variant must be one of {', '.join(BLOCKS)}, got {variant!r}")
        require_sizes(least=0, most=LARGEST_WIDTH, window=window, persistent=persistent)
        self.variant, self.window, self.persistent, self.chunk = variant, window, persistent, chunk
        sizes = AttentionSizes(window, persistent, segment_length)
        at_once = min(CHUNK, segment_length) if chunk is None else chunk
        self.blocks = nn.ModuleList(
            BLOCKS[variant](each, hidden=self.memory_hidden, chunk=at_once, attention=sizes)
            for each in block.of_layers(layers)
        )
        init_weights(self.blocks)

    def initial_state(self, lanes: int) -> TitansState:
        """The learned weights of a new document, no momentum, and no token before the first."""
        start = self.embedding.start
        exact = torch.promote_types(start.dtype, torch.float32)
        initial = torch.stack([block.memory.initial for block in self.blocks])  # type: ignore[union-attr, misc]
        weights = initial.to(exact).expand(lanes, *initial.shape)
        nothing = self._empty_window(lanes, rows=self.window if self.variant in ("mag", "mal") else 0)
        return TitansState(
            weights,
            torch.zeros_like(weights, memory_format=torch.contiguous_format),
            start.new_zeros(lanes, self.layers, TAPS - 1, 3 * self.dim),
            nothing,
            nothing,
            start.new_zeros(lanes, self.layers, dtype=torch.int64),
            start.new_full((lanes,), ABSENT, dtype=torch.int64),
        )

    def begin_cache(self, state: TitansState) -> DecodingCache:
        """The state, with room for the segment where attention sees no other, and :class:`MemoryBegun`."""
        carried, entering = MemoryCarried(*state[:-1]), state.weights[:, :, :0]
        if self.variant == "mac":
            rows, entering = self._empty_window(len(state.last), rows=self.segment_length), state.weights
            carried = carried._replace(keys=rows, values=rows)
        return *carried, *MemoryBegun(state.weights, torch.zeros_like(state.filled), entering)

    def decode_block(
        self, block: nn.Module, x: Float[Tensor, "B T D"], carried: Carried, token_mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], Carried]:
        """Run a block on the next tokens of a segment, its memory token by token."""
        assert isinstance(block, NeuralMemoryBlock)
        before = len(MemoryCarried._fields)
        x, after, begun = block.decode(x, carried[:before], MemoryBegun(*carried[before:]), token_mask)
        return x, (*after, *begun)

    def _empty_window(self, lanes: int, *, rows: int) -> Float[Tensor, "B N J W K"]:
        """Keys, or values, of tokens that attention has not seen."""
        block = self.blocks[0]
        assert isinstance(block, NeuralMemoryBlock)
        shape = lanes, self.layers, block.seen * self.heads, rows, self.dim // self.heads
        return self.embedding.start.new_zeros(shape)
