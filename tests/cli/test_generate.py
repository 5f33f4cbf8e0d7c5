"""The command ``generate``: what it reads, what it writes, and how it ends."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trained import learned, write_folder

from memformer_pl import Sampling
from memformer_pl.checkpoints.pretrained import load_pretrained, save_pretrained
from memformer_pl.data.tokenizers import pieces
from memformer_pl.inference import Session

Command = Callable[..., Any]
PROMPT = "Ein Satz, der länger ist als ein Segment: for x in y 🤷 and so on\n" * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of byte pairs, which generates parts of characters."""
    path = tmp_path_factory.mktemp("folder")
    write_folder(path, learned())
    return path


@pytest.fixture
def generate(command: Command, folder: Path) -> Command:
    return lambda *options: command("generate", "--ckpt_path", folder, *options)


def written_by_hand(folder: Path, *, prompt: str, length: int, sampling: Sampling) -> str:
    """What a session writes, token by token."""
    model, tokenizer = load_pretrained(folder)
    assert tokenizer is not None
    session = Session(model)
    session.feed(torch.from_numpy(tokenizer.encode(prompt))[None])
    tokens = [int(session.next(sampling)) for _ in range(length)]
    return b"".join(map(tokenizer.bytes_of, tokens)).decode(errors="replace")


def test_the_text_is_that_of_a_session_however_the_prompt_comes(
    generate: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "BLOCK", 7)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    expected = written_by_hand(folder, prompt=PROMPT, length=50, sampling=Sampling(seed=3, top_k=40))
    options = ["--length", "50", "--seed", "3", "--top_k", "40"]
    assert generate("--prompt", PROMPT, *options).output == expected
    assert generate("--prompt_file", tmp_path / "prompt.txt", *options).output == expected
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(PROMPT.encode())))
    assert generate("--prompt_file", "-", *options).output == expected
    assert generate("--prompt", PROMPT[1:], *options).output != expected


def test_without_a_prompt_or_with_an_empty_one_a_document_begins(
    generate: Command, folder: Path, tmp_path: Path
) -> None:
    expected = written_by_hand(folder, prompt="", length=20, sampling=Sampling())
    (tmp_path / "empty.txt").touch()
    for prompt in ([], ["--prompt", ""], ["--prompt_file", tmp_path / "empty.txt"]):
        outcome = generate(*prompt, "--length", "20")
        assert (outcome.code, outcome.output) == (0, expected)
    assert generate("--length", "0").output == ""


def test_a_machine_gets_the_same_text_line_by_line(generate: Command) -> None:
    plain = generate("--prompt", "a", "--length", "30").output
    events = [json.loads(line) for line in generate("--prompt", "a", "--length", "30", "--json").output.splitlines()]
    assert "".join(event["text"] for event in events[:-1]) == plain
    assert {event["event"] for event in events[:-1]} == {"text"}
    assert events[-1] == {"event": "end", "sample": 0, "tokens": 30, "interrupted": False}


def test_several_samples_are_written_one_after_the_other(generate: Command) -> None:
    options = ["--prompt", "a", "--length", "12", "--samples", "3", "--temperature", "2"]
    events = [json.loads(line) for line in generate(*options, "--json").output.splitlines()]
    texts = ["".join(event.get("text", "") for event in events if event["sample"] == sample) for sample in range(3)]
    assert len(set(texts)) == 3
    output = generate(*options).output
    assert output.startswith("".join(f"{text}\n" for text in texts))
    assert output.endswith("--- sample 1 of 3\n--- sample 2 of 3\n--- sample 3 of 3\n")


