"""Two processes add up their gradients and bring their lanes together; one process keeps what it has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as torch_distributed

from memformer_pl.data import LaneLoader
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.training import distributed

RANKS = 2


def parameters(rank: int) -> list[nn.Parameter]:
    """Gradients of powers of two, one bit for each rank and parameter; what is None is None on one rank, or on both."""
    dtypes = (torch.float32, torch.float64, torch.float32, torch.bfloat16)
    ours = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]
    idle, frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1), requires_grad=False)
    for n, parameter in enumerate(ours):
        parameter.grad = torch.full_like(parameter, 2.0 ** (2 * n + rank))
    if rank == 1:
        ours[0].grad = None
    return [*ours, idle, frozen]


def state(rank: int) -> tuple[Tensor, Tensor]:
    """Three lanes for each rank: numbers that no other lane has, and how many it has read."""
    lanes = torch.arange(3) + 3 * rank
    return lanes[:, None, None] + torch.tensor([[0.25, 0.5]]), lanes


def gradients_after_summing(rank: int) -> list[list[float] | None]:
    trained = parameters(rank)
    distributed.sum_gradients(trained)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in trained)
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in trained]


def messages(rank: int) -> list[tuple[str, int]]:
    """What is sent to sum the gradients: of which kind, and how many numbers."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_distributed, "all_reduce", lambda flat: sent.append((str(flat.dtype), flat.numel())))
        distributed.sum_gradients(parameters(rank))
    return sent


def everything(rank: int) -> dict[str, Any]:
    """What a rank is told, as plain lists."""
    entering = state(rank)
    gathered = distributed.gather_lanes(entering)
    own = torch.tensor([1.0 + rank])
    return {
        "count": distributed.world_size(),
        "sum": distributed.sum_over_ranks(own).tolist(),
        "summed": own.tolist(),
        "most": distributed.max_over_ranks((rank, 5 - rank), torch.device("cpu")),
        "gathered": distributed.gather(f"rank {rank}"),
        "gradients": gradients_after_summing(rank),
        "messages": messages(rank),
        "lanes": [field.tolist() for field in gathered],
        "own lanes": [field.tolist() for field in distributed.lanes_of_rank(gathered)],
        "entering": [field.tolist() for field in entering],
    }


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch_distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    (folder / f"{rank}.json").write_text(json.dumps(everything(rank)))
    torch_distributed.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks is told."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, args=(folder,), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_every_rank_knows_how_many_there_are(told: list[dict[str, Any]]) -> None:
    assert [rank["count"] for rank in told] == [2, 2]


def test_a_sum_is_over_all_ranks_and_does_not_change_its_input(told: list[dict[str, Any]]) -> None:
    assert [rank["sum"] for rank in told] == [[3.0], [3.0]]
    assert [rank["summed"] for rank in told] == [[1.0], [2.0]]


def test_the_largest_of_each_number_is_found_by_itself(told: list[dict[str, Any]]) -> None:
    assert [rank["most"] for rank in told] == [[1, 5], [1, 5]]
    assert distributed.max_over_ranks((2, 3), torch.device("cpu")) == [2, 3]


def test_values_are_gathered_in_the_order_of_the_ranks(told: list[dict[str, Any]]) -> None:
    assert [rank["gathered"] for rank in told] == [["rank 0", "rank 1"]] * 2


def test_gradients_are_summed_and_what_is_missing_counts_as_zero(told: list[dict[str, Any]]) -> None:
    # 2^0 from rank 0 alone; 2^2 + 2^3; 2^4 + 2^5; 2^6 + 2^7; zeros from both; and nothing for what is frozen
    expected = [[1.0] * 2, [12.0] * 2, [48.0] * 2, [192.0] * 2, [0.0] * 3, None]
    assert [rank["gradients"] for rank in told] == [expected] * 2


def test_gradients_of_a_kind_are_one_message_and_all_ranks_send_the_same(told: list[dict[str, Any]]) -> None:
    kinds = [["torch.bfloat16", 2], ["torch.float32", 2 + 2 + 3], ["torch.float64", 2]]
    assert [rank["messages"] for rank in told] == [kinds] * 2


def test_lanes_of_all_ranks_are_gathered_and_shared_again(told: list[dict[str, Any]]) -> None:
    together = [torch.cat(fields).tolist() for fields in zip(state(0), state(1), strict=True)]
    assert [rank["lanes"] for rank in told] == [together] * 2
    assert [rank["own lanes"] for rank in told] == [rank["entering"] for rank in told]


@pytest.mark.parametrize("lanes", range(1, 13))
def test_each_rank_owns_the_lanes_that_its_loader_reads(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ranks a checkpoint is read by; a number that does not divide the lanes is refused."""
    whole = (torch.arange(lanes), torch.arange(2 * lanes).view(lanes, 2))
    documents = PackedDocuments.from_arrays([np.arange(9)])
    for count in range(1, 14):
        monkeypatch.setattr(distributed, "world_size", lambda count=count: count)
        for rank in range(count):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            sizes = {"batch_size": lanes, "segment_length": 2, "horizon": 1, "rank": rank, "world_size": count}
            if lanes % count:
                with pytest.raises(ValueError, match=f"{lanes} lanes cannot be shared among {count} proc"):
                    distributed.lanes_of_rank(whole)
                with pytest.raises(ValueError, match=f"got batch_size={lanes} and world_size={count}"):
                    LaneLoader(documents, **sizes)
            else:
                read = LaneLoader(documents, **sizes)._lanes
                own = distributed.lanes_of_rank(whole)
                assert [field.tolist() for field in own] == [field[read.start : read.stop].tolist() for field in whole]


@pytest.mark.parametrize("function", [distributed.sum_over_ranks, lambda tensor: distributed.gather(tensor)[0]])
def test_one_process_keeps_what_it_has(function: Callable[[Tensor], Tensor]) -> None:
    tensor = torch.randn(3)
    assert distributed.world_size() == 1
    assert function(tensor) is tensor


def test_one_process_keeps_its_gradients_and_its_lanes() -> None:
    before = [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters(1)]
    assert gradients_after_summing(1) == before
    assert all(
        torch.equal(a, b)
        for a, b in zip(distributed.lanes_of_rank(distributed.gather_lanes(state(1))), state(1), strict=True)
    )
