"""Blocks that attend to a window of earlier tokens and to state vectors, and how the vectors are updated
(Block-Recurrent Transformers).

B  lanes     L  tokens of a segment     T  tokens of a piece     W  earlier tokens     M  state vectors     D  width
H  heads     K  width of a head
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from memformer_pl.layers.attention import (
    Attention,
    CrossAttention,
    KeysValues,
    Positions,
    SelfAttention,
    SourceKeysValues,
    split_heads,
    with_before,
)
from memformer_pl.layers.dropout import Keep, add_update
from memformer_pl.layers.kv_cache import LayerKVCache
from memformer_pl.layers.probe import Probe
from memformer_pl.layers.transformer import BlockConfig

Window = tuple[Float[Tensor, "B H W K"], Float[Tensor, "B H W K"]]
"""Keys, without positions, and values of the tokens before a segment."""

GATE = 1.0
"""Initial bias of the gate: a state vector keeps 0.73 of itself in a segment."""
SMALL = 0.1
"""Initial size of the state vectors, and of the map to their update, as a part of unit gain."""


class WindowBlock(nn.Module):
    """Pre-norm block: attention to a window and to the tokens up to a token's own, optionally at the same time to state
    vectors with queries of their own, and feed-forward."""

    branches = 2
    """Number of branches whose outputs are dropped in part."""

    def __init__(self, config: BlockConfig, *, reads_states: bool) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.self_norm, self.self_attention = nn.LayerNorm(dim), SelfAttention(dim=dim, heads=heads)
        self.reads_states = reads_states
        if reads_states:
            self.state_attention = CrossAttention(dim=dim, heads=heads)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), config.build_feed_forward()

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        at: Positions,
        window: Window,
        states: SourceKeysValues | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Float[Tensor, "B L D"], KeysValues]:
        """Run the block on a segment; return its tokens, and their keys and values.

        Args:
            x: Tokens.
            at: Rotations of the window and of the tokens after it, and the mask of the tokens over both.
            window: Keys, without positions, and values of the tokens before.
            states: Keys and values of the state vectors, for a block that reads them.
            keep: Factors of dropout; by default nothing is dropped.
        """
        assert at.rotation is not None
        normed = self.self_norm(x)
        query, new = self.self_attention.project(normed)
        key, value = with_before(window, new)
        query = at.rotation.rows(slice(window[0].shape[2], None)).turn_heads(query)
        return self._finish(x, normed, query, (at.rotation.turn_heads(key), value), at, states, keep), new

    def keys_values(self, x: Float[Tensor, "B L D"]) -> KeysValues:
        """The keys, without positions, and values that :meth:`forward` returns."""
        keys_values: KeysValues = self.self_attention.project(self.self_norm(x))[1]
        return keys_values

    def decode(self, x: Float[Tensor, "B T D"], at: Positions, cache: LayerKVCache) -> Float[Tensor, "B T D"]:
        """Run the block on the next tokens of a segment.

        Args:
            x: Tokens.
            at: Their rotations, and their mask over the cached positions.
            cache: Keys, with positions, and values of the window and of the tokens before; of the state vectors as its
                source.
        """
        normed = self.self_norm(x)
        query, new = self.self_attention.project(normed, at.rotation)
        return self._finish(x, normed, query, cache.append(*new), at, cache.source, None)

    def _finish(
        self,
        x: Float[Tensor, "B L D"],
        normed: Float[Tensor, "B L D"],
        query: Float[Tensor, "B H L K"],
        keys_values: KeysValues,
        at: Positions,
        states: SourceKeysValues | None,
        keep: Keep | None,
    ) -> Float[Tensor, "B L D"]:
        update = self.self_attention(query, keys_values, at)
        if self.reads_states:
            update = update + self.state_attention(normed, states)
        x = add_update(x, update, keep, 0)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, 1)


class StateUpdate(Attention):
    """State vectors, which attend to each other and to the tokens of a window and a segment, and move towards what they
    find (section 3.2, fixed gate, "skip": no feed-forward layer on this side).

    A state vector is normed and gets a learned identity, so that vectors that are alike can ask for different things.
    It asks twice: for the other vectors, with the keys and values that tokens read them by, and for the tokens, with
    the keys and values that tokens read each other by, without positions and without a causal mask. One linear map of
    both gives the update ``z``, and a learned gate ``g`` for each channel the next state: ``g c + (1 - g) z``.

    The probe ``weights`` shows attention to the vectors, and ``token_weights`` that to the tokens.

    Args:
        dim: Width of state vectors and tokens.
        heads: Must divide ``dim``.
        states: Number of state vectors.
    """

    no_decay: ClassVar = ("initial", "identities")

    def __init__(self, *, dim: int, heads: int, states: int) -> None:
        super().__init__(dim=dim, heads=heads)
        self.initial = nn.Parameter(SMALL * torch.randn(states, dim))
        self.identities = nn.Parameter(torch.randn(states, dim))
        self.norm = nn.LayerNorm(dim)
        self.to_queries, self.to_update = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim)
        self.gate = nn.Parameter(torch.full((dim,), GATE))
        self.token_attention = Attention(dim=dim, heads=heads)
        self.token_weights: Probe = self.token_attention.weights

    @torch.no_grad()
    def shrink(self) -> None:
        """Make the initial map to updates small."""
        self.to_update.weight.mul_(SMALL)

    def identified(self, states: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        """State vectors as they are read: normed, and with their identities."""
        out: Tensor = self.norm(states) + self.identities
        return out

    def forward(
        self,
        states: Float[Tensor, "B M D"],
        identified: Float[Tensor, "B M D"],
        states_keys_values: SourceKeysValues,
        tokens_keys_values: KeysValues,
        exists: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "B M D"]:
        """The state vectors after a segment.

        Args:
            states: Before it.
            identified: From :meth:`identified`.
            states_keys_values: Their keys and values.
            tokens_keys_values: Keys, without positions, and values of the window and the segment.
            exists: Which of these tokens exist; in each lane at least one.
        """
        queries = split_heads(self.to_queries(identified), heads=2 * self.heads).transpose(1, 2)
        to_states, to_tokens = queries.chunk(2, dim=1)
        found = (
            self.attend(to_states, states_keys_values),
            self.token_attention.attend(to_tokens, tokens_keys_values, visible=exists[:, None, None]),
        )
        share = self.gate.sigmoid()
        after: Tensor = share * states + (1 - share) * self.to_update(torch.cat(found, dim=-1))
        return after
