"""A captured rollout gives what an eager one gives, to the bit: on a CPU by a stand-in, on a GPU by a CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from models import LENGTHS, MODELS, STARTS, full, irregular, make_segment, memformer
from tape import Tape
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memformer_pl.contract import Segment, SegmentModel, State, checks, detach
from memformer_pl.errors import UsageError
from memformer_pl.gradients import captured
from memformer_pl.gradients.captured import CapturedGradient, CudaGraphs, Recorder, with_one_flag
from memformer_pl.gradients.replay import replay_backward
from memformer_pl.gradients.rng import RandomState
from memformer_pl.gradients.rollout import add_gradient

Add = Callable[..., tuple[Tensor, State]]

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=no_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device, with the checks of a GPU: values of segments are not read."""
    monkeypatch.setattr(checks, "has_values", lambda tensor: False)
    if request.param == "cpu":
        monkeypatch.setattr(captured, "WARM_UPS", 1)
    return torch.device(request.param)


class Recorders:
    """Makes a recorder for a device, and counts what its recorders record and launch."""

    def __init__(self) -> None:
        self.recorded = self.launches = 0

    def __call__(self, device: torch.device) -> Recorder:
        self.recorder = CudaGraphs(device) if device.type == "cuda" else Tape(device)
        return self

    def run(self, function: Callable[[], object]) -> None:
        self.recorder.run(function)

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        launch, result = self.recorder.record(function)
        self.recorded += 1

        def counted() -> None:
            self.launches += 1
            launch()

        return counted, result


class Pair:
    """Two equal modules: the rollouts of one are captured, those of the other are not."""

    def __init__(self, build: Callable[[], Any], add: Callable[[Any], Add], device: torch.device) -> None:
        self.captured, self.eager = build().to(device), build().to(device)
        self.recorders = Recorders()
        self.calls = CapturedGradient(add(self.captured), self.captured, recorder=self.recorders), add(self.eager)
        self.device = device

    def compare(self, *args: Any) -> tuple[Tensor, State]:
        """Call both with the same arguments, and compare results, gradients, buffers and random streams."""
        stream = RandomState.capture(torch.empty(0, device=self.device))
        outcomes = []
        for call in self.calls:
            stream.restore()
            outcomes.append((*call(*args), RandomState.capture(torch.empty(0, device=self.device))))
        (loss, state, random), (expected_loss, expected_state, expected_random) = outcomes
        assert type(state) is type(expected_state)
        for got, expected in zip((loss, *state), (expected_loss, *expected_state), strict=True):
            assert not got.requires_grad
            assert same(got, expected)
        for (name, got), expected in zip(self.captured.named_buffers(), self.eager.buffers(), strict=True):
            assert same(got, expected), name
        for (name, parameter), other in zip(self.captured.named_parameters(), self.eager.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), name
            assert parameter.grad is None or same(parameter.grad, other.grad), name
        assert torch.equal(random.cpu, expected_random.cpu)
        assert all(map(torch.equal, random.device_states, expected_random.device_states))
        return loss, state

    def each(self, change: Callable[[Any], object]) -> None:
        """Change both modules in the same way."""
        for module in (self.captured, self.eager):
            change(module)

    def step(self) -> None:
        """Take a step of gradient descent, and clear gradients."""
        with torch.no_grad():
            for module in (self.captured, self.eager):
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.05)
                        parameter.grad = None


def same(got: Tensor, expected: Tensor) -> bool:
    """Whether they agree to the bit, or on a GPU, whose sums come in any order, to rounding."""
    if got.is_cuda and got.is_floating_point():
        return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-11, atol=1e-13)
    return torch.equal(got, expected)


def adds(gradient: str, group: int = 1) -> Callable[[SegmentModel], Add]:
    """What is captured for a model of this package."""

    def of(model: SegmentModel) -> Add:
        def add(segments: Sequence[Segment], state: State, divisor: Tensor) -> tuple[Tensor, State]:
            return add_gradient(
                model,
                lambda output: output.token_losses.sum() / divisor + output.auxiliary_loss,
                segments,
                state,
                gradient=gradient,
                decoder_group=group,
            )

        return add

    return of


