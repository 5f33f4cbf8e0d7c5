"""What is not finite stays out of the weights: faults of every kind, at every place, and what is left behind."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty import Faulty
from lightning import Callback, Trainer
from models import LENGTH, VOCAB, memformer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LRScheduler, SequentialLR, StepLR

from memformer_pl.checkpoints.format import KEY
from memformer_pl.contract import Segment, State, detach
from memformer_pl.data import LaneLoader, Rollout
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.models import Memformer
from memformer_pl.training import nonfinite
from memformer_pl.training.lr_schedule import WarmupCosine, lr_factor
from memformer_pl.training.nonfinite import FILE
from memformer_pl.training.optimizer import Optimization
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

LANES, HORIZON, GROUPS = 3, 3, 2
LANE = Faulty.lane
"""The one in which there are faults."""
LIMITS = ("max_steps", "val_check_interval", "num_sanity_val_steps")
FAULTS = ("nan loss", "infinite loss", "nan auxiliary", "infinite gradient", "nan gradient", "nan memory")


def chained(optimizer: Optimizer) -> LRScheduler:
    """One schedule after another, each with a state of its own."""
    return SequentialLR(optimizer, [ConstantLR(optimizer, 0.5, 3), ExponentialLR(optimizer, 0.9)], milestones=[3])


class After(Callback):
    """Lets the model fail in some rollouts, and keeps what stands after each, if wished as a checkpoint too.

    With ``late``, training finds out about a fault while it computes the next rollout, as it does without a callback.
    """

    def __init__(self, fault: str | None, rollouts: Collection[int], *, segment: int, saves: bool, late: bool) -> None:
        self.fault, self.rollouts, self.segment, self.saves, self.late = fault, rollouts, segment, saves, late
        self.read: list[Rollout] = []
        self.kept: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: SegmentTask) -> None:
        model = pl_module.model
        model.fault = self.fault
        overflows = self.fault == "overflow"
        model.writer.to_key.weight.register_hook(lambda grad: grad * math.inf if overflows and model.failing else grad)

    def on_train_batch_start(self, trainer: Trainer, pl_module: SegmentTask, batch: Rollout, batch_idx: int) -> None:
        if pl_module._rollouts % pl_module.accumulate_grad_batches == 0 and not self.late:
            pl_module.model.failing.clear()
        if pl_module._rollouts in self.rollouts:
            pl_module.model.failing.append(batch.segments[self.segment].tokens)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: SegmentTask, outputs: object, batch: Rollout, batch_idx: int
    ) -> None:
        self.read.append(batch)
        if not self.late:
            pl_module.settle()
        if self.saves:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/{pl_module._rollouts}.ckpt")
        content: dict[str, Any] = {"weights": pl_module.state_dict(), "steps": trainer.global_step}
        content["moments"] = {n: dict(state) for n, state in enumerate(trainer.optimizers[0].state.values())}
        content["states"] = dict(pl_module._states)
        self.kept.append(copied(content))


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    return tuple(map(copied, value)) if isinstance(value, tuple) else value


def documents() -> PackedDocuments:
    random = np.random.default_rng(0)
    lengths = (71, 44, 1, 57, 80, 38, 63, 12, 45, 90, 33)
    return PackedDocuments.from_arrays([random.integers(VOCAB, size=length) for length in lengths])


def loader(*, shuffle: bool = True) -> LaneLoader:
    groups = GROUPS if shuffle else 1
    sizes = {"batch_size": LANES, "segment_length": LENGTH, "horizon": HORIZON, "interleave": groups}
    return LaneLoader(documents(), **sizes, shuffle=shuffle)


def build(**options: Any) -> SegmentTask:
    model = memformer(encoder_layers=1, decoder_layers=1, dropout=options.pop("dropout", 0.0))
    model.__class__, model.failing = Faulty, []
    return SegmentTask(model=model, **{"warmup_steps": 3, "learning_rate": 0.01, **options})


class Run:
    """A run of some rollouts, in double precision, with faults in some of them."""

    def __init__(
        self,
        folder: Path,
        fault: str | None = None,
        rollouts: Collection[int] = (),
        *,
        segment: int = 1,
        length: int = 8,
        saves: bool = False,
        late: bool = False,
        checkpoint: Path | None = None,
        **options: Any,
    ) -> None:
        self.after = After(fault, rollouts, segment=segment, saves=saves, late=late)
        self.folder = folder
        limits: dict[str, Any] = {"limit_train_batches": length, "limit_val_batches": 0, "max_epochs": 1}
        limits |= {name: options.pop(name) for name in (*limits, *LIMITS) if name in options}
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        self.trainer = Trainer(
            accelerator="cpu",
            precision="64-true",
            callbacks=[self.after, *options.pop("callbacks", ())],
            default_root_dir=folder,
            **{**limits, **quiet},
        )
        self.task = build(**options)
        torch.manual_seed(0)
        self.trainer.fit(self.task, loader(), loader(shuffle=False), ckpt_path=checkpoint)

    @property
    def kept(self) -> list[dict[str, Any]]:
        return self.after.kept

    @property
    def skipped(self) -> float:
        return float(self.trainer.callback_metrics["train/skipped"])

    def report(self) -> Mapping[str, Any]:
        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not valid JSON")

        content: Mapping[str, Any] = json.loads((self.folder / FILE).read_text(), parse_constant=refuse)
        return content


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, entry by entry."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(map(finite, value.values()))
    return all(map(finite, value)) if isinstance(value, tuple) else math.isfinite(value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without a fault."""
    return Run(tmp_path_factory.mktemp("sound"))


