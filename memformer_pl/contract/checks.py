"""Check the arguments and results of a step against the contract, so that an error names the mistake where it is made.

Checks of types, shapes and devices cost nothing. Values are checked on a CPU only: elsewhere the host would wait for
the device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from memformer_pl.contract.segment import Segment, SegmentOutput
from memformer_pl.errors import UsageError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
"""Types that token numbers may have outside a segment."""


def in_words(value: object) -> str:
    """Describe a value: ``float32[3, 6]`` for a tensor, the elements of a tuple or list, and otherwise the type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        elements = [*map(in_words, value[:6]), *["..."] * (len(value) > 6)]
        return f"{'' if type(value) is tuple else type(value).__name__}({', '.join(elements)})"
    return "None" if value is None else type(value).__name__


def is_state(value: object) -> bool:
    """Whether a value is a flat tuple of tensors."""
    return isinstance(value, tuple) and all(isinstance(field, Tensor) for field in value)


def pair(returned: object, *, by: str, first: str) -> tuple[Any, Any]:
    """Unpack the two results of a function.

    Args:
        returned: The value that it returned.
        by: Name of the function, for the message.
        first: Name of the first result; the second is the next state.

    Raises:
        TypeError: The value is not a pair.
    """
    if isinstance(returned, tuple | list) and len(returned) == 2:
        return returned[0], returned[1]
    raise TypeError(f"{by} must return ({first}, next state), it returned {in_words(returned)}")


def check_loss(loss: object, *, by: str) -> None:
    """Raise a ``TypeError`` unless the loss is a tensor of one real floating-point number."""
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
        raise TypeError(
            f"{by} must return (loss, next state), and the loss must be a tensor of one real floating-point number, "
            f"such as losses.sum(); it returned {in_words(loss)} as the loss"
        )


def check_next_state(next_state: object, entering: tuple[Tensor, ...], *, by: str) -> None:
    """Raise a ``TypeError`` unless the next state is a flat tuple with the fields of the entering state.

    Shapes and dtypes may change (a cache may grow), and a plain tuple may become a named one.
    """
    same_type = is_state(next_state) and type(entering) in (tuple, type(next_state))
    if not same_type or len(next_state) != len(entering):  # type: ignore[arg-type]
        raise TypeError(
            f"{by} must return the next state like the one that it was given, {in_words(entering)}; "
            f"it returned {in_words(next_state)} as the next state"
        )


def check_encoded(encoded: object, *, by: str) -> None:
    """Raise a ``TypeError`` unless an encoded segment is a flat tuple of tensors."""
    if not is_state(encoded):
        raise TypeError(f"{by} must encode a segment to a flat tuple of tensors, it returned {in_words(encoded)}")


def check_output(output: object, shape: torch.Size, *, by: str) -> None:
    """Raise a ``TypeError`` unless it is a :class:`SegmentOutput` whose losses have this shape."""
    fields = (output.token_losses, output.correct) if isinstance(output, SegmentOutput) else ()
    if not fields or any(not isinstance(field, Tensor) or field.shape != shape for field in fields):
        raise TypeError(
            f"{by} must return (output, next state), and the output must be a SegmentOutput whose token_losses and "
            f"correct have the shape {list(shape)}; it returned {in_words(output)} as the output"
        )


def check_segment(segment: object, *, vocab_size: int, segment_length: int) -> None:
    """Raise if a segment does not keep the contract of :class:`~memformer_pl.contract.Segment`.

    Args:
        segment: The argument of a model.
        vocab_size: Tokens must be below it.
        segment_length: The most tokens of a lane.

    Raises:
        TypeError: It is not a segment, or a field is not a tensor of the right dtype.
        UsageError: Shapes or devices do not fit, or, on a CPU, a token is outside the vocabulary or not at the left.
    """
    if not isinstance(segment, Segment):
        raise TypeError(f"a model reads a Segment, got {in_words(segment)}")
    tokens, token_mask = segment.tokens, segment.token_mask
    fields = {"tokens": tokens, "token_mask": token_mask, "document_start": segment.document_start}
    optional = {"loss_mask": segment.loss_mask, "seeds": segment.seeds}
    fields |= {name: field for name, field in optional.items() if field is not None}
    for name, field in fields.items():
        wanted = torch.int64 if name in ("tokens", "seeds") else torch.bool
        if not isinstance(field, Tensor) or field.dtype != wanted:
            raise TypeError(f"segment.{name} must be a tensor of {wanted}, got {in_words(field)}")
    if (weights := segment.weights) is not None:
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise TypeError(f"segment.weights must be a tensor of a floating-point dtype, got {in_words(weights)}")
        fields["weights"] = weights
    if not isinstance(segment.continues, bool):
        raise TypeError(f"segment.continues must be True or False, got {in_words(segment.continues)}")
    if tokens.dim() != 2:
        raise UsageError(f"segment.tokens must have the shape [lanes, tokens], got {list(tokens.shape)}")
    for name, field in fields.items():
        shape = tokens.shape[:1] if name == "document_start" else tokens.shape
        if name != "seeds" and field.shape != shape:
            raise UsageError(f"segment.{name} must have the shape {list(shape)}, got {list(field.shape)}")
        if field.device != tokens.device:
            raise UsageError(f"segment.tokens is on {tokens.device} and segment.{name} on {field.device}: move them")
    if tokens.shape[1] > segment_length:
        raise UsageError(f"a segment holds {tokens.shape[1]} tokens, more than {segment_length=}")
    seeds = segment.seeds
    if seeds is not None and (seeds.dim() != 1 or not len(seeds) or len(tokens) % len(seeds)):
        raise UsageError(
            f"segment.seeds must hold a seed for each of the segments that make up its {len(tokens)} lanes, in equal "
            f"parts, such as a tensor of one seed; got the shape {list(seeds.shape)}"
        )
    if has_values(tokens):
        _check_values(tokens, token_mask, vocab_size)
        if segment.continues:
            check_continues(token_mask[:, :1].all() & ~segment.document_start.any())


