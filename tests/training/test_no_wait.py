"""Training does not wait for the device: nothing in the loop over rollouts asks for a value that was just computed.

On a CPU every tensor is at hand, so what would wait on a GPU is refused by its name; on a GPU torch itself refuses it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from models import BOUNDED, LENGTH, full
from tasks import documents, small_memformer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import trainer_of

from memformer_pl.callbacks import ProgressLines, RunRecord, SegmentProgressBar
from memformer_pl.contract import checks
from memformer_pl.data import LaneLoader
from memformer_pl.data.revisiting import Revisit
from memformer_pl.gradients.rollout import GRADIENTS, add_gradient
from memformer_pl.training import task as tasks
from memformer_pl.training.arriving import Arriving
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

STEPS = 20
OPERATIONS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
"""Of torch, whoever calls them: their result, or its shape, depends on values."""
METHODS = ("item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__")
"""Of a tensor: on a CPU, some of them call no operation."""


class WaitError(AssertionError):
    """The host would wait for the device."""


class RefusedOperations(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        chosen = [index for index in args[1] if index is not None] if name in ("index", "index_put_") else []
        if name in OPERATIONS or any(index.dtype == torch.bool for index in chosen):
            raise WaitError(name)
        return func(*args, **(kwargs or {}))


class RefusedMethods(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in METHODS and isinstance(args[0], Tensor):
            raise WaitError(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def refused_by_name() -> Iterator[None]:
    with RefusedMethods(), RefusedOperations():
        yield


@contextmanager
def refused_by_torch() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watch(monkeypatch: pytest.MonkeyPatch, refused: Callable[[], Any], *, after: int = 0) -> list[str]:
    """Refuse waits in the loop over rollouts, except in ``Arriving.wait``; return what is done, in order.

    Args:
        monkeypatch: Undoes what is changed.
        refused: A context in which waits raise.
        after: Number of rollouts that may wait first.
    """
    order: list[str] = []
    advance, wait, gradient = _TrainingEpochLoop.advance, Arriving.wait, tasks.add_gradient

    def watched_advance(loop: _TrainingEpochLoop, data_fetcher: Any) -> None:
        if order.count("gradient") < after:
            advance(loop, data_fetcher)
            return
        with refused():
            advance(loop, data_fetcher)

    def watched_wait(arriving: Arriving) -> dict[str, float]:
        order.append("wait")
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return wait(arriving)

    def watched_gradient(*args: Any, **options: Any) -> Any:
        order.append("gradient")
        return gradient(*args, **options)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", watched_advance)
    monkeypatch.setattr(Arriving, "wait", watched_wait)
    monkeypatch.setattr(tasks, "add_gradient", watched_gradient)
    monkeypatch.setattr(checks, "has_values", lambda tensor: False)  # only on a CPU are tokens checked
    return order


def train(
    folder: Path,
    *callbacks: Callback,
    task: SegmentTask | None = None,
    revisit: Revisit | None = None,
    **options: Any,
) -> Trainer:
    """Twenty steps in one epoch, with loggers that write after every rollout, and all that a run may show."""
    sizes = {"batch_size": 2, "segment_length": LENGTH, "horizon": 3}
    read = documents([331, 300, 217, 340, 408, 223, 312, 305])
    defaults: dict[str, Any] = {
        "logger": [CSVLogger(folder, "csv"), TensorBoardLogger(folder, "board")],
        "log_every_n_steps": 1,
        "max_steps": STEPS,
        "limit_val_batches": 0,
        "enable_progress_bar": True,
    }
    # Lightning's monitor copies each rate to the device, and a GPU waits for that
    monitor = [] if options.get("accelerator") == "gpu" else [LearningRateMonitor()]
    trainer = trainer_of(folder, RunRecord(), *monitor, *callbacks, **{**defaults, **options})
    task = task or SegmentTask(model=small_memformer())
    given = LaneLoader(read, **sizes, interleave=2, revisit=revisit)
    trainer.fit(task, given, LaneLoader(read, **sizes, shuffle=False))
    return trainer


def assert_results_are_read_late(order: list[str], rollouts: int) -> None:
    """The first rollout is waited for at once, since metrics must exist; the last, since training ends; every other one
    when the gradient of the next one is enqueued."""
    assert order == ["gradient", "wait", "gradient", *["gradient", "wait"] * (rollouts - 2), "wait"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bar", [lambda: ProgressLines(seconds=0.0), SegmentProgressBar], ids=["lines", "bar"])
def test_twenty_steps_wait_for_nothing_but_the_rollout_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bar: Callable[[], Callback], accumulate: int
) -> None:
    order = watch(monkeypatch, refused_by_name)
    model = small_memformer(dropout=0.2)
    trainer = train(tmp_path, bar(), task=SegmentTask(model=model, accumulate_grad_batches=accumulate, peak_flops=1e9))
    assert trainer.global_step == STEPS
    assert_results_are_read_late(order, STEPS * accumulate)
    assert {"train/loss", "train/gradient_norm", "train/mfu", "bits/byte"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("name", [name for name in BOUNDED if name != "lstm"])
def test_no_model_waits_but_the_lstm_which_packs_its_lanes_and_a_state_that_grows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """After its first rollout, which finds out which buffers are constants. What grows is measured to be compacted."""
    model = BOUNDED[name](dropout=0.2)
    add_gradient(model, lambda o: o.token_losses.sum(), full(2), model.initial_state(2), gradient="replay")
    watch(monkeypatch, refused_by_name)
    assert train(tmp_path, task=SegmentTask(model=model), max_steps=4).global_step == 4


@pytest.mark.parametrize(
    "options",
    [{"decoder_group": 2}, *({"gradient": name} for name in GRADIENTS if name != "replay")],
    ids=lambda options: "=".join(map(str, *options.items())),
)
def test_no_gradient_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any]) -> None:
    watch(monkeypatch, refused_by_name)
    task = SegmentTask(model=small_memformer(dropout=0.2), **options)
    assert train(tmp_path, task=task, max_steps=4).global_step == 4


def test_draws_wait_for_nothing_but_the_losses_of_the_rollout_before_the_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order = watch(monkeypatch, refused_by_name)
    trainer = train(tmp_path, revisit=Revisit(share=0.5, size=4))
    assert trainer.global_step == STEPS
    assert_results_are_read_late(order, STEPS)


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy(),
    "bool": lambda x: bool((x == 0).any()),
    "float": lambda x: float(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.detach().clone().__setitem__(x > 0, torch.zeros(())[None]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "index": lambda x: [0, 1][(x.sum() * 0).long()],
}


@pytest.mark.parametrize(("place", "fault"), [("in the model", "item"), *(("before the step", f) for f in FAULTS)])
def test_a_wait_that_is_planted_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, fault: str
) -> None:
    class Plant(Callback):
        def on_train_start(self, trainer: Trainer, task: SegmentTask) -> None:
            if place == "in the model":
                task.model.writer.register_forward_hook(lambda module, args, output: [FAULTS[fault](args[0])].clear())

        def on_before_optimizer_step(self, trainer: Trainer, task: SegmentTask, optimizer: object) -> None:
            if place == "before the step":
                FAULTS[fault](next(p.grad for p in task.parameters() if p.grad is not None))

    watch(monkeypatch, refused_by_name)
    with pytest.raises(WaitError):
        train(tmp_path, Plant(), max_steps=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_gpu_torch_sees_no_wait_after_the_second_rollout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulate: int
) -> None:
    order = watch(monkeypatch, refused_by_torch, after=2)
    options = {"accelerator": "gpu", "devices": 1, "precision": "32-true"}
    task = SegmentTask(model=small_memformer(dropout=0.2).float(), accumulate_grad_batches=accumulate)
    assert train(tmp_path, ProgressLines(seconds=0.0), task=task, **options).global_step == STEPS
    assert_results_are_read_late(order, STEPS * accumulate)