def test_without_a_fault_training_is_a_plain_loop_bit_for_bit(sound: Run) -> None:
    task = build()
    model, states = task.model, dict[int, State]()
    optimizer, _ = Optimization(0.01, 3, None, None, None).build(task, total_steps=-1)
    torch.manual_seed(0)
    for step, (rollout, _) in enumerate(zip(loader(), sound.kept, strict=False)):
        tokens = sum(int(segment.token_mask.sum()) for segment in rollout.segments)

        def read(segment: Segment, state: State, tokens: int = tokens) -> tuple[Tensor, State]:
            output, next_state = model(segment, state)
            return output.token_losses.sum() / torch.tensor(tokens), next_state

        entering = states.get(rollout.group) or detach(model.initial_state(LANES))
        _, states[rollout.group] = GRADIENTS["replay"](read, rollout.segments, entering, advance=model.advance)
        for group, decay in zip(optimizer.param_groups, (0.01, 0.0), strict=True):
            group.update(lr=0.01 * lr_factor(step, warmup_steps=3, total_steps=-1), weight_decay=decay)
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert same(dict(sound.kept[step]["weights"]), dict(task.state_dict())), step
        assert same(sound.kept[step]["states"]["train", rollout.group], states[rollout.group]), step
    assert sound.skipped == 0
    assert not (sound.folder / FILE).exists()


@pytest.mark.parametrize(
    ("fault", "gradient"),
    [
        *((fault, "replay") for fault in FAULTS),
        *(("nan memory", name) for name in ("bptt", "checkpointed", "truncated")),
    ],
)
def test_a_fault_reaches_neither_weights_nor_moments_nor_the_count_of_steps(
    tmp_path: Path, sound: Run, fault: str, gradient: str
) -> None:
    run = Run(tmp_path, fault, {3}, length=5, gradient=gradient)
    before, skipped, after = run.kept[2:]
    for entry in ("weights", "moments", "steps"):
        assert same(skipped[entry], before[entry]), entry
    assert (skipped["steps"], after["steps"], run.skipped) == (3, 4, 1)
    assert not same(after["weights"], skipped["weights"])
    assert finite(after)
    if gradient == "replay":
        assert same(before, sound.kept[2])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_very_first_rollout_may_fail(tmp_path: Path, fault: str) -> None:
    run = Run(tmp_path, fault, {0}, length=2)
    assert same(dict(run.kept[0]["weights"]), dict(build().double().state_dict()))
    assert not any(value.any() for moments in run.kept[0]["moments"].values() for value in moments.values())
    assert run.kept[0]["steps"] == 0
    assert run.kept[1]["steps"] == 1
    assert finite(run.kept[1])