def rollouts(count: int, device: torch.device, *, horizon: int = 4) -> list[tuple[list[Segment], Tensor]]:
    """Rollouts that differ in tokens, masks, starts, masks of the loss, seeds, and the divisor of their loss."""
    made = []
    for number in range(count):
        segments = []
        for t in range(horizon):
            row = (3 * number + t) % len(LENGTHS)
            segment = make_segment(LENGTHS[row], document_start=STARTS[row], seed=100 * number + t)
            loss_mask, seeds = torch.rand(segment.tokens.shape) < 0.7, torch.randint(1 << 62, (1,))
            segments.append(moved(segment._replace(loss_mask=loss_mask, seeds=seeds), device))
        made.append((segments, torch.tensor(3.0 + number, dtype=torch.float64, device=device)))
    return made


def moved(segment: Segment, device: torch.device) -> Segment:
    return Segment(*(field.to(device) if isinstance(field, Tensor) else field for field in segment))


def entering(pair: Pair, lanes: int = 4) -> State:
    """The initial state of the models of a pair."""
    return detach(pair.eager.initial_state(lanes))


CASES = [
    *(("memformer", gradient, group) for gradient, group in (("replay", 1), ("replay", 2), ("replay", 4), ("bptt", 1))),
    ("memformer", "sparse_replay", 1),
    ("memformer decoder", "replay", 1),
    ("recurrent memory transformer", "replay", 1),
    ("gated delta net", "replay", 1),
    ("titans", "replay", 1),
    ("transformer xl", "truncated", 1),
    ("transformer xl", "truncated", 2),
    ("compressive transformer", "truncated", 1),
    ("lamemo", "truncated", 1),
]


@pytest.mark.parametrize(("name", "gradient", "group"), CASES)
def test_a_captured_rollout_is_an_eager_one(name: str, gradient: str, group: int, device: torch.device) -> None:
    pair = Pair(partial(MODELS[name], dropout=0.2), adds(gradient, group), device)
    state, losses = entering(pair), []
    for segments, divisor in rollouts(3, device):
        loss, state = pair.compare(segments, state, divisor)
        losses.append(float(loss))
        pair.step()
    assert len(set(losses)) == 3
    assert (pair.recorders.recorded, pair.recorders.launches) == (1, 3)


