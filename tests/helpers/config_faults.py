"""Configurations with one fault each, made by rule, by hand, or at random."""

import copy
import gzip
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import yaml

BASE = """
seed_everything: 0
model:
  gradient: replay
  learning_rate: 1.0e-3
  warmup_steps: 2
  weight_decay: 0.1
  gradient_clip_val: 1.0
  accumulate_grad_batches: 1
  model:
    class_path: Memformer
    init_args:
      dim: 16
      heads: 2
      slots: 4
      ffn_dim: 8
      encoder_layers: 1
      decoder_layers: 1
      temperature: 0.25
      writer_heads: 2
      forgetting: true
      dropout: 0.1
data:
  corpus:
    class_path: Files
    init_args:
      paths: TEXTS
      field: text
  tokenizer:
    class_path: BytePairs
    init_args:
      vocab_size: 260
  segment_length: 8
  horizon: 2
  batch_size: 4
  interleave: 2
  evaluation_batch_size: 2
  validation: 0.3
  test: 0.1
  seed: 0
  cache: CACHE
trainer:
  accelerator: cpu
  strategy: auto
  devices: 1
  num_nodes: 1
  precision: 32-true
  max_epochs: 1
  max_steps: 1
  log_every_n_steps: 1
  val_check_interval: 1
  check_val_every_n_epoch: 1
  num_sanity_val_steps: 0
  limit_train_batches: 2
  limit_val_batches: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: true
  callbacks:
    - class_path: ModelCheckpoint
      init_args:
        every_n_train_steps: 1
        save_top_k: 1
    - class_path: ClosingReport
  logger:
    class_path: TensorBoardLogger
    init_args:
      save_dir: RUNS
      name: run
      version: 0
ckpt_path: null
"""
Where = tuple[str | int, ...]


class Fault(NamedTuple):
    """A fault in a configuration."""

    name: str
    text: str | bytes | None = None
    """Content of a file that is stacked on the valid one, or, if ``instead``, replaces it."""
    options: tuple[str, ...] = ()
    instead: bool = False
    touched: tuple[str, ...] = ()
    """Words, one of which the error must contain."""
    must: bool = True
    """Whether it must be refused. Otherwise the configuration may be valid, and then it trains."""


