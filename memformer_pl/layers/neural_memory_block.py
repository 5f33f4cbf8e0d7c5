"""Blocks with a neural memory, alone or with attention: the variants of Titans (Behrouz et al. 2024, arXiv 2501.00663,
section 4).

B  lanes     L  tokens     T  tokens of a piece     D  width     H  heads     K  width of a head
R  layers of a memory     F  hidden units of a memory     P  inputs of a convolution before the first token
I  its channels     J  heads of a window     W  its rows
"""

from collections.abc import Mapping
from typing import NamedTuple

from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.dropout import Keep, add_update
from memformer_pl.layers.inner_gradient import Learned, Weights, answer
from memformer_pl.layers.neural_memory import NeuralMemory, Projected
from memformer_pl.layers.sliding_attention import SlidingAttention, Window
from memformer_pl.layers.transformer import BlockConfig

Tokens = Float[Tensor, "B L D"]


class MemoryCarried(NamedTuple):
    """What a block carries from token to token."""

    weights: Weights
    """Of memory."""
    momentum: Weights
    """Of memory."""
    inputs: Float[Tensor, "B P I"]
    """Of the convolution."""
    keys: Float[Tensor, "B J W K"]
    """Of attention, at the tokens before; no row without attention to them."""
    values: Float[Tensor, "B J W K"]
    """Of attention, at the tokens before."""
    filled: Int[Tensor, " B"]
    """Number of filled rows of keys and values."""


class MemoryBegun(NamedTuple):
    """What a block needs besides to go on within a segment."""

    first: Weights
    """Of memory, before the chunk that each lane is in."""
    place: Int[Tensor, " B"]
    """Tokens that each lane has read of the segment."""
    entering: Weights
    """Of memory, before the segment; no head where nothing reads them."""


class AttentionSizes(NamedTuple):
    """Of the attention beside a neural memory."""

    window: int
    """Number of tokens before its own that a token sees."""
    persistent: int
    """Number of learned vectors that it sees."""
    segment_length: int


class Call(NamedTuple):
    """Of which tokens a block is called."""

    token_mask: Bool[Tensor, "B L"]
    """Which exist, at the left."""
    keep: Keep | None = None
    """Factors of dropout; by default nothing is dropped."""
    place: Int[Tensor, " B"] | None = None
    """Tokens of the segment before the first of them; by default none."""


class NeuralMemoryBlock(nn.Module):
    """Pre-norm block: a neural memory, and feed-forward (LMM). Its subclasses add attention."""

    branches = 2
    """Number of branches whose outputs are dropped in part."""
    seen = 1
    """Vectors of each token that attention sees, where there is attention."""

    def __init__(self, config: BlockConfig, *, hidden: int, chunk: int, attention: AttentionSizes) -> None:
        super().__init__()
        dim = config.dim
        self.memory_norm = nn.LayerNorm(dim)
        self.memory = NeuralMemory(dim=dim, heads=config.heads, hidden=hidden, chunk=chunk)
        self.add_attention(dim, config.heads, attention)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), config.build_feed_forward()

    def add_attention(self, dim: int, heads: int, sizes: AttentionSizes) -> None:
        """Build attention, and what joins it to memory."""

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        carried: tuple[Tensor, ...],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Float[Tensor, "B L D"], MemoryCarried]:
        """Run the block on a segment.

        Args:
            x: Tokens.
            carried: :class:`MemoryCarried` before the first of them.
            token_mask: Which of the tokens exist, at the left.
            keep: Factors of dropout; by default nothing is dropped.

        Returns:
            The tokens, and what is carried after the last one that exists.
        """
        weights, momentum, inputs, *attended = carried
        lesson, window = self.enter(x, Window(*attended), weights, Call(token_mask))
        projected = self.memory.project(lesson, inputs, token_mask)
        read, learned = self.memory(lesson, Learned(weights, momentum), projected)
        x, window = self.leave(x, lesson, read, window, Call(token_mask, keep))
        return self._feed_forward(x, keep), _carried(learned, projected, window)

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        carried: tuple[Tensor, ...],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> MemoryCarried:
        """What :meth:`forward` carries on, without what does not lead to it."""
        del keep
        weights, momentum, inputs, *attended = carried
        lesson, window = self.enter(x, Window(*attended), weights, Call(token_mask))
        projected = self.memory.project(lesson, inputs, token_mask)
        learned = self.memory.learn(Learned(weights, momentum), projected)
        return _carried(learned, projected, self.advance_window(x, window, token_mask))

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        carried: tuple[Tensor, ...],
        begun: MemoryBegun,
        token_mask: Bool[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B T D"], MemoryCarried, MemoryBegun]:
        """Run the block on the next tokens of a segment; return them, and what was given about those before, after
        them."""
        weights, momentum, inputs, *attended = carried
        call = Call(token_mask, place=begun.place)
        lesson, window = self.enter(x, Window(*attended), begun.entering, call)
        projected = self.memory.project(lesson, inputs, token_mask)
        learned = Learned(weights, momentum)
        read, learned, first, after = self.memory.decode(lesson, learned, begun.first, begun.place, projected)
        x, window = self.leave(x, lesson, read, window, call)
        begun = begun._replace(first=first, place=after)
        return self._feed_forward(x), _carried(learned, projected, window), begun

    def enter(self, x: Tokens, window: Window, entering: Weights, call: Call) -> tuple[Tokens, Window]:
        """What teaches memory and asks it, and the window, behind these tokens if attention has seen them.

        Args:
            x: Tokens.
            window: Before the first of them.
            entering: Weights of memory before the segment.
            call: About these tokens.
        """
        del entering, call
        return self.memory_norm(x), window

    def leave(self, x: Tokens, lesson: Tokens, read: Tokens, window: Window, call: Call) -> tuple[Tokens, Window]:
        """The tokens with what they have read, before feed-forward, and the window behind them.

        Args:
            x: Tokens.
            lesson: What :meth:`enter` returned of them.
            read: What memory has returned.
            window: What :meth:`enter` returned.
            call: About these tokens.
        """
        del lesson
        return add_update(x, read, call.keep, 0), window

    def advance_window(self, x: Float[Tensor, "B L D"], window: Window, token_mask: Bool[Tensor, "B L"]) -> Window:
        """The window that :meth:`leave` returns, where it does not depend on what memory returns."""
        del x, token_mask
        return window

    def _feed_forward(self, x: Float[Tensor, "B L D"], keep: Keep | None = None) -> Float[Tensor, "B L D"]:
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, self.branches - 1)