@pytest.mark.parametrize(("fault", "accumulate"), [*((fault, 1) for fault in FAULTS), ("nan loss", 2)])
def test_a_fault_that_is_known_a_rollout_late_leaves_what_one_that_is_known_at_once_leaves(
    tmp_path: Path, fault: str, accumulate: int
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "length": 8, "dropout": 0.2}
    at_once, late = (Run(tmp_path / str(late), fault, {2, 3, 5}, late=late, **options) for late in (False, True))
    for step, (expected, got) in enumerate(zip(at_once.kept, late.kept, strict=True)):
        for entry in ("weights", "moments", "states"):
            assert same(got[entry], expected[entry]), (step, entry)
    assert late.kept[-1]["steps"] == at_once.kept[-1]["steps"] == 8 // accumulate - late.skipped
    assert [kept["steps"] for kept in late.kept] != [kept["steps"] for kept in at_once.kept]
    assert late.skipped == at_once.skipped > 0
    assert late.report() == at_once.report()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.AdamW, fused=False)], ids=["SGD", "AdamW"])
def test_an_optimizer_that_cannot_skip_on_the_device_takes_no_step_that_is_not_finite(
    tmp_path: Path, optimizer: Callable[..., Optimizer]
) -> None:
    options: dict[str, Any] = {"optimizer": partial(optimizer, lr=0.01), "learning_rate": None, "late": True}
    run = Run(tmp_path, "nan loss", {3}, length=5, **options)
    before, skipped, after = run.kept[2:]
    for entry in ("weights", "moments", "steps"):
        assert same(skipped[entry], before[entry]), entry
    assert (after["steps"], run.skipped) == (4, 1)
    assert not same(after["weights"], skipped["weights"])
    assert finite(after)


@pytest.mark.parametrize("schedule", [WarmupCosine, partial(StepLR, step_size=2, gamma=0.5), chained])
def test_a_schedule_does_not_advance_with_a_skipped_step(tmp_path: Path, schedule: Callable[..., LRScheduler]) -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.taken: list[tuple[int, float]] = []

        def on_before_optimizer_step(self, trainer: Trainer, task: SegmentTask, optimizer: Optimizer) -> None:
            self.taken.append((task._rollouts - 1, optimizer.param_groups[0]["lr"]))

    rates = []
    for rollouts in ((), (2, 3, 6)):
        seen = Rates()
        options: dict[str, Any] = {"lr_scheduler": schedule, "warmup_steps": None, "callbacks": [seen]}
        Run(tmp_path, "nan loss", rollouts, length=10, late=True, **options)
        rates.append([rate for rollout, rate in seen.taken if rollout not in rollouts])
    assert rates[1] == rates[0][:7]
    assert len(set(rates[1])) > 2


def test_a_checkpoint_right_after_a_fault_is_that_of_a_step_that_was_not_taken(tmp_path: Path) -> None:
    """The one who writes it does not ask for what is pending."""
    whole = Run(tmp_path, "nan loss", {3}, length=8, saves=True, late=True)
    content = torch.load(tmp_path / "4.ckpt", weights_only=True)
    assert content["global_step"] == 3
    assert content["lr_schedulers"][0]["last_epoch"] == 3
    assert content[KEY]["guard"] == {"skipped": 1, "in_a_row": 1, "finite": True}
    resumed = Run(tmp_path / "more", length=8, checkpoint=tmp_path / "4.ckpt")
    for expected, got in zip(whole.kept[4:], resumed.kept, strict=True):
        assert same(got["weights"], expected["weights"])
        assert same(got["moments"], expected["moments"])
    assert resumed.trainer.global_step == whole.trainer.global_step == 7