def options_of(tree: object, path: Where = ()) -> Iterator[Where]:
    """The path of every option and section."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, name)
        yield from options_of(value, (*path, name))


def at(tree: Any, path: Where) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def changed(path: Where, change: Callable[[Any, str | int], None]) -> str:
    """The valid configuration with a change at ``path``."""
    tree = copy.deepcopy(yaml.safe_load(BASE))
    change(at(tree, path[:-1]), path[-1])
    return yaml.safe_dump(tree, sort_keys=False)


def words_in(value: object) -> Iterator[str]:
    """The names and values inside a value."""
    if isinstance(value, dict):
        yield from (word for pair in value.items() for part in pair for word in words_in(part))
    elif isinstance(value, list):
        yield from (word for part in value for word in words_in(part))
    elif value is not None:
        yield str(value)


def wrong_values() -> Iterator[Fault]:
    """Every option and section with values that are wrong for most."""
    values = (None, True, -1, 0, 10**30, math.nan, math.inf, "", "text", [1], {"a": 1}, {"class_path": "nowhere.X"})
    for path in options_of(yaml.safe_load(BASE)):
        for value in values:
            # NaN is always wrong, and so is a huge number for a size
            sized = path[:2] == ("model", "model") or path[-1] in (
                "batch_size",
                "horizon",
                "interleave",
                "segment_length",
            )
            must = value != value or (sized and value == 10**30 and path[-1] != "temperature")
            text = changed(path, lambda parent, name, value=value: parent.__setitem__(name, value))
            named = (*map(str, path), str(value), *(value if isinstance(value, dict) else ()), "are required")
            yield Fault(f"{'.'.join(map(str, path))}={value!r}", text, instead=True, touched=named, must=must)


def missing_and_unknown() -> Iterator[Fault]:
    """Every option left out, misspelt, and with an unknown option beside it."""
    for path in options_of(yaml.safe_load(BASE)):
        name = ".".join(map(str, path))
        yield Fault(f"no {name}", changed(path, lambda parent, name: parent.pop(name)), instead=True, must=False)
        if isinstance(path[-1], str):
            misspelt = f"{path[-1]}z"

            def misspell(parent: dict[str, object], name: str, misspelt: str = misspelt) -> None:
                parent[misspelt] = parent.pop(name)

            yield Fault(f"misspelt {name}", changed(path, misspell), instead=True, touched=(misspelt, *path))
            if isinstance(at(yaml.safe_load(BASE), path), dict):
                added = changed((*path, "x"), lambda parent, name: parent.update(no_such_option=1))
                yield Fault(f"unknown in {name}", added, instead=True, touched=("no_such_option",))


INVALID: dict[str, str | bytes] = {
    "empty": "",
    "comment": "# nothing",
    "null": "null",
    "number": "3",
    "word": "hello",
    "list": "- 1",
    "two documents": "trainer: {}\n---\ntrainer: {}\n",
    "tab": "\ttrainer: {}",
    "unclosed": "trainer: {max_steps: 3",
    "colons": "a: b: c",
    "indentation": "trainer:\n  max_steps: 1\n max_epochs: 3\n",
    "quote": "trainer: {accelerator: 'cpu}",
    "latin-1": "trainer: {default_root_dir: caf\xe9}".encode("latin-1"),
    "utf-16": "trainer: {max_steps: 1}".encode("utf-16"),
    "nul": b"trainer: {max_steps: \0}",
    "control character": b"trainer: {max_steps: \x07}",
    "binary": bytes(range(256)) * 10,
    "compressed": gzip.compress(BASE.encode()),
    "20,000 unknown options": "model:\n" + "".join(f"  key{number}: {number}\n" for number in range(20_000)),
    "a million letters": f"trainer: {{accelerator: {'x' * 10**6}}}",
    "a long list": f"data: {{batch_size: [{','.join(['nowhere'] * 5000)}]}}",
    "undefined reference": "data: {batch_size: *a}",
    "object": "data: {batch_size: !!python/object/apply:os.system ['exit 1']}",
    "unknown tag": "data: {batch_size: !foo 3}",
    "bytes": "data: {batch_size: !!binary aGVsbG8=}",
    "set": "data: {batch_size: !!set {a, b}}",
    "section twice": "trainer: {max_steps: 1}\ntrainer: {max_steps: 3}\n",
    "option twice": "trainer: {max_steps: 1, max_steps: 2}",
    "class twice": "data: {corpus: {class_path: Files, class_path: Pydoc}}",
    "number for a name": "trainer: {3: 4}",
    "null for a name": "trainer: {null: 4}",
    "list for a name": "trainer: {[1]: 4}",
    "nothing for a name": "'': 4",
    "dots for a name": "'...': 3",
    "space in a name": "'a b': 3",
    "merged with a number": "<<: 3",
    "of a command": "fit: {trainer: {max_steps: 1}}",
    "itself as configuration": "config: nowhere.yaml",
    "wrong class": "data: {corpus: {class_path: os.getcwd}}",
    "class of something else": "model: {model: {class_path: torch.nn.Linear, init_args: {in_features: 1}}}",
    "abstract class": "data: {corpus: {class_path: memformer_pl.data.Corpus}}",
    "class with spaces": "data: {corpus: 'Fi les'}",
    "module for a class": "data: {corpus: os}",
    "built-in class": "data: {corpus: {class_path: int}}",
    "unknown arguments": "data: {corpus: {class_path: Files, init_args: {paths: x}, dict_kwargs: {a: 1}}}",
    "unknown key of a class": "data: {corpus: {class_path: Files, initargs: {paths: x}}}",
}

OF_THE_TRAINER: dict[str, list[object]] = {
    "strategy": ["fsdp", "deepspeed", "tpu", "x", 3, [1], {"class_path": "DDPStrategy", "init_args": {"nope": 1}}],
    "precision": ["16", "8", "16-true", "transformer-engine", "", [], {}],
    "devices": ["many", "", [], [0, 0], -2, "-1,-2", "1.5", {}, [-1], 3, 10**9, 10**30],
    "num_nodes": [3, 10**9],
    "accelerator": ["abacus", "tpu", "", 3, []],
    "callbacks": [
        [3],
        ["x"],
        [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "nothing", "save_top_k": 2}}],
        [{"class_path": "ModelCheckpoint", "init_args": {"save_top_k": 2}}],
        [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "every_n_epochs": 1}}],
        [{"class_path": "EarlyStopping", "init_args": {"monitor": "nothing"}}],
        [{"class_path": "EarlyStopping"}],
        [{"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {"0": 2}}}],
        [{"class_path": "Timer", "init_args": {"duration": "x"}}],
    ],
    "logger": [[3], "x", {"class_path": "WandbLogger"}],
    "gradient_clip_val": [1],
    "accumulate_grad_batches": [2],
    "profiler": ["x"],
    "reload_dataloaders_every_n_epochs": [-1],
    "overfit_batches": [-1, math.nan],
    "fast_dev_run": [-1, "x"],
    "max_time": ["x", {"days": "x"}, [1]],
    "barebones": [True],
    "plugins": ["x", [3]],
    "limit_train_batches": [-1, 1.5, math.nan, "x"],
    "limit_val_batches": [-1, 1.5, math.nan],
    "limit_test_batches": [-1, math.nan],
    "val_check_interval": [math.nan, -1, -0.5, 1.5, "x", 0, 3, 10**9],
    "check_val_every_n_epoch": [0, -1],
}

ON_THE_COMMAND_LINE = [
    "--trainer.max_steps x",
    "--trainer.max_steps",
    "--trainer.max_stepz 3",
    "--trainer",
    "--trainer 3",
    "--model 3",
    "--data []",
    "--model.model 3",
    "--data.corpus 3",
    "--model.model.init_args.dim nan",
    "--model.learning_rate .nan",
    "--model.gradient_clip_val .nan",
    "--model.model.init_args.temperature .inf",
    "--data.validation .nan",
    "--data.batch_size=[1",
    "--data.batch_size={",
    "--data.batch_size=",
    "--data.batch_size=--",
    "--data.seed -1",
    "--model.model.init_args 3",
    "--model.model.init_args.vocab_size 3",
    "--model.model.init_args.slotz 3",
    "--model.model.class_path 3",
    "--data.corpus.class_path=",
    "--data.corpus.paths=",
    "--data.horizon 1048576 --data.batch_size 1048576 --data.interleave 1",
    "extra",
    "-x",
    "--",
    "--config",
    "--config=",
    "--config .",
    "--config /dev/null",
    "--config nowhere.yaml",
    "--config x:[",
    '--config {"trainer":{"max_steps":"x"}}',
    "--seed_everything -1",
    "--seed_everything x",
    "--seed_everything 4294967296",
    "--print_config=x",
    "--trainer.callbacks x",
    "--trainer.callbacks+=x",
    "--trainer.callbacks.nope=3",
    "--trainer.logger=x",
    "--ckpt_path best",
    "--ckpt_path hpc",
    "--ckpt_path s3://nowhere/x.ckpt",
    "--ckpt_path nothing://nowhere/x.ckpt",
    "--verbose",
]


def texts_with_errors(many: int) -> Iterator[Fault]:
    """The valid configuration with a line or a character lost, doubled, moved or changed."""
    lines = BASE.splitlines(keepends=True)
    for seed in range(many):
        chance = random.Random(seed)
        line, other, place = (chance.randrange(size) for size in (len(lines), len(lines), len(BASE)))
        changed, text = list(lines), bytearray(BASE.encode())
        kind = chance.choice(["lost", "doubled", "swapped", "indented", "flipped", "truncated", "inserted", "replaced"])
        if kind == "lost":
            del changed[line]
        elif kind == "doubled":
            changed.insert(other, changed[line])
        elif kind == "swapped":
            changed[line], changed[other] = changed[other], changed[line]
        elif kind == "indented":
            changed[line] = f"  {changed[line]}"
        elif kind == "flipped":
            text[place] ^= 1 << chance.randrange(8)
        elif kind == "truncated":
            del text[place:]
        else:
            characters = bytes(chance.choices(b":{}[]&*!#|>'\"%@`-?,\t\n 0\xff", k=chance.randint(1, 3)))
            text[place : place + (len(characters) if kind == "replaced" else 0)] = characters
        in_lines = kind in ("lost", "doubled", "swapped", "indented")
        content = "".join(changed).encode() if in_lines else bytes(text)
        yield Fault(f"{kind} {seed}", content, instead=True, must=False)


FAULTS = [
    *wrong_values(),
    *missing_and_unknown(),
    *(Fault(name, text) for name, text in INVALID.items()),
    *(
        Fault(
            f"trainer.{name}={value!r}",
            yaml.safe_dump({"trainer": {name: value}}),
            # an error about a missing argument or package does not repeat the value
            touched=(name, str(value), *words_in(value), "are required", "not met"),
        )
        for name, values in OF_THE_TRAINER.items()
        for value in values
    ),
    *(Fault(line, options=tuple(line.split())) for line in ON_THE_COMMAND_LINE),
    *texts_with_errors(200),
]
