"""On a GPU, where there is one: gradients equal a plain loop's and the CPU's, and a run trains, goes on and writes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    MODELS,
    SEEDED,
    Case,
    assert_same,
    irregular,
    largest_relative_difference,
    llama,
    memformer,
    outcome,
    outcome_in_groups,
    plain_loop,
    train_on,
)
from torch import Tensor, nn

from memformer_pl.contract import SegmentModel
from memformer_pl.gradients.rollout import GRADIENTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

Build = Callable[..., SegmentModel]
EXACT = ["replay", "sparse_replay", "bptt", "checkpointed"]


def rollout(build: Build, *, dropout: float, device: str, seeded: bool = False) -> Case:
    """Three irregular segments, entered in the middle of documents, with a graph that leads out of the rollout."""
    model = build(dropout=dropout).to(device)
    segments = [each._replace(seeds=torch.tensor([t]) if seeded else None) for t, each in enumerate(irregular(4))]
    first, *rest = (segment.to(torch.device(device)) for segment in segments)
    return train_on(model, rest, model(first, model.initial_state(len(first.document_start)))[1])


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Build:
    return MODELS[request.param]


@pytest.mark.parametrize("name", EXACT)
def test_gradients_equal_a_plain_loop_with_dropout(build: Build, name: str) -> None:
    case = partial(rollout, build, dropout=0.2, device="cuda")
    got, stream = outcome(GRADIENTS[name], case), torch.cuda.get_rng_state()
    assert_same(got, outcome(plain_loop, case))
    assert torch.equal(stream, torch.cuda.get_rng_state())


@pytest.mark.parametrize("group", [2, 3])
def test_decoders_in_groups_equal_a_plain_loop_with_dropout(group: int) -> None:
    case = partial(rollout, memformer, dropout=0.2, device="cuda")
    assert_same(outcome_in_groups(group, case), outcome(plain_loop, case))


def test_rows_that_grow_are_stored_once_and_get_the_gradient_of_a_plain_loop() -> None:
    model = llama()
    growing = [model.growing.get(name) for name in model.initial_state(1)._fields]
    case = partial(rollout, llama, dropout=0.2, device="cuda")
    assert_same(outcome(partial(GRADIENTS["replay"], growing=growing), case), outcome(plain_loop, case))


@pytest.mark.parametrize("name", ["replay", "sparse_replay", "checkpointed"])
def test_a_step_may_take_its_segments_to_the_gpu_itself_and_begin_without_a_state(name: str) -> None:
    layer, drop = nn.Linear(64, 64, device="cuda"), nn.Dropout(0.5)

    def step(numbers: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        numbers = numbers.cuda()
        state = drop(layer(numbers if state is None else numbers + state).tanh())
        return state.square().sum(), state

    grads = []
    for method in (name, "bptt"):
        torch.manual_seed(0)
        segments = list(torch.randn(3, 64))
        GRADIENTS[method](step, segments, None)
        grads.append(layer.weight.grad)
        layer.weight.grad = layer.bias.grad = None
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("build", SEEDED.values(), ids=SEEDED.keys())
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_those_of_the_cpu_and_seeds_drop_the_same_entries(build: Build, dropout: float) -> None:
    """To six digits: sines and cosines of distances are of single precision, and not the same in the last."""
    on_gpu, on_cpu = (
        outcome(GRADIENTS["replay"], partial(rollout, build, dropout=dropout, device=device, seeded=True))
        for device in ("cuda", "cpu")
    )
    grads = {name: None if grad is None else grad.cpu() for name, grad in on_gpu.grads.items()}
    assert largest_relative_difference(grads, on_cpu.grads) < 1e-6
    torch.testing.assert_close(on_gpu.loss.cpu(), on_cpu.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_trains_resumes_and_generates(command: Callable[..., Any], small: Path, precision: str) -> None:
    options = ["--config", small, "--trainer.accelerator", "gpu", "--trainer.precision", precision]
    assert command("fit", *options, "--trainer.max_steps", 2).code == 0
    assert command("fit", *options, "--ckpt_path", "last").code == 0
    last = small.parent / "run" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True, map_location="cpu")["global_step"] == 4
    written = command("generate", "--ckpt_path", last, "--device", "cuda", "--prompt", "ab", "--length", 8)
    assert written.code == 0
    assert written.output
