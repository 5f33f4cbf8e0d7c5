"""A block computed on a chunk of tokens at a time (Blockwise Parallel Transformer, Liu & Abbeel 2023): the same numbers
without the square of scores and without the hidden layer of all tokens. ``cross_entropy.py`` splits the logits.

Each chunk passes the whole block, and once more in the backward pass. Queries, keys and values of all tokens are held.
A chunk attends to all keys in one fused kernel, which splits the keys: the paper's inner loop.

B  lanes     L  tokens of a chunk     S  tokens up to the end of that chunk     D  width     H  heads     K  width of a
head
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer_pl.layers.attention import KeysValues, Positions
from memformer_pl.layers.dropout import Keep
from memformer_pl.layers.rotary import Rotation
from memformer_pl.layers.transformer import TransformerBlock


def forward_by_chunks(
    block: nn.Module,
    x: Float[Tensor, "B T D"],
    *,
    rotation: Rotation,
    chunk: int,
    keep: Callable[[int, Float[Tensor, "B L D"]], Keep | None],
) -> Float[Tensor, "B T D"]:
    """The output of a :class:`TransformerBlock` under a causal mask.

    Args:
        block: The block.
        x: All tokens.
        rotation: Their rotations.
        chunk: Number of tokens that are computed at once.
        keep: Draws the factors of dropout of a chunk, given its number and its tokens; called again in the backward
            pass, so that those of all tokens are never held.
    """
    assert isinstance(block, TransformerBlock)
    query_BHTK, (key_BHTK, value_BHTK) = block.self_attention.project(block.self_norm(x), rotation)

    def forward(
        number: int, x: Float[Tensor, "B L D"], query: Float[Tensor, "B H L K"], keys_values: KeysValues
    ) -> Float[Tensor, "B L D"]:
        shape = x.shape[1], keys_values[0].shape[2]
        causal = torch.ones(shape, dtype=torch.bool, device=x.device).tril(shape[1] - shape[0])
        return block.forward_rows(x, query, Positions(causal[None, None]), keys_values, keep=keep(number, x))

    parts = []
    for number, rows in enumerate(chunks(x.shape[1], chunk)):
        seen = key_BHTK[..., : rows.stop, :], value_BHTK[..., : rows.stop, :]
        parts.append(checkpoint(forward, number, x[:, rows], query_BHTK[:, :, rows], seen, use_reentrant=False))
    return torch.cat(parts, dim=1)


def chunks(length: int, chunk: int) -> list[slice]:
    """The tokens of each chunk; the last may be shorter."""
    return [slice(first, min(first + chunk, length)) for first in range(0, length, chunk)]
