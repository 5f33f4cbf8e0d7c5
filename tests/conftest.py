"""Fixtures of all tests. Tests and the processes they start use one thread each: more would compete for the cores."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jaxtyping

# First: typing caches unions, so float | int made earlier would replace lightning's int | float, and the command line
# would read --trainer.limit_val_batches 1 as 1.0. A command in a process of its own imports lightning early.
import lightning.pytorch  # noqa: F401
import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("fuzzing")
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# lightning 2.6 uses names of jsonargparse that are deprecated
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seed every test, so that its numbers do not depend on the tests before it."""
    torch.manual_seed(0)


WHOLE_RUNS = ("cli", "sweeps", "experiments")
"""Folders of tests that run commands from beginning to end."""


@pytest.fixture(autouse=True)
def type_checks(request: pytest.FixtureRequest) -> None:
    """Check shapes and types in every call, but not in whole runs, where the checks would be a third of the time.

    Modules of a folder that say ``WHOLE_RUN = True`` are such runs too.
    """
    whole = request.path.parent.name in WHOLE_RUNS or getattr(request.module, "WHOLE_RUN", False)
    jaxtyping.config.update("jaxtyping_disable", whole)


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    """Turn off the type checks of the tests: the package itself must refuse wrong input."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Outcome(NamedTuple):
    """The result of a command."""

    code: int | str | None
    errors: list[str]
    """Lines that begin with ``error:``."""
    output: str
    """Standard output and standard error."""


Runner = Callable[[Callable[[list[str]], None]], Callable[..., Outcome]]
"""Makes a function that runs a command line, given its main function."""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Runs command lines in this process."""
    monkeypatch.setattr("sys.argv", ["memformer_pl"])

    def run(main: Callable[[list[str]], None], *args: object) -> Outcome:
        code: int | str | None = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as stopped:
            code = stopped.code
        printed = "".join(capsys.readouterr())
        return Outcome(code, [line for line in printed.splitlines() if line.startswith("error:")], printed)

    return lambda main: partial(run, main)


@pytest.fixture
def command(runner: Runner) -> Callable[..., Outcome]:
    """Run a command line of the package."""
    from memformer_pl.cli.main import main

    return runner(main)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents of 0 to 400 bytes, all of different lengths; one is not UTF-8."""
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    for length in (0, 1, 5, 17, 40, 64, 100, 123, 150, 211, 300, 400):
        letters = random.choice(np.frombuffer(b"abcdefgh \n", dtype=np.uint8), length)
        (folder / f"{length:03}.txt").write_bytes(letters.tobytes())
    (folder / "binary.bin").write_bytes(bytes(range(128, 256)))
    return folder


@pytest.fixture(scope="session")
def pack_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


def write_small(folder: Path, texts: Path, pack_cache: Path) -> Path:
    """Write the configuration of a run of four steps, about a second; it logs below the folder."""
    path = folder / "small.yaml"
    path.write_text(
        f"""
        model:
          warmup_steps: 2
          model:
            class_path: Memformer
            init_args: {{dim: 16, heads: 2, slots: 4, encoder_layers: 1, decoder_layers: 1}}
        data:
          corpus: {{class_path: Files, init_args: {{paths: {texts}}}}}
          tokenizer: Bytes
          segment_length: 8
          horizon: 2
          batch_size: 4
          interleave: 2
          validation: 0.3
          test: 0.1
          cache: {pack_cache}
        trainer:
          accelerator: cpu
          max_steps: 4
          log_every_n_steps: 1
          enable_progress_bar: false
          enable_model_summary: false
          logger:
            class_path: TensorBoardLogger
            init_args: {{save_dir: {folder}, name: run, version: 0}}
        """
    )
    return path


@pytest.fixture
def small(tmp_path: Path, texts: Path, pack_cache: Path) -> Path:
    """The configuration of a run that takes a second, logged below the test's own folder."""
    return write_small(tmp_path, texts, pack_cache)