def test_a_rollout_is_run_again_in_the_precision_of_the_run_whoever_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[torch.dtype] = []
    run_again = nonfinite.run_again

    def spy(*given: Any) -> Any:
        again.append(torch.get_default_dtype())
        return run_again(*given)

    monkeypatch.setattr(nonfinite, "run_again", spy)
    Run(tmp_path, "nan loss", {3}, length=5, saves=True, late=True)  # a callback that writes a checkpoint asks
    assert again == [torch.float64]


def test_the_last_step_of_a_run_is_one_that_was_taken(tmp_path: Path) -> None:
    run = Run(tmp_path, "nan loss", {1, 4}, length=20, max_steps=4, late=True)
    assert len(run.kept) == 6
    assert run.trainer.global_step == 4


def test_a_validation_after_a_fault_sees_it_counted(tmp_path: Path) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.steps: list[tuple[int, float]] = []

        def on_validation_start(self, trainer: Trainer, task: SegmentTask) -> None:
            self.steps.append((trainer.global_step, float(trainer.callback_metrics["train/skipped"])))

    seen = Seen()
    often = {"limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 0}
    Run(tmp_path, "nan loss", {1, 4}, length=6, late=True, callbacks=[seen], **often)
    assert seen.steps == [(1, 0), (1, 1), (2, 1), (3, 1), (3, 2), (4, 2)]


def test_only_a_lane_whose_state_is_not_finite_loses_its_memory(tmp_path: Path, sound: Run) -> None:
    """The others have read the rollout with the same weights as in a run without the fault."""
    for fault in ("nan loss", "nan memory"):
        run = Run(tmp_path / fault, fault, {2}, segment=HORIZON - 1, length=4)
        got, expected = (kept[2]["states"]["train", 0] for kept in (run.kept, sound.kept))
        healthy = [lane for lane in range(LANES) if fault == "nan loss" or lane != LANE]
        assert same(*(tuple(field[healthy] for field in state) for state in (got, expected)))
        if fault == "nan memory":
            run.task.load_state_dict(run.kept[2]["weights"])
            initial = run.task.model.initial_state(LANES)
            for name, now, before, new in zip(initial._fields, got, expected, detach(initial), strict=True):
                assert same(now[LANE], (before if name in Memformer.unread else new)[LANE]), name
        assert run.skipped == 1


@pytest.mark.parametrize(("rollouts", "fails_at"), [({2, 3, 4}, 4), ({0, 1, 2}, 2), ({1, 2, 4, 5, 6}, 6)])
def test_so_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, rollouts: set[int], fails_at: int) -> None:
    with pytest.raises(FloatingPointError, match=r"skipped 3 steps in a row.*the loss of rollout") as raised:
        Run(tmp_path, "nan loss", rollouts, max_skipped=3)
    assert "\n" not in str(raised.value)
    assert f"rollout {fails_at} in lane {LANE} (" in str(raised.value)
    content = json.loads((tmp_path / FILE).read_text())
    assert content["skipped_in_a_row"] == 3
    assert [step["rollouts"][0]["rollout"] for step in content["steps"]] == [fails_at - 2, fails_at - 1, fails_at]


def test_skipped_steps_that_do_not_follow_each_other_end_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "infinite gradient", {0, 1, 3, 4, 6}, max_skipped=3)
    assert (run.kept[-1]["steps"], run.skipped) == (3, 5)
    assert run.report()["skipped_in_a_row"] == 1


