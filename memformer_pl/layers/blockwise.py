"""A block computed on a chunk of tokens at a time (Blockwise Parallel Transformer, Liu & Abbeel 2023): the same numbers
without the square of scores and without the hidden layer of all tokens. ``cross_entropy.py`` splits the logits.

Each chunk passes the whole block, and once more in the backward pass. Keys and values of all tokens are held. A chunk
attends to all keys in one fused kernel, which splits the keys: the paper's inner loop.

B  lanes     L  tokens of a chunk     S  tokens up to the end of that chunk     D  width     H  heads     K  width of a
head
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer_pl.layers.attention import KeysValues, Positions
from memformer_pl.layers.rotary import Rotation
from memformer_pl.layers.transformer import TransformerBlock


def forward_by_chunks(
    block: nn.Module, x: Float[Tensor, "B T D"], *, rotation: Rotation, chunk: int
) -> Float[Tensor, "B T D"]:
    """The output of a :class:`TransformerBlock` under a causal mask.

    Dropout draws other numbers than without chunks.
    """
    assert isinstance(block, TransformerBlock)
    normed = block.self_norm(x)
    key_BHTK, value_BHTK = block.self_attention.keys_values(normed, rotation)

    def forward(
        x: Float[Tensor, "B L D"], normed: Float[Tensor, "B L D"], rotation: Rotation, keys_values: KeysValues
    ) -> Float[Tensor, "B L D"]:
        shape = x.shape[1], keys_values[0].shape[2]
        causal = torch.ones(shape, dtype=torch.bool, device=x.device).tril(shape[1] - shape[0])
        return block.forward_rows(x, normed, Positions(causal[None, None], rotation), keys_values)

    parts = []
    for rows in chunks(x.shape[1], chunk):
        seen = key_BHTK[..., : rows.stop, :], value_BHTK[..., : rows.stop, :]
        parts.append(checkpoint(forward, x[:, rows], normed[:, rows], rotation.rows(rows), seen, use_reentrant=False))
    return torch.cat(parts, dim=1)


def chunks(length: int, chunk: int) -> list[slice]:
    """The tokens of each chunk; the last may be shorter."""
    return [slice(first, min(first + chunk, length)) for first in range(0, length, chunk)]