class Recurrent(nn.Module):
    """An LSTM of a user's own, with a running mean of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("scale", torch.full((3,), 0.5))

    def step(self, segment: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        inputs, reads = segment
        self.mean.mul_(0.9).add_(inputs.mean((0, 1)), alpha=0.1)
        outputs, next_state = self.lstm(inputs - self.mean, state)
        wrong = (self.out(outputs) * self.scale - inputs.flip(1)).square().sum((1, 2))
        pairs = zip(next_state, state, strict=True)
        return (wrong * reads).sum(), tuple(torch.where(reads[:, None], a, b) for a, b in pairs)


def recurrent() -> Recurrent:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Recurrent().double()


def adds_of_a_user(module: Recurrent) -> Add:
    return lambda segments, state: replay_backward(module.step, segments, state)


def inputs(device: torch.device, horizon: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 5, 3).double().to(device), (torch.rand(4) < 0.8).to(device)) for _ in range(horizon)]


def test_a_step_in_plain_torch_can_be_captured_and_its_buffers_may_change_in_place(device: torch.device) -> None:
    pair = Pair(recurrent, adds_of_a_user, device)
    state: State = tuple(torch.randn(2, 4, 4).double().to(device) for _ in range(2))
    for _ in range(3):
        _, state = pair.compare(inputs(device), state)
        pair.step()
    assert pair.captured.mean.any()
    assert pair.recorders.recorded == 1


def test_gradients_are_added_to_those_that_are_there(device: torch.device) -> None:
    pair = Pair(memformer, adds("replay"), device)
    ahead = [(segments, entering(pair), divisor) for segments, divisor in rollouts(4, device)]

    def some_grads(model: SegmentModel) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.25)

    pair.each(some_grads)
    for rollout in ahead[:2]:
        pair.compare(*rollout)
    pair.each(lambda model: model.zero_grad(set_to_none=False))
    pair.compare(*ahead[2])
    pair.each(some_grads)
    pair.compare(*ahead[3])


def test_all_flags_are_true_or_none_is() -> None:
    segments = [segment._replace(continues=True) for segment in full(3)]
    assert [segment.continues for segment in with_one_flag(segments)] == [True, True, True]
    segments[1] = segments[1]._replace(continues=False)
    with_one = with_one_flag(segments)
    assert [segment.continues for segment in with_one] == [False, False, False]
    assert all(a.tokens is b.tokens for a, b in zip(with_one, segments, strict=True))


def test_each_sequence_of_flags_has_a_graph_of_its_own(device: torch.device) -> None:
    pair = Pair(partial(memformer, dropout=0.2), adds("replay", 2), device)
    divisor = torch.tensor(2.0, dtype=torch.float64, device=device)

    first, *rest = (moved(segment, device) for segment in full(4, lanes=4))
    state = detach(pair.eager(first, entering(pair))[1])
    for seed, ragged in enumerate([False, True, False, True, False, True]):
        segments = [segment._replace(continues=True, seeds=first.tokens.new_tensor([seed])) for segment in rest]
        if ragged:
            segments[0] = moved(irregular(1)[0]._replace(seeds=segments[0].seeds), device)
        _, state = pair.compare(with_one_flag(segments), state, divisor)
    # the second form drops the graph of the first, since it needs its memory to warm up
    assert (pair.recorders.recorded, pair.recorders.launches) == (3, 6)


def test_what_a_call_returned_stays_as_it_was(device: torch.device) -> None:
    pair = Pair(partial(memformer, dropout=0.2), adds("replay"), device)
    first, second = ((segments, entering(pair), divisor) for segments, divisor in rollouts(2, device))
    loss, state = pair.calls[0](*first)
    copies = [tensor.clone() for tensor in (loss, *state)]
    pair.calls[0](*second)
    assert all(map(torch.equal, (loss, *state), copies))


def test_frozen_parameters_and_those_that_nothing_reaches_get_no_gradient(device: torch.device) -> None:
    pair = Pair(memformer, adds("truncated"), device)
    (segments, divisor), *_ = rollouts(1, device)
    pair.each(lambda model: model.decoder.requires_grad_(False))
    pair.compare(segments, entering(pair), divisor)
    without = {name.partition(".")[0] for name, p in pair.captured.named_parameters() if p.grad is None}
    assert {"decoder", "writer"} <= without < {name.partition(".")[0] for name, _ in pair.captured.named_parameters()}
    pair.each(lambda model: model.decoder.requires_grad_(True))
    pair.compare(segments, entering(pair), divisor)
    assert all(parameter.grad is not None for parameter in pair.captured.decoder.parameters())
    assert pair.recorders.recorded == 2


def test_parameters_that_move_to_other_memory_are_found(device: torch.device) -> None:
    pair = Pair(memformer, adds("replay"), device)
    for segments, divisor in rollouts(2, device):
        pair.compare(segments, entering(pair), divisor)
        pair.step()
        for parameter in pair.captured.parameters():
            parameter.data = parameter.data.clone()
    assert pair.recorders.recorded == 2


def test_a_module_in_evaluation_mode_drops_nothing(device: torch.device) -> None:
    pair = Pair(partial(memformer, dropout=0.5), adds("replay"), device)
    (segments, divisor), *_ = rollouts(1, device)
    dropped, _ = pair.compare(segments, entering(pair), divisor)
    pair.each(lambda model: model.eval())
    kept, _ = pair.compare(segments, entering(pair), divisor)
    assert dropped != kept


@pytest.mark.parametrize("gradient", ["replay", "bptt"])
def test_under_autocast_weights_are_cast_in_the_graph(gradient: str, device: torch.device) -> None:
    pair = Pair(lambda: memformer(dropout=0.2).float(), adds(gradient), device)
    for segments, divisor in rollouts(3, device):
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                pair.captured(segments[0], entering(pair))  # autocast keeps the weights that it casts here
            pair.compare(segments, entering(pair), divisor)
        pair.step()


def only_on_a_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a capture that fails may spoil a GPU for the tests that follow")


def test_a_capture_that_fails_leaves_no_cast_weights(device: torch.device) -> None:
    only_on_a_cpu(device)
    model = memformer().float().to(device)
    (segments, divisor), *_ = rollouts(1, device)
    state = detach(model.initial_state(4))

    def add(segments: Sequence[Segment], state: State, divisor: Tensor) -> float:
        return adds("bptt")(model)(segments, state, divisor)[0].item()

    with torch.autocast(device.type, torch.bfloat16):
        with pytest.raises(UsageError):
            CapturedGradient(add, model, recorder=Recorders())(segments, state, divisor)
        assert model(segments[0], state)[0].token_losses.isfinite().all()


class Calls(TorchDispatchMode):
    """Lists the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.overloadpacket.__name__.startswith(("empty", "detach")):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_rollout_takes_six_operations_and_a_launch_whatever_its_horizon(device: torch.device) -> None:
    for horizon in (2, 8):
        pair = Pair(partial(memformer, dropout=0.2), adds("replay"), device)
        state = entering(pair)
        (segments, divisor), *_ = rollouts(1, device, horizon=horizon)
        pair.calls[0](segments, state, divisor)
        pair.captured.zero_grad()
        with Calls() as calls:
            pair.calls[0](segments, state, divisor)
        # arguments and results are tokens and seeds, masks, and numbers: a copy for each type; memory and last tokens
        assert calls.names == [*["_foreach_copy_"] * 3, "_foreach_zero_", *["_foreach_copy_"] * 2]
        assert pair.recorders.launches == 2


