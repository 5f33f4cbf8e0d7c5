"""Pack a corpus into token files once; a later run with the same corpus, tokenizer and shares opens them again."""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from memformer_pl.atomic_write import atomic_write
from memformer_pl.contract.config import import_path
from memformer_pl.data.corpora.corpus import SPLITS, Corpus
from memformer_pl.data.packing.documents import PackedDocuments, Summary
from memformer_pl.data.packing.passes import encode, learn, survey
from memformer_pl.data.packing.splits import require_shares
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import UsageError, usage_error

FORMAT = 6
"""Version of the cache. A higher number packs everything anew."""
MAX_LOST = 0.5
"""Default for the largest share of the bytes of a split that a tokenizer may lose. A WordPiece that lower-cases loses 4
% of prose, and a fifth of source code, whose indentation it drops.
"""
META, CHECKSUMS = "meta.json", "checksums.json"
"""``meta.json`` describes the pack; ``checksums.json`` has a hash of every other file."""
SETTLED = 2.0
"""Seconds after which a file that is written again surely has other times."""

log = logging.getLogger(__name__)


class Pack(NamedTuple):
    """A corpus, ready for training."""

    train: PackedDocuments
    validation: PackedDocuments
    test: PackedDocuments
    tokenizer: Tokenizer
    """A trained copy of the tokenizer that was passed."""
    fingerprint: str
    """Hash of the tokens and of the documents of every split."""
    folder: Path


def pack(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    validation: float,
    test: float,
    cache: str | os.PathLike[str] | None = None,
    max_lost: float = MAX_LOST,
) -> Pack:
    """Pack a corpus, or open what an earlier call packed.

    Several processes may call this at once: one packs, and the others wait. A killed process leaves nothing that
    another would open. A pack with a changed byte is packed again: a pack is read, and compared with its checksums,
    whenever a file of it was written or moved since that was done last.

    Args:
        corpus: Source of the documents.
        tokenizer: Is not changed; the result has a trained copy.
        validation: Share of the documents held out for validation, see ``splits.py``.
        test: Share of the documents held out for test.
        cache: Folder of all packs; by default ``$MEMFORMER_CACHE``, else the user's cache directory.
        max_lost: The largest share of the bytes of a split that the tokenizer may lose. A byte is lost if it cannot be
            restored from the tokens (``Tokenizer.count_lost_bytes``); bits per byte count it nevertheless. Every call
            logs the share.

    Raises:
        UsageError: The corpus is empty, too small to be split or cannot be read, the tokenizer loses too much, or the
            pack cannot be written.
    """
    require_shares(validation=validation, test=test)
    require_max_lost(max_lost)
    shares = {"validation": validation, "test": test}
    identity = {"format": FORMAT, "corpus": corpus.identity(), "tokenizer": tokenizer.identity(), "shares": shares}
    identity["classes"] = [import_path(type(corpus)), import_path(type(tokenizer))]
    key = blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()
    folder = _cache(cache) / f"{type(corpus).__name__.lower()}-{key}"
    if corpus.would_read(folder / META):
        raise UsageError(f"the cache {str(folder.parent)!r} is among the files of the corpus: choose another cache")
    if not is_intact(folder):
        with usage_error(OSError, about=f"cannot pack the corpus into {str(folder)!r}; try another cache"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder.parent)
            with _lock(folder):
                if not is_intact(folder):
                    if folder.exists():
                        log.warning("%s is damaged: packing it again", folder)
                    _write(folder, corpus, copy(tokenizer), shares=shares, identity=identity)
    opened = _open(folder, copy(tokenizer))
    _report_lost_bytes(opened, max_lost=max_lost)
    return opened


def require_max_lost(share: float) -> None:
    """Raise a ``UsageError`` unless this is a share."""
    if not 0 <= share <= 1:
        raise UsageError(f"max_lost must be from 0 to 1, got max_lost={share}")


