"""Layers by blocks of tokens (Blockwise Parallel Transformer, Liu & Abbeel 2023): the same numbers without the square
of scores, and without the hidden layer of all tokens. Logits are cut in ``reading.py``.

Each block is computed to its end, and once more in the backward pass. Keys and values of all tokens are held. A block
attends to all keys in one fused kernel, which cuts keys in blocks of its own: the paper's inner loop.

B  lanes     L  tokens of a block     S  tokens up to the end of that block     D  width     H  heads     K  width of a
head
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer_pl.layers.transformer import TransformerBlock
from memformer_pl.layers.rotary import Rotation


def layer_by_blocks(
    layer: nn.Module, x: Float[Tensor, "B T D"], *, rotation: Rotation, block: int
) -> Float[Tensor, "B T D"]:
    """What a :class:`SelfLayer` makes of tokens that see themselves and those before them. Dropout falls otherwise than
    without blocks."""
    assert isinstance(layer, TransformerBlock)
    normed = layer.self_norm(x)
    key_BHTK, value_BHTK = layer.self_attention.keys_and_values(normed, rotation)

    def up(
        x: Float[Tensor, "B L D"],
        normed: Float[Tensor, "B L D"],
        rotation: Rotation,
        key_BHSK: Float[Tensor, "B H S K"],
        value_BHSK: Float[Tensor, "B H S K"],
    ) -> Float[Tensor, "B L D"]:
        shape = x.shape[1], key_BHSK.shape[2]
        causal = torch.ones(shape, dtype=torch.bool, device=x.device).tril(shape[1] - shape[0])
        return layer.some(x, normed, key_BHSK, value_BHSK, visible=causal[None, None], rotation=rotation)

    parts = []
    for rows in blocks(x.shape[1], block):
        seen = key_BHTK[..., : rows.stop, :], value_BHTK[..., : rows.stop, :]
        parts.append(checkpoint(up, x[:, rows], normed[:, rows], rotation.some(rows), *seen, use_reentrant=False))
    return torch.cat(parts, dim=1)


def blocks(length: int, block: int) -> list[slice]:
    """The rows of each block; the last may be shorter."""
    return [slice(first, min(first + block, length)) for first in range(0, length, block)]
