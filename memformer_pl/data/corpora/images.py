"""Images pixel by pixel: an image is a document, a pixel a token, in rows from the top left."""

import io
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from memformer_pl.data.corpora.corpus import Corpus, Document
from memformer_pl.data.corpora.files import ROWS, Hub, Table, require_column
from memformer_pl.errors import UsageError


class Images(Corpus):
    """Grey images of one size. A pixel is a byte; use the tokenizer ``GreyValues``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of pixels."""

    @property
    @abstractmethod
    def white(self) -> int:
        """The largest value of a pixel; black is 0."""


class Digits(Images):
    """Scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, 17 grey values. No download, but needs
    scikit-learn (the extra ``images``).
    """

    shape = (8, 8)
    white = 16

    def documents(self) -> Iterator[Document]:
        """Yield the images in scikit-learn's order.

        Raises:
            UsageError: Scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UsageError("the corpus Digits needs scikit-learn: pip install 'memformer-pl[images]'") from error
        for number, image in enumerate(load_digits().images.astype(np.uint8)):
            yield Document(image.tobytes(), name=f"digit {number}")

    def identity(self) -> Mapping[str, object]:
        """Only the name: the digits are the same in all releases of scikit-learn."""
        return {"corpus": "Digits"}


class MNIST(Hub, Images):
    """MNIST from the Hugging Face hub: 60,000 and 10,000 images of 28 x 28 pixels, 256 grey values. Needs a download.

    The 10,000 are the test split; validation is taken from the 60,000.

    Args:
        path: The data set, or a local directory with the same columns.
        name: Configuration of the data set.
        field: The column that holds the image.
    """

    shape = (28, 28)
    white = 255

    def __init__(self, *, path: str = "ylecun/mnist", name: str | None = None, field: str = "image") -> None:
        super().__init__(path=path, name=name, field=field)

    def _contents(self, table: Table) -> Iterator[bytes]:
        require_column(table, self.field)
        for batch in table.select_columns(self.field).iter(batch_size=ROWS):
            for value in batch[self.field]:
                yield decoded(value, field=self.field, size=self.shape, mode="L").tobytes()


def decoded(value: object, *, field: str, size: tuple[int, int], mode: Literal["L", "RGB"]) -> UInt8[np.ndarray, "..."]:
    """The pixels of an image of a data set: rows and columns, and of colours red, green and blue.

    Args:
        value: What a column holds: an image, or the bytes of its file.
        field: The name of the column.
        size: Rows and columns that it must have.
        mode: ``L`` for grey, ``RGB`` for colours.

    Raises:
        UsageError: It is not an image, or has another size.
    """
    from PIL import Image  # a dependency of tensorboard

    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # a column not declared as images
        value = Image.open(io.BytesIO(value["bytes"]))
    if not isinstance(value, Image.Image):
        raise UsageError(f"column {field=} holds {type(value).__name__}, not an image")
    if value.size != size[::-1]:
        raise UsageError(f"images must have {size[1]} x {size[0]} pixels, got {value.width} x {value.height}")
    return np.asarray(value.convert(mode))
