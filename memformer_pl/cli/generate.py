"""The command ``generate``: read a prompt of any length with a trained model, and continue it.

The prompt is streamed through the model's memory, so it may be larger than the machine's. Text is written as it is
generated, in whole characters. Ctrl-C ends the generation after the current token; a second Ctrl-C ends it at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from jsonargparse import Namespace

from memformer_pl.atomic_write import partial_of, require_apart, require_writable
from memformer_pl.cli.options import (
    Parser,
    add_checkpoint,
    add_device,
    counted,
    load_reader,
    progress,
    require_file,
)
from memformer_pl.cli.text_writers import Lines, OneAfterAnother, Plain, Writer
from memformer_pl.data.tokenizers.pieces import blocks_of
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import LARGEST, UsageError, require_sizes, usage_error
from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session
from memformer_pl.inference.writing import require_sessions

STANDARD_INPUT = "-"
ENDLESS = -1


def add_options(parser: Parser) -> None:
    """Add the options of the command."""
    add_checkpoint(parser)
    for name, kind, description in (
        ("prompt", str, "Text to read first; by default none: the model begins a document."),
        ("prompt_file", str, "File to read first, of any size; - for standard input."),
        ("memory", str, "Continue from a memory that --save_memory has written."),
        ("save_memory", str, "File for the memory after prompt and generated text: a few KiB."),
        ("samples", int, "Texts to generate in parallel; by default as many as --memory holds, else one."),
    ):
        parser.add_argument(f"--{name}", type=kind, help=description)
    parser.add_argument("--length", type=int, default=256, help=f"Tokens of each text; {ENDLESS} for no end.")
    parser.add_argument("--json", action="store_true", help="Write events as JSON lines instead of text.")
    parser.add_class_arguments(Sampling)
    add_device(parser)


def run(options: Namespace, parser: Parser) -> None:
    """Read the prompt, generate, and save the memory.

    Raises:
        UsageError: The checkpoint, the memory or the prompt is unusable.
        SystemExit: With 130 after Ctrl-C, with 141 after the reader of standard output has gone.
    """
    sampling = checked(options, parser)
    if options.save_memory is not None:
        require_not_read(Path(options.save_memory), options)
    model, tokenizer = load_reader(options, parser)
    if options.length:
        require_sessions(model)
    session = Session(model) if options.memory is None else Session.load(model, options.memory)
    samples = options.samples or session.lanes
    if session.lanes not in (1, samples):
        raise UsageError(
            f"the memory holds {session.lanes} texts: samples must be {session.lanes} or left out, got {samples}"
        )
    if samples > 1 and options.length == ENDLESS and not options.json:
        parser.error(f"several texts are written when all have ended, but length={ENDLESS} has no end: add --json")
    read_prompt(session, tokenizer, options)
    session = session if samples == session.lanes else session.repeated(samples)
    with stopping() as stopped:
        try:
            writer = writer_of(samples, options)
            write_texts(session, sampling, tokenizer, writer, length=options.length, stopped=stopped)
        except BrokenPipeError:
            stopped.append(signal.SIGPIPE)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries to flush it at exit
        if options.save_memory is not None:
            session.save(options.save_memory)
    if stopped:
        sys.exit(128 + stopped[-1])


def checked(options: Namespace, parser: Parser) -> Sampling:
    """Refuse invalid options before anything is loaded; returns how tokens are drawn."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    try:
        if options.samples is not None:
            require_sizes(most=LARGEST, samples=options.samples)
        sampling = Sampling(**{name: options[name] for name in names})
    except ValueError as mistake:
        parser.error(str(mistake))
    if options.length < ENDLESS:
        parser.error(f"length must be at least 0, or {ENDLESS} for no end, got {options.length}")
    if options.prompt is not None and options.prompt_file is not None:
        parser.error("prompt and prompt_file are both given: leave one out")
    require_file(options, "save_memory", parser)
    return sampling


def require_not_read(out: Path, options: Namespace) -> None:
    """Refuse to save the memory over the prompt or the checkpoint. It may replace the one that ``memory`` names.

    Raises:
        UsageError: It would replace one of them, or the file is not writable.
    """
    read = [Path(options.ckpt_path)]
    if options.prompt_file == STANDARD_INPUT:
        if out.exists() and os.path.samestat(os.fstat(sys.stdin.fileno()), out.stat()):
            raise UsageError(f"save_memory would overwrite {str(out)!r}, an input: choose another file")
    elif options.prompt_file is not None:
        read.append(Path(options.prompt_file))
    require_apart("save_memory", (out, partial_of(out)), read=read)
    if options.memory is not None:
        require_apart("save_memory", [partial_of(out)], read=[Path(options.memory)])
    require_writable(out)


def writer_of(samples: int, options: Namespace) -> Writer:
    """Choose how the texts are written."""
    if options.json:
        return Lines(samples)
    return Plain() if samples == 1 else OneAfterAnother(samples)


def read_prompt(session: Session, tokenizer: Tokenizer, options: Namespace) -> None:
    """Feed the prompt to the session, at most a piece of it in memory.

    Raises:
        UsageError: The tokenizer cannot encode it.
    """
    with opened(options) as (read_bytes, name, total), progress("reading", total=total) as bar:
        for tokens in tokenizer.encode_blocks(counted(blocks_of(read_bytes), bar), name=name):
            session.feed(torch.from_numpy(tokens.astype("int64")).expand(session.lanes, -1))


@contextmanager
def opened(options: Namespace) -> Iterator[tuple[Callable[[int], bytes], str, int | None]]:
    """Open the prompt: a function that reads from it, its name in errors, and its size in bytes, if known."""
    if options.prompt_file is None:
        yield BytesIO((options.prompt or "").encode(errors="surrogateescape")).read, "the prompt", None
    elif options.prompt_file == STANDARD_INPUT:
        yield sys.stdin.buffer.read, "standard input", None
    else:
        path = Path(options.prompt_file)
        with usage_error(OSError, about="cannot read the prompt"):
            file = path.open("rb")
        with file:
            yield file.read, str(path), path.stat().st_size


def write_texts(
    session: Session, sampling: Sampling, tokenizer: Tokenizer, writer: Writer, *, length: int, stopped: list[int]
) -> None:
    """Draw tokens and write their texts.

    Args:
        session: With a lane for each text.
        sampling: How tokens are drawn.
        tokenizer: Of the model.
        writer: Where the texts go.
        length: Tokens of each text, or ``ENDLESS``.
        stopped: Generation ends when this list is not empty.
    """
    texts, written = [tokenizer.incremental_decoder() for _ in range(session.lanes)], 0
    while written != length and not stopped:
        for sample, token in enumerate(session.next(sampling).tolist()):
            if piece := texts[sample].add(token):
                writer.text(sample, piece)
        written += 1
    for sample, text in enumerate(texts):
        if piece := text.end():
            writer.text(sample, piece)
    writer.end(tokens=written, interrupted=bool(stopped))


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of ending the process; a second signal ends it at once."""
    numbers: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: object) -> None:
        numbers.append(number)
        if len(numbers) > 1:
            sys.exit(128 + number)

    try:
        for number in handlers:
            signal.signal(number, stop)
        yield numbers
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
