"""Losses by document, and the metrics computed from them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn
from torchmetrics import Metric

from memformer_pl.contract import Segment, SegmentOutput


class DocumentLosses(Metric):
    """Sum nats, tokens and correct predictions of each document, in double precision and over all processes.

    A corpus has more tokens than float32 can count. Nats are summed rather than probabilities, which underflow if a
    token costs more than 88 nats.

    Args:
        documents: Number of documents.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    correct: Tensor

    def __init__(self, documents: int) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        self.add_state("nats", torch.zeros(documents, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(documents, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(documents, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: SegmentOutput, segment: Segment, documents: Int[Tensor, " B"]) -> None:
        """Add a segment.

        Args:
            output: Output of the model for the segment.
            segment: The segment.
            documents: Document in each lane; -1 for none.
        """
        # lanes without a document add nothing to the first one: to leave them out, the host would wait for the device
        reads, document = documents >= 0, documents.clamp(min=0)
        nats = output.token_losses.double().sum(1)
        self.nats.index_add_(0, document, torch.where(reads, nats, torch.zeros_like(nats)))
        self.tokens.index_add_(0, document, (segment.target_mask & reads[:, None]).sum(1))
        self.correct.index_add_(0, document, (output.correct & reads[:, None]).sum(1))

    def compute(self) -> Float64[Tensor, "3 documents"]:
        """Nats, tokens and correct predictions of every document."""
        return torch.stack((self.nats, self.tokens.double(), self.correct.double()))


def accuracy_by_group(totals: Float64[Tensor, "3 documents"], groups: Int[Tensor, " documents"]) -> dict[int, float]:
    """Compute the accuracy of each group of documents; NaN for a group of which nothing was read.

    Args:
        totals: From :class:`DocumentLosses`.
        groups: Group of each document.
    """
    sums = {group: totals[1:, groups == group].sum(1).tolist() for group in sorted(set(groups.tolist()))}
    return {group: correct / tokens if tokens else math.nan for group, (tokens, correct) in sums.items()}


def exact_by_group(totals: Float64[Tensor, "3 documents"], groups: Int[Tensor, " documents"]) -> dict[int, float]:
    """Compute the share of documents of each group whose targets are all right: exact match by greedy generation.

    NaN for a group of which nothing was read. A document of which a part was read counts by that part.

    Args:
        totals: From :class:`DocumentLosses`.
        groups: Group of each document.
    """
    read, exact = totals[1] > 0, totals[1] == totals[2]
    return {group: float(exact[read & (groups == group)].double().mean()) for group in sorted(set(groups.tolist()))}


def compute_metrics(
    totals: Float64[Tensor, "3 documents"],
    sizes: Float64[Tensor, " documents"],
    words: Float64[Tensor, " documents"],
    *,
    drawn: bool = False,
) -> dict[str, float]:
    """Compute metrics over all documents together.

    Args:
        totals: From :class:`DocumentLosses`.
        sizes: Bytes of each document.
        words: Words of each document; 0 if it is not text.
        drawn: Whether the model has drawn the targets itself. Then ``loss``, how unsure it was, is the only metric.

    Returns:
        ``loss`` in nats per token, ``perplexity`` per token, ``accuracy``, ``bits_per_byte``, and ``word_perplexity``
        if there are words, which compares models with different tokenizers. Empty if no target was read, as in a
        validation that ends before the first one: NaN would stop a run with ``EarlyStopping``, or count as its best
        checkpoint.
    """
    nats, tokens, correct = totals.sum(1).tolist()
    if not tokens:
        return {}
    if drawn:
        return {"loss": nats / tokens}
    metrics = {"loss": nats / tokens, "perplexity": perplexity(nats / tokens), "accuracy": correct / tokens}
    if sizes.any():
        metrics["bits_per_byte"] = nats / math.log(2) / float(sizes.sum())
    if words.any():
        metrics["word_perplexity"] = perplexity(nats / float(words.sum()))
    return metrics


def perplexity(nats: float) -> float:
    """The perplexity of a mean loss in nats; infinite beyond the range of a double."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and every part of it back into its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
