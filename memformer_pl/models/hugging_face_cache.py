"""Keys and values of a decoder of ``transformers`` as a state: which rows a token sees, and which rows are kept.

A *row* holds the keys and values of one input token in every layer. The *place* of a row is the number of inputs before
it in its document, which is also its position.

B  lanes     L  tokens in a segment     S  cached rows     R  rows that are attended to     H  heads     K  width
"""

from collections import namedtuple
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.contract import State
from memformer_pl.models.hugging_face_loading import library

NOWHERE = 1 << 62
"""Place of a row that no token sees."""


class CachedRows(NamedTuple):
    """The state, in parts."""

    keys: Sequence[Float[Tensor, "B H S K"]]
    """Of each layer, rotated where the decoder rotates."""
    values: Sequence[Float[Tensor, "B H S K"]]
    exists: Bool[Tensor, "B S"]
    """Which rows hold a token."""
    place: Int[Tensor, " B"]
    """Place of the next input; as many of the last rows that exist are of the present document."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


@cache
def state_class(layers: int) -> Any:
    """The named tuple of the state: ``keys_0, values_0, keys_1, ..., exists, place, last``."""
    names = [f"{kind}_{n}" for n in range(layers) for kind in ("keys", "values")]
    return namedtuple("HuggingFaceState", [*names, "exists", "place", "last"])


def parts(state: State) -> CachedRows:
    """The parts of a state."""
    *rows, exists, place, last = state
    return CachedRows(rows[::2], rows[1::2], exists, place, last)


def joined(rows: CachedRows) -> State:
    """The state that has these parts."""
    pairs = [field for pair in zip(rows.keys, rows.values, strict=True) for field in pair]
    state: State = state_class(len(rows.keys))(*pairs, *rows[2:])
    return state


@cache
def layer_class() -> Any:
    """The class of one layer of a ``Cache``: a decoder appends rows to it, or writes them to ``places``."""
    dynamic: Any = library("transformers.cache_utils").DynamicLayer

    class CacheLayer(dynamic):  # type: ignore[misc]
        """Rows that are there, and the places of new ones, written in place; None to append them, in a new tensor."""

        def __init__(self, keys: Tensor, values: Tensor, places: Int[Tensor, "B L"] | None = None) -> None:
            super().__init__()
            self.keys, self.values, self.places, self.is_initialized = keys, values, places, True

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            """Add rows; return all of them."""
            self.keys = _with_rows(self.keys, keys, self.places)
            self.values = _with_rows(self.values, values, self.places)
            return self.keys, self.values

    return CacheLayer


def cached_places(exists: Bool[Tensor, "B S"], place: Int[Tensor, " B"]) -> Int[Tensor, "B S"]:
    """The place of each row in the present document of its lane; ``NOWHERE`` for empty rows and earlier documents."""
    at_or_behind = exists.flip(1).cumsum(1).flip(1)
    places = place[:, None] - at_or_behind
    return places.masked_fill(~exists | (places < 0), NOWHERE)


def next_places(place: Int[Tensor, " B"], length: int) -> Int[Tensor, "B L"]:
    """The places of ``length`` inputs, the first given."""
    return place[:, None] + torch.arange(length, device=place.device)


def visible(rows: Int[Tensor, "B R"], inputs: Int[Tensor, "B L"], *, reach: int | None) -> Bool[Tensor, "B 1 L R"]:
    """Which rows each input sees: its own, and those before it; with a sliding window, the last ``reach`` of them."""
    seen = rows[:, None] <= inputs[:, :, None]
    if reach is not None:
        seen &= rows[:, None] > inputs[:, :, None] - reach
    return seen[:, None]


def needed(rows: CachedRows, *, reach: int | None) -> Bool[Tensor, "B S"]:
    """Which rows the next inputs may see, if no layer reaches back further than ``reach``."""
    places = cached_places(rows.exists, rows.place)
    return visible(places, rows.place[:, None], reach=reach)[:, 0, 0]


def take_rows(rows: Float[Tensor, "B H S K"], index: Int[Tensor, "B R"]) -> Float[Tensor, "B H R K"]:
    """Rows by number, lane by lane; gradients reach them."""
    return rows.take_along_dim(index[:, None, :, None], dim=2)


def shifted(rows: CachedRows, arrived: Int[Tensor, " B"], *, window: int) -> CachedRows:
    """The last ``window`` rows of each lane, right-aligned, of rows behind which the first ``arrived`` are new."""
    index = torch.arange(window, device=arrived.device) + arrived[:, None]
    return _taken(rows, index, rows.exists.gather(1, index))


def without_unneeded(rows: CachedRows, *, reach: int | None) -> CachedRows:
    """The rows without those that no lane needs: at the right, as many as the lane that needs most, and zeros before
    them in the others; the same object if all stay."""
    wanted = needed(rows, reach=reach)
    most, count = int(wanted.sum(1).max()), wanted.shape[1]
    if most == count:
        return rows
    index = wanted.to(torch.int8).argsort(dim=1, stable=True)[:, count - most :]
    exists = wanted.gather(1, index)
    taken, empty = _taken(rows, index, exists), ~exists[:, None, :, None]
    keys, values = ([field.masked_fill(empty, 0) for field in fields] for fields in taken[:2])
    return taken._replace(keys=keys, values=values)


def left_aligned(
    rows: CachedRows, *, reach: int | None, room: int
) -> tuple[Int[Tensor, " B"], list[Float[Tensor, "B H R K"]]]:
    """Buffers for the rows that each lane needs, from the first place on, and for more.

    Args:
        rows: The state.
        reach: See :func:`needed`.
        room: Number of places behind the rows of the lane that needs most.

    Returns:
        The number of rows of each lane, and keys and values, layer by layer.
    """
    wanted = needed(rows, reach=reach)
    filled = wanted.sum(1)
    most = int(filled.max())
    index = (~wanted).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    buffers = []
    for pair in zip(rows.keys, rows.values, strict=True):
        for field in pair:
            buffer = field.new_zeros(*field.shape[:2], most + room, field.shape[3])
            buffer[:, :, :most] = take_rows(field, index)
            buffers.append(buffer)
    return filled, buffers


def _with_rows(
    rows: Float[Tensor, "B H S K"], new: Float[Tensor, "B H L K"], places: Int[Tensor, "B L"] | None
) -> Float[Tensor, "B H R K"]:
    """The rows and new ones, in the dtype of the rows under autocast too."""
    new = new.to(rows.dtype)
    if places is None:
        return torch.cat((rows, new), dim=2)
    return rows.scatter_(2, places[:, None, :, None].expand_as(new), new)


def _taken(rows: CachedRows, index: Int[Tensor, "B R"], exists: Bool[Tensor, "B R"]) -> CachedRows:
    keys, values = ([take_rows(field, index) for field in fields] for fields in rows[:2])
    return rows._replace(keys=keys, values=values, exists=exists)
