"""A data set of images that looks like the hub's MNIST."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def random_images(count: int, *, size: int = 28) -> list[np.ndarray]:
    random = np.random.default_rng(count)
    return list(random.integers(0, 256, (count, size, size), dtype=np.uint8))


def write_mnist(folder: Path, images: dict[str, list[np.ndarray]]) -> Path:
    """A data set with the columns of the hub's MNIST, which are images and labels in Parquet."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    for split, own in images.items():
        rows = {"image": [Image.fromarray(image) for image in own], "label": [0] * len(own)}
        (folder / "mnist").mkdir(parents=True, exist_ok=True)
        path = folder / "mnist" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return folder / "mnist"
