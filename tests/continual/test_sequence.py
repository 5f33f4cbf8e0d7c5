"""Tasks and their batches; images from a data set of the hub's schema."""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from memformer_pl.continual.images import CIFAR100, MNIST, Digits, HubImages, LabelledImages
from memformer_pl.continual.sequence import TaskLoader, TaskSequence, split_classes
from memformer_pl.errors import UsageError


def write(folder: Path, labels: dict[str, list[int]], *, channels: int = 1, size: int = 28) -> Path:
    """A data set with the columns of the hub's MNIST or CIFAR-100; an image of class c has c + 1 everywhere."""
    field, label = ("image", "label") if channels == 1 else ("img", "fine_label")
    features = datasets.Features({field: datasets.Image(), label: datasets.Value("int64")})
    (folder / "data").mkdir()
    for split, own in labels.items():
        shape = (size, size) if channels == 1 else (size, size, channels)
        images = [Image.fromarray(np.full(shape, number + 1, dtype=np.uint8)) for number in own]
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict({field: images, label: own}, features=features).to_parquet(path)
    return folder / "data"


def test_digits_have_every_image_in_one_split() -> None:
    digits = Digits()
    train, test = digits.labels("train"), digits.labels("test")
    assert (len(train), len(test)) == (1438, 359)
    assert set(train) == set(test) == set(range(10))
    both = {digits.pixels(split, [number]).tobytes() for split, number in (("train", 5), ("test", 5))}
    assert len(both) == 2
    assert digits.pixels("test", [0, 3]).shape == (2, 1, 8, 8)
    assert digits.pixels("train", range(len(train))).max() == Digits.white


@pytest.mark.parametrize(("kind", "channels", "size"), [(MNIST, 1, 28), (CIFAR100, 3, 32)])
def test_images_of_the_hub_are_read_by_their_numbers(
    kind: type[HubImages], channels: int, size: int, tmp_path: Path
) -> None:
    path = write(tmp_path, {"train": [3, 0, 7, 3], "test": [0, 7]}, channels=channels, size=size)
    images = kind(path=str(path))
    assert images.labels("train").tolist() == [3, 0, 7, 3]
    pixels = images.pixels("train", [2, 0])
    assert pixels.shape == (2, *kind.shape)
    assert (pixels.dtype, pixels[0].min(), pixels[0].max(), pixels[1].max()) == (np.uint8, 8, 8, 4)


def test_colours_keep_their_channels(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[4, 9] = (1, 2, 3)
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.Value("int64"))
    for split in ("train", "test"):
        rows = {"img": [Image.fromarray(image)], "fine_label": [0]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    (pixels,) = CIFAR100(path=str(tmp_path / "data")).pixels("train", [0])
    assert pixels[:, 4, 9].tolist() == [1, 2, 3]


def test_images_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"train": [0, 12], "test": [0]})
    images = MNIST(path=str(path))
    with pytest.raises(UsageError, match=r"column label='label' must hold numbers from 0 to 9, got .*12"):
        images.labels("train")
    with pytest.raises(UsageError, match="no column field='pixels'"):
        MNIST(path=str(path), field="pixels").labels("train")
    with pytest.raises(UsageError, match="no column field='digit'"):
        MNIST(path=str(path), label="digit").labels("train")
    (path / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(UsageError, match=r"has no split 'test', only .*train"):
        MNIST(path=str(path)).labels("train")


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    images = MNIST(path=str(write(tmp_path, {"train": [0], "test": [0]}, size=8)))
    with pytest.raises(UsageError, match="images must have 28 x 28 pixels, got 8 x 8"):
        images.pixels("train", [0])


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["train.pkl", "train.pickle", "train.parquet", "train.npy", "train.pt", "train.csv"])
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_a_pickle_is_refused_and_not_run(name: str, whole: bool, tmp_path: Path) -> None:
    folder, sprung = tmp_path / "data", tmp_path / "sprung"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / name.replace("train", split)).write_bytes(pickle.dumps(Trap(sprung)))
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works
    sprung.rmdir()
    with pytest.raises(UsageError):
        MNIST(path=str(folder if whole else folder / name)).labels("train")
    assert not sprung.exists()