@pytest.mark.parametrize(
    ("fault", "rollout"), [*((fault, 4) for fault in FAULTS), ("infinite loss", 3), ("nan memory", 5)]
)
def test_a_step_of_several_rollouts_is_skipped_as_a_whole(tmp_path: Path, fault: str, rollout: int) -> None:
    run = Run(tmp_path, fault, {rollout}, accumulate_grad_batches=3, length=9)
    assert [kept["steps"] for kept in run.kept] == [0, 0, 1, 1, 1, 1, 1, 1, 2]
    assert same(run.kept[5]["weights"], run.kept[2]["weights"])
    assert same(run.kept[5]["moments"], run.kept[2]["moments"])
    assert not same(run.kept[8]["weights"], run.kept[5]["weights"])
    assert finite(run.kept[8])
    (step,) = run.report()["steps"]
    blamed = [read["rollout"] for read in step["rollouts"]]
    assert blamed == ([3, 4, 5] if "gradient" in fault else [rollout])


def test_the_rollouts_that_share_a_step_with_a_fault_do_not_reach_the_next_step(tmp_path: Path) -> None:
    """What follows is the gradient of rollouts 6, 7 and 8 alone, with the weights and moments of rollout 2."""
    run = Run(tmp_path, "nan loss", {4}, accumulate_grad_batches=3, length=9)
    task = build(accumulate_grad_batches=3).double()
    task.load_state_dict(run.kept[5]["weights"])
    states = {group: run.kept[5]["states"]["train", group] for group in range(GROUPS)}
    for rollout in run.after.read[6:]:
        tokens = sum(int(segment.token_mask.sum()) for segment in rollout.segments)

        def read(segment: Segment, state: State, tokens: int = tokens) -> tuple[Tensor, State]:
            output, next_state = task.model(segment, state)
            return output.token_losses.sum() / (3 * tokens), next_state

        _, states[rollout.group] = GRADIENTS["bptt"](read, rollout.segments, states[rollout.group])
    norm = nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None])
    assert float(run.trainer.callback_metrics["train/gradient_norm"]) == pytest.approx(float(norm), rel=1e-6)


def test_what_is_written_down_is_what_the_rollout_read(tmp_path: Path, sound: Run) -> None:
    run = Run(tmp_path, "nan loss", {3}, segment=2, length=5)
    (step,) = run.report()["steps"]
    assert (step["steps_before"], step["gradient_norm"]) == (3, "nan")
    assert {"embedding.weight", "writer.to_key.weight"} <= set(step["gradients"])
    (rollout,) = step["rollouts"]
    assert (rollout["rollout"], rollout["group"], rollout["loss"], rollout["repeats"]) == (3, 1, "nan", True)
    (lane,) = rollout["lanes"]
    assert (lane["lane"], lane["loss_fails_in_segment"], lane["state_fails_after_segment"]) == (LANE, 2, None)
    read = run.after.read[3]
    tokens = [segment.tokens[LANE][segment.token_mask[LANE]] for segment in read.segments]
    named = [documents().document(p["document"])[slice(*p["tokens"])] for p in lane["read"]]
    assert torch.cat(tokens).tolist() == np.concatenate(named).tolist()
    assert {p["document"] for p in lane["read"]} == set(read.documents[:, LANE].tolist())
    assert (tmp_path / FILE).stat().st_size < 4000


def test_a_memory_is_blamed_with_the_segment_that_failing_it(tmp_path: Path) -> None:
    run = Run(tmp_path, "nan memory", {3}, segment=1, length=5)
    ((rollout,),) = (step["rollouts"] for step in run.report()["steps"])
    (lane,) = rollout["lanes"]
    assert (lane["lane"], lane["state_fails_after_segment"]) == (LANE, 1)
    assert lane["loss_fails_in_segment"] == (2 if not run.after.read[3].segments[2].document_start[LANE] else None)


def test_a_gradient_alone_is_named_and_all_lanes_are_listed(tmp_path: Path) -> None:
    run = Run(tmp_path, "overflow", {2}, length=4)
    (step,) = run.report()["steps"]
    assert step["gradients"] == ["writer.to_key.weight"]
    (rollout,) = step["rollouts"]
    assert not rollout["repeats"]
    assert [lane["lane"] for lane in rollout["lanes"]] == list(range(LANES))
    assert math.isfinite(float(rollout["loss"]))
    assert run.skipped == 1


