"""The jobs of the queue, the most valuable first.

A job is a script, called from the root of the repository, that writes its JSON to ``--out``. Its time is what we expect
on an H100 or H200, with starting and compiling; it decides only whether the job is started. Options for the toy size
follow those of the real one, and override them.
"""

from typing import NamedTuple


class Job(NamedTuple):
    """A measurement, and how long it should take."""

    name: str
    """Of its files."""
    seconds: int
    command: tuple[str, ...]
    """What follows ``python``; the runner adds ``--out``."""
    toy: tuple[str, ...] = ()
    """More arguments, with which it takes a second on a CPU."""


BENCHMARKS = "experiments/benchmarks"
MODES = ("--modes", "[eager,compiled,graph,compiled-graph]")
SIZES = {"horizon": 8, "decoder_layers": 16, "heads": 8, "slots": 1024, "segment_length": 128, "vocab_size": 32768}
"""The paper's model of WikiText-103, with 4 encoder layers."""
SMALL = {"horizon": 2, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "slots": 4, "segment_length": 4}


def sizes(**values: object) -> tuple[str, ...]:
    """Options of the benchmarks that take sizes."""
    return tuple(part for name, value in values.items() for part in (f"--sizes.{name}", str(value)))


def rollouts(script: str, *ways: str, dim: int, lanes: int, runs: int = 4) -> tuple[str, ...]:
    """A benchmark of rollouts in all modes, at a width and a number of lanes."""
    measured = sizes(**SIZES, dim=dim, lanes=lanes, device="cuda", bf16="true")
    return (f"{BENCHMARKS}/{script}.py", "--ways", f"[{','.join(ways)}]", *MODES, "--runs", str(runs), *measured)


TOY = (*sizes(**SMALL, dim=8, lanes=2, vocab_size=16, device="cpu"), "--modes", "[eager]", "--runs", "2")
TOY_TURN = (*TOY, "--turns", "1")


def speed(*groups: int, dim: int, lanes: int, seconds: int, bptt: bool = False, runs: int = 4) -> Job:
    """Speed of replay in groups, and of ``bptt`` beside it."""
    ways = [*(["Memformer/bptt/1"] if bptt else []), *(f"Memformer/replay/{group}" for group in groups)]
    name = f"speed_{dim}x{lanes}_groups_{'_'.join(map(str, groups))}"
    return Job(name, seconds, rollouts("rollout_speed", *ways, dim=dim, lanes=lanes, runs=runs), TOY_TURN)


def profile(*, lanes: int, seconds: int) -> Job:
    """What the device does in a rollout of width 512, with one segment and with eight in a group."""
    ways = ("Memformer/replay/1", "Memformer/replay/8")
    return Job(f"profile_512x{lanes}", seconds, rollouts("rollout_profile", *ways, dim=512, lanes=lanes), TOY)


INFERENCE = (f"{BENCHMARKS}/inference_cost.py", "rivals", "--device", "cuda", "--lanes", "[1,16,64]")
SMALL_RIVALS = ("--dim", "16", "--layers", "1", "--segment_length", "4", "--memory_length", "4", "--vocab_size", "16")
TRANSFORMER_XL = ("TransformerXL/truncated/1", "TransformerXL/truncated/8", "Memformer/replay/1", "Memformer/replay/8")

HALF_A_BILLION = {"layers": 24, "dim": 896, "heads": 14, "hidden": 4864, "vocab_size": 151936, "dtype": "bfloat16"}
"""The shape of Qwen2.5-0.5B, with two heads of keys and values."""
LONGER_SEGMENTS = "plain,checkpointed,replay/1024,replay/4096,whole/1024,whole/4096"
"""Without segments of 256 tokens, with which 32,768 tokens take more than four minutes."""
ALL_WAYS = f"{LONGER_SEGMENTS},replay/256,whole/256"
TOY_DECODER = {"layers": 1, "dim": 8, "heads": 2, "hidden": 8, "vocab_size": 16, "dtype": "float32", "device": "cpu"}
TOY_TEXT = (
    "--lengths",
    "[9]",
    "--ways",
    "[plain,checkpointed,replay/4,whole/4]",
    "--repeats",
    "2",
    "--memory",
    "false",
)


def long_context(*lengths: int, ways: str, seconds: int) -> Job:
    """Memory and time of a gradient against the length of a text; the limit is the device's memory."""
    decoder = sizes(**HALF_A_BILLION, kv_heads=2, device="cuda")
    measured = ("--lengths", str(list(lengths)), "--ways", f"[{ways}]", "--repeats", "3", "--limit", "1000", *decoder)
    name = f"long_context_{'_'.join(str(length) for length in lengths)}"
    return Job(name, seconds, (f"{BENCHMARKS}/long_context.py", *measured), (*sizes(**TOY_DECODER), *TOY_TEXT))


