"""A weight of each token multiplies what it costs in a gradient, and nothing else."""

import pytest
import torch
from models import LANES, LENGTH, MODELS, irregular, make_segment
from torch import Tensor

from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, concat_segments
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rollout import GRADIENTS, add_gradient


def cost(output: SegmentOutput) -> Tensor:
    return output.token_losses.sum()


def weighed(count: int) -> list[Segment]:
    """Segments with weights, some of them negative and some zero, but one segment without."""
    random = torch.Generator().manual_seed(3)
    segments = []
    for number, segment in enumerate(irregular(count)):
        weights = torch.randn(segment.tokens.shape, generator=random, dtype=torch.float64)
        weights[0, 0] = 0.0
        segments.append(segment if number == 1 else segment._replace(weights=weights))
    return segments


def by_hand(model: SegmentModel, segments: list[Segment]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of a plain loop, and its gradient."""
    state, total = model.initial_state(LANES), torch.zeros((), dtype=torch.float64)
    for segment in segments:
        output, state = model(segment, state)
        weights = 1.0 if segment.weights is None else segment.weights
        total = total + (output.token_losses * weights).sum()
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "gradient", "group"),
    [
        *(("memformer", gradient, 1) for gradient in sorted(GRADIENTS) if gradient != "truncated"),
        ("memformer", "replay", 2),
        ("lstm", "replay", 1),
        ("transformer xl", "truncated", 1),
        ("transformer xl", "truncated", 2),
    ],
)
def test_every_gradient_weighs_the_losses_of_tokens(name: str, gradient: str, group: int) -> None:
    segments = weighed(4)
    expected, grads = by_hand(MODELS[name](), segments)
    model = MODELS[name]()
    loss, _ = add_gradient(model, cost, segments, model.initial_state(LANES), gradient=gradient, decoder_group=group)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for parameter, p in model.named_parameters():
        if parameter in grads:
            torch.testing.assert_close(p.grad, grads[parameter], rtol=1e-10, atol=1e-11)


def test_the_output_of_a_model_has_plain_losses() -> None:
    model, plain = MODELS["memformer"](), make_segment([5, 3])
    state = model.initial_state(2)
    weights = torch.full(plain.tokens.shape, 7.0)
    for a, b in zip(model(plain, state)[0], model(plain._replace(weights=weights), state)[0], strict=True):
        assert torch.equal(a, b)


def test_concatenated_segments_have_weights_of_one_where_they_had_none() -> None:
    plain = make_segment([5, 3])
    assert concat_segments([plain, plain]).weights is None
    weights = torch.full(plain.tokens.shape, 7.0)
    joined = concat_segments([plain, plain._replace(weights=weights)]).weights
    assert joined is not None
    assert joined.tolist() == [[1.0] * LENGTH] * 2 + [[7.0] * LENGTH] * 2


def test_weights_of_another_shape_or_kind_are_refused() -> None:
    model, segment = MODELS["lstm"](), make_segment([5, 3])
    state = model.initial_state(2)
    with pytest.raises(UsageError, match=r"segment.weights must have the shape \[2, 5\], got \[2, 4\]"):
        model(segment._replace(weights=torch.ones(2, 4)), state)
    with pytest.raises(TypeError, match=r"segment.weights must be a tensor of a floating-point dtype"):
        model(segment._replace(weights=torch.ones(2, 5).long()), state)
