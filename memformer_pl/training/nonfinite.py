"""Keep non-finite values out of the weights.

A step is skipped if the loss, the gradient or the state after a rollout is not finite: weights, moments and the step
count stay unchanged. If several rollouts make a step, all of them are skipped, since their gradients are summed
already. All ranks decide alike, from sums that they exchange anyway. The device decides; the host learns it a rollout
later (``stepping.py``), when the weights are still the same, and reports what was not finite.

A lane whose state is not finite continues with the memory of a new document. The memory before the rollout would be
wrong, since its document may have ended. Tokens that the model has yet to read are kept: they are finite, and the lane
reads on in its document. Other lanes keep their states, which depend only on their documents and the weights.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.atomic_write import atomic_write
from memformer_pl.contract import S, SegmentModel, State, select_lanes
from memformer_pl.data.lanes import Rollout
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.errors import DivergedError
from memformer_pl.gradients.rng import RandomState
from memformer_pl.gradients.side_effects import SideEffects, restore
from memformer_pl.training import distributed

FILE = "skipped.json"

log = logging.getLogger(__name__)


class RolloutRecord(NamedTuple):
    """A rollout, and what is needed to run it again."""

    number: int
    """Number of rollouts of this run before it."""
    rollout: Rollout
    state: State
    random: RandomState
    loss: Float[Tensor, ""]
    """Summed over all ranks."""


class Verdict(NamedTuple):
    """Whether a step is finite. The tensors are on the device."""

    records: list[RolloutRecord]
    """The rollouts of the step on this rank."""
    parameters: list[str]
    """Names of the parameters that have a gradient."""
    norms: Float[Tensor, " P"]
    """Norm of each of these gradients."""
    norm: Float[Tensor, ""]
    """Norm of all of them together."""
    finite: Bool[Tensor, ""]
    """Whether norm, losses and states are finite, on all ranks."""


class NonFiniteGuard:
    """Judge whether a step is finite, count the skipped ones, and report why they were skipped.

    The report covers the rollouts of this process: a run that resumes in the middle of a step lacks the earlier ones.

    Args:
        max_skipped: Number of skipped steps in a row that ends the run.
    """

    def __init__(self, *, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.skipped = self.in_a_row = 0
        self._explained: list[dict[str, Any]] = []
        self._start_step()

    def _start_step(self) -> None:
        self._records: list[RolloutRecord] = []
        self._finite: Tensor | bool = True

    def watch(self, record: RolloutRecord, lanes_reset: Float[Tensor, ""]) -> None:
        """Add a rollout to the step, and the number of lanes of all ranks that were reset after it."""
        self._records.append(record)
        self._finite = record.loss.isfinite() & (lanes_reset == 0) & self._finite

    def judge(self, module: nn.Module) -> Verdict:
        """End a step whose gradients are complete, before they are clipped. Nothing waits for the device."""
        graded = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(graded.values()))) if graded else torch.zeros(0)
        norm = torch.linalg.vector_norm(norms)
        verdict = Verdict(self._records, list(graded), norms, norm, norm.isfinite() & self._finite)
        self._start_step()
        return verdict

    def take(self) -> None:
        """Count a step that was taken."""
        self.in_a_row = 0
        self._explained.clear()

    def skip(
        self, model: SegmentModel, verdict: Verdict, *, step: int, documents: PackedDocuments, folder: Path
    ) -> None:
        """Count a skipped step, and report the rollouts that caused it, or all of them if none can be singled out.

        Collective. Call it before another step is taken.

        Args:
            model: The model, with the weights of the step.
            verdict: From :meth:`judge`.
            step: Number of steps taken before.
            documents: The documents that the rollouts come from.
            folder: Folder in which the first rank writes ``skipped.json``, about the current run of skipped steps.

        Raises:
            DivergedError: Too many steps in a row were skipped.
        """
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        finite = verdict.norms.isfinite().tolist()
        gradients = [name.removeprefix("model.") for name, ok in zip(verdict.parameters, finite, strict=True) if not ok]
        reports = [explain(model, record, documents) for record in verdict.records]
        rollouts = [report for report in reports if report["repeats"]] or reports
        norm = str(verdict.norm.item())
        self._explained.append(
            {"steps_before": step, "gradient_norm": norm, "gradients": gradients, "rollouts": rollouts}
        )
        if distributed.rank() == 0:
            content = {"skipped_in_a_row": self.in_a_row, "steps": self._explained}
            with atomic_write(folder / FILE) as partial:
                partial.write_text(json.dumps(content, indent=1))
            log.warning("skipped the step after step %d; not finite: %s", step, in_words(self._explained[-1]))
        if self.in_a_row >= self.max_skipped:
            raise DivergedError(
                f"skipped {self.in_a_row} steps in a row; not finite in the last one: {in_words(self._explained[-1])}. "
                f"{str(folder / FILE)!r} lists all of them. The weights are those of step {step}, and all checkpoints "
                "are finite: resume from the last one with a lower learning rate or a higher precision, or remove the "
                "documents of these rollouts"
            )

    def state_dict(self) -> dict[str, int | bool]:
        """The counts, and whether the step that is accumulating is finite so far; the same on all ranks."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "finite": bool(self._finite)}

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Restore the counts."""
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])
        self._finite = bool(state["finite"])


def reset_nonfinite(
    model: SegmentModel[S], next_state: S, initial: S, *, like: Bool[Tensor, " B"]
) -> tuple[S, Int[Tensor, ""]]:
    """Reset the memory of every lane whose state is not finite; also return the number of such lanes.

    Args:
        model: Knows which fields of its state are memory.
        next_state: The state after a rollout.
        initial: The initial state.
        like: A mask of lanes, for its device.
    """
    finite_B = finite_lanes(next_state, like=like)
    return select_lanes(finite_B, next_state, model.with_memory(next_state, initial)), (~finite_B).sum()


def finite_lanes(state: State, *, like: Bool[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Which lanes have a finite state, as a mask on the device of ``like``."""
    finite_B = torch.ones_like(like)
    for field in state:
        finite_B = finite_B & field.isfinite()[..., None].flatten(1).all(1)
    return finite_B