def test_a_fault_that_does_not_repeat_is_said_to_be_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, "fleeting loss", {3}, length=5, dropout=0.2)
    ((rollout,),) = (step["rollouts"] for step in run.report()["steps"])
    assert (rollout["loss"], rollout["repeats"]) == ("inf", False)
    assert "the loss of rollout 3, which is finite when it runs again" in caplog.text


def test_running_again_leaves_the_random_stream_where_it_stood(tmp_path: Path) -> None:
    """A rollout that is skipped draws what it draws in any case: what follows has the same dropout."""
    streams = []
    for fault in (None, "nan loss"):
        Run(tmp_path, fault, {1}, length=3, dropout=0.2)
        streams.append(torch.get_rng_state())
    assert torch.equal(*streams)


@pytest.mark.parametrize("fault", ["infinite loss", "nan loss", "nan memory"])
def test_a_run_resumes_between_a_fault_and_the_end_of_its_step(tmp_path: Path, fault: str) -> None:
    """The gradient of a loss that is infinite by a constant is finite: a checkpoint must keep that the step failed."""
    whole = Run(tmp_path, fault, {2}, accumulate_grad_batches=2, length=6, dropout=0.2, saves=True)
    resumed = Run(
        tmp_path / "more", fault, (), accumulate_grad_batches=2, length=6, dropout=0.2, checkpoint=tmp_path / "3.ckpt"
    )
    assert [kept["steps"] for kept in whole.kept] == [0, 1, 1, 1, 1, 2]
    assert len(resumed.kept) == 3
    assert all(map(same, resumed.kept, whole.kept[3:]))
    assert (resumed.skipped, whole.skipped) == (1, 1)


def test_a_row_of_skipped_steps_continues_in_a_resumed_run(tmp_path: Path) -> None:
    whole = Run(tmp_path, "nan loss", {2, 3}, max_skipped=3, saves=True)
    assert torch.load(tmp_path / "4.ckpt", weights_only=True)[KEY]["guard"]["in_a_row"] == 2
    with pytest.raises(FloatingPointError, match="skipped 3 steps in a row"):
        Run(tmp_path / "again", "nan loss", {4}, max_skipped=3, checkpoint=tmp_path / "4.ckpt")
    resumed = Run(tmp_path / "well", checkpoint=tmp_path / "4.ckpt", max_skipped=3)
    assert all(map(same, resumed.kept, whole.kept[4:]))
    assert resumed.skipped == 2


def test_a_learning_rate_that_blows_up_ends_in_a_line_and_every_checkpoint_is_finite(
    command: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    saves = {"dirpath": str(tmp_path / "kept"), "every_n_train_steps": 1, "save_top_k": -1, "save_last": True}
    callback = {"class_path": "ModelCheckpoint", "init_args": saves}
    given = ["--model.learning_rate", "1e30", "--model.max_skipped", "2", "--trainer.max_steps", "20"]
    outcome = command("fit", "--config", small, *given, "--trainer.callbacks", json.dumps([callback]))
    assert outcome.code == 1
    (line,) = outcome.errors
    assert "skipped 2 steps in a row" in line
    assert "lower learning rate" in line
    assert str(tmp_path / "run" / "version_0" / FILE) in line
    assert "Traceback" not in outcome.output
    kept = sorted((tmp_path / "kept").iterdir())
    assert "last.ckpt" in [path.name for path in kept]
    for path in kept:
        assert finite(dict(torch.load(path, weights_only=True)["state_dict"]))
    (step,) = json.loads((tmp_path / "run" / "version_0" / FILE).read_text())["steps"][-1:]
    names = [p["name"] for rollout in step["rollouts"] for lane in rollout["lanes"] for p in lane["read"]]
    assert names
    assert all(Path(name).is_file() for name in names)


def test_a_guard_that_would_forgive_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_skipped must be at least 1, got 0"):
        build(max_skipped=0)
