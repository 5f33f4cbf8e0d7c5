"""A model of this package as a model of the LM evaluation harness (``lm-eval``), where it is called ``memformer_pl``.

Needs lm-eval, which the extra ``evaluate`` installs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f"evaluate needs lm-eval: pip install 'memformer-pl[evaluate]' ({missing})") from missing

from memformer_pl.checkpoints.pretrained import available_device, load_pretrained
from memformer_pl.contract import SegmentModel
from memformer_pl.contract.config import import_path
from memformer_pl.data.tokenizers.alignment import NO_TOKENS
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import OptionError, UsageError, nearest, require_sizes, usage_error
from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session
from memformer_pl.inference.shared_beginnings import Read, Text, read_texts
from memformer_pl.inference.writing import require_sessions, write_until

NAME = "memformer_pl"
"""The name of the model in the harness."""
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
GENERATION = ("until", "max_gen_toks", "do_sample", *SAMPLING)
"""Arguments of a request that generates."""
ARGUMENTS = ("ckpt_path", "model_module", "batch_size", "device")
"""Arguments with which the harness builds a model."""


class HarnessModel(LM):
    """A model and its tokenizer, as the harness calls them.

    A text is a document: its first token is predicted without context, as in training, and nothing marks its end. It is
    cut into segments of ``model.segment_length`` tokens, and whatever stands before a segment reaches it through the
    state alone; no context is ever cut off. Segments that several requests of one call begin with are read once.

    Scores are sums of natural logarithms in double precision. Those of :meth:`loglikelihood_rolling` are the losses
    that ``validate`` reports, if the data of the configuration has the segment length of the model and resets memory at
    each document; divided by the bytes of the text they give the same bits per byte.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its tokenizer.
        batch_size: Requests that are read side by side. The scores do not depend on it but for rounding.

    Raises:
        UsageError: The tokenizer does not read text, or has more tokens than the model, or ``batch_size`` is below 1.
    """

    def __init__(self, model: SegmentModel, tokenizer: Tokenizer | None, *, batch_size: int = 1) -> None:
        super().__init__()
        require_sizes(batch_size=batch_size)
        if tokenizer is None or not tokenizer.reads_text:
            has = "no tokenizer" if tokenizer is None else f"the tokenizer {type(tokenizer).__name__}"
            raise UsageError(
                f"the harness sends text, but the model has {has}, which is for numbers: evaluate a model that was "
                "trained with Bytes, BytePairs or a TokenizerFile"
            )
        if tokenizer.vocab_size > model.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, but the model's vocab_size is {model.vocab_size}"
            raise UsageError(f"the tokenizer has {sizes}: give the tokenizer that the model was trained with")
        self.model, self.text_tokenizer, self.batch_size = model, tokenizer, batch_size

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        """Load a checkpoint. The harness calls this.

        Args:
            arg_dict: ``ckpt_path``, a checkpoint, an exported folder or ``hf://user/name``, and ``model_module``, the
                module of a class of your own.
            additional_config: ``batch_size`` (by default 1) and ``device`` (by default a GPU if there is one).

        Raises:
            OptionError: An argument is unknown, or its value invalid.
            UsageError: The checkpoint is unusable, or its tokenizer does not read text.
        """
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        arguments = {**arg_dict, **more}
        for name in arguments:
            _require_known("argument", name, ARGUMENTS)
        if "ckpt_path" not in arguments:
            raise OptionError("ckpt_path is missing: give --model_args ckpt_path=CHECKPOINT")
        batch_size = str(arguments.get("batch_size", 1))
        if not batch_size.isdecimal():
            raise OptionError(f"batch_size must be a whole number, got {batch_size!r}: give one that fits the memory")
        device, module = available_device(arguments.get("device")), arguments.get("model_module")
        model, tokenizer = load_pretrained(arguments["ckpt_path"], device=device, model_module=module)
        return cls(model, tokenizer, batch_size=int(batch_size))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        """As :meth:`create_from_arg_obj`, with the arguments as ``name=value,name=value``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, object]:
        """What the results say of the model: its class, sizes, number of weights and their type."""
        return {
            "model_class": import_path(type(self.model)),
            "model_sizes": dict(self.model.config()),
            "model_num_parameters": sum(weight.numel() for weight in self.model.parameters()),
            "model_dtype": str(next(self.model.parameters()).dtype),
        }

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations of contexts: the log-probability in nats, and whether it is the greedy continuation.

        Context and continuation are encoded as one text, as in training. The context is the tokens that end within it;
        a token that reaches over the border belongs to the continuation, whole. So no text is lost or counted twice,
        and a space at the end of a context is scored with the word behind it. An empty context is the beginning of a
        document.

        Args:
            requests: With the arguments ``(context, continuation)``.
            disable_tqdm: Show no progress.

        Raises:
            UsageError: A continuation has no tokens, or a text is not valid Unicode.
        """
        texts = [self._pair(*request.args) for request in requests]
        return self._score("loglikelihood", requests, texts, lambda read: (-read.nats, read.greedy), disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole documents: the log-probability of all tokens in nats, the first one included.

        Args:
            requests: With the argument ``(document,)``.
            disable_tqdm: Show no progress.

        Raises:
            UsageError: A document has no tokens, or is not valid Unicode.
        """
        texts = [self._pair("", *request.args) for request in requests]
        return self._score("loglikelihood_rolling", requests, texts, lambda read: -read.nats, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a string of ``until`` appears, which is left out, or ``max_gen_toks`` are written.

        Without ``do_sample`` and ``temperature`` the likeliest token is taken, and with ``do_sample: false`` whatever
        the temperature, as in the harness's own models. A request draws from a random stream of its own, seeded with
        ``seed`` and its place in the call, so what it draws does not depend on ``batch_size``.

        Args:
            requests: With the arguments ``(context, generation arguments)``: ``until``, ``max_gen_toks`` (by default
                256), ``do_sample``, and those of :class:`Sampling`.
            disable_tqdm: Show no progress.

        Raises:
            UsageError: A generation argument is unknown or invalid, or the model cannot generate.
        """
        require_sessions(self.model)
        groups: dict[Generation, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(Generation.of(request.args[1]), []).append(index)
        written = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or None) as bar:
            for generation, indices in groups.items():
                contexts = [self._context(requests[index].args[0]) for index in indices]
                for batch in _batches(read_texts(self.model, contexts, lanes=self.batch_size), self.batch_size):
                    places = [indices[read.text] for read in batch]
                    session = Session.joined([read.session for read in batch])
                    for place, text in zip(places, generation.write(session, self.text_tokenizer, places), strict=True):
                        written[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    bar.update(len(batch))
        return written

    def _score(
        self,
        kind: str,
        requests: Sequence[Any],
        texts: Sequence[Text],
        answer: Callable[[Read], Any],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Read texts that belong to requests, and answer these."""
        answers: list[Any] = [None] * len(requests)
        reading = read_texts(self.model, texts, lanes=self.batch_size)
        # without a terminal, None shows nothing
        for read in tqdm(reading, total=len(texts), desc=kind, disable=disable_tqdm or None):
            answers[read.text] = answer(read)
            self.cache_hook.add_partial(kind, requests[read.text].args, answers[read.text])
        return answers

    def _context(self, context: str) -> Text:
        with usage_error(UnicodeEncodeError, about=f"the context {_shown(context)} is not valid Unicode"):
            tokens = self.text_tokenizer.encode(context).astype(np.int64)
        return Text(torch.from_numpy(tokens), len(tokens))

    def _pair(self, context: str, continuation: str) -> Text:
        """The tokens of a context with its continuation, and the first that does not end within the context."""
        told = f"the continuation {_shown(continuation)} of the context {_shown(context)}"
        with usage_error(UnicodeEncodeError, about=f"{told} is not valid Unicode"):
            border, whole = len(context.encode()), (context + continuation).encode()
        parts = list(self.text_tokenizer.align_blocks([whole], name=told))
        tokens = np.concatenate([NO_TOKENS, *(part.tokens for part in parts)])
        ends = np.concatenate([NO_TOKENS, *(part.sizes for part in parts)]).cumsum()
        scored = 0
        if border:
            # tokens without bytes of their own at the border belong to what follows them
            before = int(np.searchsorted(ends, border))
            scored = before + int((ends[before : before + 1] == border).sum())
        if scored == len(tokens):
            raise UsageError(f"{told} has no tokens: leave the item out of the task's data")
        return Text(torch.from_numpy(tokens.astype(np.int64)), scored)


class Generation(NamedTuple):
    """How texts are continued; equal ones are written side by side."""

    until: tuple[str, ...]
    max_gen_toks: int
    sampling: tuple[tuple[str, Any], ...]
    """Arguments of :class:`Sampling` without the seed."""
    seed: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Generation":
        """Read the generation arguments of a request.

        Raises:
            OptionError: One of them is unknown or invalid.
        """
        for name in arguments:
            _require_known("generation argument", name, GENERATION)
        given = {name: value for name, value in arguments.items() if value is not None}
        until, length = given.pop("until", ()), given.pop("max_gen_toks", 256)
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list | tuple) or not all(isinstance(string, str) and string for string in until):
            raise OptionError(f"until must be strings, none of them empty, got {until!r}")
        if not isinstance(length, int) or length < 1:
            raise OptionError(f"max_gen_toks must be a whole number of at least 1, got {length!r}")
        draws = given.pop("do_sample", None)
        for name, value in given.items():
            if not isinstance(value, int | float):
                raise OptionError(f"{name} must be a number, got {value!r}")
            given[name] = value if name in ("top_k", "seed") else float(value)
        if draws and given.get("temperature") == 0:
            raise OptionError(
                "do_sample=True draws nothing at temperature=0: leave out do_sample, or raise temperature"
            )
        given["temperature"] = 0.0 if draws is False else float(given.get("temperature", 1.0 if draws else 0.0))
        seed = given.pop("seed", 0)
        Sampling(**given, seed=seed)  # refuses what is invalid before anything is read
        return cls(tuple(until), length, tuple(sorted(given.items())), seed)

    def write(self, session: Session, tokenizer: Tokenizer, places: Sequence[int]) -> list[str]:
        """Continue the lanes of a session; ``places`` are those of their requests in the call."""
        sampling = [Sampling(**dict(self.sampling), seed=self.seed + place) for place in places]
        return write_until(session, tokenizer, sampling, until=self.until, max_tokens=self.max_gen_toks)


def _batches(reading: Iterator[Read], size: int) -> Iterator[list[Read]]:
    batch: list[Read] = []
    for read in reading:
        batch.append(read)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _require_known(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = nearest(name, known)
        meant = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
        raise OptionError(f"there is no {kind} {name!r} here: {meant}")


def _shown(text: str) -> str:
    """The text as an error shows it: its end, if it is long."""
    return repr(text if len(text) <= 40 else f"...{text[-40:]}")


register_model(NAME)(HarnessModel)
