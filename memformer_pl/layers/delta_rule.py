"""Linear recurrences whose memory is a matrix for each head: decayed and written at every token, computed by chunks.

B  lanes     H  heads     L  tokens     C  tokens of a chunk     K  width of a key     W  width of a value
G  decays of a head: 1, or one for each entry of a key
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.errors import UsageError, require_sizes


class Writes(NamedTuple):
    """What each token writes, and what its memory loses before."""

    keys: Float[Tensor, "B H L K"]
    values: Float[Tensor, "B H L W"]
    strength: Float[Tensor, "B H L 1"]
    """Step width of the write."""
    log_decay: Float[Tensor, "B H L G"]
    """Logarithm of the share of memory that is left, at most 0."""

    def masked(self, token_mask: Bool[Tensor, "B L"]) -> "Writes":
        """These writes, where absent tokens neither write nor decay."""
        exists = rearrange(token_mask, "B L -> B 1 L 1")
        return self._replace(strength=self.strength.where(exists, 0.0), log_decay=self.log_decay.where(exists, 0.0))

    def chunks(self, chunk: int, *, like: Tensor) -> Iterator["Writes"]:
        """The writes of ``chunk`` tokens after another, of the dtype of ``like``; the last chunk may be shorter."""
        parts = zip(*(torch.split(field.to(like.dtype), chunk, dim=2) for field in self), strict=True)
        return (Writes(*part) for part in parts)


class Decay(NamedTuple):
    """Products of decays within a chunk."""

    from_start: Float[Tensor, "B H C G"]
    """From before the chunk up to each token."""
    between: Float[Tensor, "B H C C G"]
    """From behind a token (second axis) up to another (first axis); 0 where the second stands behind the first."""
    to_end: Float[Tensor, "B H C G"]
    """From behind each token to the end of the chunk."""
    whole: Float[Tensor, "B H G 1"]
    """From before the chunk to its end."""


def require_chunk(chunk: int | None, *, segment_length: int) -> None:
    """Refuse a chunk that no segment fills.

    Raises:
        UsageError: It is below 1, or above ``segment_length``.
    """
    if chunk is None:
        return
    require_sizes(chunk=chunk)
    if chunk > segment_length:
        raise UsageError(f"chunk must be at most segment_length={segment_length}, got {chunk}: lower it, or set null")


def read_and_write(
    memory: Float[Tensor, "B H K W"], queries: Float[Tensor, "B H L K"], writes: Writes, *, corrects: bool, chunk: int
) -> tuple[Float[Tensor, "B H L W"], Float[Tensor, "B H K W"]]:
    """Let each token decay and write memory, and then read it.

    At each token ``S <- a S``, then ``S <- S + b k (v - S^T k)^T``, or ``S <- S + b k v^T`` without correction; it
    reads ``S^T q``. Within a chunk, the corrected values solve a triangular system (Yang et al. 2024, arXiv 2406.06484,
    section 3; with decay arXiv 2412.06464, section 3.3). The results of any chunk are those of the loop over tokens, to
    rounding. Computed in the dtype of ``memory``, under autocast too.

    Args:
        memory: Before the first token.
        queries: What each token reads with.
        writes: What each token writes.
        corrects: Whether a write replaces what memory holds under its key, and not only adds to it.
        chunk: Number of tokens that are computed at once; the cost grows with it, the number of operations shrinks.

    Returns:
        What each token reads, and memory after the last.
    """
    read = []
    with torch.autocast(memory.device.type, enabled=False):
        parts = zip(torch.split(queries.to(memory.dtype), chunk, dim=2), writes.chunks(chunk, like=memory), strict=True)
        for query, part in parts:
            decay = decays(part.log_decay)
            updates, next_memory = _write(memory, part, decay, corrects=corrects)
            before = (query * decay.from_start) @ memory
            read.append(before + _scores(query, part.keys, decay.between) @ updates)
            memory = next_memory
    return torch.cat(read, dim=2), memory


def write_only(
    memory: Float[Tensor, "B H K W"], writes: Writes, *, corrects: bool, chunk: int
) -> Float[Tensor, "B H K W"]:
    """The memory that :func:`read_and_write` returns, bit for bit."""
    with torch.autocast(memory.device.type, enabled=False):
        for part in writes.chunks(chunk, like=memory):
            _, memory = _write(memory, part, decays(part.log_decay), corrects=corrects)
    return memory


def _write(
    memory: Float[Tensor, "B H K W"], part: Writes, decay: Decay, *, corrects: bool
) -> tuple[Float[Tensor, "B H C W"], Float[Tensor, "B H K W"]]:
    """What the tokens of a chunk add under their keys, and memory after them."""
    updates = part.strength * part.values
    if corrects:
        updates = updates - part.strength * ((part.keys * decay.from_start) @ memory)
        overlap = (part.strength * _scores(part.keys, part.keys, decay.between)).tril(-1)
        updates = torch.linalg.solve_triangular(overlap, updates, upper=False, unitriangular=True)
    return updates, decay.whole * memory + (part.keys * decay.to_end).mT @ updates


def decays(log_decay: Float[Tensor, "B H C G"]) -> Decay:
    """Products as exponentials of sums, each over its own tokens.

    A quotient of two products would be 0 / 0 after strong decay, and a difference of two long sums loses its digits.
    """
    place = torch.arange(log_decay.shape[2] + 1, device=log_decay.device)
    later, same = (place[:, None] > place)[..., None], (place[:, None] == place)[..., None]
    steps = F.pad(log_decay, (0, 0, 1, 0))[:, :, :, None]  # a place before the first token
    sums = steps.where(later, 0.0).cumsum(2).masked_fill(~(later | same), float("-inf"))
    products = sums.exp()
    return Decay(products[:, :, 1:, 0], products[:, :, 1:, 1:], products[:, :, -1, 1:], products[:, :, -1, 0, :, None])


def _scores(
    queries: Float[Tensor, "B H C K"], keys: Float[Tensor, "B H C K"], between: Float[Tensor, "B H C C G"]
) -> Float[Tensor, "B H C C"]:
    """Products of each query with the keys up to its own token, as far as these have not decayed."""
    if between.shape[-1] == 1:
        return (queries @ keys.mT) * between[..., 0]
    return einsum(queries[:, :, :, None] * between, keys, "B H I J K, B H J K -> B H I J")
