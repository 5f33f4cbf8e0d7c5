"""A rollout gives the device few operations. The bounds are half of what it took before blocks were rewritten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HORIZON = 8


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments" / "benchmarks")
    import operations

    return operations.Case(horizon=HORIZON)


@pytest.fixture
def total(case: Any) -> Callable[[Callable[[], object]], int]:
    import operations

    return lambda work: operations.dispatched(work).total()


@pytest.mark.parametrize(("group", "most"), [(1, 22_754 // 2), (8, 10_883 // 2)])
def test_replay_dispatches_at_most_half_of_its_former_operations(
    case: Any, total: Callable[[Callable[[], object]], int], group: int, most: int
) -> None:
    assert 1_000 < total(lambda: case.rollout("replay", group)) <= most


def test_python_launches_a_captured_rollout_with_less_than_four_calls_a_segment(
    case: Any, total: Callable[[Callable[[], object]], int]
) -> None:
    launched = 1 + total(case.captured("replay", 1))
    assert 2 <= launched <= 4 * HORIZON


def test_a_profile_of_what_is_not_compiled_sees_nearly_what_is_dispatched(case: Any) -> None:
    import operations

    dispatched = operations.dispatched(case.rollout)
    profiled = operations.launched(case.rollout, set(dispatched))
    assert 0.9 * dispatched.total() < profiled.total() <= dispatched.total()
