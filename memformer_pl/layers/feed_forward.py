"""The feed-forward layers that a block can have, and the option that chooses one for some layers of a model."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.errors import LARGEST_WIDTH, UsageError, nearest, require_sizes
from memformer_pl.layers.ultra_memory import ProductKeys, UltraMemory


class FeedForward(nn.Module):
    """Feed-forward network of one hidden layer, applied to each token separately.

    Args:
        dim: Width of a token.
        hidden: Width of the hidden layer.
    """

    def __init__(self, *, dim: int, hidden: int) -> None:
        super().__init__()
        require_sizes(most=LARGEST_WIDTH, hidden=hidden)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """The update of each token."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


FEED_FORWARDS: dict[str, type[nn.Module]] = {
    "FeedForward": FeedForward,
    "ProductKeys": ProductKeys,
    "UltraMemory": UltraMemory,
}
"""The layers that ``feed_forward`` of a model can choose, by class path; ``memformer_pl.layers.`` may stand before."""
PUBLIC = "memformer_pl.layers."
PARTS = ("class_path", "init_args", "layers")
"""Of the option ``feed_forward``."""


def check_choice(option: object, *, layers: int) -> None:
    """Refuse a value of the option ``feed_forward`` that does not fit.

    Args:
        option: ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``; layers count from 0.
        layers: Number of layers of the model.

    Raises:
        UsageError: Names what is unknown, missing or out of range, its value, and what to write instead.
    """
    if not isinstance(option, Mapping):
        raise UsageError(f"feed_forward must be null (in Python None), or have {_list(PARTS)}, got {option!r}")
    _require_names("feed_forward", option, known=PARTS, needed=PARTS)
    path, arguments, chosen = (option[part] for part in PARTS)
    name = path.removeprefix(PUBLIC) if isinstance(path, str) else ""
    if name not in FEED_FORWARDS:
        raise UsageError(f"feed_forward.class_path must be one of {_list(FEED_FORWARDS)}, got {path!r}{_guess(name)}")
    _check_arguments(name, arguments)
    if not isinstance(chosen, list | tuple) or not chosen:
        raise UsageError(
            f"feed_forward.layers must list the layers that have a {name}, counted from 0, such as [{layers - 1}], got "
            f"{chosen!r}"
        )
    for layer in chosen:
        if type(layer) is not int or not 0 <= layer < layers:
            raise UsageError(
                f"feed_forward.layers must hold numbers from 0 to {layers - 1}, since the model has {layers} layers, "
                f"got {layer!r}"
            )
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"feed_forward.layers must list each layer once, got {list(chosen)}")


def build_choice(option: Mapping[str, Any], *, dim: int) -> nn.Module:
    """Build the layer that a checked option chooses, for tokens of the width ``dim``."""
    return FEED_FORWARDS[option["class_path"].removeprefix(PUBLIC)](dim=dim, **option["init_args"])


def _check_arguments(name: str, arguments: object) -> None:
    """Refuse arguments that the layer ``name`` does not take, lacks, or that are not whole numbers."""
    parameters = dict(inspect.signature(FEED_FORWARDS[name]).parameters)
    del parameters["dim"]  # the model's
    needed = [each for each, parameter in parameters.items() if parameter.default is parameter.empty]
    if not isinstance(arguments, Mapping):
        raise UsageError(f"feed_forward.init_args must hold {_list(needed)} of {name}, got {arguments!r}")
    _require_names("feed_forward.init_args", arguments, known=parameters, needed=needed)
    for each, value in arguments.items():
        if type(value) is not int:
            raise UsageError(f"feed_forward.init_args.{each} must be a whole number, got {value!r}")


def _require_names(what: str, given: Mapping[str, Any], *, known: Iterable[str], needed: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise UsageError(f"{what} must hold {_list(known)}, got {name!r}{_guess(str(name), known)}")
    for name in needed:
        if name not in given:
            raise UsageError(f"{what} has no {name!r}: add it, got {dict(given)!r}")


def _guess(name: str, known: Iterable[str] = tuple(FEED_FORWARDS)) -> str:
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near!r}?"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
