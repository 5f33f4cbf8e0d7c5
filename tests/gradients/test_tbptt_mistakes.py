"""The page "Truncated back-propagation through time in Lightning 2": two models in series, and common mistakes."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule
from tbptt_page import assert_close, definitions, gradients, in_double, trainer, zeros
from torch import Tensor, nn
from torchmetrics import SumMetric

from memformer_pl import GRADIENTS, replay_backward

WHOLE_RUN = True
pytestmark = pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers")


@pytest.fixture
def page() -> SimpleNamespace:
    return definitions()


def in_series(page: SimpleNamespace) -> tuple[tuple[nn.GRU, nn.TransformerDecoderLayer], list[Tensor], tuple[Tensor]]:
    """Both models of the page, its segments and its state, in double precision."""
    page.encode.__globals__["causal"] = page.causal.double()
    models = page.encoder.double(), page.decoder.double()
    gradients(*models)
    return models, [segment.double() for segment in page.segments], (page.state[0].double(),)


def by_one_graph(page: SimpleNamespace, segments: Sequence[Tensor], state: tuple[Tensor]) -> Tensor:
    losses = []
    for segment in segments:
        loss, state = page.step(segment, state)
        losses.append(loss)
    total = torch.stack(losses).sum()
    total.backward()
    return total.detach()


@pytest.mark.parametrize("frozen", ["none", "encoder", "decoder"])
def test_both_models_get_the_gradient_of_one_graph(page: SimpleNamespace, frozen: str) -> None:
    models, segments, state = in_series(page)
    if frozen != "none":
        getattr(page, frozen).requires_grad_(False)
    expected = by_one_graph(page, segments, state), gradients(*models)
    assert sum(grad is not None for grad in expected[1]) == {"none": 22, "encoder": 18, "decoder": 4}[frozen]

    def advance(segment: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
        return page.encode(segment, state)[1]

    losses = [replay_backward(page.step, segments, state, advance=advance)[0]]
    assert_close((losses[0], gradients(*models)), expected)
    for group in (3, 8):
        losses.append(page.replay_in_groups(page.encode, page.decode, segments, state, group=group)[0])
        assert_close((losses[-1], gradients(*models)), expected)
    GRADIENTS["truncated"](page.step, segments, state)
    if frozen == "encoder":
        assert_close(gradients(*models), expected[1])
    else:
        assert not torch.allclose(gradients(page.encoder)[1], expected[1][1])


def test_lightning_counts_the_step_of_each_optimizer(page: SimpleNamespace) -> None:
    class Series(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.encoder, self.decoder = page.encoder, page.decoder

        def training_step(self, rollout: list[Tensor], batch_idx: int) -> None:
            replay_backward(page.step, rollout, page.state)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return page.optimizers

    run = trainer(max_steps=6)
    run.fit(Series(), page.DataLoader([page.segments] * 10, batch_size=None))
    assert run.fit_loop.epoch_loop.batch_progress.current.completed == 3


def simple(page: SimpleNamespace) -> tuple[Any, list[Any], tuple[Tensor, Tensor]]:
    return page.Forecaster(dropout=0.0).double(), in_double(page.data[0]), zeros(page.Forecaster())


def test_a_step_reads_all_segments_but_the_last_twice_and_the_first_last(page: SimpleNamespace) -> None:
    module, rollout, state = simple(page)
    read = []

    def step(number: int, state: tuple[Tensor, ...]) -> Any:
        read.append(number)
        return module.step(rollout[number], state)

    replay_backward(step, range(5), state)
    assert read == [0, 1, 2, 3, 4, 3, 2, 1, 0]


def test_a_detached_sum_in_the_state_counts_each_segment_once(page: SimpleNamespace) -> None:
    module, rollout, state = simple(page)

    def step(segment: Any, state: tuple[Tensor, ...]) -> Any:
        loss, hidden = module.step(segment, state[:2])
        return loss, (*hidden, state[2] + loss.detach())

    loss, last = replay_backward(step, rollout, (*state, torch.zeros(()).double()))
    assert_close(last[2], loss)


def test_a_hidden_state_in_a_module_is_warned_of_and_fails_or_gives_a_wrong_gradient(page: SimpleNamespace) -> None:
    module, rollout, state = simple(page)

    class Stateful(nn.Module):
        def __init__(self, *, cut: bool) -> None:
            super().__init__()
            self.module, self.cut, self.hidden = module, cut, state

        def forward(self, segment: Any, unused: Any) -> Any:
            loss, hidden = self.module.step(segment, self.hidden)
            self.hidden = tuple(field.detach() for field in hidden) if self.cut else hidden
            return loss, unused

    told = r"the step changes Stateful\.hidden, and it runs twice for each segment"
    with (
        pytest.warns(UserWarning, match=told),
        pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"),
    ):
        replay_backward(Stateful(cut=False), rollout, state)
    gradients(module)
    GRADIENTS["truncated"](module.step, rollout, state)
    expected = gradients(module)
    with pytest.warns(UserWarning, match=told):
        replay_backward(Stateful(cut=True), rollout, state)
    assert not torch.allclose(gradients(module)[0], expected[0])


def test_a_metric_in_the_step_counts_twice_and_is_warned_of(page: SimpleNamespace) -> None:
    module, rollout, state = simple(page)
    metric = SumMetric()

    def step(segment: Any, state: tuple[Tensor, ...]) -> Any:
        metric.update(1.0)
        return module.step(segment, state)

    with pytest.warns(UserWarning, match=r"the step changes SumMetric\."):
        replay_backward(step, rollout, state)
    assert metric.compute() == 2 * len(rollout) - 1


def test_a_graph_from_outside_fails_unless_it_is_in_the_state(page: SimpleNamespace) -> None:
    module, rollout, state = simple(page)
    prompt = nn.Linear(3, 1).double()
    outside = prompt(torch.ones(3).double()).exp()

    def step(segment: Any, state: tuple[Tensor, ...]) -> Any:
        loss, hidden = module.step(segment, state[:2])
        return loss * state[2], (*hidden, state[2])

    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        replay_backward(lambda segment, state: (*step(segment, (*state, outside))[:1], state), rollout, state)
    gradients(module, prompt)
    found = []
    for method in ("replay", "bptt"):
        outside = prompt(torch.ones(3).double()).exp()
        GRADIENTS[method](step, rollout, (*state, outside.sum()))
        found.append(gradients(module, prompt))
    assert_close(*found)


def test_detaching_in_the_step_truncates(page: SimpleNamespace) -> None:
    module, rollout, state = simple(page)
    replay_backward(lambda s, state: module.step(s, tuple(field.detach() for field in state)), rollout, state)
    cut = gradients(module)
    GRADIENTS["truncated"](module.step, rollout, state)
    assert_close(cut, gradients(module))


def test_a_second_backward_call_is_refused(page: SimpleNamespace) -> None:
    class Twice(page.Forecaster):  # type: ignore[misc, name-defined]
        def training_step(self, rollout: Any, batch_idx: int) -> None:
            self.manual_backward(self.add_gradient(rollout))

    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
        trainer().fit(Twice(), page.loader)


def test_a_validation_clears_what_is_accumulated(page: SimpleNamespace) -> None:
    cleared = []

    class Validated(page.Trained):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, *_: Any) -> None:
            cleared.append(self.lstm.weight_hh_l0.grad is None)

        def validation_step(self, rollout: Any, batch_idx: int) -> None:
            cleared.append(self.lstm.weight_hh_l0.grad is None)

    run = trainer(val_check_interval=1, limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=0)
    Validated.accumulate = 100
    run.fit(Validated(), page.loader, page.loader)
    assert cleared == [True, True]