def test_the_first_call_leaves_no_trace_but_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "WARM_UPS", 3)
    pair = Pair(recurrent, adds_of_a_user, device)
    other = nn.Parameter(torch.zeros(1, device=device))
    pair.each(lambda module: module.register_parameter("other", other))
    other.grad = torch.ones_like(other)
    state: State = tuple(torch.randn(2, 4, 4).double().to(device) for _ in range(2))
    arguments = inputs(device)
    copies = [tensor.clone() for tensor in (*state, *(field for segment in arguments for field in segment))]
    pair.compare(arguments, state)
    kept = (*state, *(field for segment in arguments for field in segment))
    assert all(map(torch.equal, kept, copies))
    assert other.grad.tolist() == [1]


class Draws(Recurrent):
    def step(self, segment: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        return super().step((nn.functional.dropout(segment[0], 0.1), segment[1]), state)


class DrawsOnTheHost(Recurrent):
    def step(self, segment: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        return super().step((segment[0] * float(torch.rand(())), segment[1]), state)


class Waits(Recurrent):
    def step(self, segment: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        loss, next_state = super().step(segment, state)
        return loss / segment[1].sum().clamp(min=1).item(), next_state


class Selects(Recurrent):
    def step(self, segment: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        loss, next_state = super().step(segment, state)
        return loss + next_state[0][:, segment[1]].sum(), next_state


class Replaces(Recurrent):
    def step(self, segment: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        self.scale = self.scale * 0.9
        return super().step(segment, state)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Draws, "draws from a default random stream"),
        (DrawsOnTheHost, "draws from a default random stream"),
        (Waits, "must not wait for the device"),
        (Selects, "must not wait for the device"),
        (Replaces, "replaces the buffer scale of a Replaces"),
    ],
)
def test_what_a_graph_cannot_repeat_is_refused(kind: type[Recurrent], message: str, device: torch.device) -> None:
    if kind in (Waits, Selects):
        only_on_a_cpu(device)
    pair = Pair(kind, adds_of_a_user, device)
    pair.each(lambda module: module.double())
    state: State = tuple(torch.randn(2, 4, 4).double().to(device) for _ in range(2))
    stream = RandomState.capture(state)
    with pytest.raises(UsageError, match=f"{message}.*leave cuda_graph off"):
        pair.calls[0](inputs(device), state)
    stream.restore()
    assert all(parameter.grad is None for parameter in pair.captured.parameters())
    assert pair.captured.scale.tolist() == [0.5] * 3
    assert not pair.captured.mean.any()


def test_dropout_without_seeds_is_refused(device: torch.device) -> None:
    pair = Pair(partial(memformer, dropout=0.2), adds("replay"), device)
    (segments, divisor), *_ = rollouts(1, device)
    with pytest.raises(UsageError, match=r"draw from Segment\.seeds"):
        pair.calls[0]([segment._replace(seeds=None) for segment in segments], entering(pair), divisor)


def test_a_graph_and_another_device_are_refused(device: torch.device) -> None:
    pair = Pair(recurrent, adds_of_a_user, device)
    state: State = tuple(torch.randn(2, 4, 4).double().to(device) for _ in range(2))
    with pytest.raises(UsageError, match=f"tensors on {device}.* without a graph, got .*requires_grad=True"):
        pair.calls[0](inputs(device), (state[0].requires_grad_(), state[1]))
    with pytest.raises(UsageError, match="on meta"):
        pair.calls[0](inputs(device), (state[0].detach(), state[1].to("meta")))


def test_too_many_forms_are_refused(device: torch.device) -> None:
    pair = Pair(recurrent, adds_of_a_user, device)
    state: State = tuple(torch.randn(2, 4, 4).double().to(device) for _ in range(2))
    for horizon in range(1, 5):
        pair.compare(inputs(device, horizon), state)
        pair.step()
    with pytest.raises(UsageError, match="more than 4 forms"):
        pair.calls[0](inputs(device, 5), state)


def test_a_model_on_a_cpu_needs_no_graph() -> None:
    module = recurrent()
    with pytest.raises(UsageError, match="cuda_graph needs a GPU, and the model is on cpu"):
        CapturedGradient(adds_of_a_user(module), module)(inputs(torch.device("cpu")), ())


def test_the_message_names_the_first_failure_and_not_that_of_the_end_of_the_capture() -> None:
    class FailsTwice(Tape):
        def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            try:
                return super().record(function)
            except RuntimeError as error:
                raise RuntimeError("operation failed due to a previous error during capture") from error

    module = Waits().double()
    state: State = tuple(torch.randn(2, 4, 4).double() for _ in range(2))
    call = CapturedGradient(adds_of_a_user(module), module, recorder=FailsTwice)
    with pytest.raises(
        UsageError, match=r"as a CUDA graph: operation not permitted .*_local_scalar_dense.*\. Its"
    ) as raised:
        call(inputs(torch.device("cpu")), state)
    assert "_local_scalar_dense" in str(raised.value.__cause__)


def test_a_lack_of_memory_is_not_taken_for_a_mistake() -> None:
    module, calls = recurrent(), []

    def add(segments: Any, state: State) -> tuple[Tensor, State]:
        calls.append(1)
        if len(calls) > captured.WARM_UPS:
            raise torch.OutOfMemoryError("out of memory")
        return adds_of_a_user(module)(segments, state)

    state: State = tuple(torch.randn(2, 4, 4).double() for _ in range(2))
    with pytest.raises(torch.OutOfMemoryError):
        CapturedGradient(add, module, recorder=Tape)(inputs(torch.device("cpu")), state)


def test_streams_of_devices_are_left_alone_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stream = RandomState.capture(torch.empty(0, device="meta"))
    assert stream.devices == stream.device_states == []
    first = torch.rand(3)
    stream.restore()
    assert torch.equal(torch.rand(3), first)


class Stream:
    """In place of a stream of a GPU: notes which stream is current, and which one waits for which."""

    device = torch.device("cuda:0")
    current: "Stream"
    events: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def as_current(self) -> Iterator[None]:
        before, Stream.current = Stream.current, self
        try:
            yield
        finally:
            Stream.current = before


class Graph:
    """In place of a CUDA graph."""

    def replay(self) -> None:
        Stream.events.append("replay")


class Capture(AbstractContextManager):
    """In place of ``torch.cuda.graph``, which does not restore the current stream if the end of a capture fails."""

    def __init__(self, graph: Graph, *, pool: object, stream: Stream, capture_error_mode: str) -> None:
        assert isinstance(graph, Graph)
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.stream = stream

    def __enter__(self) -> None:
        self.before, Stream.current = Stream.current, self.stream

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            raise RuntimeError("the capture was invalidated")
        Stream.current = self.before


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[Stream, Stream]:
    """A GPU's default stream, and the one that is captured."""
    default, captured_one = Stream("default"), Stream("captured")
    monkeypatch.setattr(Stream, "events", [])
    monkeypatch.setattr(Stream, "current", default, raising=False)
    monkeypatch.setattr(captured, "_capture_stream", lambda device: captured_one)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", Stream.as_current)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    return default, captured_one


def test_warm_up_and_capture_share_a_side_stream(streams: tuple[Stream, Stream], no_type_checks: None) -> None:
    default, side = streams
    graphs = CudaGraphs(torch.device("cuda:0"))
    graphs.run(lambda: Stream.events.append(f"runs on {Stream.current.name}"))
    assert Stream.events == ["captured waits for default", "runs on captured", "default waits for captured"]
    launch, current = graphs.record(lambda: Stream.current)
    assert (current, Stream.current) == (side, default)
    launch()
    assert Stream.events[3:] == ["replay"]


def test_the_current_stream_is_restored_where_a_function_fails(
    streams: tuple[Stream, Stream], no_type_checks: None
) -> None:
    default, _ = streams
    graphs = CudaGraphs(torch.device("cuda:0"))

    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        graphs.run(fails)
    assert Stream.events[-1] == "default waits for captured"
    with pytest.raises(RuntimeError, match="invalidated"):
        graphs.record(fails)
    assert Stream.current is default


class TestTape:
    """The stand-in is as strict as a CUDA graph."""

    def test_values_of_the_host_stay_as_they_were_recorded(self) -> None:
        x, factor = torch.ones(2), [2.0]
        launch, result = Tape(x.device).record(lambda: x * factor[0])
        factor[0] = 3.0
        x.fill_(5.0)
        launch()
        assert result.tolist() == [10, 10]

    def test_recording_does_no_work(self) -> None:
        x, total = torch.ones(2), torch.zeros(2)
        launch, result = Tape(x.device).record(lambda: (total.add_(x), x + 1)[1])
        assert total.tolist() == [0, 0]
        assert result.isnan().all()
        for _ in range(2):
            launch()
        assert total.tolist() == [2, 2]
        assert result.tolist() == [2, 2]

    def test_memory_stays_where_it_was_recorded(self) -> None:
        x = torch.ones(2)
        launch, result = Tape(x.device).record(lambda: x + 1)
        x.data = torch.full((2,), 7.0)
        launch()
        assert result.tolist() == [2, 2]

    @pytest.mark.parametrize(
        "waits",
        [
            *(bool, torch.Tensor.item, torch.Tensor.nonzero, torch.unique),
            *(lambda x: x[x > 0], lambda x: torch.equal(x, x + 1), lambda x: torch.tensor(3.0)),
        ],
    )
    def test_what_waits_for_a_device_fails(self, waits: Callable[[Tensor], object]) -> None:
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            Tape(torch.device("cpu")).record(lambda: waits(torch.ones(1)))
