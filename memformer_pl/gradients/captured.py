"""The gradient of a rollout as one CUDA graph: a few calls from Python instead of tens of thousands.

Shapes do not change in training, and dropout is a function of ``Segment.seeds``. So the gradient of a rollout is a
function of tensors: the rollout, the entering state, and the parameters. Its work is recorded once and launched for
each rollout, on the same memory, into which the rollout is copied::

    def add(segments, state, divisor):
        def cost(output):
            return output.token_losses.sum() / divisor

        return add_gradient(model, cost, segments, state, gradient="replay")

    captured = CapturedGradient(add, model)
    loss, state = captured(with_one_flag(segments), state, divisor)  # as add(with_one_flag(segments), state, divisor)

The graphs of a :class:`CapturedGradient` share a pool of memory, as large as the peak of a rollout. It stays reserved
between rollouts, and nothing else can use it. In addition, each graph keeps a copy of its arguments.

Source: the notes of PyTorch on CUDA semantics, "Whole-network capture". Ours: ``.grad`` is as after an eager call, also
where it holds the gradient of earlier rollouts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from memformer_pl.contract import Segment, SegmentModel
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rng import RandomState
from memformer_pl.gradients.side_effects import Captured, SideEffects

P = ParamSpec("P")
R = TypeVar("R")

WARM_UPS = 3
"""Eager runs before a capture, as in ``torch.cuda.make_graphed_callables``: they load kernels and libraries, compile
what is compiled, and allocate workspaces."""
MOST_FORMS = 4


def require_capturable(model: SegmentModel, *, gradient: str) -> None:
    """Raise a ``UsageError`` if the gradient of a model cannot be recorded by this method."""
    if gradient == "checkpointed":
        raise UsageError("cuda_graph cannot record gradient='checkpointed': choose another, such as replay")
    if model.growing:
        raise UsageError(
            f"cuda_graph needs a state of the same size in all rollouts, but that of {type(model).__name__} grows: set "
            "its window, or leave cuda_graph off"
        )


def with_one_flag(segments: Sequence[Segment]) -> list[Segment]:
    """The segments of a rollout, all with the same ``continues``: True if it is in all of them.

    False is always right. So two graphs serve every rollout, instead of one for each sequence of flags.
    """
    one = all(segment.continues for segment in segments)
    return [segment._replace(continues=one) for segment in segments]


class Recorder(Protocol):
    """Records the work that functions give to a device."""

    def run(self, function: Callable[[], object]) -> None:
        """Run a function where it will be recorded, without recording it."""

    def record(self, function: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """Record a function, without doing its work.

        Returns:
            A function that launches the work, on the same memory; and the result, whose tensors a launch fills.
        """


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: libraries allocate workspaces per stream, and autograd remembers streams."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


class CudaGraphs:
    """Records functions as CUDA graphs. They share memory, so a launch may overwrite the results of another graph.

    Args:
        device: A GPU.

    Raises:
        UsageError: It is another device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UsageError(f"cuda_graph needs a GPU, and the model is on {device}: leave cuda_graph off")
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], object]) -> None:
        """Run a function on the stream that is captured."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                function()
        finally:
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """Capture a function. A launch runs on the stream that is current then."""
        # the outer context restores the current stream where a capture fails: there the inner one does not
        with torch.cuda.stream(self._stream):
            graph = torch.cuda.CUDAGraph()
            # thread_local: a thread of a loader may pin memory meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = function()
        return graph.replay, result


class _Graph(NamedTuple):
    """A recorded call."""

    arguments: list[Tensor]
    """The tensors among the arguments; those of a rollout are copied into them."""
    reached: list[nn.Parameter]
    """The parameters that get a gradient."""
    launch: Callable[[], None]
    results: list[Any]
    spec: TreeSpec
    """Of the results."""


class CapturedGradient(Generic[P, R]):
    """A function that adds gradients to ``.grad``, recorded in its first call and launched in every call.

    A call runs the operations of the function, in order. There is one graph for each form of the arguments: shapes,
    dtypes, and the values of all that are not tensors, such as ``Segment.continues``. All graphs are recorded anew once
    a parameter is frozen or moves to other memory, or a module switches between training and evaluation.

    The function may depend on its arguments, on the parameters and buffers of the model, and on constants. It must not
    wait for the device, nor draw from the default random streams; buffers may change in place. It runs as Python only
    while it is recorded: a hook that prints does so only then, and an attribute that is set later, such as a dropout
    rate, has no effect.

    The ``.grad`` that a call sets is the same tensor each time: copy it to keep it.

    Args:
        function: Such as :func:`~memformer_pl.gradients.add_gradient` of a model. Arguments and results are tensors
            without a graph, other values that can be compared, and tuples, lists and dictionaries of them.
        model: Holds all parameters that the function reaches.
        recorder: Makes a recorder for the device of the model.
    """

    def __init__(
        self, function: Callable[P, R], model: nn.Module, *, recorder: Callable[[torch.device], Recorder] = CudaGraphs
    ) -> None:
        self._function, self._model, self._new_recorder = function, model, recorder
        self._surroundings: object = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function.

        Raises:
            UsageError: The model is not on a GPU, the function cannot be captured, a tensor is on another device or has
                a graph, or the arguments have taken too many forms. After a capture that failed, the GPU may not be
                usable in this process.
        """
        leaves, spec = tree_flatten((args, kwargs))
        self._drop_stale_graphs()
        form = spec, tuple(map(_form, leaves))
        if form not in self._graphs:
            self._graphs[form] = self._capture(form, leaves, spec)
        graph = self._graphs[form]
        with torch.no_grad():
            _copy(graph.arguments, _tensors(leaves))
            self._enter_grads(graph.reached)
            graph.launch()
            filled = _tensors(graph.results)
            own = [torch.empty_like(tensor) for tensor in filled]  # the next launch fills the others again
            _copy(own, filled)
        rest = iter(own)
        returned = [next(rest) if isinstance(result, Tensor) else result for result in graph.results]
        result: R = tree_unflatten(returned, graph.spec)
        return result

    def _drop_stale_graphs(self) -> None:
        """Forget all graphs once anything has changed that they depend on, other than the arguments."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        device = tensors[0].device
        surroundings = (
            [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors],
            [module.training for module in self._model.modules()],
            (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type), torch.is_grad_enabled()),
        )
        if surroundings != self._surroundings:
            self._graphs: dict[object, _Graph] = {}
            self._reached: dict[object, list[nn.Parameter]] = {}
            self._grads: dict[nn.Parameter, Tensor] = {}
            self._device, self._surroundings = device, surroundings

    def _enter_grads(self, reached: list[nn.Parameter]) -> None:
        """Let ``.grad`` be the tensor that the graph adds to: with what it holds, or zero if there is none."""
        fresh = []
        for parameter in reached:
            grad = self._grads[parameter]
            if parameter.grad is None:
                fresh.append(grad)
            elif parameter.grad is not grad:
                grad.copy_(parameter.grad)
            parameter.grad = grad
        for (alike,) in _by_dtype(fresh):
            torch._foreach_zero_(alike)

    def _capture(self, form: object, leaves: list[Any], spec: TreeSpec) -> _Graph:
        self._check(leaves)
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
        call = partial(self._function, *args, **kwargs)
        with _grads_aside(self._model):
            if form not in self._reached:
                self._reached[form] = self._warm_up(call)
            reached = self._reached[form]
            for parameter in reached:
                if parameter not in self._grads:
                    self._grads[parameter] = torch.zeros_like(parameter)
                parameter.grad = self._grads[parameter]
            launch, result = self._record(call)
            if any(parameter.grad is not self._grads[parameter] for parameter in reached):
                raise UsageError("the gradient replaces .grad instead of adding to it in place: leave cuda_graph off")
        results, of_results = tree_flatten(result)
        self._check(results)
        return _Graph(_tensors(leaves), reached, launch, results, of_results)

    def _check(self, leaves: list[Any]) -> None:
        for tensor in _tensors(leaves):
            if tensor.device != self._device or tensor.requires_grad:
                raise UsageError(
                    f"what is captured takes and returns tensors on {self._device} without a graph, got "
                    f"{tensor.dtype} {list(tensor.shape)} on {tensor.device} with requires_grad={tensor.requires_grad}"
                )

    def _warm_up(self, call: Callable[[], object]) -> list[nn.Parameter]:
        """Run a call several times without side effects; return the parameters that get a gradient."""
        if len(self._reached) == MOST_FORMS:
            raise UsageError(
                f"rollouts have taken more than {MOST_FORMS} forms (shapes, dtypes, flags), and each needs a CUDA "
                "graph: give them the same form, or leave cuda_graph off"
            )
        self._graphs.clear()  # the runs need their memory; they are recorded again when they are needed
        self._recorder = self._new_recorder(self._device)
        parameters = list(self._model.parameters())
        side_effects = SideEffects(self._function, self._model)
        before = side_effects.capture(parameters[0])
        for _ in range(WARM_UPS):
            try:
                with _separate_casts():
                    self._recorder.run(call)
                _check_side_effects(before, RandomState.capture((parameters[0], side_effects.placed)))
            finally:
                before.restore()
        reached = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in reached:
            parameter.grad = None
        return reached

    def _record(self, call: Callable[[], R]) -> tuple[Callable[[], None], R]:
        failed: list[RuntimeError] = []

        def noting_failure() -> R:
            try:
                return call()
            except RuntimeError as error:
                failed.append(error)
                raise

        try:
            with _separate_casts():
                return self._recorder.record(noting_failure)
        except RuntimeError as error:
            first = (failed or [error])[0]  # after a failure, the end of the capture fails too
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise UsageError(
                f"the rollout cannot be captured as a CUDA graph: {str(first).splitlines()[0]}. Its step must not wait "
                "for the device, as .item(), .cpu(), boolean indexing and packed sequences do: change it, or leave "
                "cuda_graph off"
            ) from first


def _check_side_effects(before: Captured, after: RandomState) -> None:
    """Raise a ``UsageError`` if a run had side effects that a launch would not have."""
    streams = before.random
    pairs = zip((streams.cpu, *streams.device_states), (after.cpu, *after.device_states), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise UsageError(
            "the step draws from a default random stream, which a captured rollout cannot rewind: draw from "
            "Segment.seeds, as the models of this package do, or leave cuda_graph off"
        )
    for module, name, tensor, _ in before.buffers:
        if getattr(module, name) is not tensor:
            raise UsageError(
                f"the step replaces the buffer {name} of a {type(module).__name__}, which a captured rollout would not "
                "see: change it in place, or leave cuda_graph off"
            )


@contextmanager
def _grads_aside(model: nn.Module) -> Iterator[None]:
    """Run the body without any ``.grad``, and restore them."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


@contextmanager
def _separate_casts() -> Iterator[None]:
    """Run the body without weights that autocast cast before, and what follows without those that it casts in the body:
    a graph must cast weights itself, and what it casts has no value outside."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _form(leaf: object) -> object:
    """What a graph depends on in an argument: all but the values of a tensor."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _copy(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for copies, originals in _by_dtype(into, tensors):
        torch._foreach_copy_(copies, originals)


def _by_dtype(*lists: Sequence[Tensor]) -> list[list[tuple[Tensor, ...]]]:
    """The lists for each dtype, since tensors of one dtype share kernels."""
    rows: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        rows.setdefault(row[0].dtype, []).append(row)
    return [list(zip(*alike, strict=True)) for alike in rows.values()]
