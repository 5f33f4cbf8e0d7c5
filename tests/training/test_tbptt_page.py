"""The page "Truncated back-propagation through time in Lightning 2": its code trains and resumes as it says."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pages
import pytest
import torch
from identical import assert_identical
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from tbptt_page import PAGE, assert_close, definitions, in_double, trainer, zeros
from torch import Tensor, nn

WHOLE_RUN = True
pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:Using ModelCheckpoint with manual optimization",
    "ignore:Checkpoint directory .* exists and is not empty",
)


@pytest.fixture
def page() -> SimpleNamespace:
    return definitions()


def test_a_sequence_shorter_than_a_segment_is_dropped(page: SimpleNamespace) -> None:
    sequences = [torch.arange(length) for length in (41, 10, 20, 21, 0)]
    whole = page.Rollouts([sequences[0], sequences[3]], lanes=1, horizon=1, length=20)
    mixed = page.Rollouts(sequences, lanes=1, horizon=1, length=20)
    assert len(mixed) == len(whole) == 3
    assert all(torch.equal(mixed[t][0][0], whole[t][0][0]) for t in range(3))


def test_each_lane_reads_whole_waves_one_after_another(page: SimpleNamespace) -> None:
    read: list[list[Tensor]] = [[] for _ in range(4)]
    for rollout in page.loader:
        for inputs, targets, starts in rollout:
            for lane in range(4):
                if starts[lane]:
                    read[lane].append(inputs[lane, :1, 0])
                assert torch.equal(read[lane][-1][-1:], inputs[lane, :1, 0])
                read[lane][-1] = torch.cat((read[lane][-1], targets[lane, :, 0]))
    for lane, waves in enumerate(read):
        assert len(waves) > 5
        for wave, expected in zip(waves[:-1], page.waves[lane::4], strict=False):
            assert torch.equal(wave, expected[: len(wave)])
            assert len(expected) - len(wave) < 20


def test_two_ranks_read_the_lanes_of_one(page: SimpleNamespace) -> None:
    parts = [page.Rollouts(page.waves, lanes=4, horizon=5, length=20, rank=rank, world_size=2) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(page.data)
    for field in range(3):
        one, *two = (data[7][2][field] for data in (page.data, *parts))
        assert torch.equal(one, torch.stack(two, dim=1).flatten(0, 1))


@pytest.mark.parametrize("horizon", [1, 5])
def test_a_rollout_is_trained_as_by_a_plain_loop(page: SimpleNamespace, horizon: int) -> None:
    """With a horizon of 1, this loop is what Lightning 1 did between two values of ``hiddens``."""
    data = page.Rollouts(page.waves, lanes=4, horizon=horizon, length=20)
    module, plain = page.Forecaster(dropout=0.0), page.Forecaster(dropout=0.0).double()
    plain.load_state_dict(module.double().state_dict())
    trainer(precision="64-true").fit(module, page.DataLoader(data, batch_size=None))
    optimizer, state = plain.configure_optimizers(), zeros(plain)
    for rollout in map(in_double, page.DataLoader(data, batch_size=None)):
        loss = torch.zeros(()).double()
        for segment in rollout:
            segment_loss, state = plain.step(segment, state)
            loss = loss + segment_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = tuple(field.detach() for field in state)
    assert_close(module.state_dict(), plain.state_dict())
    assert_close(module.state, state)


def test_a_lane_that_starts_a_wave_forgets_the_one_before(page: SimpleNamespace) -> None:
    module = page.Forecaster(dropout=0.0).double()
    inputs, targets, _ = in_double(page.data[3])[0]
    state = tuple(torch.randn_like(field) for field in zeros(module))
    starts = torch.tensor([True, False, False, True])
    _, after = module.step((inputs, targets, starts), state)
    for lane, start in enumerate(starts):
        entering = tuple(field[:, lane] for field in (zeros(module) if start else state))
        assert_close(after[0][:, lane], module.lstm(inputs[lane], entering)[1][0])


def test_rollouts_are_averaged_clipped_and_scheduled(page: SimpleNamespace) -> None:
    module, plain = page.Trained(dropout=0.0), page.Trained(dropout=0.0).double()
    plain.load_state_dict(module.double().state_dict())
    plain.divisor = 10
    high = page.Rollouts([2 * wave for wave in page.waves], lanes=4, horizon=5, length=20)
    loader, run = page.DataLoader(high, batch_size=None), trainer(precision="64-true")
    run.fit(module, loader)
    (optimizer,), (schedule,) = plain.configure_optimizers()
    rollouts, state, norms = list(map(in_double, loader)), zeros(plain), []
    assert run.global_step == (len(rollouts) + 1) // 2
    for first in range(0, len(rollouts), 2):
        for rollout in rollouts[first : first + 2]:
            losses = []
            for segment in rollout:
                loss, state = plain.step(segment, state)
                losses.append(loss)
            torch.stack(losses).sum().backward()
            state = tuple(field.detach() for field in state)
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert min(norms) < 1 < max(norms)
    assert_close(module.state_dict(), plain.state_dict())
    assert run.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1e-2


@pytest.mark.parametrize("option", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_lightning_refuses_its_own_options(page: SimpleNamespace, option: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="not supported for manual optimization"):
        trainer(**option).fit(page.Forecaster(), page.loader)


def test_what_is_carried_stays_in_float32_under_autocast(page: SimpleNamespace) -> None:
    seen = []

    class Watched(page.Trained):  # type: ignore[misc, name-defined]
        def step(self, segment: Any, state: Any) -> Any:
            seen.append(self.lstm(segment[0], state)[1][0].dtype)
            return super().step(segment, state)

    module = Watched()
    trainer(precision="bf16-mixed", max_steps=3).fit(module, page.loader)
    assert set(seen) == {torch.bfloat16}
    assert {field.dtype for field in module.state} == {torch.float32}


def test_losses_that_manual_backward_did_not_scale_are_refused(page: SimpleNamespace) -> None:
    class OnCPU(MixedPrecision):  # whose LSTM knows no float16
        def autocast_context_manager(self) -> torch.autocast:
            return torch.autocast("cpu", torch.bfloat16)

    with pytest.raises(AssertionError, match="Attempted unscale_ but _scale is None"):
        trainer(plugins=[OnCPU("16-mixed", "cpu")]).fit(page.Trained(), page.loader)


DDP = """
import sys

