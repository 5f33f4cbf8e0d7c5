"""The Lightning data module of class-incremental learning: classes in tasks, and the batches of all tasks in order.

B  images of a batch     C  channels     Y, X  rows and columns     F  features
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from memformer_pl.continual.exemplars import herd
from memformer_pl.continual.images import LabelledImages, Split
from memformer_pl.errors import UsageError, require_sizes

EVALUATED = 512
"""Images of a batch in evaluation."""


class Batch(NamedTuple):
    """Images of a task, and of old classes that are seen again."""

    images: Float[Tensor, "B C Y X"]
    """From 0, black, to 1."""
    targets: Int64[Tensor, " B"]
    """Places of their classes in the order of learning."""
    task: int
    """From 0."""
    share: float
    """Of the task's epochs that have passed, from 0 to below 1; whole epochs count."""
    last: bool
    """Whether it is the last of its task."""


class TaskSequence(LightningDataModule):
    """Images whose classes arrive in tasks. A run of all tasks is one epoch of Lightning; ``epochs`` counts how often a
    task's images are seen.

    While a task is trained, its batches hold its images and the exemplars that :meth:`keep` has kept of old classes,
    in a new order in each epoch. What is drawn depends on ``seed``, the task and the epoch, and on no stream.

    Args:
        images: The images.
        tasks: The number of tasks, for classes in an order drawn from ``seed``, the first tasks having one more where
            it does not divide their number; or the classes of each task. Classes in none are left out.
        per_class: How many training images of a class to use, the first ones; by default all.
        tested_per_class: How many test images, likewise.
        epochs: How often each image of a task is seen.
        batch_size: Images of a batch; the last of an epoch may be smaller.
        seed: Seed of the order of classes, and of that of images.

    Raises:
        UsageError: A size is out of range; or a class is unknown or in two tasks, or a task has none.
    """

    def __init__(
        self,
        *,
        images: LabelledImages,
        tasks: int | list[list[int]] = 5,
        per_class: int | None = None,
        tested_per_class: int | None = None,
        epochs: int = 5,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        limits = {"per_class": per_class, "tested_per_class": tested_per_class}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        require_sizes(epochs=epochs, batch_size=batch_size, **given)
        require_sizes(least=0, seed=seed)
        self.images = images
        self.tasks = split_classes(tasks, images.classes, seed=seed)
        self.order = [label for task in self.tasks for label in task]
        """Labels in the order of learning."""
        self.limits: dict[Split, int | None] = {"train": per_class, "test": tested_per_class}
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.capacity: int | None = 0
        """Exemplars that fit the budget; None if everything is kept. The task sets it."""
        self.exemplars: list[list[int]] = []
        """Numbers of the training images kept of each old class, the most typical first."""
        self._pixels: dict[Split, UInt8[Tensor, "N C Y X"]] = {}
        self._targets: dict[Split, Int64[Tensor, " N"]] = {}

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.images.shape[0]

    @property
    def image_bytes(self) -> int:
        """Bytes of an image."""
        return int(np.prod(self.images.shape))

    def setup(self, stage: str | None = None) -> None:
        """Read the images of all tasks, and forget exemplars.

        Raises:
            UsageError: A class has no images.
        """
        self.exemplars = []
        splits: tuple[Split, Split] = ("train", "test")
        for split in splits if not self._pixels else ():
            labels = self.images.labels(split)
            members = [np.flatnonzero(labels == label)[: self.limits[split]] for label in self.order]
            for label, found in zip(self.order, members, strict=True):
                if not len(found):
                    raise UsageError(f"class {label} has no image in the split {split}: leave it out of tasks")
            self._pixels[split] = torch.from_numpy(self.images.pixels(split, np.concatenate(members).tolist()))
            places = np.repeat(np.arange(len(members)), [len(found) for found in members])
            self._targets[split] = torch.from_numpy(places)

    def train_dataloader(self) -> "TaskLoader":
        """The batches of all tasks."""
        return TaskLoader(self)

    def test_dataloader(self) -> "EvaluationLoader":
        """The test images of all tasks."""
        return EvaluationLoader(self)

    def tested(self, classes: int | None = None) -> Iterator[Batch]:
        """Yield the test images of the first classes, by default of all."""
        classes = len(self.order) if classes is None else classes
        for numbers in torch.split(torch.nonzero(self._targets["test"] < classes).flatten(), EVALUATED):
            yield self._batch("test", numbers, task=len(self.tasks) - 1, share=0.0, last=False)

    def members(self, place: int) -> list[int]:
        """Numbers of the training images of a class, given its place in the order of learning."""
        found: list[int] = torch.nonzero(self._targets["train"] == place).flatten().tolist()
        return found

    def keep(self, classes: int, extract: Callable[[Float[Tensor, "B C Y X"]], Float[Tensor, "B F"]]) -> None:
        """Keep exemplars of the first classes, the same number of each: fewer of those that have some, and of the
        others those that herding chooses. If everything is kept, it is all images.

        Ours: features are scaled to length 1 first.

        Args:
            classes: Number of classes so far.
            extract: Computes features, in evaluation mode and without gradients.
        """
        share = self._share(classes)
        self.exemplars = [kept[:share] for kept in self.exemplars]
        for place in range(len(self.exemplars), classes):
            members = self.members(place)
            if share is None or share >= len(members) or not share:
                self.exemplars.append(members[:share])
                continue
            blocks = torch.split(torch.tensor(members), EVALUATED)
            found = [extract(self._batch("train", block, task=0, share=0.0, last=False).images) for block in blocks]
            features = torch.nn.functional.normalize(torch.cat(found).double()).cpu().numpy()
            self.exemplars.append([members[chosen] for chosen in herd(features, share)])

    def _share(self, classes: int) -> int | None:
        """Exemplars of each of so many classes; None for all."""
        return None if self.capacity is None else self.capacity // classes

    def steps(self) -> list[int]:
        """Batches of each task. Known before the first one is trained: so is how many exemplars there will be."""
        counts = torch.bincount(self._targets["train"]).tolist()
        steps, known = [], 0
        for task in self.tasks:
            share = self._share(known) if known else 0
            kept = sum(count if share is None else min(count, share) for count in counts[:known])
            own = sum(counts[known : known + len(task)])
            steps.append(self.epochs * -(-(own + kept) // self.batch_size))
            known += len(task)
        return steps

    def batches(self, task: int, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch of the present task."""
        known = sum(map(len, self.tasks[:task]))
        assert len(self.exemplars) == known, "the exemplars of the task before were not kept"
        own = [self.members(place) for place in range(known, known + len(self.tasks[task]))]
        numbers = np.concatenate([*own, *self.exemplars]).astype(np.int64)
        shuffled = torch.from_numpy(np.random.default_rng((self.seed, task, epoch)).permutation(numbers))
        *before, final = torch.split(shuffled, self.batch_size)
        for chosen in before:
            yield self._batch("train", chosen, task=task, share=epoch / self.epochs, last=False)
        yield self._batch("train", final, task=task, share=epoch / self.epochs, last=epoch == self.epochs - 1)

    def _batch(self, split: Split, numbers: Int64[Tensor, " B"], *, task: int, share: float, last: bool) -> Batch:
        images = self._pixels[split][numbers].to(torch.get_default_dtype()) / self.images.white
        return Batch(images, self._targets[split][numbers], task, share, last)

    def state_dict(self) -> dict[str, Any]:
        """The exemplars, and what gives their numbers and those of batches a meaning."""
        return {**self._geometry(), "exemplars": self.exemplars}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the exemplars.

        Raises:
            UsageError: The checkpoint is of other tasks or other images, or training is to resume with other batches;
                says what differs.
        """
        testing = self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING
        needed = {name: value for name, value in self._geometry().items() if not testing or name in ("images", "tasks")}
        changed = {name: value for name, value in needed.items() if state_dict.get(name) != value}
        if changed:
            told = ", ".join(f"{name} (was {state_dict.get(name)!r}, is {value!r})" for name, value in changed.items())
            raise UsageError(f"the checkpoint was written with other data: {told}")
        self.exemplars = [list(kept) for kept in state_dict["exemplars"]]

    def _geometry(self) -> dict[str, Any]:
        return {
            "images": type(self.images).__name__,
            "tasks": self.tasks,
            "training_images": len(self._targets["train"]),
            "capacity": self.capacity,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


class TaskLoader:
    """Yields the batches of all tasks in order, and continues where it was.

    Args:
        data: Makes the batches.
    """

    def __init__(self, data: TaskSequence) -> None:
        self.data = data
        self.done = 0

    def __len__(self) -> int:
        return sum(self.data.steps())

    def __iter__(self) -> Iterator[Batch]:
        passed = 0
        for task, steps in enumerate(self.data.steps()):
            length = steps // self.data.epochs
            for epoch in range(self.data.epochs):
                left = max(passed + length - self.done, 0)
                passed += length
                # an epoch that is over was drawn with other exemplars
                for batch in islice(self.data.batches(task, epoch) if left else (), length - left, None):
                    self.done += 1  # before the yield: a checkpoint written during this step must count the batch
                    yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches that were yielded."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from there."""
        self.done = state["done"]


class EvaluationLoader:
    """Yields the test images of all tasks.

    Args:
        data: Makes the batches.
    """

    def __init__(self, data: TaskSequence) -> None:
        self.data = data

    def __len__(self) -> int:
        return sum(1 for _ in self.data.tested())

    def __iter__(self) -> Iterator[Batch]:
        return self.data.tested()


def split_classes(tasks: int | Sequence[Sequence[int]], classes: int, *, seed: int) -> list[list[int]]:
    """The classes of each task; see :class:`TaskSequence`.

    Raises:
        UsageError: A class is unknown or in two tasks, or a task has none.
    """
    if isinstance(tasks, int):
        require_sizes(tasks=tasks)
        if tasks > classes:
            raise UsageError(f"tasks must be at most the number of classes, {classes}, got {tasks}")
        order = np.random.default_rng(seed).permutation(classes)
        return [part.tolist() for part in np.array_split(order, tasks)]
    if not tasks:
        raise UsageError("tasks must list the classes of at least one task, such as [[0, 1], [2, 3]], got []")
    seen: dict[int, int] = {}
    for number, task in enumerate(tasks):
        if not task:
            raise UsageError(f"task {number} has no classes: remove it, got tasks={list(map(list, tasks))}")
        for label in task:
            if not 0 <= label < classes:
                raise UsageError(f"task {number} has class {label}, but classes are numbered from 0 to {classes - 1}")
            if label in seen:
                where = f"tasks {seen[label]} and {number}" if seen[label] != number else f"task {number} twice"
                raise UsageError(f"class {label} is in {where}: remove it from one")
            seen[label] = number
    return [list(task) for task in tasks]
