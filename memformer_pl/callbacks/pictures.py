"""Arrays as grey pictures for TensorBoard: no drawing library is needed, and they print as they look."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

Weights = Float[np.ndarray, "down right"]

CELL = 8
"""Pixels of a side of a cell."""
WIDEST = 2048
"""Pixels that a picture may be wide; cells of wider ones are narrower, then left out evenly."""


def picture(weights: Weights, *, most: float) -> UInt8[np.ndarray, "height width"]:
    """A cell for each weight: white for 0 and what is not a number, black for ``most`` and more."""
    wide = min(CELL, max(WIDEST // weights.shape[1], 1))
    shown = weights[:, :: max(weights.shape[1] // WIDEST, 1)]
    grey = 255 - (255 * np.clip(np.nan_to_num(shown) / most, 0, 1)).round().astype(np.uint8)
    return np.kron(grey, np.ones((CELL, wide), dtype=np.uint8))


def tiles(rows: Sequence[Sequence[Weights]]) -> Float[np.ndarray, "all_down all_right"]:
    """Tables of one size side by side and below each other, an empty line of cells between them."""
    framed = [[np.pad(tile, ((0, 1), (0, 1))) for tile in row] for row in rows]
    return np.block(framed)[:-1, :-1]


def show(trainer: Trainer, tag: str, shown: UInt8[np.ndarray, "height width"]) -> None:
    """Put a picture into the run's TensorBoard, if it has one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, shown, trainer.global_step, dataformats="HW")
