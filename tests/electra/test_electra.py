"""ELECTRA: what is masked and replaced, what the buffer holds, and runs of a few steps."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Outcome, Runner
from identical import assert_identical
from lightning import Trainer

from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.electra import command_line
from memformer_pl.electra.data import Examples
from memformer_pl.electra.model import Corrupted, Electra, bit_losses
from memformer_pl.electra.replay import Replay, ReplayBuffer, measure
from memformer_pl.electra.task import KEY, ElectraTask
from memformer_pl.errors import DivergedError, UsageError
from memformer_pl.sweeps import rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
VOCAB, LENGTH, BATCH = 11, 20, 4
BASE = Path(__file__).parents[2] / "experiments" / "electra" / "base.yaml"


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def electra() -> Electra:
    return Electra(vocab_size=VOCAB, length=LENGTH, dim=16, heads=2, layers=1)


def examples(count: int = BATCH) -> torch.Tensor:
    return torch.randint(VOCAB, (count, LENGTH), generator=random())


def test_fifteen_percent_are_masked_and_a_replacement_that_is_right_is_no_replacement() -> None:
    model, tokens = electra(), examples(500)
    assert model.masked == 3
    loss, corrupted = model.corrupt(tokens, random())
    assert (corrupted.bits.sum(1) <= 3).all()
    assert corrupted.bits.sum(1).float().mean() > 2  # nearly all of them, before the generator has learned anything
    assert torch.equal(corrupted.bits, corrupted.tokens != tokens)
    assert int(corrupted.tokens.max()) < VOCAB
    assert float(loss.detach()) == pytest.approx(np.log(VOCAB), rel=0.2)
    again = model.corrupt(tokens, random())[1]
    assert torch.equal(again.tokens, corrupted.tokens)
    assert not torch.equal(model.corrupt(tokens, random(1))[1].tokens, corrupted.tokens)


def test_every_token_sees_every_other_and_no_other_example() -> None:
    model, tokens = electra(), examples()
    before = model.judge(tokens)
    tokens[0, -1] = (tokens[0, -1] + 1) % VOCAB
    changed = (model.judge(tokens) != before).detach()
    assert changed[0].all()
    assert not changed[1:].any()


def test_no_gradient_of_the_discriminator_reaches_the_generator() -> None:
    model = electra()
    _, corrupted = model.corrupt(examples(), random())
    bit_losses(model.judge(corrupted.tokens), corrupted.bits).mean().backward()
    assert all(weight.grad is None for weight in (*model.generator.parameters(), *model.to_token.parameters()))
    assert all(weight.grad is not None for weight in model.discriminator.blocks.parameters())


def test_the_norm_of_a_gradient_is_that_of_autograd() -> None:
    logits = torch.randn(BATCH, LENGTH, dtype=torch.float64, requires_grad=True)
    bits = torch.rand(BATCH, LENGTH, generator=random()) < 0.2
    losses = measure(logits, bits, priority="loss_difference")
    torch.testing.assert_close(losses, bit_losses(logits, bits).mean(1))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(measure(logits, bits, priority="gradient_norm").detach(), grad.norm(dim=1))


def numbered(*numbers: int) -> Corrupted:
    """Examples whose tokens are all their number."""
    tokens = torch.tensor(numbers)[:, None].expand(-1, LENGTH)
    return Corrupted(tokens, tokens % 2 == 0)


def test_a_buffer_takes_five_bytes_a_token_and_the_first_in_is_the_first_out() -> None:
    buffer = ReplayBuffer(Replay(size=2, priority="uniform"), length=LENGTH)
    assert buffer.nbytes == 2 * 5 * LENGTH
    buffer.write(numbered(7, 8, 9), torch.ones(3))
    keys, drawn = buffer.draw(100, np.random.default_rng(0), device=torch.device("cpu"))
    assert set(keys.tolist()) == {1, 2}
    assert drawn.tokens[:, 0].tolist() == [7 + key for key in keys]
    assert torch.equal(drawn.bits, drawn.tokens % 2 == 0)


def test_an_example_that_is_drawn_twice_in_a_step_is_visited_once() -> None:
    buffer = ReplayBuffer(Replay(size=2), length=LENGTH)
    buffer.write(numbered(7, 8), torch.tensor([0.9, 0.5]))
    buffer.visit(np.array([0, 0]), torch.tensor([0.4, 0.4]))
    assert buffer.weights == {0: pytest.approx(0.5), 1: 1.0}
    with pytest.raises(DivergedError, match="is not finite"):
        buffer.visit(np.array([0]), torch.tensor([float("nan")]))


def test_examples_are_whole_and_every_pass_has_another_order() -> None:
    documents = PackedDocuments.from_arrays([np.arange(100), np.arange(100, 119), np.arange(200, 265)])
    given = Examples(documents, length=LENGTH, batch_size=3, seed=0)
    firsts = [batch[:, 0].tolist() for _ in range(2) for batch in given]
    everything = [0, 20, 40, 60, 80, 200, 220, 240]
    assert len(given) == 2
    assert len(firsts) == 4
    for read in (firsts[0] + firsts[1], firsts[2] + firsts[3]):
        assert len(set(read)) == 6
        assert set(read) < set(everything)
    assert firsts[:2] != firsts[2:]
    given.next = 3
    assert [batch[:, 0].tolist() for batch in given] == firsts[3:]
    held_out = list(Examples(documents, length=LENGTH, batch_size=3, seed=None))
    assert torch.cat(held_out)[:, 0].tolist() == everything
    assert torch.equal(held_out[0][0], torch.arange(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, "replay.share must be at least 0 and below 1, got 1.0"),
        ({"size": 0}, "replay.size must be at least 1, got 0"),
        ({"priority": "loss"}, "replay.priority must be one of loss_difference, gradient_norm, uniform, got 'loss'"),
        ({"share": 0.3}, "is 1.71429 examples: choose a share that gives a whole number"),
        ({"size": 3}, "replay.size must be at least the 4 examples that a step draws, got 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(no_type_checks: None, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Replay(**options).drawn(BATCH)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_learning_rate_that_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match=f"learning_rate must be above 0 and finite, got {rate}"):
        ElectraTask(vocab_size=5, length=4, batch_size=2, learning_rate=rate)


@pytest.fixture
def run(runner: Runner, tmp_path: Path, pack_cache: Path) -> Callable[..., Outcome]:
    """Runs of the shipped configuration, smaller, with a checkpoint every second step."""
    small = {
        "model": {"dim": 16, "heads": 2, "layers": 1, "warmup_steps": 2},
        "data": {"tokenizer": "Bytes", "batch_size": 4, "cache": str(pack_cache)},
        "trainer": {
            **{"max_steps": 6, "val_check_interval": 3, "limit_val_batches": 3, "enable_progress_bar": False},
            **{"enable_model_summary": False, "precision": "64-true"},
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2, "save_top_k": -1}}],
            "logger": {"init_args": {"save_dir": str(tmp_path), "version": "whole"}},
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small))
    return partial(runner(command_line.main), "fit", "--config", BASE, "--config", path)


def test_a_checkpoint_is_validated_without_its_buffer(
    run: Callable[..., Outcome], runner: Runner, tmp_path: Path
) -> None:
    assert run("--model.replay={share: 0.5, size: 10}").code == 0
    trained, small = checkpoint(tmp_path, "whole", 6), tmp_path / "small.yaml"
    outcome = runner(command_line.main)("validate", "--config", BASE, "--config", small, "--ckpt_path", trained)
    assert outcome.code == 0
    assert "validation/auc" in outcome.output


@pytest.mark.parametrize("name", [row.name for row in rows.read("electra/rows").rows])
def test_every_row_takes_a_step_and_has_the_metrics_of_its_table(
    run: Callable[..., Outcome], tmp_path: Path, name: str
) -> None:
    table = rows.read("electra/rows")
    (row,) = (row for row in table.rows if row.name == name)
    assert row.configs == (BASE,)
    (tmp_path / "row.yaml").write_text(yaml.safe_dump(dict(row.override)))
    outcome = run(f"--config={tmp_path / 'row.yaml'}", "--trainer.max_steps=3", "--trainer.callbacks+=RunRecord")
    assert outcome.code == 0, outcome.output
    record = json.loads((tmp_path / "electra" / "whole" / "record.json").read_text())
    assert {*table.metrics, "parameters", "tokens", "processor_seconds"} <= record.keys()
    assert record["tokens"] == 3 * 4 * 64


def checkpoint(folder: Path, version: str, step: int) -> Path:
    (found,) = (folder / "electra" / version / "checkpoints").glob(f"*step={step}.ckpt")
    return found


@pytest.mark.parametrize("priority", ["loss_difference", "gradient_norm", "uniform"])
def test_a_run_with_a_buffer_goes_on_bit_for_bit(run: Callable[..., Outcome], tmp_path: Path, priority: str) -> None:
    replay = f"--model.replay={{share: 0.5, size: 10, priority: {priority}}}"
    outcome = run(replay)
    assert outcome.code == 0, outcome.output
    middle = checkpoint(tmp_path, "whole", 2)
    outcome = run(replay, f"--ckpt_path={middle}", "--trainer.logger.init_args.version=resumed")
    assert outcome.code == 0, outcome.output
    whole, resumed = (torch.load(checkpoint(tmp_path, name, 6), weights_only=True) for name in ("whole", "resumed"))
    for part in ("state_dict", "optimizer_states", checkpoints.KEY):
        assert_identical(resumed[part], whole[part])
    weights = whole[checkpoints.KEY][KEY]["buffer"]["weighted"]["entries"][:, 0]
    assert len(weights) == 10
    assert (len(weights.unique()) == 1) == (priority == "uniform")
    refused = run(f"--ckpt_path={middle}", "--trainer.logger.init_args.version=other")
    assert refused.code == 1
    replayed = f"replay (was Replay(share=0.5, size=10, priority='{priority}'), is None)"
    assert f"options differ from the checkpoint: {replayed}" in refused.errors[0]
    refused = run(replay, "--data.seed=1", f"--ckpt_path={middle}", "--trainer.logger.init_args.version=other")
    assert "options differ from the checkpoint: seed (was 0, is 1)" in refused.errors[0]
    content = torch.load(middle, weights_only=True)
    del content[checkpoints.KEY]
    torch.save(content, tmp_path / "foreign.ckpt")
    refused = run(f"--ckpt_path={tmp_path / 'foreign.ckpt'}", "--trainer.logger.init_args.version=other")
    assert refused.code == 1
    assert "was not written by memformer_pl" in refused.errors[0]


def test_generators_are_the_same_whatever_is_replayed_and_a_share_of_nothing_is_the_same_run(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    for version, share in (("none", None), ("nothing", 0.0), ("half", 0.5)):
        replay = [] if share is None else [f"--model.replay={{share: {share}, size: 10}}"]
        assert run(*replay, f"--trainer.logger.init_args.version={version}").code == 0
    none, nothing, half = (
        torch.load(checkpoint(tmp_path, version, 6), weights_only=True)["state_dict"]
        for version in ("none", "nothing", "half")
    )
    assert_identical(nothing, none)
    for name, weight in none.items():
        trained_alike = name.startswith(("model.generator", "model.to_token"))
        if trained_alike or "blocks" in name:
            assert torch.equal(half[name], weight) == trained_alike, name


def test_a_run_that_diverges_says_so(run: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run("--model.learning_rate=1e300", "--trainer.callbacks+=RunRecord")
    assert outcome.code == 1
    assert outcome.errors[0].startswith("error: the generator's loss is not finite")
    assert json.loads((tmp_path / "electra" / "whole" / "record.json").read_text())["diverged"]


def test_mistakes_are_refused_in_a_line(run: Callable[..., Outcome]) -> None:
    for given, message in (
        ("--model.replay={share: 1.0}", "replay.share must be at least 0 and below 1, got 1.0"),
        ("--model.dim=18", "dim must be a multiple of 4"),
        ("--data.length=100000", "the training documents make no batch of 4 examples"),
        ("--model.dims=16", "there is no option 'model.dims'. Did you mean model.dim?"),
    ):
        outcome = run(given)
        assert outcome.code in (1, 2)
        assert message in outcome.errors[0]


def test_a_discriminator_learns_to_tell_what_is_easy(tmp_path: Path) -> None:
    """Examples of one repeated token: what differs was replaced."""
    documents = PackedDocuments.from_arrays([np.full(LENGTH, number % VOCAB) for number in range(64)])
    loaders = [Examples(documents, length=LENGTH, batch_size=16, seed=seed) for seed in (0, None)]
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "length": LENGTH, "batch_size": 16, "dim": 16, "heads": 2, "layers": 1}
    task = ElectraTask(**sizes, learning_rate=3e-3, warmup_steps=5, replay=Replay(size=64))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_steps=60, default_root_dir=tmp_path, num_sanity_val_steps=0, **quiet)
    trainer.fit(task, *loaders)
    assert float(trainer.callback_metrics["validation/auc"]) > 0.9