import pages
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

page, folder = pages.run(sys.argv[1], train=False), sys.argv[2]
options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, strategy="ddp",
               devices=2, use_distributed_sampler=False)
module = page.Parallel(dropout=0.0)
trainer = Trainer(max_epochs=2, precision="64-true", enable_checkpointing=False, **options)
trainer.fit(module)
torch.save(module.state_dict(), f"{folder}/rank{trainer.global_rank}.pt")

ends = []
for path in (None, f"{folder}/15.ckpt"):
    name = dict(filename="{step}", auto_insert_metric_name=False)
    keep = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, **name)
    module = page.Resumable()
    Trainer(max_steps=20, callbacks=[keep], **options).fit(module, ckpt_path=path)
    ends.append((module.state_dict(), module.state, torch.get_rng_state()))
torch.save(ends, f"{folder}/ends{trainer.global_rank}.pt")
"""

KILLED = """
import os
import signal
import sys

import pages
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

page, folder, every, last = pages.run(sys.argv[1], train=False), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == last:
            os.kill(os.getpid(), signal.SIGKILL)


keep = ModelCheckpoint(folder, filename="last", every_n_train_steps=every, enable_version_counter=False)
Trainer(max_steps=20, callbacks=[keep, Kill()], accelerator="cpu", logger=False).fit(page.Resumable())
"""


def run_script(source: str, folder: Path, *words: object, code: int = 0) -> None:
    """Run a script in a process of its own; whatever happens, no process is left behind."""
    script = folder / "script.py"
    script.write_text(source)
    paths = os.pathsep.join([str(Path(pages.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(script), PAGE, str(folder), *map(str, words)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as process:
        try:
            printed, _ = process.communicate(timeout=120)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == code, printed


def test_two_processes_end_as_one_and_resume_bit_for_bit(page: SimpleNamespace, tmp_path: Path) -> None:
    run_script(DDP, tmp_path)
    module = page.Parallel(dropout=0.0)
    trainer(max_epochs=2, precision="64-true").fit(module)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_identical(ranks[0], ranks[1])
    assert_close(ranks[0], dict(module.state_dict()))
    for rank in range(2):
        uninterrupted, resumed = torch.load(tmp_path / f"ends{rank}.pt", weights_only=True)
        assert_identical(resumed, uninterrupted)


@pytest.mark.parametrize(("every", "last"), [(5, 17), (12, 14)], ids=["in mid-epoch", "at the end of an epoch"])
def test_a_run_that_was_killed_ends_as_if_it_were_not(
    page: SimpleNamespace, tmp_path: Path, every: int, last: int
) -> None:
    run_script(KILLED, tmp_path, every, last, code=-signal.SIGKILL)
    ends = []
    for folder, path in ((tmp_path / "other", None), (tmp_path, tmp_path / "last.ckpt")):
        keep = ModelCheckpoint(folder, filename="last", every_n_train_steps=every, enable_version_counter=False)
        run = trainer(max_steps=20, max_epochs=-1, callbacks=[keep], enable_checkpointing=True)
        module = page.Resumable()
        run.fit(module, ckpt_path=path)
        optimizer, schedule = run.optimizers[0].state_dict(), run.lr_scheduler_configs[0].scheduler.state_dict()
        ends.append((dict(module.state_dict()), module.state, optimizer, schedule, torch.get_rng_state()))
    assert_identical(*ends)