def test_the_order_of_classes_comes_from_the_seed() -> None:
    one, other = split_classes(5, 10, seed=0), split_classes(5, 10, seed=1)
    assert one == split_classes(5, 10, seed=0) != other
    assert sorted(flat(one)) == sorted(flat(other)) == list(range(10))
    assert [len(task) for task in one] == [2] * 5
    assert [len(task) for task in split_classes(4, 10, seed=0)] == [3, 3, 2, 2]
    assert split_classes([[4, 2], [0]], 10, seed=0) == [[4, 2], [0]]


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([[0, 1], [2, 0]], "class 0 is in tasks 0 and 1: remove it from one"),
        ([[0, 1, 0]], "class 0 is in task 0 twice"),
        ([[0, 1], []], r"task 1 has no classes: remove it, got tasks=\[\[0, 1\], \[\]\]"),
        ([[0, 10]], "task 0 has class 10, but classes are numbered from 0 to 9"),
        ([[-1]], "task 0 has class -1"),
        ([], "tasks must list the classes of at least one task"),
        (0, "tasks must be at least 1, got 0"),
        (11, "tasks must be at most the number of classes, 10, got 11"),
    ],
)
def test_tasks_that_are_none_are_refused(tasks: int | list[list[int]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TaskSequence(images=Digits(), tasks=tasks)


@pytest.mark.parametrize("name", ["per_class", "tested_per_class", "epochs", "batch_size"])
def test_sizes_below_one_are_refused(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(UsageError, match=f"{name} must be at least 1, got 0"):
        TaskSequence(images=Digits(), **options)


class Few(LabelledImages):
    """Six images of each of four classes; image n of class c is grey c, with n in its corner."""

    shape, classes, white = (1, 4, 4), 4, 1

    def labels(self, split: str) -> np.ndarray:
        return np.arange(24) % 4

    def pixels(self, split: str, numbers: Any) -> np.ndarray:
        made = np.repeat((np.array(numbers) % 4).astype(np.uint8), 16).reshape(-1, 1, 4, 4)
        made[:, 0, 0, 0] = np.array(numbers) // 4
        return made


Seen = list[tuple[int, int]]
"""Class and number of each image of a batch."""


def walked(data: TaskSequence, loader: TaskLoader | None = None, *, batches: int | None = None) -> list[Seen]:
    """The next batches of a run that keeps what the capacity allows; by default all that are left."""
    seen = []
    for batch in islice(loader or TaskLoader(data), batches):
        labels, numbers = batch.images[:, 0, 1, 1].int().tolist(), batch.images[:, 0, 0, 0].int().tolist()
        assert [data.order[place] for place in batch.targets] == labels
        seen.append(list(zip(labels, numbers, strict=True)))
        if batch.last:
            data.keep(sum(map(len, data.tasks[: batch.task + 1])), lambda images: images.flatten(1))
    return seen


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def few(**options: Any) -> TaskSequence:
    data = TaskSequence(images=Few(), **{"tasks": [[2, 0], [3], [1]], "epochs": 2, "batch_size": 5, **options})
    data.setup()
    return data


@pytest.mark.parametrize(
    ("capacity", "steps", "kept"),
    # of two old classes 2 each, of three 1 each: 12, 6 + 4 and 6 + 3 images, in batches of five
    [(5, [6, 4, 4], [0, 2, 1]), (0, [6, 4, 4], [0, 0, 0]), (None, [6, 8, 10], [0, 6, 6]), (99, [6, 8, 10], [0, 6, 6])],
)
def test_an_epoch_has_the_images_of_its_task_and_the_exemplars_of_the_tasks_before(
    capacity: int | None, steps: list[int], kept: list[int]
) -> None:
    data = few()
    data.capacity = capacity
    assert data.steps() == steps
    batches = iter(walked(data))
    for task, own in enumerate(data.tasks):
        expected = {**dict.fromkeys(flat(data.tasks[:task]), kept[task]), **dict.fromkeys(own, 6)}
        for _ in range(data.epochs):
            images = flat(islice(batches, steps[task] // data.epochs))
            assert len(set(images)) == len(images)
            assert Counter(label for label, _ in images) == Counter(expected)
    assert not list(batches)


def test_epochs_differ_in_order_and_runs_do_not() -> None:
    batches = walked(few())
    assert batches == walked(few())
    assert batches != walked(few(seed=1))
    assert batches[:3] != batches[3:6]
    assert sorted(flat(batches[:3])) == sorted(flat(batches[3:6]))


def test_limits_take_the_first_images_of_a_class() -> None:
    data = few(per_class=2, tested_per_class=1)
    assert {number for batch in walked(data) for _, number in batch} == {0, 1}
    assert len(torch.cat([batch.targets for batch in data.tested(4)])) == 4
    assert torch.cat([batch.targets for batch in data.tested(3)]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 6, 7, 9, 10, 13, 14])
def test_a_loader_goes_on_where_it_was(stop: int) -> None:
    data, again = few(), few()
    for each in (data, again):
        each.capacity = 5
    loader, rest = TaskLoader(data), TaskLoader(again)
    begun = walked(data, loader, batches=stop)
    again.load_state_dict(data.state_dict())
    rest.load_state_dict(loader.state_dict())
    assert begun + walked(again, rest) == begun + walked(data, loader)
    assert len(begun) == stop
    assert again.exemplars == data.exemplars


def test_fewer_exemplars_are_the_first_of_more() -> None:
    data = few()
    data.capacity = 4
    data.keep(2, lambda images: images.flatten(1))
    first = data.exemplars
    assert [len(kept) for kept in first] == [2, 2]
    data.keep(3, lambda images: images.flatten(1))
    assert data.exemplars[:2] == [kept[:1] for kept in first]
    assert len(data.exemplars[2]) == 1


def test_a_checkpoint_of_other_tasks_is_refused() -> None:
    state = few().state_dict()
    with pytest.raises(
        UsageError, match=r"other data: tasks \(was \[\[2, 0\], \[3\], \[1\]\], is .*seed \(was 0, is 1\)"
    ):
        few(tasks=[[0], [1]], seed=1).load_state_dict(state)


def test_a_class_without_images_is_refused() -> None:
    class Fewer(Few):
        classes = 5

    data = TaskSequence(images=Fewer(), tasks=[[4]])
    with pytest.raises(UsageError, match="class 4 has no image in the split train: leave it out of tasks"):
        data.setup()
