"""Arrays as grey pictures for TensorBoard, without a drawing library."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

Weights = Float[np.ndarray, "down right"]

CELL = 8
"""Width and height of a cell in pixels."""
WIDEST = 2048
"""Largest width of a picture in pixels; beyond it cells become narrower, then columns are skipped evenly."""


def picture(weights: Weights, *, most: float) -> UInt8[np.ndarray, "height width"]:
    """Draw a cell for each weight: white for 0 and NaN, black for ``most`` and above."""
    wide = min(CELL, max(WIDEST // weights.shape[1], 1))
    shown = weights[:, :: -(-weights.shape[1] // WIDEST)]
    grey = 255 - (255 * np.clip(np.nan_to_num(shown) / most, 0, 1)).round().astype(np.uint8)
    return np.kron(grey, np.ones((CELL, wide), dtype=np.uint8))


def tiles(rows: Sequence[Sequence[Weights]]) -> Float[np.ndarray, "all_down all_right"]:
    """Arrange arrays of one size in rows and columns, with an empty line of cells between them."""
    framed = [[np.pad(tile, ((0, 1), (0, 1))) for tile in row] for row in rows]
    return np.block(framed)[:-1, :-1]


def show(trainer: Trainer, tag: str, shown: UInt8[np.ndarray, "height width"]) -> None:
    """Log a picture to TensorBoard, if the run uses it."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, shown, trainer.global_step, dataformats="HW")
