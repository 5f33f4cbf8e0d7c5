"""Refuse arguments and callbacks of Lightning that do not work here, and say what to use instead."""

from collections.abc import Iterable
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.trainer.states import TrainerFn

from memformer_pl.contract import SegmentModel
from memformer_pl.data.lanes import LaneLoader, require_lane_loader
from memformer_pl.errors import UsageError

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
STRATEGIES = ("auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
"""Supported strategies, as ``--trainer.strategy`` names them."""
SUPPORTED = (DDPStrategy, SingleDeviceStrategy)
"""Supported classes of strategies, and their subclasses except ``UNSUPPORTED``."""
UNSUPPORTED = (DeepSpeedStrategy, SingleDeviceXLAStrategy, XLAStrategy)
"""Subclasses of ``SUPPORTED`` that split parameters, or run on devices on which nothing was tried."""
CALLBACKS: dict[type[Callback], str] = {
    lightnings.BackboneFinetuning: (
        "SegmentTask has no attribute `backbone`, and its schedule sets the learning rate; derive a callback from "
        "BaseFinetuning that freezes and unfreezes parts of task.model"
    ),
    lightnings.BasePredictionWriter: (
        "SegmentTask has no predict loop; use `python -m memformer_pl predict`, which writes a table"
    ),
    lightnings.BatchSizeFinder: (
        "a checkpoint depends on the number of lanes; set --data.batch_size (in Python SegmentData(batch_size=...))"
    ),
    lightnings.GradientAccumulationScheduler: (
        "SegmentTask takes its steps itself; set --model.accumulate_grad_batches (in Python "
        "SegmentTask(accumulate_grad_batches=...))"
    ),
    lightnings.LearningRateFinder: (
        "the schedule keeps the learning rate that it was built with, so a suggestion has no effect; compare short "
        "runs with different --model.learning_rate (in Python SegmentTask(learning_rate=...))"
    ),
    lightnings.ModelPruning: (
        "a checkpoint does not hold its masks, so a resumed run would differ; prune the trained model with "
        "torch.nn.utils.prune"
    ),
    lightnings.SpikeDetection: (
        "it ends a run with a list of batches to skip, but a rollout cannot be skipped in the middle of a document; "
        "SegmentTask itself skips steps that are not finite, see --model.max_skipped"
    ),
    lightnings.StochasticWeightAveraging: (
        "it replaces the learning-rate schedule, which SegmentTask advances itself; use WeightAveraging or "
        "EMAWeightAveraging"
    ),
}
"""Callbacks of Lightning that have no effect or a wrong one here: why, and what to do instead."""


def check_cuda_graph(trainer: Trainer) -> None:
    """Refuse to record CUDA graphs without a GPU, or in several processes, where nothing was tried."""
    device, processes = trainer.strategy.root_device, trainer.world_size
    if device.type != "cuda" or processes > 1:
        raise UsageError(
            f"cuda_graph needs a GPU and a single process, got {device} and {processes}: set --model.cuda_graph false "
            "(in Python SegmentTask(cuda_graph=False))"
        )


def check_data(data: Any, model: SegmentModel, *, acts: bool) -> None:
    """Refuse data that the model cannot read.

    Args:
        data: A ``SegmentData``.
        model: The model.
        acts: Whether the model plays episodes instead of reading documents.

    Raises:
        UsageError: The data has a larger vocabulary or longer segments than the model, or revisits what it plays.
    """
    for name in ("vocab_size", "segment_length"):
        if (needed := getattr(data, name)) > (limit := getattr(model, name)):
            raise UsageError(f"the data has {name}={needed}, the model {name}={limit}: build it with {needed}")
    revisit = getattr(data, "revisit", None)
    if acts and revisit is not None and revisit.share:
        raise UsageError("a model that acts plays new episodes in every lane: leave out data.revisit")


def check_loader(trainer: Trainer, loader: object, *, shuffle: bool = False) -> LaneLoader:
    """Return a loader, after checks that a ``SegmentData`` makes unnecessary.

    Raises:
        TypeError: It is not a :class:`LaneLoader`.
        UsageError: It shares its lanes among another number of processes, or shuffles where it should not.
    """
    loader, processes = require_lane_loader(loader), trainer.world_size
    if loader.world_size != processes:
        raise UsageError(
            f"the loader shares its lanes among {loader.world_size} processes, but there are {processes}: give the "
            "trainer a SegmentData as datamodule, or each process a LaneLoader of its rank and world_size"
        )
    if loader.shuffle != shuffle:
        use = "training needs" if shuffle else "validation and test need"
        raise UsageError(f"{use} a LaneLoader(shuffle={shuffle}), got shuffle={loader.shuffle}")
    return loader


def check_trainer(*, strategy: str | type, precision: str) -> None:
    """Refuse a strategy or a precision with which training would fail or give wrong numbers.

    Args:
        strategy: Its name for ``--trainer.strategy``, or its class.
        precision: Its name for ``--trainer.precision``.

    Raises:
        UsageError: The precision scales losses, which would compound over segments; or the strategy splits parameters,
            which manual optimization does not support.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision!r} is not supported: choose one of {', '.join(PRECISIONS)} (float16 needs its loss "
            "scaled, which would compound over the segments of a rollout)"
        )
    if isinstance(strategy, str):
        name, known = strategy, strategy in STRATEGIES
    else:
        name, known = strategy.__name__, issubclass(strategy, SUPPORTED) and not issubclass(strategy, UNSUPPORTED)
    if not known:
        raise UsageError(
            f"strategy {name!r} is not supported: choose auto or ddp (others split parameters or gradients, which "
            "manual optimization through segments does not allow)"
        )


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse ``CALLBACKS`` and callbacks derived from them.

    Raises:
        UsageError: Says which callback, why, and what to do instead.
    """
    for callback in callbacks:
        for kind, why in CALLBACKS.items():
            if isinstance(callback, kind):
                raise UsageError(f"callback {type(callback).__name__} is not supported: {why}")


def check_trainer_arguments(trainer: Trainer) -> None:
    """Refuse arguments and callbacks that have no effect or a wrong one here, before anything is read or written.

    Raises:
        UsageError: Says which argument or callback, why, and what to do instead.
    """
    check_trainer(strategy=type(trainer.strategy), precision=str(trainer.precision))
    check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]  # Lightning sets it elsewhere
    for name, given, why in _refused_arguments(trainer):
        raise UsageError(f"trainer.{name} is {given!r}, which is not supported: {why}")
    if trainer.state.fn == TrainerFn.PREDICTING:
        raise UsageError(
            "trainer.predict is not supported, SegmentTask has no predict loop: use `python -m memformer_pl predict`, "
            "or memformer_pl.Session(load_pretrained(checkpoint).model) to read token by token"
        )


