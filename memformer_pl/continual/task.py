"""Train a network on classes that arrive task by task, and evaluate it after each on all classes so far.

B  images of a batch     C  channels     Y, X  rows and columns
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from lightning import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.continual.backbones import Backbone, ConvNet
from memformer_pl.continual.exemplars import METHODS, MethodName, exemplars_for
from memformer_pl.continual.net import ExpandingNet, Scores
from memformer_pl.continual.sequence import Batch, TaskSequence
from memformer_pl.errors import DivergedError, OptionError, UsageError
from memformer_pl.gradients.rng import RandomState
from memformer_pl.training import checkpoint_io
from memformer_pl.training.metrics import evaluation_mode
from memformer_pl.training.records import Recorded
from memformer_pl.training.run_folder import check_folder
from memformer_pl.training.trainer_checks import check_trainer_arguments

KEY = "continual"
"""Entry, in what this package adds to a checkpoint, that holds the tasks so far."""
MOMENTUM = 0.9
FALLS = (80 / 170, 150 / 170)
"""Shares of a task's epochs after which the learning rate falls to a tenth."""


class ContinualTask(Recorded):
    """Learn classes task by task, with what a method keeps under a budget in bytes (Zhou et al., arXiv 2205.13218).

    ``memo`` shares the shallow part of its network and adds a deep part for each task, ``der`` adds a whole network;
    both train with an auxiliary head, and align the weights of their head after each task but the first. ``replay`` and
    ``fine_tuning`` train one network on. All but ``fine_tuning`` see images of old classes again: as many as the budget
    leaves room for beside the stored model, chosen by herding, the same number of each class. ``joint`` sees all again,
    at any price: what no budget limits.

    Alignment expects new classes to have the larger weights, as long training on few old images makes them. After few
    epochs theirs are the smaller ones, and alignment makes the network forget: see ``experiments/continual/README.md``.

    The loss is the cross-entropy over all classes so far, plus that of the auxiliary head. Each task begins with a new
    optimizer, SGD with momentum 0.9, whose learning rate falls to a tenth after 80/170 and 150/170 of its epochs.

    Ours: the model is counted as large as it is after the last task, so that the number of exemplars is the same from
    task to task. Images are not augmented. All tasks have equally many epochs.

    Args:
        backbone: What the network is made of.
        method: What is kept from task to task.
        align: Whether ``memo`` and ``der`` align their head.
        budget: Bytes of the stored model and the exemplars together, for methods that keep exemplars.
        learning_rate: At the beginning of a task.
        weight_decay: Of all weights that learn.

    Raises:
        UsageError: A value is out of range.
    """

    counted = "images"

    def __init__(
        self,
        *,
        backbone: Backbone | None = None,
        method: MethodName = "memo",
        align: bool = True,
        budget: int | None = None,
        learning_rate: float = 0.1,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise UsageError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} must be at least 0, got {value}")
        self.automatic_optimization = False
        self.backbone = backbone if backbone is not None else ConvNet()
        self.method: MethodName = method
        self.align = align
        self.budget, self.learning_rate, self.weight_decay = budget, learning_rate, weight_decay
        self.net: ExpandingNet
        self.accuracies: list[float] = []
        """After each task: the share of the test images of all classes so far that are recognized."""
        self._random: RandomState | None = None

    @property
    def data(self) -> TaskSequence:
        """The tasks of the run.

        Raises:
            TypeError: The trainer has another data module, or none.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TaskSequence):
            raise TypeError(f"ContinualTask needs a TaskSequence as datamodule, got {type(data).__name__}")
        return data

    @staticmethod
    def check_trainer(trainer: Trainer) -> None:
        """Refuse several processes, and several epochs of Lightning.

        Raises:
            OptionError: Says which option, and what to set.
        """
        if trainer.world_size > 1:
            raise OptionError(f"tasks are learned in one process, got {trainer.world_size}: set trainer.devices to 1")
        if trainer.max_epochs != 1:
            raise OptionError(
                f"trainer.max_epochs must be 1, which is all tasks, got {trainer.max_epochs}: data.epochs says how "
                "often the images of a task are seen"
            )

    def setup(self, stage: str) -> None:
        """Build the network of the first task, and work out how many exemplars the budget leaves room for.

        Raises:
            UsageError: The budget does not fit the method, the images do not fit the network, or the trainer is not
                supported.
        """
        check_trainer_arguments(self.trainer)
        self.check_trainer(self.trainer)
        if self.backbone.channels != self.data.channels:
            raise UsageError(f"images have {self.data.channels} channels, the backbone takes {self.backbone.channels}")
        least = 2 << self.backbone.halvings  # of one pixel a batch norm learns nothing, and refuses a single image
        if min(self.data.images.shape[1:]) < least:
            raise UsageError(
                f"images have {self.data.images.shape[1:]} pixels, and the backbone halves rows and columns "
                f"{self.backbone.halvings} times, which needs {least}: give it fewer convolutions"
            )
        checkpoint_io.install(self.trainer.strategy)
        self._begin([len(self.data.tasks[0])], accuracies=[])
        model_bytes = self.net.stored_bytes(len(self.data.tasks))
        image_bytes = self.data.image_bytes
        self.data.capacity = exemplars_for(self.method, self.budget, model_bytes=model_bytes, image_bytes=image_bytes)
        if stage == TrainerFn.FITTING:
            room = "all images" if self.data.capacity is None else f"room for {self.data.capacity:,} exemplars"
            rank_zero_info(f"{self.method}: a model of {model_bytes:,} bytes, and {room} of {image_bytes:,} bytes")

    def on_fit_start(self) -> None:
        """Refuse the folder of another run; only now does Lightning know which checkpoint this run resumes from."""
        check_folder(self.trainer, resume_from=self.trainer.ckpt_path)

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of the present task."""
        learning = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        return SGD(learning, lr=self.learning_rate, momentum=MOMENTUM, weight_decay=self.weight_decay)

    def on_train_start(self) -> None:
        """Continue the random stream of the checkpoint, if this run resumes from one."""
        if self._random is not None:
            self._random.restore()
        self._random = None
        self.net.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Begin a task with its first batch; set the learning rate."""
        if batch.task == len(self.net.sizes):
            self.net.grow(len(self.data.tasks[batch.task]))
            self.trainer.optimizers = [self.configure_optimizers()]
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate * 0.1 ** sum(batch.share >= fall for fall in FALLS)

    def training_step(self, batch: Batch) -> None:
        """Take a step; after the last of a task, evaluate and choose exemplars.

        Raises:
            DivergedError: The loss is not finite, or after the last step of a task a weight.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        loss = self._loss(self.net(batch.images), batch.targets)
        if not loss.isfinite():
            raise DivergedError(f"training has diverged: the loss of task {batch.task + 1} is {float(loss.detach())}")
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train/loss", loss, prog_bar=True)
        if batch.last:
            self._end_task()

    def _loss(self, scores: Scores, targets: Int64[Tensor, " B"]) -> Tensor:
        loss = F.cross_entropy(scores.logits, targets)
        if scores.auxiliary is None:
            return loss
        return loss + F.cross_entropy(scores.auxiliary, auxiliary_targets(targets, known=self.net.known))

    def _end_task(self) -> None:
        """Align the head, evaluate on all classes so far, and choose exemplars."""
        tasks, classes = len(self.net.sizes), sum(self.net.sizes)
        if not all(bool(parameter.isfinite().all()) for parameter in self.net.parameters()):
            raise DivergedError(f"training has diverged: after task {tasks} a weight is not finite")
        if self.align and self.net.auxiliary is not None:
            self.net.align()
        with torch.no_grad(), evaluation_mode(self.net):
            right = [self._right(batch.images, batch.targets) for batch in self.data.tested(classes)]
            self.data.keep(classes, lambda images: self.net.extract(images.to(self.net.head.weight)))
        self.accuracies.append(float(torch.cat(right).double().mean()))
        for logger in self.loggers:
            logger.log_metrics({"test/accuracy": self.accuracies[-1]}, step=self.global_step)
        rank_zero_info(
            f"Task {tasks} of {len(self.data.tasks)}: accuracy {self.accuracies[-1]:.4f} on {classes} classes, "
            f"{sum(map(len, self.data.exemplars)):,} exemplars"
        )

    def test_step(self, batch: Batch) -> None:
        """Evaluate test images of the classes that the network knows."""
        seen = batch.targets < sum(self.net.sizes)
        if seen.any():
            right = self._right(batch.images[seen], batch.targets[seen])
            self.log("test/accuracy", right.double().mean(), batch_size=len(right))

    def _right(self, images: Float[Tensor, "B C Y X"], targets: Int64[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Whether each image is recognized, among all classes so far."""
        scores: Scores = self.net(images.to(self.net.head.weight))
        return torch.eq(scores.logits.argmax(1).cpu(), targets.cpu())

    def _begin(self, sizes: list[int], *, accuracies: list[float]) -> None:
        """Build the network after so many tasks."""
        method = METHODS[self.method]
        net = ExpandingNet(self.backbone, sizes=sizes, shares=method.shares, grows=method.grows)
        # Lightning converts only after it has loaded a checkpoint, whose weights would be rounded on the way
        if self._trainer is not None:
            self.trainer.precision_plugin.convert_module(net)
        self.net = net
        self.accuracies = accuracies

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save: the tasks so far, and the random streams."""
        checkpoint[checkpoints.KEY] = {
            "format": checkpoints.FORMAT,
            "model": self.backbone.config(),
            KEY: {
                "method": self.method,
                "sizes": self.net.sizes,
                "accuracies": self.accuracies,
                "random": tuple(RandomState.capture(next(self.net.parameters()))),
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Grow the network to the size of the checkpoint's.

        Raises:
            UsageError: This task did not write the checkpoint; says which value differs.
        """
        saved = self.check(checkpoint)
        self._begin(list(saved["sizes"]), accuracies=list(saved["accuracies"]))
        self._random = RandomState(*saved["random"])

    def check(self, checkpoint: object) -> Mapping[str, Any]:
        """Return what a task like this one added to a checkpoint.

        Raises:
            UsageError: The file is foreign, or holds another backbone or method; says which value differs.
        """
        added = checkpoints.ours(checkpoint)
        if KEY not in added:
            raise UsageError("the checkpoint holds a sequence model, not a network of this command")
        differing = self.backbone.differences(added["model"])
        if (method := added[KEY]["method"]) != self.method:
            differing.append(f"method (was {method!r}, is {self.method!r})")
        if differing:
            raise UsageError(f"the checkpoint holds another network, and cannot be loaded: {', '.join(differing)}")
        saved: Mapping[str, Any] = added[KEY]
        return saved

    def read_in(self, batch: Batch) -> Tensor:
        """Images of a batch."""
        return torch.tensor(len(batch.targets), device=batch.targets.device)

    def facts(self, counts: Mapping[str, int | float]) -> Mapping[str, Any]:
        """What was stored, and for how many bytes."""
        exemplars, model = sum(map(len, self.data.exemplars)), self.net.stored_bytes(len(self.net.sizes))
        return {
            "model": self.backbone.config(),
            "parameters": sum(parameter.numel() for parameter in self.net.parameters()),
            "exemplars": exemplars,
            "stored_bytes": model + exemplars * self.data.image_bytes,
        }

    def results(self) -> Mapping[str, float]:
        """The accuracy after each task, after the last, and their mean."""
        if not self.accuracies:
            return {}
        after = {f"test/after/{number}": value for number, value in enumerate(self.accuracies, 1)}
        return {**after, "test/last": self.accuracies[-1], "test/mean": sum(self.accuracies) / len(self.accuracies)}


def auxiliary_targets(targets: Int64[Tensor, " B"], *, known: int) -> Int64[Tensor, " B"]:
    """Targets of the auxiliary head: 0 for every known class, and 1 + its index for a new one.

    Args:
        targets: Places of classes in the order of learning.
        known: Number of classes of the tasks before.
    """
    return (targets - known + 1).clamp(min=0)
