"""What is not finite stays out of the weights.

A step is dropped if the loss, the gradient or the state that a rollout leaves is not finite: weights, moments and the
count of steps stay as they were. Where several rollouts make a step all of them are dropped, for a sum cannot be
cleaned. All ranks decide alike, from what they have summed in any case, and the host looks once for each step.

A lane whose state is not finite goes on from the initial state, as at the start of a document. The state that entered
the rollout would not do: its document may have ended since, and what Memformer still has to read would not be the
segment before. The other lanes keep theirs, which depends on nothing but their documents and the weights.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.atomic_write import atomic_write
from memformer_pl.contract import S, SegmentModel, State, select_lanes
from memformer_pl.data.lanes import Rollout
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.errors import NonFiniteError
from memformer_pl.gradients.rng import RandomState
from memformer_pl.gradients.side_effects import SideEffects, restore
from memformer_pl.training import distributed

FILE = "skipped.json"

log = logging.getLogger(__name__)


class RolloutRecord(NamedTuple):
    """A rollout, and what it takes to read it again."""

    number: int
    """Windows of this run before it."""
    rollout: Rollout
    state: State
    random: RandomState
    loss: Float[Tensor, ""]
    """Over all ranks."""


class NonFiniteGuard:
    """Decides whether a step is taken, counts those that are not, and writes down why.

    What is explained is what this process has read: after a resumption between two rollouts of a step, not the first.

    Args:
        most: So many dropped steps in a row end the run.
    """

    def __init__(self, *, most: int) -> None:
        self.most = most
        self.skipped = self.in_a_row = 0
        self._explained: list[dict[str, Any]] = []
        self._start_step()

    def _start_step(self) -> None:
        self._entered: list[RolloutRecord] = []
        self._sound: Tensor | bool = True

    def watch(self, entered: RolloutRecord, lanes_lost: Float[Tensor, ""]) -> None:
        """Add a rollout to the step, and how many lanes of all ranks had to be reset behind it."""
        self._entered.append(entered)
        self._sound = entered.loss.isfinite() & (lanes_lost == 0) & self._sound

    def passes(self, norm: Float[Tensor, ""]) -> bool:
        """Whether the step may be taken, given the norm of its gradient."""
        sound = bool(norm.isfinite() & self._sound)
        if sound:
            self.in_a_row = 0
            self._explained.clear()
            self._start_step()
        return sound

    def drop(
        self, model: SegmentModel, norm: Float[Tensor, ""], *, step: int, documents: PackedDocuments, folder: Path
    ) -> None:
        """Count a step that may not be taken, and write down the rollouts that are to blame, or else all of them.

        Collective. Gradients are still there.

        Args:
            model: With the gradients of the step.
            norm: Of its gradient.
            step: Steps that were taken before.
            documents: Those that the rollouts are cut from.
            folder: Where ``skipped.json`` is written, on the first rank: the steps of the present row.

        Raises:
            NonFiniteError: Too many steps in a row were dropped.
        """
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        gradients = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        read = [explain(model, entered, documents) for entered in self._entered]
        rollouts = [rollout for rollout in read if rollout["repeats"]] or read
        self._explained.append(
            {"steps_before": step, "gradient_norm": str(norm.item()), "gradients": gradients, "rollouts": rollouts}
        )
        if distributed.rank() == 0:
            content = {"dropped_in_a_row": self.in_a_row, "steps": self._explained}
            with atomic_write(folder / FILE) as partial:
                partial.write_text(json.dumps(content, indent=1))
            log.warning("dropped the step after step %d: not finite is %s", step, in_words(self._explained[-1]))
        self._start_step()
        if self.in_a_row >= self.most:
            raise NonFiniteError(
                f"dropped {self.in_a_row} steps in a row; in the last one, not finite is "
                f"{in_words(self._explained[-1])}. {str(folder / FILE)!r} has them all. The weights are still those of "
                f"step {step}, and every checkpoint is sound: go on from the last one with a lower learning_rate or in "
                "a higher precision, or leave out the documents that these rollouts read"
            )

    def state_dict(self) -> dict[str, int | bool]:
        """The counts, and whether the step that is being accumulated may still be taken: the same on all ranks."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "sound": bool(self._sound)}

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Go on counting; from zero where the state is empty, as of a checkpoint from before there were counts."""
        self.skipped, self.in_a_row = int(state.get("skipped", 0)), int(state.get("in_a_row", 0))
        self._sound = bool(state.get("sound", True))


def reset_nonfinite(next_state: S, initial: S, *, like: Bool[Tensor, " B"]) -> tuple[S, Int[Tensor, ""]]:
    """The state to carry on, which is the initial one in every lane that is not finite, and how many those are."""
    finite_B = finite_lanes(next_state, like=like)
    return select_lanes(finite_B, next_state, initial), (~finite_B).sum()


def finite_lanes(state: State, *, like: Bool[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Which lanes have a finite state, as a mask like another."""
    finite_B = torch.ones_like(like)
    for field in state:
        finite_B = finite_B & field.isfinite()[..., None].flatten(1).all(1)
    return finite_B