def explain(model: SegmentModel, record: RolloutRecord, documents: PackedDocuments) -> dict[str, Any]:
    """Report what a rollout read in the lanes that are not finite, or in all lanes if all are finite. Collective.

    All lanes are finite if only a gradient overflowed, or if the fault does not repeat, such as one of the hardware.
    """
    losses_TB, states_TB = run_again(model, record)
    lanes_here = losses_TB.shape[1]
    lanes_of_rank: list[dict[str, Any]] = [
        {
            "lane": distributed.rank() * lanes_here + b,
            "loss_fails_in_segment": first_false(losses_TB[:, b]),
            "state_fails_after_segment": first_false(states_TB[:, b]),
            "read": passages(record.rollout, b),
        }
        for b in range(lanes_here)
    ]
    lanes = [lane for rank in distributed.gather(lanes_of_rank) for lane in rank]
    failing = [lane for lane in lanes if any(place is not None for name, place in lane.items() if "fails" in name)]
    read = [passage for lane in failing or lanes for passage in lane["read"]]
    names = documents.names({passage["document"] for passage in read})
    for passage in read:
        passage["name"] = names.get(passage["document"])
    return {
        "rollout": record.number,
        "group": record.rollout.group,
        "loss": str(record.loss.item()),
        "repeats": bool(failing),
        "lanes": failing or lanes,
    }


@torch.no_grad()
def run_again(model: SegmentModel, record: RolloutRecord) -> tuple[Bool[Tensor, "T B"], Bool[Tensor, "T B"]]:
    """Where the losses of each segment are finite, and where the state after it is.

    Draws the same random numbers as the first time. Restores the random streams, and buffers that change, such as
    running averages.
    """
    buffers, random = SideEffects(model).buffers(), RandomState.capture((record.state, record.rollout.segments))
    record.random.restore()
    state, losses, states = record.state, [], []
    for segment in record.rollout.segments:
        output, state = model(segment, state)
        losses.append((output.token_losses + output.auxiliary_loss).isfinite().all(1))
        states.append(finite_lanes(state, like=segment.document_start))
    restore(buffers)
    random.restore()
    return torch.stack(losses).cpu(), torch.stack(states).cpu()


def first_false(values: Bool[Tensor, " T"]) -> int | None:
    """Index of the first False; None if there is none."""
    return None if bool(values.all()) else int((~values).int().argmax())


def passages(rollout: Rollout, lane: int) -> list[dict[str, Any]]:
    """The documents that a lane reads in a rollout, each with its range of tokens (end exclusive)."""
    found: list[dict[str, Any]] = []
    for segment, document, first in zip(
        rollout.segments, rollout.documents[:, lane].tolist(), rollout.firsts[:, lane].tolist(), strict=True
    ):
        end = first + int(segment.token_mask[lane].sum())
        if found and found[-1]["document"] == document and found[-1]["tokens"][1] == first:
            found[-1]["tokens"][1] = end
        elif end > first:
            found.append({"document": document, "tokens": [first, end]})
    return found


def in_words(explained: Mapping[str, Any]) -> str:
    """Name what was not finite in a step: one lane of each rollout, and one gradient."""
    found = []
    for rollout in explained["rollouts"]:
        if rollout["repeats"]:
            lane = rollout["lanes"][0]
            what = "loss" if lane["loss_fails_in_segment"] is not None else "state"
            read = (f"{p['name'] or p['document']}, tokens {p['tokens']}" for p in lane["read"])
            found.append(f"the {what} of rollout {rollout['rollout']} in lane {lane['lane']} ({'; '.join(read)})")
        elif not math.isfinite(float(rollout["loss"])):
            found.append(f"the loss of rollout {rollout['rollout']}, which is finite when it runs again")
    gradients = explained["gradients"]
    if gradients or not found:
        more = f" and {len(gradients) - 1} more" if len(gradients) > 1 else ""
        found.append(f"the gradient of {gradients[0] if gradients else 'all parameters together'}{more}")
    return ", ".join(found)
