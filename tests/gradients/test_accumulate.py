"""The gradients of a segment are added to ``.grad`` together: the same bits as one by one, whatever is in ``.grad``."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from models import Case, in_groups, irregular, largest_relative_difference, memformer, plain_loop, train_on
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from memformer_pl.contract import State
from memformer_pl.gradients import baselines, grouped, replay
from memformer_pl.gradients.accumulate import backward, parameters_of
from memformer_pl.gradients.rollout import GRADIENTS

M = TypeVar("M", bound=nn.Module)
Way = Callable[[Case], object]


def way(name: str) -> Way:
    return lambda case: GRADIENTS[name](case.step, case.segments, case.state, advance=case.advance)


WAYS: dict[str, Way] = {
    "replay": way("replay"),
    "sparse_replay": way("sparse_replay"),
    "truncated": way("truncated"),
    "groups": lambda case: in_groups(2, case),
}


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Leave all accumulation to autograd, from the call on."""

    def plain(roots: Sequence[tuple[Tensor, Tensor | None]], groups: object) -> None:
        with_graph = [(root, grad) for root, grad in roots if root.requires_grad]
        if with_graph:
            torch.autograd.backward([root for root, _ in with_graph], [grad for _, grad in with_graph])

    def leave() -> None:
        for module in (replay, grouped, baselines):
            monkeypatch.setattr(module, "backward", plain)

    return leave


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.of[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def rollout() -> Case:
    model = memformer(dropout=0.2)
    return train_on(model, irregular(3), model.initial_state(4))


def grads_of(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def twice(way: Way, kind: str) -> dict[str, Tensor | None]:
    """The gradients after two rollouts, the second of which adds to those of the first."""
    torch.manual_seed(0)
    case = rollout()
    case.module.to(torch.float64 if kind == "float64" else torch.float32)
    for _ in range(2):
        state = case.module.initial_state(4)
        with torch.autocast("cpu", torch.bfloat16) if kind == "bfloat16" else nullcontext():
            way(case._replace(state=state))
    return grads_of(case.module)


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", WAYS)
def test_the_gradients_have_the_bits_that_they_have_one_by_one(
    name: str, kind: str, one_by_one: Callable[[], None]
) -> None:
    together = twice(WAYS[name], kind)
    one_by_one()
    expected = twice(WAYS[name], kind)
    assert sum(grad is not None and bool(grad.any()) for grad in expected.values()) > 30
    for name, grad in expected.items():
        assert (together[name] is None) == (grad is None)
        assert grad is None or (torch.equal(together[name], grad) and together[name].stride() == grad.stride())


@pytest.mark.parametrize(
    ("name", "backward_calls"), [("replay", 4), ("sparse_replay", 4), ("truncated", 3), ("groups", 6)]
)
def test_each_backward_call_adds_once(name: str, backward_calls: int, one_by_one: Callable[[], None]) -> None:
    def calls() -> Counter[str]:
        case = rollout()
        for parameter in case.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Calls() as counted:
            WAYS[name](case)
        return counted.of

    together = calls()
    assert together["_foreach_add_"] == backward_calls
    one_by_one()
    assert calls()["add_"] - together["add_"] > 10 * backward_calls


class Sum(nn.Module):
    """Adds its parameters; all have six entries."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.randn(shape, dtype=torch.float64) for shape in shapes])

    def forward(self) -> Tensor:
        return torch.stack([part.flatten() for part in self.parts]).sum(0)


def step_of(module: M, added: Callable[[M], Tensor], *, last: bool = False) -> Case:
    """Adds to the state what ``added`` takes from the module; ``last``: only the last segment has a loss."""

    def step(segment: tuple[int, Tensor], state: State) -> tuple[Tensor, State]:
        t, x = segment
        h = state[0].view(-1) + added(module)
        loss = (h * x).sum() if not last or t == 3 else torch.zeros((), dtype=torch.float64)
        return loss, (h.view(3, 2),)

    segments = list(enumerate(torch.randn(4, 6, dtype=torch.float64)))
    return Case(module, step, segments, (torch.zeros(3, 2, dtype=torch.float64),))


def assert_as_a_plain_loop(build: Callable[[], Case]) -> None:
    grads = []
    for gradient in (replay.replay_backward, plain_loop):
        torch.manual_seed(0)
        case = build()
        gradient(case.step, case.segments, case.state)
        grads.append({n: g if g is None else g.to_dense() for n, g in grads_of(case.module).items()})
    assert largest_relative_difference(*grads) < 1e-12


def test_two_parameters_of_one_shape_whose_gradients_are_views_of_one_tensor() -> None:
    def build() -> Case:
        module = Sum((2, 3), (6, 1))
        return step_of(module, lambda module: module.parts[0].view(6) + module.parts[1].view(6))

    case = build()
    case.step(case.segments[0], case.state)[0].backward()
    first, second = (part.grad for part in case.module.parts)
    assert first.data_ptr() == second.data_ptr(), "autograd separates them, so this test is not needed"
    assert_as_a_plain_loop(build)


def test_a_parameter_and_the_state_whose_gradients_are_views_of_one_tensor() -> None:
    def build() -> Case:
        module = Sum((2, 3))
        return step_of(module, lambda module: module.parts[0].view(6), last=True)

    assert_as_a_plain_loop(build)


def test_a_parameter_of_the_decoder_and_an_encoded_segment_whose_gradients_are_views_of_one_tensor() -> None:
    encoder, decoder = (Sum((2, 3)) for _ in range(2))
    segments, state = list(torch.randn(4, 6, dtype=torch.float64)), (torch.zeros(6, dtype=torch.float64),)

    def encode(x: Tensor, state: State) -> tuple[State, State]:
        h = state[0] + encoder()
        return (h.view(3, 2),), (h * x,)

    def decode(segments: Sequence[Tensor], encoded: Sequence[State]) -> Tensor:
        pairs = zip(segments, encoded, strict=True)
        return torch.stack([((h.view(6) + decoder.parts[0].view(6)) * x).sum() for x, (h,) in pairs]).sum()

    def step(x: Tensor, state: State) -> tuple[Tensor, State]:
        encoded, next_state = encode(x, state)
        return decode([x], [encoded]), next_state

    def gradients(run: Callable[[], object]) -> dict[str, Tensor | None]:
        both = nn.ModuleList([encoder, decoder])
        both.zero_grad()
        run()
        return grads_of(both)

    found = gradients(lambda: grouped.replay_in_groups(encode, decode, segments, state, group=1))
    assert largest_relative_difference(found, gradients(lambda: plain_loop(step, segments, state))) < 1e-12


def test_parts_of_one_tensor_that_do_not_overlap_are_not_copied() -> None:
    first, second = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    backward([((torch.cat((first, second)) * torch.randn(4, 3)).sum(), None)], [[first, second]])
    assert first.grad.untyped_storage().data_ptr() == second.grad.untyped_storage().data_ptr()
    assert first.grad.data_ptr() != second.grad.data_ptr()


def test_a_gradient_that_is_one_number_expanded() -> None:
    def build() -> Case:
        module = Sum((2, 3), (6,))
        return step_of(module, lambda module: module.parts[0].sum() + module.parts[1])

    assert_as_a_plain_loop(build)


def test_a_parameter_that_modules_share_is_added_once() -> None:
    def build() -> Case:
        module = nn.ModuleList([nn.Linear(6, 6, bias=False).double() for _ in range(2)])
        module[1].weight = module[0].weight
        return step_of(module, lambda module: module[1](module[0](torch.ones(6).double())))

    assert len(parameters_of(list(build().module.modules()))[0]) == 1
    assert_as_a_plain_loop(build)


def test_a_leaf_that_is_in_no_module_gets_its_gradient_too() -> None:
    def gradient_of(gradient: Callable[..., object]) -> Tensor:
        torch.manual_seed(0)
        module, leaf = Sum((2, 3)), torch.ones(6, dtype=torch.float64, requires_grad=True)
        case = step_of(module, lambda module: module() * leaf)
        gradient(case.step, case.segments, case.state)
        return leaf.grad

    torch.testing.assert_close(gradient_of(replay.replay_backward), gradient_of(plain_loop), rtol=1e-12, atol=0)


def test_grad_stays_none_without_a_gradient_and_the_same_tensor_with_one() -> None:
    module = Sum((2, 3), (6,), (3, 2), (1, 6))
    reached, frozen, unused, new = module.parts
    frozen.requires_grad_(False)
    for part in (reached, frozen):
        part.grad = torch.ones_like(part)
    before = reached.grad, frozen.grad
    case = step_of(module, lambda module: sum(module.parts[place].flatten() for place in (0, 1, 3)))
    replay.replay_backward(case.step, case.segments, case.state)
    assert reached.grad is before[0]
    assert frozen.grad is before[1]
    assert unused.grad is None
    assert (frozen.grad == 1).all()
    torch.testing.assert_close(reached.grad.flatten() - 1, new.grad.flatten(), rtol=1e-12, atol=1e-12)
    assert new.grad.any()


@pytest.mark.parametrize("there", ["nothing", "dense"])
def test_sparse_gradients_are_added_too(there: str) -> None:
    def build() -> Case:
        table = nn.Embedding(5, 6, sparse=True).double()
        if there == "dense":
            table.weight.grad = torch.ones_like(table.weight)
        return step_of(table, lambda table: table(torch.tensor([1, 1, 3])).sum(0).tanh())

    case = build()
    replay.replay_backward(case.step, case.segments, case.state)
    assert case.module.weight.grad.is_sparse == (there == "nothing")
    assert_as_a_plain_loop(build)


class Unlisted(Tensor):
    """A subclass that cannot be added in a list, such as the tensors that are split over devices."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch._foreach_add_
        return super().__torch_function__(func, types, args, kwargs)


def test_a_gradient_of_a_subclass_is_left_to_autograd() -> None:
    def build() -> Case:
        module = Sum((2, 3), (6,))
        part = module.parts[0]
        part.grad = torch.zeros_like(part).as_subclass(Unlisted)
        return step_of(module, Sum.forward)

    case = build()
    replay.replay_backward(case.step, case.segments, case.state)
    assert type(case.module.parts[0].grad) is Unlisted
    assert_as_a_plain_loop(build)


def seen_by(register: str, one_by_one: Callable[[], None] | None) -> list[Tensor]:
    """What a hook sees over two rollouts: gradients before accumulation, or ``.grad`` after it."""
    torch.manual_seed(0)
    seen: list[Tensor] = []
    if one_by_one is not None:
        one_by_one()
    module = Sum((2, 3), (6,))
    after = register == "register_post_accumulate_grad_hook"
    getattr(module.parts[0], register)(lambda found: seen.append((found.grad if after else found).clone()))
    case = step_of(module, lambda module: module.parts[0].flatten() * 2 + module.parts[1])
    for _ in range(2):
        replay.replay_backward(case.step, case.segments, case.state)
    return seen


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_run_once_per_segment_and_see_what_they_see_one_by_one(
    register: str, one_by_one: Callable[[], None]
) -> None:
    together, expected = seen_by(register, None), seen_by(register, one_by_one)
    assert len(expected) == 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("name", ["replay", "truncated"])
def test_after_an_error_in_a_backward_call_grad_is_as_before_that_call(name: str, error: type[BaseException]) -> None:
    module = Sum((2, 3), (6,))
    early, late = module.parts
    for part in (early, late):
        part.grad = torch.ones_like(part)
    there, before = [early.grad, late.grad], []

    def fail_in_the_third_call(_: Tensor) -> None:
        if len(before) == 3:
            assert early.grad is not None
            assert early.grad is not there[0], "one of the parameters is reached before the error"
            raise error("in a hook")

    def both(_: Sum) -> Tensor:
        through = late * 1
        if through.requires_grad:
            before.append([early.grad.clone(), late.grad.clone()])
            through.register_hook(fail_in_the_third_call)
        return through + early.flatten()

    with pytest.raises(error, match="in a hook"):
        way(name)(step_of(module, both))
    assert early.grad is there[0]
    assert late.grad is there[1]
    assert all(torch.equal(grad, kept) for grad, kept in zip(there, before[2], strict=True))
    assert not (before[2][0] == before[1][0]).any()


def test_parameters_that_cannot_share_kernels_are_in_groups_of_their_own() -> None:
    double = {"dtype": torch.float64}
    tensors = [torch.ones(2, 3), torch.ones(2, 3, **double), torch.ones(2, 3, device="meta"), torch.ones(3, 1)]
    module = nn.ParameterList([*tensors, torch.ones(6), torch.ones(4, **double)])
    module[5].requires_grad_(False)
    module._parameters["6"] = torch.ones(6, requires_grad=True) * 2  # as inside torch.func.functional_call
    places = {id(parameter): place for place, parameter in enumerate(module)}
    assert [[places[id(p)] for p in group] for group in parameters_of([module, module])] == [[0, 4], [1], [2], [3]]


def test_parameters_of_several_types_equal_a_plain_loop() -> None:
    def build() -> Case:
        module = Sum((2, 3), (6,), (6, 1))
        module.parts[0] = nn.Parameter(torch.randn(2, 3))
        return step_of(module, Sum.forward)

    assert_as_a_plain_loop(build)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_module_that_synchronizes_gradients_in_its_backward_pass_keeps_them_in_its_memory() -> None:
    def gradients(wrap: Callable[[nn.Module], nn.Module]) -> list[Any]:
        torch.manual_seed(0)
        module = Sum((2, 3), (6,))
        wrapped = wrap(module)
        case = step_of(wrapped, lambda wrapped: wrapped())
        for _ in range(2):
            replay.replay_backward(case.step, case.segments, case.state)
        return [part.grad for part in module.parts]

    synchronized = gradients(lambda module: DistributedDataParallel(module, gradient_as_bucket_view=True))
    assert all(torch.equal(a, b) for a, b in zip(synchronized, gradients(lambda module: module), strict=True))