def _report_lost_bytes(opened: Pack, *, max_lost: float) -> None:
    """Log the share of bytes that the tokenizer loses in each split, and refuse too large a share."""
    name = type(opened.tokenizer).__name__
    for split, summary in json.loads((opened.folder / META).read_text())["splits"].items():
        share = summary["lost"] / max(summary["bytes"], 1)
        message = f"the tokenizer {name} loses {100 * share:.3g} % of the bytes of the {split} documents"
        if share > max_lost:
            raise UsageError(
                f"{message}: they cannot be restored from its tokens, so bits per byte would mean little. Use a "
                f"tokenizer that fits the text, or set max_lost={min(share + 0.005, 1):.2f}, got {max_lost=}"
            )
        if share:
            log.warning("%s: they cannot be restored from its tokens, but bits per byte count them", message)
        if summary["without_tokens"]:
            skipped = "left out %d %s documents: the tokenizer %s finds no token in them"
            log.warning(skipped, summary["without_tokens"], split, name)


def is_intact(folder: Path) -> bool:
    """Whether a pack exists and is as it was written. Unless nothing has changed since this was last found, reads all
    of it, at about a gigabyte per second.
    """
    verified = folder.with_suffix(".verified")  # size and times of every file when the hashes were last compared
    try:
        stamps = _stamps(folder)
        if stamps and _read_json(verified) == stamps:
            return True
        intact = bool(json.loads((folder / CHECKSUMS).read_bytes()) == _checksums(folder))
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    if intact and _settled(stamps) and _stamps(folder) == stamps:
        with suppress(OSError, UsageError), atomic_write(verified) as partial:  # a cache may not be ours to write
            partial.write_text(json.dumps(stamps))
    return intact


def write_checksums(folder: Path) -> None:
    """Complete a pack: write down the hash of every file."""
    (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder), indent=1))


def _checksums(folder: Path) -> dict[str, str]:
    """Hash of every file of a pack."""
    digests = {}
    for path in _files(folder):
        if path.name != CHECKSUMS:
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = file_digest(file, blake2b).hexdigest()
    return digests


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size, and times of the last change, of every file of a pack. No program can set the second of the times back."""
    statuses = {path.relative_to(folder).as_posix(): path.stat() for path in _files(folder)}
    return {name: [status.st_size, status.st_mtime_ns, status.st_ctime_ns] for name, status in statuses.items()}


def _settled(stamps: Mapping[str, list[int]]) -> bool:
    """Whether the last change is so long ago that another one would have changed the times."""
    return max(max(times) for _, *times in stamps.values()) < time.time_ns() - SETTLED * 1e9


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _read_json(path: Path) -> object:
    """The content of a file; None if there is none, or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, FileNotFoundError):
        return None


def _cache(cache: str | os.PathLike[str] | None) -> Path:
    return Path(cache or os.environ.get("MEMFORMER_CACHE") or user_cache_path("memformer_pl")).expanduser()


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_suffix(".lock"))


def _remove_leftovers(cache: Path) -> None:
    """Remove what killed processes left half-written; the system has released their locks."""
    for leftover in cache.glob("*.partial"):
        try:
            with _lock(leftover).acquire(timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)
        except Timeout:
            continue  # still being written


def _write(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, *, shares: Mapping[str, float], identity: Mapping[str, object]
) -> None:
    """Pack into a sibling of ``folder``, and rename it at the end."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with _progress() as progress:
            known = survey(corpus, progress, **shares)
            learn(tokenizer, corpus, known, progress)
            dtype = np.min_scalar_type(tokenizer.vocab_size - 1).name
            summaries = encode(tokenizer, corpus, known, progress, folder=partial, dtype=dtype)
        tokenizer.save(partial)
        meta = {"dtype": dtype, "vocab_size": tokenizer.vocab_size, **_described(summaries), "identity": identity}
        (partial / META).write_text(json.dumps(meta, indent=1))
        write_checksums(partial)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _described(summaries: Mapping[str, Summary]) -> dict[str, object]:
    if not summaries["train"].documents:
        raise UsageError("the tokenizer finds no token in any training document")
    joined = "".join(summary.fingerprint for summary in summaries.values())
    fingerprint = blake2b(joined.encode(), digest_size=16).hexdigest()
    return {"fingerprint": fingerprint, "splits": {split: summary._asdict() for split, summary in summaries.items()}}


def _open(folder: Path, tokenizer: Tokenizer) -> Pack:
    meta = json.loads((folder / META).read_text())
    tokenizer.load(folder)
    train, validation, test = (
        PackedDocuments.open(folder / split, dtype=meta["dtype"], fingerprint=meta["splits"][split]["fingerprint"])
        for split in SPLITS
    )
    return Pack(train, validation, test, tokenizer, fingerprint=meta["fingerprint"], folder=folder)


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))
