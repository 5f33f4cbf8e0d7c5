"""Images sampled from a model pixel by pixel, beside real ones."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import track

from memformer_pl.contract import SegmentModel
from memformer_pl.data import PackedDocuments
from memformer_pl.data.corpora.images import Images
from memformer_pl.inference import Sampling, Session

IMAGES = 40
ACROSS = 10


def sample_images(model: SegmentModel, documents: PackedDocuments, images: Images) -> dict[str, np.ndarray]:
    """Sample images at temperature 1, and select as many real ones.

    Args:
        model: A model in evaluation mode.
        documents: Real images.
        images: The corpus of the images, which has their size.

    Returns:
        ``real`` and ``drawn`` ``[images, rows, columns]``, and ``white``, the largest value of a pixel.
    """
    rows, columns = images.shape
    session, sampling = Session(model, lanes=IMAGES), Sampling(seed=0)
    pixels = [session.next(sampling) for _ in track(range(rows * columns), f"{'sampling images':24}")]
    chosen = np.linspace(0, len(documents) - 1, min(IMAGES, len(documents))).astype(int)
    real = np.stack([np.asarray(documents.document(number)) for number in chosen.tolist()])
    drawn = torch.stack(pixels, dim=1).cpu().numpy()
    return {
        "real": real.reshape(-1, rows, columns).astype(np.uint8),
        "drawn": drawn.reshape(-1, rows, columns).astype(np.uint8),
        "white": np.array(images.white),
    }


def draw_images(arrays: Mapping[str, np.ndarray]) -> Figure:
    """Draw real images at the left, sampled ones at the right."""
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("real", "drawn"), strict=True):
        axes.imshow(_tiled(arrays[name]), cmap="gray_r", vmin=0, vmax=int(arrays["white"]), interpolation="nearest")
        axes.set(title=f"{name}: {len(arrays[name])} images", xticks=[], yticks=[])
    return figure


def _tiled(images: np.ndarray) -> np.ndarray:
    """Arrange images in one picture, with a pixel between them."""
    framed = np.pad(images, ((0, -len(images) % ACROSS), (0, 1), (0, 1)))
    count, rows, columns = framed.shape
    return framed.reshape(count // ACROSS, ACROSS, rows, columns).swapaxes(1, 2).reshape(-1, ACROSS * columns)