def _refused_arguments(trainer: Trainer) -> Iterable[tuple[str, object, str]]:
    """Name, value and reason of each argument of a trainer that is set and not supported."""
    rollouts, clip, limit = trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.limit_predict_batches
    by_norm = "gradients are clipped by the norm of all of them together"
    if rollouts != 1:
        python = f"in Python SegmentTask(accumulate_grad_batches={rollouts})"
        why = f"leave it at 1 and set --model.accumulate_grad_batches {rollouts} ({python})"
        yield "accumulate_grad_batches", rollouts, why
    if clip is not None:
        limit_norm = clip if clip > 0 else float("inf")
        python = f"in Python SegmentTask(gradient_clip_val={limit_norm if clip > 0 else 'math.inf'})"
        why = f"leave it out and set --model.gradient_clip_val {limit_norm} ({python}); {by_norm}"
        yield "gradient_clip_val", clip, why
    if trainer.gradient_clip_algorithm is not None:
        algorithm = str(trainer.gradient_clip_algorithm.value)
        yield "gradient_clip_algorithm", algorithm, f"leave it out; {by_norm}, to at most --model.gradient_clip_val"
    if not trainer.fast_dev_run and (isinstance(limit, int) or limit != 1.0):  # type: ignore[attr-defined]
        yield "limit_predict_batches", limit, "leave it out; SegmentTask has no predict loop"
    if n := trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        why = "leave it at 0; the corpus is packed once, and a new loader would start over instead of continuing"
        yield "reload_dataloaders_every_n_epochs", n, why
    if trainer._accelerator_connector._layer_sync is not None:
        why = "leave it out; batch statistics over processes were never tried with replay: normalize by layer"
        yield "sync_batchnorm", True, why
    if trainer._model_registry is not None:
        why = "leave it out; write a trained model with `python -m memformer_pl export`, and upload the folder"
        yield "model_registry", trainer._model_registry, why
