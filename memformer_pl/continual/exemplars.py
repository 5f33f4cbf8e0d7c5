"""Methods, and what each keeps from task to task: parts of its network, and images of old classes (exemplars)."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from memformer_pl.errors import OptionError

MethodName = Literal["fine_tuning", "replay", "der", "memo", "joint"]


class Method(NamedTuple):
    """What a method keeps."""

    grows: bool
    """Whether each task adds a part to the network; such methods also have an auxiliary head and align the weights of
    the head after each task."""
    shares: bool
    """Whether the shallow part is shared by these parts."""
    keeps: Literal["nothing", "exemplars", "everything"]
    """Which images of old classes are trained on again."""


METHODS: dict[MethodName, Method] = {
    "fine_tuning": Method(grows=False, shares=True, keeps="nothing"),
    "replay": Method(grows=False, shares=True, keeps="exemplars"),
    "der": Method(grows=True, shares=False, keeps="exemplars"),
    "memo": Method(grows=True, shares=True, keeps="exemplars"),
    "joint": Method(grows=False, shares=True, keeps="everything"),
}


def exemplars_for(method: MethodName, budget: int | None, *, model_bytes: int, image_bytes: int) -> int | None:
    """How many exemplars a budget leaves room for, beside the model at its largest.

    Args:
        method: A key of ``METHODS``.
        budget: Bytes of model and exemplars together.
        model_bytes: Bytes of the model after the last task.
        image_bytes: Bytes of an image, one for each value of a pixel.

    Returns:
        The number; None if all images are kept.

    Raises:
        OptionError: The budget is missing, is given to a method that keeps no exemplars or all images, or is below the
            bytes of the model.
    """
    keeps = METHODS[method].keeps
    if keeps != "exemplars":
        if budget is not None:
            raise OptionError(f"{method} keeps {keeps}, whatever the budget: set budget to null, got {budget:,}")
        return 0 if keeps == "nothing" else None
    if budget is None:
        raise OptionError(f"{method} needs a budget: the bytes of its model, {model_bytes:,}, and of its exemplars")
    if budget < model_bytes:
        raise OptionError(
            f"{method} stores a model of {model_bytes:,} bytes, more than the budget of {budget:,}: raise budget, or "
            "choose a smaller backbone or another method"
        )
    return (budget - model_bytes) // image_bytes


def herd(features: Float[np.ndarray, "N F"], count: int) -> list[int]:
    """Choose rows one by one, each so that the mean of those chosen so far is nearest to the mean of all (herding,
    Welling 2009, as iCaRL uses it).

    Args:
        features: Of the images of a class.
        count: How many to choose; all, if there are fewer.

    Returns:
        Their numbers, in the order in which they were chosen. Of equally good rows it is the first.
    """
    left, chosen = np.ones(len(features), dtype=bool), []
    mean, total = features.mean(0), np.zeros(features.shape[1])
    for number in range(1, min(count, len(features)) + 1):
        gaps = np.linalg.norm(mean - (total + features) / number, axis=1)
        best = int(np.where(left, gaps, np.inf).argmin())
        chosen.append(best)
        left[best] = False
        total += features[best]
    return chosen