TOY_DOCUMENTS = ("data.corpus.init_args.trained=[[64,4,200]]", "data.corpus.init_args.tested=[[64,4,2]]")
TOY_RUN = ("data.batch_size=2", "trainer.max_steps=1", "trainer.val_check_interval=1", "trainer.accelerator=cpu")


def mqar(row: str, *, seconds: int) -> Job:
    """A row of the published grid of MQAR, with every learning rate."""
    options = ("--options", "trainer.accelerator=gpu", "model.cuda_graph=true")
    command = ("experiments/gpu/train_rows.py", "recall/mqar/published/rows", "--only", row)
    return Job(f"mqar_{row}", seconds, (*command, *options), ("--options", *TOY_DOCUMENTS, *TOY_RUN))


TOY_TEXTS = ("data.corpus=Pydoc", "data.tokenizer=Bytes", "data.segment_length=16", "trainer.precision=32")
TOY_EVALUATION = ("trainer.limit_val_batches=1", "trainer.limit_test_batches=1")


def installed(row: str, *, seconds: int) -> Job:
    """A row of the rivals on installed packages, with every learning rate."""
    options = ("--options", "model.cuda_graph=true") if row != "lstm" else ()
    command = ("experiments/gpu/train_rows.py", "lead/installed/rows", "--only", row)
    toy = ("--options", *TOY_TEXTS, *TOY_RUN, *TOY_EVALUATION)
    return Job(f"installed_{row}", seconds, (*command, *options), toy)


def curriculum(task: str, row: str, *, seconds: int) -> Job:
    """A row of Remember or Rewrite up to ten pairs; a curriculum of hundreds does not fit a lease."""
    options = ("--options", "trainer.accelerator=gpu", "model.cuda_graph=true")
    command = ("experiments/gpu/train_curriculum.py", task, "--row", row, "--stages", "5")
    small = ("data.corpus.init_args.questions=2", "data.corpus.init_args.examples=20")
    return Job(f"{task.lower()}_{row}", seconds, (*command, *options), ("--stages", "2", "--options", *small, *TOY_RUN))


REMEMBER = ("armt", "prmt", "rmt", "gated_delta_net", "lstm", "memformer_decoder")

INSTALLED = ("memformer", "transformer_xl_6", "transformer_xl_64", "lstm", "no_memory", "gated_delta_net")

MQAR = (
    *("gated_delta_net", "transformer_xl", "memformer_decoder", "associative_recurrent_memory_transformer", "lstm"),
    *("infini_attention", "recurrent_memory_transformer", "block_recurrent_transformer", "delta_net", "memformer"),
    *("titans", "compressive", "parallel_memory"),
)

GPU_TESTS = ("tests/training/test_gpu.py", "tests/gradients/test_captured.py", "tests/training/test_no_wait.py")
A_TEST = ("tests/layers/test_cross_entropy.py", "--only", "a_token_by_hand_in_pieces")
"""One that passes without a GPU."""

JOBS = (
    Job("environment", 30, ("experiments/gpu/environment.py",)),
    long_context(8192, 16384, ways=ALL_WAYS, seconds=130),
    Job("tests", 100, ("experiments/gpu/count_tests.py", *GPU_TESTS), A_TEST),
    profile(lanes=128, seconds=130),
    long_context(32768, ways=LONGER_SEGMENTS, seconds=130),
    long_context(65536, ways="plain,checkpointed,replay/4096,whole/4096", seconds=150),
    speed(1, 8, dim=512, lanes=128, seconds=200, bptt=True),
    long_context(262144, ways="checkpointed,replay/1024,replay/4096,whole/4096", seconds=240),
    speed(1, 8, dim=1024, lanes=128, seconds=240, bptt=True),
    speed(1, 8, dim=512, lanes=32, seconds=160, bptt=True),
    Job("inference", 60, INFERENCE, ("--device", "cpu", *SMALL_RIVALS, "--lanes", "[1,2]", "--rounds", "2")),
    Job("transformer_xl_512x128", 150, rollouts("rollout_speed", *TRANSFORMER_XL, dim=512, lanes=128), TOY_TURN),
    speed(1, 8, dim=512, lanes=512, seconds=240, bptt=True, runs=2),
    profile(lanes=32, seconds=100),
    *(installed(row, seconds=240) for row in INSTALLED),
    *(mqar(row, seconds=240) for row in MQAR),
    *(curriculum(task, row, seconds=240) for task in ("Remember", "Rewrite") for row in REMEMBER),
    speed(1, 8, dim=1024, lanes=512, seconds=240, bptt=True, runs=1),
    speed(1, 8, dim=1024, lanes=32, seconds=160, bptt=True),
    speed(2, 4, dim=512, lanes=128, seconds=160),
    speed(2, 4, dim=512, lanes=32, seconds=130),
    speed(2, 4, dim=1024, lanes=128, seconds=200),
    speed(2, 4, dim=512, lanes=512, seconds=200, runs=2),
    speed(2, 4, dim=1024, lanes=32, seconds=130),
    speed(2, 4, dim=1024, lanes=512, seconds=240, runs=1),
)
