"""Saved sessions: files of another model, damaged files and a full disk are refused with the reason."""

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from models import BOUNDED, LENGTH, VOCAB, memformer, transformer
from torch import Tensor

from memformer_pl.contract import SegmentModel
from memformer_pl.inference import Session
from memformer_pl.models import Memformer

Build = Callable[..., SegmentModel]


def text(length: int) -> Tensor:
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(0))


def fed(model: SegmentModel, tokens: Tensor) -> Session:
    """A session that has read ``tokens``."""
    session = Session(model, lanes=len(tokens))
    session.feed(tokens)
    return session


@pytest.mark.parametrize("build", BOUNDED.values(), ids=BOUNDED.keys())
def test_a_saved_session_does_not_grow(build: Build, tmp_path: Path) -> None:
    sizes = []
    session = Session(build().eval(), lanes=2)
    for _ in range(3):
        session.feed(text(20 * LENGTH + 3).repeat(2, 1))
        _ = session.log_probs
        session.save(tmp_path / "memory")
        sizes.append((tmp_path / "memory").stat().st_size)
    # numbers of calls and tokens are written with eight bytes each; the header says where each tensor lies
    assert len(set(sizes)) == 1
    assert sizes[0] < 16 * 1024


def test_a_saved_session_of_1024_slots_takes_little_more_than_its_slots(tmp_path: Path) -> None:
    model = Memformer(
        vocab_size=VOCAB, dim=64, heads=2, encoder_layers=1, decoder_layers=1, slots=1024, segment_length=16
    )
    fed(model.eval(), text(100)).save(tmp_path / "memory")
    assert (tmp_path / "memory").stat().st_size < 1024 * 64 * 4 + 3000


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    fed(memformer().eval(), text(13)).save(path)
    return path


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(memformer, slots=4), r"belongs to another model: slots \(was 3, is 4\)"),
        (transformer, r"belongs to another model: class \(was '.*\.Memformer', is '.*\.Transformer'\), ffn_dim"),
        (lambda: memformer().float(), "belongs to a model with other weights, or another precision"),
    ],
)
def test_a_session_of_another_model_is_refused(saved: Path, build: Build, message: str) -> None:
    if "ffn_dim" in message:
        message = message.replace(", ffn_dim", "")
    with pytest.raises(ValueError, match=message):
        Session.load(build().eval(), saved)


def test_a_session_of_other_weights_is_refused(saved: Path) -> None:
    model = memformer().eval()
    with torch.no_grad():
        model.start[0] += 1e-9
    with pytest.raises(ValueError, match="belongs to a model with other weights"):
        Session.load(model, saved)


def test_a_file_in_which_a_bit_has_changed_is_refused(saved: Path) -> None:
    content, model = saved.read_bytes(), memformer().eval()
    for place in range(0, len(content), 11):
        changed = bytearray(content)
        changed[place] ^= 4
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=r"memory' is (damaged|not a saved session)"):
            Session.load(model, saved)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "memory").write_bytes(content)
    with pytest.raises(ValueError, match=r"memory' is (damaged, or is )?not a saved session"):
        Session.load(memformer().eval(), tmp_path / "memory")


@pytest.mark.parametrize("length", [5, 100, 1000])
def test_a_truncated_file_is_refused(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(ValueError, match="memory' is damaged, or is not a saved session"):
        Session.load(memformer().eval(), saved)


def test_a_file_of_an_earlier_format_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memformer_pl.inference.saved_session.FORMAT", "memformer_pl session 3")
    fed(memformer().eval(), text(13)).save(tmp_path / "memory")
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"has format 'memformer_pl session 3', not .* 4'\. Let the model read the text"
    ):
        Session.load(memformer().eval(), tmp_path / "memory")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ValueError, match=f"there is no saved session '{path}'"):
            Session.load(memformer().eval(), path)


def test_a_full_disk_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    session = fed(memformer().eval(), text(3))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(ValueError, match="no space left"):
        session.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