def test_from_a_saved_memory_the_text_goes_on(generate: Command, tmp_path: Path) -> None:
    greedy, memory = ["--temperature", "0", "--repetition_penalty", "1.5"], tmp_path / "memory"
    whole = generate("--prompt", PROMPT, "--length", "30", *greedy).output
    first = generate("--prompt", PROMPT, "--length", "11", *greedy, "--save_memory", memory).output
    assert whole == first + generate("--memory", memory, "--length", "19", *greedy).output
    size = memory.stat().st_size
    generate("--prompt", PROMPT * 20, "--length", "5", "--save_memory", memory)
    assert memory.stat().st_size == pytest.approx(size, abs=64)
    events = generate("--memory", memory, "--length", "3", "--samples", "2", "--save_memory", memory, "--json")
    assert events.output.count('"event": "end"') == 2
    assert generate("--memory", memory, "--length", "3", "--json").output.count('"event": "end"') == 2
    refused = generate("--memory", memory, "--samples", "3")
    assert (refused.code, refused.errors) == (
        1,
        ["error: the memory holds 2 texts: samples must be 2 or left out, got 3"],
    )


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        (["--top_p", "0"], 2, "top_p must be above 0 and at most 1, got 0.0"),
        (["--top_k", "0"], 2, "top_k must be at least 1, got 0"),
        (["--temperature", "-1"], 2, "temperature must be 0 (the most likely token) or more, got -1.0"),
        (["--repetition_penalty", "0"], 2, "repetition_penalty must be above 0, got 0.0"),
        (["--length", "-2"], 2, "length must be at least 0, or -1 for no end, got -2"),
        (["--samples", "0"], 2, "samples must be at least 1, got 0"),
        (["--length", "-1", "--samples", "2"], 2, "length=-1 has no end: add --json"),
        (["--prompt", "a", "--prompt_file", "b"], 2, "prompt and prompt_file are both given: leave one out"),
        (["--save_memory", "."], 2, "save_memory must be a file, but '.' is a folder"),
        (["--temprature", "1"], 2, "there is no option 'temprature'. Did you mean temperature?"),
        (["--temperature", "warm"], 2, "temperature"),
        (["--device", "abacus"], 2, "device 'abacus' is not available"),
        (["--prompt_file", "missing.txt"], 1, "No such file or directory: 'missing.txt'"),
        (["--memory", "missing.txt"], 1, "missing.txt"),
        (["--prompt", "abc\udcff"], 1, "the prompt is not UTF-8: byte 0xff at offset 3"),
        (["--ckpt_path", "missing.ckpt"], 1, "there is no checkpoint 'missing.ckpt'"),
    ],
)
def test_invalid_options_and_inputs_are_refused_in_a_line(
    generate: Command, given: list[str], code: int, told: str
) -> None:
    outcome = generate(*given)
    (line,) = outcome.errors
    assert (outcome.code, outcome.output) == (code, f"{line}\n")
    assert told in line


def test_a_model_of_numbers_is_refused(command: Command, tmp_path: Path) -> None:
    load_from = tmp_path / "folder"
    save_pretrained(write_folder(load_from, learned()), load_from)
    outcome = command("generate", "--ckpt_path", load_from)
    assert outcome.code == 1
    assert "has no tokenizer: its model was trained on numbers, or with a tokenizer of your own" in outcome.errors[0]


def endless(folder: Path, *options: object) -> subprocess.Popen[bytes]:
    """A command that writes until it is stopped."""
    words = [sys.executable, "-m", "memformer_pl", "generate", "--ckpt_path", folder, "--length", "-1", *options]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_ends_it_with_what_was_written_kept(folder: Path, tmp_path: Path) -> None:
    process = endless(folder, "--save_memory", tmp_path / "memory", "--json")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(20)]
    os.kill(process.pid, signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    events = [json.loads(line) for line in (*lines, *rest.splitlines())]
    assert all(event["text"] for event in events[:-1])
    assert events[-1]["interrupted"]
    session = Session.load(load_pretrained(folder).model, tmp_path / "memory")
    assert session.tokens_read.tolist() == [events[-1]["tokens"]]


def test_it_ends_silently_when_the_reader_has_gone(folder: Path, tmp_path: Path) -> None:
    process = endless(folder, "--save_memory", tmp_path / "memory")
    assert process.stdout is not None
    assert process.stdout.read(100)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141
    assert (tmp_path / "memory").is_file()
    process.stderr.close()
