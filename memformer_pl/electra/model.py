"""Generator and discriminator: two stacks of self-attention in which every token sees every other."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract.config import Configured
from memformer_pl.errors import LARGEST_WIDTH, DivergedError, UsageError, require_sizes
from memformer_pl.layers import BlockConfig, Positions, RotaryPositions, causal_blocks

MASKED = 0.15
"""Share of the tokens of an example that are masked."""


class Corrupted(NamedTuple):
    """Examples in which some tokens were replaced."""

    tokens: Int[Tensor, "B L"]
    bits: Bool[Tensor, "B L"]
    """Whether the token differs from the original. A replacement that equals the original is not one."""


class Encoder(nn.Module):
    """A vector for each token, from all tokens of its example.

    Args:
        vocab_size: Token numbers are below it.
        length: Most tokens of an example.
        dim: Width.
        heads: Must divide ``dim``, into heads of an even width.
        layers: Blocks.
    """

    def __init__(self, *, vocab_size: int, length: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.blocks = causal_blocks(BlockConfig(dim=dim, heads=heads, dropout=0.0), layers=layers)
        self.positions = RotaryPositions(width=dim // heads, first=0, last=length - 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """The vectors, normalised."""
        x, at = self.tokens(tokens), Positions(rotation=self.positions.span(0, tokens.shape[1]))
        for block in self.blocks:
            x = block(x, at)
        out: Tensor = self.norm(x)
        return out


class Electra(Configured):
    """A generator that fills masked places, and a discriminator that says of each token whether it was replaced.

    Source: ELECTRA (Clark et al. 2020), from memory: 15 % of the tokens masked, a generator of a quarter of the width,
    no gradient from the discriminator to the generator. Ours: pre-norm blocks and rotary positions as in this package,
    no dropout, and a table of tokens for each of the two, where ELECTRA has one for both. So the generator does not
    depend on the discriminator, nor on what is replayed.

    Args:
        vocab_size: Size of the vocabulary.
        length: Tokens of an example.
        dim: Width of the discriminator; a multiple of 4.
        heads: Attention heads of each; must divide ``dim / 4``, into heads of an even width.
        layers: Blocks of each.

    Raises:
        UsageError: A size is out of range, or does not divide another.
    """

    def __init__(self, *, vocab_size: int, length: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        require_sizes(most=LARGEST_WIDTH, vocab_size=vocab_size, length=length, dim=dim)
        if dim % 4:
            raise UsageError(f"dim must be a multiple of 4, since the generator has a quarter of it, got {dim}")
        self.vocab_size, self.length, self.dim, self.heads, self.layers = vocab_size, length, dim, heads, layers
        common = {"length": length, "heads": heads, "layers": layers}
        self.generator = Encoder(vocab_size=vocab_size + 1, dim=dim // 4, **common)  # the last token is the mask
        self.to_token = nn.Linear(dim // 4, vocab_size)
        self.discriminator = Encoder(vocab_size=vocab_size, dim=dim, **common)
        self.to_bit = nn.Linear(dim, 1)

    @property
    def masked(self) -> int:
        """Masked places of an example."""
        return max(1, round(MASKED * self.length))

    def corrupt(self, tokens: Int[Tensor, "B L"], random: torch.Generator) -> tuple[Float[Tensor, ""], Corrupted]:
        """Mask some places, and fill them with what the generator draws.

        Args:
            tokens: Examples.
            random: Draws the places and the replacements; on their device.

        Returns:
            The mean nats of the masked tokens, with a graph, and the examples, without.

        Raises:
            DivergedError: The nats are not finite.
        """
        ranks_BL = torch.rand(tokens.shape, generator=random, device=tokens.device).argsort(1)
        place_BP = ranks_BL[:, : self.masked]
        encoded_BLD = self.generator(tokens.scatter(1, place_BP, self.vocab_size))
        logits_BPV = self.to_token(encoded_BLD.gather(1, place_BP[..., None].expand(-1, -1, encoded_BLD.shape[2])))
        loss = F.cross_entropy(logits_BPV.flatten(0, 1), tokens.gather(1, place_BP).flatten())
        if not loss.isfinite():
            raise DivergedError("the generator's loss is not finite: train again with a lower learning rate")
        drawn = torch.multinomial(logits_BPV.detach().softmax(-1).flatten(0, 1), 1, generator=random)
        corrupted_BL = tokens.scatter(1, place_BP, drawn.view_as(place_BP))
        return loss, Corrupted(corrupted_BL, corrupted_BL != tokens)

    def judge(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """The logit of each token to have been replaced."""
        out: Tensor = self.to_bit(self.discriminator(tokens))[..., 0]
        return out


def bit_losses(logits: Float[Tensor, "B L"], bits: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Nats of each bit."""
    return F.binary_cross_entropy_with_logits(logits, bits.to(logits), reduction="none")
