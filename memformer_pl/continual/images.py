"""Images with labels, each read only when it is chosen.

N  images     C  channels     Y, X  rows and columns
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Int, UInt8

from memformer_pl.data.corpora.files import load_splits, require_column
from memformer_pl.data.corpora.images import decoded
from memformer_pl.errors import UsageError

Split = Literal["train", "test"]


class LabelledImages(ABC):
    """Images of one size, each of one class, in a training and a test split."""

    shape: ClassVar[tuple[int, int, int]]
    """Channels, rows and columns. A pixel has a byte for each channel."""
    classes: ClassVar[int]
    white: ClassVar[int]
    """The largest value of a pixel; black is 0."""

    @abstractmethod
    def labels(self, split: Split) -> Int[np.ndarray, " N"]:
        """The class of each image, from 0.

        Raises:
            UsageError: The images cannot be read, or a label is not a class.
        """

    @abstractmethod
    def pixels(self, split: Split, numbers: Sequence[int]) -> UInt8[np.ndarray, "N C Y X"]:
        """The images of these numbers.

        Raises:
            UsageError: The images cannot be read, or have another size.
        """


class Digits(LabelledImages):
    """Scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, 17 grey values. Every fifth is a test image. No
    download, but needs scikit-learn (the extra ``images``).
    """

    shape = (1, 8, 8)
    classes = 10
    white = 16

    @cached_property
    def _loaded(self) -> Any:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UsageError("the images Digits need scikit-learn: pip install 'memformer-pl[images]'") from error
        return load_digits()

    def labels(self, split: Split) -> Int[np.ndarray, " N"]:
        labels: Int[np.ndarray, " N"] = self._loaded.target[self._chosen(split)]
        return labels

    def pixels(self, split: Split, numbers: Sequence[int]) -> UInt8[np.ndarray, "N C Y X"]:
        chosen = self._loaded.images[self._chosen(split)][list(numbers)]
        return np.asarray(chosen[:, None], dtype=np.uint8)

    def _chosen(self, split: Split) -> Int[np.ndarray, " N"]:
        every = np.arange(len(self._loaded.target))
        chosen: Int[np.ndarray, " N"] = every[(every % 5 == 4) == (split == "test")]
        return chosen


class HubImages(LabelledImages):
    """Images of the Hugging Face hub, or of a local directory in one of its formats: Parquet, for example. Code and
    pickles are not among them: they are refused, and nothing in them is run.

    Args:
        path: The data set, or a directory with the same columns and the splits train and test.
        name: Configuration of the data set, if it has several.
        field: The column of images.
        label: The column of classes, numbers from 0.
    """

    mode: ClassVar[Literal["L", "RGB"]]
    """How a pixel is read: ``L`` as grey, ``RGB`` as colours."""

    def __init__(self, *, path: str, name: str | None = None, field: str, label: str) -> None:
        self.path, self.name, self.field, self.label = path, name, field, label

    @cached_property
    def _splits(self) -> dict[str, Any]:
        splits = dict(load_splits(self.path, self.name))
        if "test" not in splits:
            raise UsageError(f"the data set {self.path!r} has no split 'test', only {sorted(splits)}")
        for table in splits.values():
            require_column(table, self.field)
            require_column(table, self.label)
        return splits

    def labels(self, split: Split) -> Int[np.ndarray, " N"]:
        labels = np.asarray(self._splits[split].select_columns(self.label)[:][self.label])
        wrong = labels if labels.dtype.kind not in "iu" else labels[(labels < 0) | (labels >= self.classes)]
        if len(wrong):
            raise UsageError(
                f"column label={self.label!r} must hold numbers from 0 to {self.classes - 1}, got {wrong[0]!r}"
            )
        return labels

    def pixels(self, split: Split, numbers: Sequence[int]) -> UInt8[np.ndarray, "N C Y X"]:
        channels, *size = self.shape
        rows = self._splits[split].select_columns(self.field).select(list(numbers))
        images = [decoded(row[self.field], field=self.field, size=(size[0], size[1]), mode=self.mode) for row in rows]
        return np.stack(images).reshape(-1, *size, channels).transpose(0, 3, 1, 2).copy()


class MNIST(HubImages):
    """MNIST from the hub: 60,000 and 10,000 digits of 28 x 28 pixels, 256 grey values. Needs a download, or a path.

    Args:
        path: The data set, or a local directory with the same columns.
        name: Configuration of the data set.
        field: The column of images.
        label: The column of digits.
    """

    shape = (1, 28, 28)
    classes = 10
    white = 255
    mode = "L"

    def __init__(
        self, *, path: str = "ylecun/mnist", name: str | None = None, field: str = "image", label: str = "label"
    ) -> None:
        super().__init__(path=path, name=name, field=field, label=label)


class CIFAR100(HubImages):
    """CIFAR-100 from the hub: 50,000 and 10,000 photographs of 32 x 32 pixels in 100 classes. Needs a download, or a
    path.

    Args:
        path: The data set, or a local directory with the same columns.
        name: Configuration of the data set.
        field: The column of images.
        label: The column of classes.
    """

    shape = (3, 32, 32)
    classes = 100
    white = 255
    mode = "RGB"

    def __init__(
        self, *, path: str = "uoft-cs/cifar100", name: str | None = None, field: str = "img", label: str = "fine_label"
    ) -> None:
        super().__init__(path=path, name=name, field=field, label=label)