class MemoryAsLayerBlock(NeuralMemoryBlock):
    """A neural memory, attention behind it, and feed-forward (MAL)."""

    branches = 3

    def add_attention(self, dim: int, heads: int, sizes: AttentionSizes) -> None:
        """Build attention and its norm."""
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SlidingAttention(dim=dim, heads=heads, **sizes._asdict())

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        carried: tuple[Tensor, ...],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> MemoryCarried:
        """What :meth:`forward` carries on: attention sees what memory returned."""
        weights, momentum, inputs, *attended = carried
        lesson = self.memory_norm(x)
        projected = self.memory.project(lesson, inputs, token_mask)
        read, learned = self.memory(lesson, Learned(weights, momentum), projected)
        normed = self.attention_norm(add_update(x, read, keep, 0))
        window = self.attention.advance(normed, Window(*attended), token_mask)
        return _carried(learned, projected, window)

    def leave(self, x: Tokens, lesson: Tokens, read: Tokens, window: Window, call: Call) -> tuple[Tokens, Window]:
        """Add what memory has returned, and what attention finds then."""
        del lesson
        x = add_update(x, read, call.keep, 0)
        found, window = self.attention.look(self.attention_norm(x), window, call.token_mask, call.place)
        return add_update(x, found, call.keep, 1), window


class MemoryAsGateBlock(NeuralMemoryBlock):
    """Attention gated by a neural memory, and feed-forward (MAG)."""

    def add_attention(self, dim: int, heads: int, sizes: AttentionSizes) -> None:
        """Build attention, its norm, and those of both before the gate."""
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SlidingAttention(dim=dim, heads=heads, **sizes._asdict())
        self.read_norm, self.found_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def leave(self, x: Tokens, lesson: Tokens, read: Tokens, window: Window, call: Call) -> tuple[Tokens, Window]:
        """Add what attention finds, as far as memory lets it through."""
        del lesson
        found, window = self.attention.look(self.attention_norm(x), window, call.token_mask, call.place)
        return add_update(x, self.found_norm(found) * self.read_norm(read).sigmoid(), call.keep, 0), window

    def advance_window(self, x: Float[Tensor, "B L D"], window: Window, token_mask: Bool[Tensor, "B L"]) -> Window:
        """The window behind the tokens."""
        return self.attention.advance(self.attention_norm(x), window, token_mask)


class MemoryAsContextBlock(NeuralMemoryBlock):
    """Attention within a segment that also sees what memory held before it; what it finds teaches memory, and is gated
    by what memory then returns; and feed-forward (MAC).

    A token sees the reads of the tokens up to its own, so no later token.
    """

    seen = 2

    def add_attention(self, dim: int, heads: int, sizes: AttentionSizes) -> None:
        """Build attention to a segment, the queries of the first read, and the norms of both reads."""
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SlidingAttention(dim=dim, heads=heads, **sizes._replace(window=sizes.segment_length)._asdict())
        self.to_recall = nn.Linear(dim, dim, bias=False)
        self.recalled_norm, self.read_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def enter(self, x: Tokens, window: Window, entering: Weights, call: Call) -> tuple[Tokens, Window]:
        """What attention finds in the segment up to each token, and in what memory held before the segment."""
        normed = self.attention_norm(x)
        recalled = self.recalled_norm(self._recall(normed, entering))
        found, window = self.attention.look(normed, window, call.token_mask, call.place, reads=recalled)
        return self.memory_norm(found), window

    def leave(self, x: Tokens, lesson: Tokens, read: Tokens, window: Window, call: Call) -> tuple[Tokens, Window]:
        """Add what attention found, as far as memory lets it through."""
        return add_update(x, lesson * self.read_norm(read).sigmoid(), call.keep, 0), window

    def _recall(self, x: Float[Tensor, "B L D"], entering: Weights) -> Float[Tensor, "B L D"]:
        """What memory returns to queries of unit length, the heads side by side."""
        queries = rearrange(self.to_recall(x), "B L (H K) -> B H L K", H=self.memory.heads)
        read = answer(entering, F.normalize(queries, dim=-1))
        return rearrange(read, "B H L K -> B L (H K)").to(x.dtype)


def _carried(learned: Learned, projected: Projected, window: Window) -> MemoryCarried:
    return MemoryCarried(*learned, projected.inputs, *window)


BLOCKS: Mapping[str, type[NeuralMemoryBlock]] = {
    "lmm": NeuralMemoryBlock,
    "mac": MemoryAsContextBlock,
    "mag": MemoryAsGateBlock,
    "mal": MemoryAsLayerBlock,
}
"""The block of each variant."""
