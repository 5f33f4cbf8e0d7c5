"""Losses by document are sums in double precision, and the figures are theirs."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from memformer_pl.contract import Segment, SegmentOutput
from memformer_pl.layers import output_from_logits
from memformer_pl.training.metrics import DocumentLosses, accuracy_by_group, compute_metrics, exact_by_group

IGNORED = -100


def output_of(losses: list[list[float]], correct: list[list[int]]) -> SegmentOutput:
    return SegmentOutput(torch.tensor(losses), torch.tensor(correct).bool(), torch.zeros(()))


def segment_of(present: list[list[int]]) -> Segment:
    there = torch.tensor(present).bool()
    return Segment(torch.zeros(there.shape, dtype=torch.int64), there, torch.zeros(len(there), dtype=torch.bool))


def guesses(scale: float) -> tuple[Tensor, Segment]:
    """Logits about random tokens, some of which are absent."""
    torch.manual_seed(0)
    segment = Segment(torch.randint(7, (3, 5)), torch.rand(3, 5) < 0.7, torch.zeros(3, dtype=torch.bool))
    return scale * torch.randn(3, 5, 7), segment


def both_perplexities(logits: Tensor, segment: Segment) -> tuple[float, float]:
    """Ours and that of torchmetrics."""
    ours, theirs = DocumentLosses(3), Perplexity(ignore_index=IGNORED)
    ours.update(output_from_logits(logits, segment), segment, torch.arange(3))
    theirs.update(logits, segment.tokens.where(segment.token_mask, IGNORED))
    one = torch.ones(3).double()
    return compute_metrics(ours.compute(), one, one)["perplexity"], float(theirs.compute())


def test_perplexity_is_that_of_torchmetrics() -> None:
    ours, theirs = both_perplexities(*guesses(scale=1.0))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_perplexity_is_finite_where_that_of_torchmetrics_is_not() -> None:
    ours, theirs = both_perplexities(*guesses(scale=100.0))
    assert math.isinf(theirs)
    assert math.isfinite(ours)


def test_a_document_is_exact_if_all_its_targets_are_right() -> None:
    """Groups 0: two documents, one with an error; 1: one not read, one exact; 2: none read."""
    tokens, correct = torch.tensor([2.0, 2.0, 0.0, 1.0, 0.0]), torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0])
    totals, groups = torch.stack((torch.zeros(5), tokens, correct)).double(), torch.tensor([0, 0, 1, 1, 2])
    exact, accuracy = exact_by_group(totals, groups), accuracy_by_group(totals, groups)
    assert (exact[0], exact[1], math.isnan(exact[2])) == (0.5, 1.0, True)
    assert (accuracy[0], accuracy[1], math.isnan(accuracy[2])) == (0.75, 1.0, True)


def test_perplexity_is_infinite_where_no_double_holds_it() -> None:
    found = compute_metrics(
        torch.tensor([[1000.0], [1.0], [0.0]]).double(), torch.ones(1).double(), torch.ones(1).double()
    )
    assert found["loss"] == 1000.0
    assert found["perplexity"] == found["word_perplexity"] == math.inf


def test_nats_tokens_and_right_answers_are_summed_by_document() -> None:
    # Documents 0 and 2 are read in two lanes each, at once and one after the other; a lane of -1 reads none.
    metric = DocumentLosses(3)
    metric.update(
        output_of([[1.0, 2.0], [4.0, 0.0], [8.0, 16.0]], [[1, 1], [0, 0], [0, 1]]),
        segment_of([[1, 1], [1, 0], [1, 1]]),
        torch.tensor([2, 0, 2]),
    )
    metric.update(
        output_of([[32.0, 64.0], [128.0, 256.0], [0.0, 0.0]], [[1, 1], [1, 0], [0, 0]]),
        segment_of([[1, 1], [1, 1], [0, 0]]),
        torch.tensor([-1, 0, 0]),
    )
    assert metric.compute().tolist() == [[388.0, 0.0, 27.0], [3.0, 0.0, 4.0], [1.0, 0.0, 3.0]]
    metric.reset()
    metric.update(output_of([[1.0]], [[1]]), segment_of([[1]]), torch.tensor([1]))
    assert metric.compute().tolist() == [[0.0, 1.0, 0.0]] * 3


def test_metrics_by_hand() -> None:
    # 6 ln 2 nats over 4 tokens, 3 bytes, 2 words: 1.5 bits a token, 2 a byte, 3 a word; 1 token of 4 was right.
    nats, tokens, correct = [2 * math.log(2), 4 * math.log(2)], [1.0, 3.0], [0.0, 1.0]
    totals = torch.tensor([nats, tokens, correct], dtype=torch.float64)
    sizes, words = (torch.tensor(numbers, dtype=torch.float64) for numbers in ([1.0, 2.0], [0.0, 2.0]))
    by_hand = {"loss": 1.5 * math.log(2), "perplexity": 2**1.5, "accuracy": 0.25, "bits_per_byte": 2.0}
    assert compute_metrics(totals, sizes, words) == pytest.approx({**by_hand, "word_perplexity": 8.0}, rel=1e-12)
    assert compute_metrics(totals, sizes, torch.zeros(2).double()) == pytest.approx(by_hand, rel=1e-12)


def test_what_nothing_was_read_for_has_no_figure() -> None:
    totals, sizes, words = (torch.tensor(values).double() for values in ([[0.0], [0.0], [0.0]], [5.0], [1.0]))
    assert compute_metrics(totals, sizes, words) == {}
    totals[1] = 4
    assert set(compute_metrics(totals, sizes * 0, words * 0)) == {"loss", "perplexity", "accuracy"}
    assert set(compute_metrics(totals, sizes, words)) == {
        "loss",
        "perplexity",
        "accuracy",
        "bits_per_byte",
        "word_perplexity",
    }


def test_more_is_summed_than_single_precision_can_count() -> None:
    metric = DocumentLosses(1)
    for nats in (2.0**24, 1.0, 1.0):
        metric.update(output_of([[nats]], [[0]]), segment_of([[1]]), torch.tensor([0]))
    assert float(metric.compute()[0]) == 2.0**24 + 2
    assert torch.tensor(2.0**24) + 1 == 2.0**24


def test_outputs_in_half_precision_are_summed_in_double() -> None:
    metric, losses = DocumentLosses(1), torch.full((1, 1000), 2.0 + 2**-6).bfloat16()
    segment = segment_of([[1] * 1000])
    metric.update(SegmentOutput(losses, segment.token_mask, torch.zeros(())), segment, torch.tensor([0]))
    assert float(metric.compute()[0]) == 1000 * (2.0 + 2**-6)


def test_a_model_in_half_precision_leaves_the_sums_in_double() -> None:
    module = nn.ModuleDict({"losses": DocumentLosses(2), "layer": nn.Linear(1, 1)}).bfloat16()
    assert module["layer"].weight.dtype == torch.bfloat16
    assert module["losses"].nats.dtype == torch.float64
    assert module["losses"].tokens.dtype == torch.int64
