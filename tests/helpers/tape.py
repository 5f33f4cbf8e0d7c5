"""A stand-in for CUDA graphs on a CPU: it records every operation, and runs them again on the same memory."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

R = TypeVar("R")

aten = torch.ops.aten
WAITS = {
    *(aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount, aten._pack_padded_sequence),
    aten.lift_fresh,  # torch.tensor(...) copies from memory of the host, which is not pinned
}
"""Operations for which the host waits for a GPU."""
SELECTS = {aten.index, aten.index_put, aten.index_put_}
"""It also waits for these, if indices are masks, whose count is a shape."""


class Call(NamedTuple):
    """A recorded operation."""

    operation: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor | None]
    """The tensors that it made; None for one that shares memory with an argument."""

    def repeat(self) -> None:
        """Run it again, on the same memory."""
        results = tree_leaves(self.operation(*self.args, **self.kwargs))
        for tensor, result in zip(self.made, results, strict=True):
            if tensor is not None:
                tensor.copy_(result)


class Tape:
    """Records functions as :class:`~memformer_pl.gradients.captured.CudaGraphs` does.

    As in a capture, values of the host are fixed, an operation that waits for the device fails, and the work is not
    done: afterwards the tensors that are new hold garbage, and the others what they held before. It does not notice
    ``.cpu()`` and ``.tolist()``, which torch does not dispatch on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.recorded = self.launches = 0

    def run(self, function: Callable[[], object]) -> None:
        """Run a function."""
        function()

    def record(self, function: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """Record a function."""
        recording = Recording()
        try:
            with recording:
                result = function()
        finally:
            recording.undo()
        self.recorded += 1

        def launch() -> None:
            self.launches += 1
            with torch.no_grad(), _disable_current_modes():
                for call in recording.calls:
                    call.repeat()

        return launch, result


class Recording(TorchDispatchMode):
    """Notes operations, and the values that they write to memory that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._made: dict[int, list[Tensor]] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket in WAITS or (func.overloadpacket in SELECTS and selects_by_mask(args[1])):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nas CUDA says")
        kwargs = kwargs or {}
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(tree_leaves(given.get(argument.name)))
        result = func(*args, **kwargs)
        memory = {address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = [
            tensor.detach() if isinstance(tensor, Tensor) and address(tensor) not in memory else None
            for tensor in tree_leaves(result)
        ]
        for tensor in made:
            if tensor is not None:
                self._made.setdefault(address(tensor), []).append(tensor)
        if any(tensor is not None for tensor in made) or func._schema.is_mutable:
            # other objects on the same memory: a parameter may move away, but a recorded call stays where it was
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach(), (tuple(args), kwargs))
            self.calls.append(Call(func, args, kwargs, made))
        return result

    def undo(self) -> None:
        """Leave garbage in what was made, and restore the rest."""
        for tensors in self._made.values():
            for tensor in tensors:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
        for tensor, value in self._before.values():
            tensor.copy_(value)

    def _keep(self, written: list[Any]) -> None:
        for tensor in written:
            if isinstance(tensor, Tensor) and address(tensor) not in self._made:
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before.setdefault(address(tensor), (memory, memory.clone()))


def selects_by_mask(indices: list[Tensor | None]) -> bool:
    """Whether an index is a mask."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins."""
    return tensor.untyped_storage().data_ptr()