def explain(model: SegmentModel, entered: RolloutRecord, documents: PackedDocuments) -> dict[str, Any]:
    """What a rollout has read, ready for JSON: in the lanes that are not finite, or in all if none is. Collective.

    None is where only a gradient overflowed, or where the fault does not repeat, as one of the machine would not.
    """
    losses_TB, states_TB = read_again(model, entered)
    lanes_here = losses_TB.shape[1]
    own: list[dict[str, Any]] = [
        {
            "lane": distributed.rank() * lanes_here + b,
            "loss_fails_in_segment": first_false(losses_TB[:, b]),
            "state_fails_after_segment": first_false(states_TB[:, b]),
            "read": passages(entered.rollout, b),
        }
        for b in range(lanes_here)
    ]
    lanes = [lane for rank in distributed.gather(own) for lane in rank]
    failing = [lane for lane in lanes if any(place is not None for name, place in lane.items() if "fails" in name)]
    read = [passage for lane in failing or lanes for passage in lane["read"]]
    names = documents.names({passage["document"] for passage in read})
    for passage in read:
        passage["name"] = names.get(passage["document"])
    group, loss = entered.rollout.group, str(entered.loss.item())
    return {
        "rollout": entered.number,
        "group": group,
        "loss": loss,
        "repeats": bool(failing),
        "lanes": failing or lanes,
    }


@torch.no_grad()
def read_again(model: SegmentModel, entered: RolloutRecord) -> tuple[Bool[Tensor, "T B"], Bool[Tensor, "T B"]]:
    """Where the losses of a segment are finite, and the state behind it.

    With the random numbers of the first time, after which the random stream stands where it stood, and so do buffers
    that change, such as running averages.
    """
    buffers = SideEffects(model).buffers()
    entered.random.restore()
    state, losses, states = entered.state, [], []
    for segment in entered.rollout.segments:
        output, state = model(segment, state)
        losses.append((output.token_losses + output.auxiliary_loss).isfinite().all(1))
        states.append(finite_lanes(state, like=segment.document_start))
    restore(buffers)
    return torch.stack(losses).cpu(), torch.stack(states).cpu()


def first_false(values: Bool[Tensor, " T"]) -> int | None:
    """The place of the first False, if there is one."""
    return None if bool(values.all()) else int((~values).int().argmax())


def passages(rollout: Rollout, lane: int) -> list[dict[str, Any]]:
    """What a lane reads in a rollout: documents, and from which token to which (exclusive), counted in the document."""
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
    """What was not finite in a step: one lane of each rollout, and one gradient."""
    found = []
    for rollout in explained["rollouts"]:
        if rollout["repeats"]:
            lane = rollout["lanes"][0]
            what = "loss" if lane["loss_fails_in_segment"] is not None else "state"
            read = (f"{p['name'] or p['document']}, tokens {p['tokens']}" for p in lane["read"])
            found.append(f"the {what} of rollout {rollout['rollout']} in lane {lane['lane']} ({'; '.join(read)})")
        elif not math.isfinite(float(rollout["loss"])):
            found.append(f"the loss of rollout {rollout['rollout']}, which is finite when it is read again")
    gradients = explained["gradients"]
    if gradients or not found:
        more = f" and {len(gradients) - 1} more" if len(gradients) > 1 else ""
        found.append(f"the gradient of {gradients[0] if gradients else 'all together'}{more}")
    return ", ".join(found)
