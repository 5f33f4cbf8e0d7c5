"""A text of 100 MB is read at the memory of one of 100 KB; minutes long."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from models import small

from memformer_pl.checkpoints.pretrained import save_pretrained
from memformer_pl.data import BytePairs, Document
from memformer_pl.models import Memformer

pytestmark = pytest.mark.slow

SIZES = {"short": 100_000, "long": 100_000_000}
MEASURED = """
import sys
from pathlib import Path
from memformer_pl.cli.main import main

main(sys.argv[1:])
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(peak, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one narrow layer, whose tokens are words of 60 letters; and two texts of such words."""
    path = tmp_path_factory.mktemp("long")
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array([" " + "".join(random.choice(letters, 60)) for _ in range(20)])
    tokenizer = BytePairs(vocab_size=1500)
    tokenizer.train([Document("".join(random.choice(words, 2000)).encode(), name="")])
    for name, size in SIZES.items():
        with (path / name).open("w") as file:
            for _ in range(size // 100_000):
                file.write("".join(random.choice(words, 100_000 // 61)).ljust(100_000, "."))
    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "slots": 4,
        "vocab_size": tokenizer.vocab_size,
        "segment_length": 256,
    }
    save_pretrained(small(Memformer, **sizes).float(), path / "model", tokenizer=tokenizer.serialize())
    return path


def peak(*words: object) -> float:
    """The most memory that a command has held at once, in MiB."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kibibytes = int(done.stderr.split("VmHWM:")[1].split()[0])
    print(words[0], f"{kibibytes / 1024:.0f} MiB, {time.perf_counter() - started:.0f} s")
    return kibibytes / 1024


def test_a_prompt_of_any_length_is_read_at_the_same_memory(folder: Path) -> None:
    read = ["generate", "--ckpt_path", folder / "model", "--length", 20, "--prompt_file"]
    short, long = (peak(*read, folder / name) for name in SIZES)
    assert long < 1.2 * short


def test_a_document_of_any_length_is_predicted_at_the_same_memory(folder: Path) -> None:
    read = ["predict", "--ckpt_path", folder / "model", "--out", folder / "losses.parquet", "--documents"]
    short, long = (peak(*read, folder / name) for name in SIZES)
    assert long < 1.2 * short
    assert pyarrow.parquet.ParquetFile(folder / "losses.parquet").metadata.num_rows > 1_000_000
