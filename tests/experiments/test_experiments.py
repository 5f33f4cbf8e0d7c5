"""Every configuration in ``experiments/`` takes a step, and the scripts there run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Outcome
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memformer_pl import SegmentData, models
from memformer_pl.data import BytePairs, Stdlib
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.packing.pack import is_intact
from memformer_pl.gradients.rollout import GRADIENTS

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CONFIGS, MODELS = sorted(EXPERIMENTS.glob("*.yaml")), sorted((EXPERIMENTS / "models").glob("*.yaml"))
RECALL = sorted(path for path in (EXPERIMENTS / "recall").rglob("*.yaml") if path.name != "rows.yaml")
OURS = [name for name in models.__all__ if name != "HuggingFaceDecoder"]
"""Models of the sizes that benchmarks give to all; decoders of transformers have ``long_context.py``."""
TASKS = {
    "copy": [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64],
    "associative": [3, 4, 6, 8, 12, 16, 24, 32, 48, 64],
}
OVERLAYS = {"no_memory.yaml": "quickstart.yaml", "watch.yaml": "quickstart.yaml"}
CODE = sorted(str(path) for path in (EXPERIMENTS.parent / "memformer_pl" / "layers").glob("*.py"))
SMALL = [
    "--data.batch_size=2",
    "--data.evaluation_batch_size=8",
    "--model.model.init_args.dim=16",
    "--model.model.init_args.heads=2",
    "--trainer.max_steps=1",
    "--trainer.val_check_interval=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow a test to import the scripts of ``experiments/benchmarks``."""
    monkeypatch.syspath_prepend(EXPERIMENTS / "benchmarks")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_an_experiment_takes_a_step(
    config: Path, command: Callable[..., Outcome], tmp_path: Path, pack_cache: Path
) -> None:
    base = [f"--config={EXPERIMENTS / OVERLAYS[config.name]}"] if config.name in OVERLAYS else []
    files = ["--data.corpus=Files", f"--data.corpus.paths={CODE}"]
    where = [f"--data.cache={pack_cache}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    outcome = command("fit", *base, f"--config={config}", *SMALL, *files, *where)
    assert outcome.code == 0
    assert [path.name for path in tmp_path.rglob("documents.csv")] == ["documents.csv"]


@pytest.mark.parametrize("config", MODELS, ids=lambda path: path.stem)
def test_a_model_takes_a_step_in_place_of_the_quickstarts(
    config: Path, command: Callable[..., Outcome], texts: Path, tmp_path: Path, pack_cache: Path
) -> None:
    foreign = {"lstm": ("heads",), "hugging_face": ("heads", "dim")}.get(config.stem, ())
    small = [option for option in SMALL if not any(f".{size}=" in option for size in foreign)]
    stack = [f"--config={EXPERIMENTS / 'quickstart.yaml'}", f"--config={config}", *small]
    files = [
        "--trainer.log_every_n_steps=1",
        "--data.corpus=Files",
        f"--data.corpus.paths={texts}",
        "--data.tokenizer=Bytes",
    ]
    where = [f"--data.cache={pack_cache}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    assert command("fit", *stack, *files, *where).code == 0
    assert [path.parent.name for path in tmp_path.rglob("documents.csv")] == [config.stem]


@pytest.mark.parametrize(
    ("task", "config"),
    [
        pytest.param(
            task,
            config,
            id=f"{task}-{config.stem}",
            marks=pytest.mark.slow if task == "associative" and config.stem != "memformer" else (),
        )
        for task in TASKS
        for config in sorted((EXPERIMENTS / "recall" / "copy").glob("*.yaml"))
        if config.name != "rows.yaml"
    ],
)
def test_recall_takes_a_step_with_every_model(
    task: str, config: Path, command: Callable[..., Outcome], tmp_path: Path, pack_cache: Path
) -> None:
    base = EXPERIMENTS / "recall" / task / "memformer.yaml"
    stack = [f"--config={base}", *([] if config.stem == base.stem else [f"--config={config}"]), *SMALL]
    documents = ["--data.corpus.examples=40", "--data.corpus.questions=1", "--trainer.log_every_n_steps=1"]
    where = [f"--data.cache={pack_cache}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    options = ["--trainer.limit_val_batches=1.0", "--trainer.num_sanity_val_steps=0", "--trainer.callbacks+=RunRecord"]
    outcome = command("fit", *stack, *documents, *where, *options)
    assert outcome.code == 0
    assert "Accuracy by distance" in outcome.output
    (written,) = tmp_path.rglob("record.json")
    assert written.parent.name == config.stem
    accuracies = {name: value for name, value in json.loads(written.read_text()).items() if "distance/" in name}
    assert sorted(accuracies) == sorted(f"distance/{distance}" for distance in TASKS[task])
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())


def unigram_bits_per_byte(cache: Path) -> float:
    """Bits per byte of the quickstart's held-out documents under the training frequencies of tokens."""
    data = SegmentData(corpus=Stdlib(), tokenizer=BytePairs(vocab_size=2048), validation=0.1, test=0.0, cache=cache)
    data.setup()
    counts, held_out = (
        np.bincount(np.asarray(documents.tokens), minlength=data.vocab_size)
        for documents in (data.packed.train, data.packed.validation)
    )
    bits = -np.log2((counts + 1) / (counts + 1).sum())
    return float((held_out * bits).sum() / data.packed.validation.bytes.sum())


@pytest.mark.slow
@pytest.mark.parametrize("config", [EXPERIMENTS / "quickstart.yaml", *MODELS], ids=lambda path: path.stem)
def test_a_model_beats_the_unigram_entropy_of_the_corpus_within_two_hundred_rollouts(
    config: Path, command: Callable[..., Outcome], tmp_path: Path, pack_cache: Path
) -> None:
    stack = [f"--config={EXPERIMENTS / 'quickstart.yaml'}", f"--config={config}", f"--data.cache={pack_cache}"]
    steps = ["--trainer.max_steps=200", "--trainer.val_check_interval=200", "--trainer.callbacks=[]"]
    quietly = ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    assert command("fit", *stack, *steps, *quietly).code == 0
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*"))))
    events.Reload()
    bits, floor = events.Scalars("validation/bits_per_byte")[-1].value, unigram_bits_per_byte(pack_cache)
    print(f"{config.stem}: {bits:.3f} bits per byte after 200 rollouts; unigrams {floor:.3f}")
    assert bits < floor


@pytest.mark.parametrize("config", [*CONFIGS, *MODELS, *RECALL], ids=lambda path: path.stem)
def test_an_experiment_begins_with_its_question(config: Path) -> None:
    assert config.read_text().startswith("# Question:")
    assert yaml.safe_load(config.read_text())


def test_compare_says_how_much_a_run_saves(command: Callable[..., Outcome], tmp_path: Path) -> None:
    for name, bits in (("a", (40, 60)), ("b", (60, 100))):
        (tmp_path / name).mkdir()
        rows = "\n".join(f"{place},10,{cost}" for place, cost in enumerate(bits))
        (tmp_path / name / "documents.csv").write_text(f"document,sizes,with_memory\n{rows}\n")
    output = command("compare", tmp_path / "a", tmp_path / "b").output
    # (60 - 40) / 10 = 2 and (100 - 60) / 10 = 4: mean 3, standard deviation sqrt(2), error sqrt(2) / sqrt(2) = 1
    assert "A saves 3.0000 ± 1.0000 bits per byte, on 100% of 2 documents" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no .*documents.csv: add --trainer.callbacks\\+=ClosingReport to a run"),
        (
            "document,sizes\n0,10\n",
            "is not from a ClosingReport: it must have numbers in the columns sizes, with_memory",
        ),
        ("document,sizes,with_memory\n0,10,many\n", "is not from a ClosingReport"),
        ("document,sizes,with_memory\n0,10\n", "is not from a ClosingReport"),
        ("document,sizes,with_memory\n", "has no documents"),
        ("", "has no documents"),
        ("document,sizes,with_memory\n0,11,40\n", "a and .*b were validated on different documents"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_with_one_line(
    content: str | None, message: str, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    for name, text in (("a", "document,sizes,with_memory\n0,10,40\n"), ("b", content)):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "documents.csv").write_text(text)
    outcome = command("compare", tmp_path / "a", tmp_path / "b")
    assert outcome.code
    (line,) = outcome.errors
    assert re.search(message, line)


@pytest.mark.usefixtures("benchmarks")
def test_every_model_has_a_configuration_with_the_weights_of_the_quickstart_within_three_percent() -> None:
    from step_cost import runs_on

    runs = runs_on(EXPERIMENTS / "quickstart.yaml")
    weights = {name: sum(p.numel() for p in run.model.parameters()) for name, run in runs.items()}
    assert {type(run.model).__name__ for run in runs.values()} == set(models.__all__)
    assert {name: n for name, n in weights.items() if abs(n / weights["quickstart"] - 1) > 0.03} == {}
    assert {(run.lanes, run.horizon, run.model.segment_length, run.model.vocab_size) for run in runs.values()} == {
        (32, 8, 16, 2048)
    }


@pytest.mark.usefixtures("benchmarks")
def test_step_cost_reports_every_model_and_its_formulas_agree_with_torch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from step_cost import main

    main(repeats=0, out=tmp_path / "costs.json")
    rows = {row["model"]: row for row in json.loads((tmp_path / "costs.json").read_text())["rows"]}
    assert len(rows) == len(models.__all__)
    printed, markdown = capsys.readouterr().out, (tmp_path / "costs.md").read_text()
    for name, row in rows.items():
        assert name in printed
        assert f"| {name} |" in markdown
        assert row["flops_per_token"] == row["flops_per_token_by_formula"] > 0
    assert rows["transformer"]["share_of_next_state"] == 0 == rows["transformer"]["state_bytes"]
    assert rows["quickstart"]["state_bytes"] == 32 * 128 * 4 + 16 * 8


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_watching_cost_times_validations_with_each_callback_of_watch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pack_cache: Path
) -> None:
    from watching_cost import main

    config = yaml.safe_load((EXPERIMENTS / "quickstart.yaml").read_text())
    config["model"]["model"]["init_args"] |= {"dim": 8, "heads": 2, "slots": 2}
    config["data"] |= {"corpus": "Pydoc", "cache": str(pack_cache), "segment_length": 512}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    main(base=tmp_path / "small.yaml", validation=0.03, repeats=2, out=tmp_path / "times.json")
    result = json.loads((tmp_path / "times.json").read_text())
    assert [row["callbacks"] for row in result["rows"]] == [
        "none",
        "SlotRetention",
        "AttentionMaps",
        "all of watch.yaml",
    ]
    assert result["rows"][0]["ratio"] == [1, 1, 1]
    assert result["settings"]["documents"] == 2
    assert "watch.yaml" in capsys.readouterr().out


@pytest.mark.usefixtures("benchmarks")
def test_memory_length_times_every_model_that_caches(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from memory_length import main

    main(lengths=[8, 16], dim=8, layers=2, segment_length=4, lanes=1, repeats=1, out=tmp_path / "times.json")
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"TransformerXL", "CompressiveTransformer", "LaMemo"}
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
    assert "LaMemo" in capsys.readouterr().out


@pytest.mark.usefixtures("benchmarks")
def test_inference_cost_times_every_model_after_a_long_text_and_rivals_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from inference_cost import context, rivals

    small = {"dim": 16, "layers": 2, "segment_length": 4, "rounds": 2}
    context(names=OURS, short=20, long=90, **small, out=tmp_path / "context.json")
    rows = json.loads((tmp_path / "context.json").read_text())["rows"]
    assert [row["model"] for row in rows] == OURS
    assert all(row["seconds"]["long"] > 0 for row in rows)
    rivals(lanes=[1, 2], vocab_size=16, memory_length=12, **small, out=tmp_path / "rivals.json")
    rows = json.loads((tmp_path / "rivals.json").read_text())["rows"]
    assert len(rows) == 2 * 5 * 3
    states = {row["model"]: row["state_bytes"] for row in rows}
    assert states == {
        "Transformer-XL, memory 12": 2 * 12 * 16 * 4 + 2 * 8,
        "Memformer, 1024 slots": 1024 * 16 * 4 + 4 * 8,
        "Memformer, 64 slots": 64 * 16 * 4 + 4 * 8,
    }
    # the printed table breaks long names where numbers are wide
    written = "".join((tmp_path / f"{name}.md").read_text() for name in ("context", "rivals"))
    assert all(f"| {name} |" in written for name in (*OURS, *states))
    assert "LSTM" in capsys.readouterr().out


@pytest.mark.usefixtures("benchmarks")
def test_replay_holds_one_segment_whatever_the_horizon() -> None:
    from replay_cost import Sizes, rows_of

    def peaks(gradient: str, horizon: int) -> Any:
        sizes = Sizes(horizon=horizon, encoder_layers=1, decoder_layers=2)
        return rows_of(sizes, [(gradient, 1)], repeats=0, threads=1, memory=True)[0]

    few, many = (peaks("replay", horizon) for horizon in (4, 32))
    assert many["peak"] - many["states"] <= 1.02 * (few["peak"] - few["states"])
    assert peaks("bptt", 8)["peak"] > 1.3 * few["peak"]


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("model", OURS)
def test_replay_cost_times_every_model_and_gradient(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from replay_cost import Sizes, main

    sizes = Sizes(
        dim=16, heads=2, encoder_layers=1, decoder_layers=1, slots=4, segment_length=4, lanes=2, vocab_size=16
    )
    main([2], [model], groups=[2], sizes=sizes, repeats=2, memory=False, out=tmp_path / "costs.json")
    rows = json.loads((tmp_path / "costs.json").read_text())["rows"]
    assert [row["gradient"] for row in rows] == [*GRADIENTS, *(["replay"] if model == "Memformer" else [])]
    assert all(len(row["ratio"]) == 3 and row["seconds"] > 0 for row in rows)
    assert f"| {model} | 2 | checkpointed |" in (tmp_path / "costs.md").read_text()


@pytest.mark.usefixtures("benchmarks")
def test_loss_cost_holds_a_large_vocabulary_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loss_cost import main
    from replay_cost import Sizes

    from memformer_pl.layers import cross_entropy

    monkeypatch.setattr(
        cross_entropy, "LARGEST", cross_entropy.LARGEST
    )  # the benchmark changes it; restored after the test
    sizes = Sizes(dim=16, heads=2, encoder_layers=1, decoder_layers=1, slots=4, horizon=1, lanes=8)
    main([50257], sizes=sizes, repeats=2, out=tmp_path / "costs.json")
    at_once, in_pieces = json.loads((tmp_path / "costs.json").read_text())["rows"]
    assert in_pieces["peak"] < 0.6 * at_once["peak"]
    assert "| 50,257 | in pieces |" in (tmp_path / "costs.md").read_text()


@pytest.mark.usefixtures("benchmarks")
def test_figures_are_drawn_from_the_committed_results(tmp_path: Path) -> None:
    from figures import FIGURES, horizon, main, models, rows_of, sizes

    results = EXPERIMENTS / "results"
    main(out=tmp_path)
    for name in FIGURES:
        assert 20_000 < (tmp_path / f"{name}.png").stat().st_size < 150_000
        assert (results / f"{name}.png").exists()
    time, memory = horizon(results).axes
    ways = {(row["gradient"], row["group"]) for row in rows_of(results, "replay_cost_horizons")}
    assert {way for way, _ in ways} == set(GRADIENTS)
    assert len(time.containers) == len(memory.lines) == len(ways)
    assert all(len(axes.patches) == len(rows_of(results, "step_cost")) for axes in models(results).axes)
    assert [len(axes.lines) for axes in sizes(results).axes] == [6, 2]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The quickstart on a small corpus, with a small model."""
    config = yaml.safe_load((EXPERIMENTS / "quickstart.yaml").read_text())
    config["data"] |= {"corpus": "Pydoc", "tokenizer": {"class_path": "BytePairs", "init_args": {"vocab_size": 300}}}
    config["data"] |= {"batch_size": 4, "horizon": 2, "interleave": 2}
    config["model"]["model"]["init_args"] |= {"dim": 16, "heads": 2, "slots": 4}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.usefixtures("benchmarks")
def test_loader_cost_compares_the_loader_with_training(tiny: Path, tmp_path: Path) -> None:
    from loader_cost import main

    main(base=tiny, rollouts=5, repeats=2, out=tmp_path / "costs.json")
    rows = {row["what"]: row for row in json.loads((tmp_path / "costs.json").read_text())["rows"]}
    assert list(rows) == [
        "read the documents",
        "pack",
        "open the pack",
        "write the tokens",
        "read the tokens",
        "load a rollout",
        "train on a rollout",
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["train on a rollout"]["times_training"] == [1, 1, 1]


@pytest.mark.usefixtures("benchmarks")
def test_corpus_size_opens_a_pack_that_is_read_once_and_loads_rollouts(tmp_path: Path) -> None:
    from corpus_size import make, measure

    make(tmp_path / "pack", documents=2000, gigabytes=1e-3)
    opened = PackedDocuments.open(tmp_path / "pack", dtype="uint16", fingerprint="")
    assert (len(opened), len(opened.tokens), int(opened.offsets[-1])) == (2001, 500_000, 500_000)
    row = measure(tmp_path / "pack", rollouts=3)
    assert list(row) == ["verify", "open", "plan", "first", "longest"]
    assert all(0 < seconds < 60 for seconds in row.values())
    with (tmp_path / "pack" / "tokens.bin").open("r+b") as tokens:
        tokens.write(b"x")
    assert not is_intact(tmp_path / "pack")


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_scaling_counts_one_sum_of_all_gradients_per_rollout(tiny: Path, tmp_path: Path) -> None:
    from scaling import main
    from step_cost import build

    main(base=tiny, rollouts=2, repeats=2, out=tmp_path / "scaling.json")
    rows = {row["case"]: row for row in json.loads((tmp_path / "scaling.json").read_text())["rows"]}
    weights = sum(p.numel() for p in build(tiny).model.parameters())
    assert [row["gradient_messages"] for row in rows.values()] == [0, 1, 1]
    assert rows["more lanes"]["gradient_bytes"] == 4 * weights
    assert [row["lanes"] for row in rows.values()] == [4, 8, 4]
