"""A model of the package in the LM evaluation harness: scores, rolling scores, and texts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import memformer
from tokenizer_kinds import KINDS
from trained import learned, write_folder

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from memformer_pl import SegmentModel
from memformer_pl.data import Bytes, GreyValues, LaneLoader, PackedDocuments, Symbols, Tokenizer
from memformer_pl.data.tokenizers.subwords import SerializedTokenizer
from memformer_pl.inference import Sampling, Session
from memformer_pl.inference.harness import HarnessModel
from memformer_pl.models import Transformer
from memformer_pl.training.task import SegmentTask

DOCUMENTS = ["for x in y:\n    pass\n" * 9, "a", "Ein Satz mit ä und 🤷. " * 15, "short one", "x" * 64]
PAIRS = [
    ("The context", " goes on"),
    ("The context", " ends"),
    ("", "a document begins"),
    ("x = 1\n" * 20, "y"),
    ("a trailing space ", "word"),
    ("🤷", "ä"),
]


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number, ("ours", number, 1)) for number, each in enumerate(arguments)]


@pytest.fixture(params=[Bytes, learned])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    built: Tokenizer = request.param()
    return built


@pytest.fixture
def model(tokenizer: Tokenizer) -> SegmentModel:
    built = memformer(vocab_size=tokenizer.vocab_size, segment_length=8).eval()
    with torch.no_grad():  # else it would hardly prefer one token to another
        built.embedding.weight.mul_(4.0)
    return built


def one_pass(model: SegmentModel, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token, and the most likely one, by a session that reads token by token."""
    session, log_probs = Session(model), []
    for token in tokens:
        log_probs.append(session.log_probs[0])
        session.feed(torch.tensor([[token]]))
    together = torch.stack(log_probs)
    return together.gather(1, torch.tensor(tokens)[:, None])[:, 0], together.argmax(1)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_rolling_score_is_the_loss_of_the_evaluation(
    tokenizer: Tokenizer, model: SegmentModel, batch_size: int
) -> None:
    encoded = [tokenizer.encode(text).astype(np.int64) for text in DOCUMENTS]
    documents = PackedDocuments.from_arrays(encoded)
    loader = LaneLoader(documents, batch_size=2, segment_length=8, horizon=3, shuffle=False)
    nats, tokens, _ = SegmentTask(model=model).read_documents(loader, documents=len(DOCUMENTS)).compute().numpy()
    scores = HarnessModel(model, tokenizer, batch_size=batch_size).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,) for text in DOCUMENTS])
    )
    assert tokens.tolist() == [len(each) for each in encoded]
    for score, document, count in zip(scores, nats, tokens, strict=True):
        assert -score / count == pytest.approx(document / count, abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_score_of_a_continuation_is_that_of_one_pass_over_context_and_continuation(
    tokenizer: Tokenizer, model: SegmentModel, batch_size: int
) -> None:
    scores = HarnessModel(model, tokenizer, batch_size=batch_size).loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (score, greedy) in zip(PAIRS, scores, strict=True):
        tokens = tokenizer.encode(context + continuation).tolist()
        log_probs, likeliest = one_pass(model, tokens)
        # from the first token that does not end within the context
        ends = np.cumsum([len(tokenizer.bytes_of(token)) for token in tokens])
        first = int((ends <= len(context.encode())).sum())
        assert tokenizer.decode(tokens[first:]).endswith(continuation)
        assert score == pytest.approx(float(log_probs[first:].sum()), abs=1e-10)
        assert greedy == (likeliest[first:] == torch.tensor(tokens[first:])).all()


class Ascii(Bytes):
    """Bytes of 7 bits: whatever a model writes is valid text."""

    vocab_size = 128


def test_the_greedy_continuation_is_greedy_and_no_other_is() -> None:
    harness = HarnessModel(memformer(vocab_size=128).eval(), Ascii(), batch_size=3)
    (written,) = harness.generate_until(requests("generate_until", [("The context", {"max_gen_toks": 12})]))
    other = f"{written[:-1]}{'a' if written[-1] != 'a' else 'b'}"
    asked = [("The context", written), ("The context", other), (f"The context{written[:4]}", written[4:])]
    scores = harness.loglikelihood(requests("loglikelihood", asked))
    assert [greedy for _, greedy in scores] == [True, False, True]
    assert scores[0][0] > scores[1][0]


def pair_of(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    model = memformer(vocab_size=tokenizer.vocab_size).eval()
    text = HarnessModel(model, tokenizer)._pair(context, continuation)
    return text.tokens[: text.scored].tolist(), text.tokens[text.scored :].tolist()


def test_a_token_over_the_border_belongs_to_the_continuation() -> None:
    tokenizer = learned()
    whole = tokenizer.encode("return name").tolist()
    texts = [tokenizer.decode([token]) for token in whole]
    place = next(place for place, text in enumerate(texts) if len(text) > 1)
    assert place < len(texts) - 1
    before, token, behind = "".join(texts[:place]), texts[place], "".join(texts[place + 1 :])
    assert pair_of(tokenizer, before + token, behind) == (whole[: place + 1], whole[place + 1 :])
    assert pair_of(tokenizer, before + token[:1], token[1:] + behind) == (whole[:place], whole[place:])
    assert pair_of(tokenizer, "", "return name") == ([], whole)
    assert pair_of(Bytes(), "se", "lf") == (list(b"se"), list(b"lf"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(("context", "continuation"), [("The cat", " saw"), ("The cat saw Z", "oë"), ("The ", "cat")])
def test_with_every_tokenizer_the_tokens_are_those_of_the_whole_text(
    kind: Callable[[], Any], context: str, continuation: str
) -> None:
    tokenizer = SerializedTokenizer(text=kind().to_str())
    before, behind = pair_of(tokenizer, context, continuation)
    assert before + behind == tokenizer.encode(context + continuation).tolist()
    assert behind
    # all of the continuation is behind the border
    (whole,) = tokenizer.align_blocks([(context + continuation).encode()], name="both")
    assert whole.sizes[: len(before)].sum() <= len(context.encode())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_texts_are_those_of_a_session(tokenizer: Tokenizer, model: SegmentModel, batch_size: int) -> None:
    contexts = ["", "The context", "x = 1\n" * 20, "The context goes", "a"]
    asked = [(context, {"until": ["\n\n\n"], "max_gen_toks": 20, "do_sample": False}) for context in contexts]
    texts = HarnessModel(model, tokenizer, batch_size=batch_size).generate_until(requests("generate_until", asked))
    for context, text in zip(contexts, texts, strict=True):
        session = Session(model)
        session.feed(torch.from_numpy(tokenizer.encode(context).astype(np.int64))[None])
        sampling = Sampling(temperature=0.0)
        drawn = [int(session.next(sampling)) for _ in range(20)]
        assert text == tokenizer.decode(drawn).partition("\n\n\n")[0]


def test_a_text_stops_before_a_string_of_until(tokenizer: Tokenizer, model: SegmentModel) -> None:
    def written(**arguments: Any) -> str:
        (text,) = HarnessModel(model, tokenizer).generate_until(requests("generate_until", [("a", arguments)]))
        return text

    whole = written(max_gen_toks=20)
    stop = whole[5:8]
    assert written(max_gen_toks=20, until=[stop]) == whole[: whole.find(stop)]
    assert written(max_gen_toks=20, until=stop) == whole[: whole.find(stop)]
    assert written(max_gen_toks=20, until=["never to be seen"]) == whole


def test_what_is_drawn_depends_on_the_seed_and_the_place_and_not_on_the_batch(
    tokenizer: Tokenizer, model: SegmentModel
) -> None:
    def written(batch_size: int, **arguments: Any) -> list[str]:
        asked = [("The context", {"max_gen_toks": 9, "temperature": 1.0, **arguments})] * 4
        return HarnessModel(model, tokenizer, batch_size=batch_size).generate_until(requests("generate_until", asked))

    texts = written(1)
    assert len(set(texts)) == 4
    assert written(3) == texts
    assert written(3, seed=1)[:3] == texts[1:]
    assert len(set(written(2, do_sample=False))) == 1
    assert len(set(written(2, temperature=None))) == 1
    assert len(set(written(2, temperature=None, do_sample=True))) == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"max_new_tokens": 3},
            "there is no generation argument 'max_new_tokens' here: did you mean max_gen_toks?",
        ),
        ({"max_gen_tok": 3}, "'max_gen_tok' here: did you mean max_gen_toks?"),
        (
            {"num_beams": 2},
            "there is no generation argument 'num_beams' here: there are until, max_gen_toks, do_sample",
        ),
        ({"until": [""]}, r"until must be strings, none of them empty, got \[''\]"),
        ({"until": 3}, "until must be strings, none of them empty, got 3"),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number of at least 1, got 0"),
        ({"max_gen_toks": "many"}, "max_gen_toks must be a whole number of at least 1, got 'many'"),
        ({"temperature": -1}, "temperature must be 0 .* or more, got -1"),
        ({"temperature": "warm"}, "temperature must be a number, got 'warm'"),
        ({"top_p": 2.0, "temperature": 1.0}, "top_p must be above 0 and at most 1, got 2.0"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True draws nothing at temperature=0: leave out do_sample"),
    ],
)
def test_generation_arguments_that_are_unknown_or_invalid_are_refused(arguments: dict[str, Any], told: str) -> None:
    harness = HarnessModel(memformer(vocab_size=256).eval(), Bytes())
    with pytest.raises(ValueError, match=told):
        harness.generate_until(requests("generate_until", [("a", {}), ("a", arguments)]))


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        (None, "the harness sends text, but the model has no tokenizer, which is for numbers: evaluate a model that"),
        (GreyValues(values=9), "the model has the tokenizer GreyValues, which is for numbers"),
        (Symbols(vocab_size=9), "the model has the tokenizer Symbols, which is for numbers"),
        (Bytes(), "the tokenizer has 256 tokens, but the model's vocab_size is 11: give the tokenizer that the model"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer: Tokenizer | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        HarnessModel(memformer().eval(), tokenizer)


def test_requests_without_tokens_and_texts_that_are_not_unicode_are_refused() -> None:
    harness = HarnessModel(memformer(vocab_size=256).eval(), Bytes())
    with pytest.raises(ValueError, match="the continuation '' of the context 'abc' has no tokens: leave the item out"):
        harness.loglikelihood(requests("loglikelihood", [("abc", "")]))
    with pytest.raises(ValueError, match="the continuation '' of the context '' has no tokens: leave the item out"):
        harness.loglikelihood_rolling(requests("loglikelihood_rolling", [("",)]))
    with pytest.raises(ValueError, match=r"the continuation '\\ud800' of the context 'a+' is not valid Unicode"):
        harness.loglikelihood(requests("loglikelihood", [("a" * 40, "\ud800")]))
    with pytest.raises(ValueError, match=r"the context '\.\.\.a+\\ud800' is not valid Unicode"):
        harness.generate_until(requests("generate_until", [("a" * 90 + "\ud800", {})]))


def test_a_model_without_sessions_scores_and_does_not_generate() -> None:
    class Mute(Transformer):
        prefill, decode = SegmentModel.prefill, SegmentModel.decode

    harness = HarnessModel(Mute(vocab_size=256, dim=8, heads=2, layers=1, segment_length=8).eval(), Bytes())
    assert harness.loglikelihood(requests("loglikelihood", [("a", "b")]))[0][0] < 0
    with pytest.raises(ValueError, match=r"Mute cannot generate: it does not implement prefill\(\)"):
        harness.generate_until(requests("generate_until", [("a", {})]))


def test_the_harness_builds_it_from_a_checkpoint(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "folder", Bytes())
    kind = get_model("memformer_pl")
    settings = {"batch_size": "4", "max_batch_size": None, "device": "cpu"}
    built = [
        kind.create_from_arg_obj({"ckpt_path": str(tmp_path / "folder")}, settings),
        kind.create_from_arg_string(f"ckpt_path={tmp_path / 'folder'}", settings),
    ]
    asked = requests("loglikelihood_rolling", [("a document",)])
    for harness in built:
        assert harness.batch_size == 4
        assert harness.loglikelihood_rolling(asked) == HarnessModel(model, Bytes()).loglikelihood_rolling(asked)
    info = built[0].get_model_info()
    assert info["model_class"] == "memformer_pl.models.Memformer"
    assert info["model_num_parameters"] == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        ({}, {}, "ckpt_path is missing: give --model_args ckpt_path=CHECKPOINT"),
        ({"chkpt_path": "x"}, {}, "there is no argument 'chkpt_path' here: did you mean ckpt_path?"),
        ({"ckpt_path": "x"}, {"batch_size": "auto"}, "batch_size must be a whole number, got 'auto'"),
        (
            {"ckpt_path": "x"},
            {"max_batch_size": 8},
            "there is no argument 'max_batch_size' here: did you mean batch_size",
        ),
        ({"ckpt_path": "x"}, {"device": "abacus"}, "device 'abacus' is not available"),
    ],
)
def test_arguments_of_the_harness_that_are_unknown_or_invalid_are_refused(
    arguments: dict[str, Any], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        HarnessModel.create_from_arg_obj(arguments, settings)


def test_answers_are_given_to_the_cache_of_the_harness(model: SegmentModel, tokenizer: Tokenizer) -> None:
    kept = []

    class Hook:
        def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
            kept.append((kind, arguments, answer))

    harness = HarnessModel(model, tokenizer, batch_size=2)
    harness.set_cache_hook(Hook())
    asked = {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [(text,) for text in DOCUMENTS],
        "generate_until": [("a", {"max_gen_toks": 3}), ("b", {"max_gen_toks": 3})],
    }
    for kind, arguments in asked.items():
        answers = getattr(harness, kind)(requests(kind, arguments))
        assert sorted(kept, key=str) == sorted(zip([kind] * len(answers), arguments, answers, strict=True), key=str)
        kept.clear()