def has_values(tensor: Tensor) -> bool:
    """Whether values can be checked without waiting: a tensor of another type has none (FakeTensor), and a graph that
    is compiled would break."""
    return type(tensor) is Tensor and tensor.is_cpu and tensor.numel() > 0 and not torch.compiler.is_compiling()


def check_continues(continuing: Tensor) -> None:
    """Raise a ``UsageError`` if ``segment.continues`` is True and, on a CPU, ``continuing`` is not."""
    if has_values(continuing) and not continuing.all():
        raise UsageError(
            "segment.continues is True, but a lane starts a document, has no token, or follows a segment that is not "
            "full: leave it False"
        )


def _check_values(tokens: Tensor, token_mask: Tensor, vocab_size: int) -> None:
    least, most = (int(token) for token in tokens.aminmax())
    if least < 0 or most >= vocab_size:
        got = least if least < 0 else most
        raise UsageError(
            f"segment.tokens must be at least 0 and below {vocab_size=}, got {got}: put 0 where token_mask is False"
        )
    if not token_mask.all() and (token_mask[:, 1:] > token_mask[:, :-1]).any():
        raise UsageError(
            "segment.token_mask must be True at the left of each lane, but a token follows a gap: pad at the right"
        )


def check_entering(
    state: object,
    initial: tuple[Tensor, ...],
    tokens: Tensor,
    parameter: Tensor | None,
    *,
    model: str,
    growing: Mapping[str, int],
) -> None:
    """Raise if a state does not fit a model or a segment.

    Args:
        state: Enters the segment.
        initial: Initial state of the model, for the lanes of the segment.
        tokens: Tokens of the segment.
        parameter: A parameter of the model, if it has one.
        model: Name of the model.
        growing: Names of fields that may have more rows than in the initial state, with the axis of the rows.

    Raises:
        TypeError: The state has another type or number of fields.
        UsageError: Lanes, shapes or devices differ.
    """
    if not is_state(initial):
        raise TypeError(f"{model}.initial_state must return a flat tuple of tensors, it returned {in_words(initial)}")
    if not is_state(state) or len(state) != len(initial):  # type: ignore[arg-type]
        raise TypeError(f"the state of a {model} must be like {in_words(initial)}, got {in_words(state)}")
    assert isinstance(state, tuple)
    if parameter is not None and parameter.device != tokens.device:
        raise UsageError(f"the segment is on {tokens.device} and the {model} on {parameter.device}: move one of them")
    for name, field, expected in zip(getattr(initial, "_fields", range(len(state))), state, initial, strict=True):
        if field.shape[:1] != tokens.shape[:1]:
            raise UsageError(f"the segment has {len(tokens)} lanes, and field {name} of the state {list(field.shape)}")
        axis = growing.get(name)
        if _without(axis, field.shape) != _without(axis, expected.shape):
            wanted = f"{list(expected.shape)}, got {list(field.shape)}"
            raise UsageError(f"field {name} of the state of a {model} must have the shape {wanted}")
        if field.device != tokens.device:
            raise UsageError(f"the segment is on {tokens.device}, field {name} of the state on {field.device}: move it")


def _without(axis: int | None, shape: torch.Size) -> list[int]:
    """A shape without one axis, if one is given."""
    return [size for n, size in enumerate(shape) if n != axis]


def checked_tokens(
    tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"] | None, *, lanes: int, vocab_size: int
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """The next tokens of each lane on the CPU, 0 where there is none, and their number, after checks.

    Raises:
        UsageError: ``tokens`` is not a tensor of integers, has another number of lanes, or holds a token outside the
            vocabulary, or ``token_mask`` is not True at the left.
    """
    if not isinstance(tokens, Tensor):
        got = f"got {in_words(tokens)}: feed(torch.tensor(tokens))"
        raise UsageError(f"tokens must be a tensor of whole numbers of the shape [{lanes}, T], {got}")
    if tokens.dim() != 2 or len(tokens) != lanes or tokens.dtype not in INTEGERS:
        got = f"got {list(tokens.shape)} of {tokens.dtype}"
        raise UsageError(f"tokens must be whole numbers of the shape [{lanes}, T], {got}")
    token_mask = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
    if not isinstance(token_mask, Tensor) or token_mask.dtype != torch.bool:
        raise UsageError(f"token_mask must be a tensor of torch.bool, got {in_words(token_mask)}")
    if token_mask.shape != tokens.shape:
        raise UsageError(
            f"token_mask must have the shape of tokens, {list(tokens.shape)}, got {list(token_mask.shape)}"
        )
    tokens, token_mask = tokens.to("cpu", torch.int64), token_mask.cpu()
    if (token_mask[:, 1:] & ~token_mask[:, :-1]).any():
        raise UsageError("token_mask must be True at the left, but a token follows a gap")
    tokens = tokens.masked_fill(~token_mask, 0)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise UsageError(f"tokens must be at least 0 and below vocab_size={vocab_size}, got {int(outside[0])}")
    return tokens, token_mask.sum(1)
