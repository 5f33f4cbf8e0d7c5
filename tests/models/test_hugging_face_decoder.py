"""Decoders of transformers, segment by segment: what one pass gives, whatever lanes do, and what is refused."""

import copy
import json
import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from models import (
    LENGTH,
    VOCAB,
    Case,
    assert_same,
    full,
    gpt2,
    irregular,
    largest_relative_difference,
    llama,
    losses_of,
    make_segment,
    outcome,
    plain_loop,
    small,
    train_on,
)
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.checkpoints.pretrained import load_pretrained, save_pretrained
from memformer_pl.contract import Segment, SegmentModel, State, detach
from memformer_pl.gradients.replay import replay_backward
from memformer_pl.gradients.rollout import add_gradient
from memformer_pl.inference import Session
from memformer_pl.inference.sampling import Sampling
from memformer_pl.models import HuggingFaceDecoder

close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}


def decoder(model_type: str, **options: Any) -> dict[str, Any]:
    return {"model_type": model_type, **WIDTHS, **options}


def build(options: dict[str, Any], **sizes: Any) -> HuggingFaceDecoder:
    return small(HuggingFaceDecoder, decoder=options, **sizes).eval()


DECODERS: dict[str, Callable[..., HuggingFaceDecoder]] = {
    "llama, grouped queries": llama,
    "qwen2": partial(build, decoder("qwen2")),
    "qwen3": partial(build, decoder("qwen3", head_dim=4)),
    "gpt2": gpt2,
    "mistral, sliding window": partial(build, decoder("mistral", sliding_window=4)),
    "gemma3, both kinds of layers": partial(build, decoder("gemma3_text", head_dim=4, **BOTH)),
    "qwen2, both kinds of layers": partial(build, decoder("qwen2", use_sliding_window=True, **BOTH)),
}
IN_FLOAT32 = "gemma3, both kinds of layers"
"""Its norms compute in float32 whatever the weights are, so gradients agree to 1e-7; the qwen2 below has both kinds."""


@pytest.fixture(params=DECODERS)
def model(request: pytest.FixtureRequest) -> HuggingFaceDecoder:
    return DECODERS[request.param]().eval()


def text(length: int, *, lanes: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (lanes, length), generator=torch.Generator().manual_seed(seed))


def segments_of(tokens: Tensor) -> list[Segment]:
    """A document in each lane; the last segment may be shorter."""
    starts = torch.ones(len(tokens), dtype=torch.bool)
    return [
        Segment(part, torch.ones_like(part, dtype=torch.bool), starts & (n == 0))
        for n, part in enumerate(tokens.split(LENGTH, dim=1))
    ]


def plain_pass(model: HuggingFaceDecoder, tokens: Tensor, **options: Any) -> Tensor:
    """The losses of whole documents by transformers alone, with BOS before them."""
    bos = torch.full((len(tokens), 1), VOCAB)
    inputs = torch.cat((bos, tokens[:, :-1]), dim=1)
    logits = model.language_model(inputs, use_cache=False, **options).logits[..., :VOCAB]
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def read(model: SegmentModel, segments: list[Segment], *, compact: bool) -> Tensor:
    """Losses of all segments, side by side."""
    state, losses = model.initial_state(len(segments[0].tokens)), []
    with torch.no_grad():
        for segment in segments:
            output, state = model(segment, state)
            state = model.compact(state) if compact else state
            losses.append(output.token_losses)
    return torch.cat(losses, dim=1)


# what a document costs


def test_a_document_in_segments_costs_what_it_does_in_one_pass(model: HuggingFaceDecoder) -> None:
    tokens = text(4 * LENGTH + 2, lanes=2)
    with torch.no_grad():
        close(read(model, segments_of(tokens), compact=False), plain_pass(model, tokens))


@pytest.mark.parametrize("name", [name for name in DECODERS if name != IN_FLOAT32])
def test_the_gradient_of_replay_is_that_of_one_pass(name: str) -> None:
    model, tokens = DECODERS[name]().eval(), text(8 * LENGTH, lanes=2)
    segments = segments_of(tokens)
    loss, _ = add_gradient(
        model, lambda output: output.token_losses.sum(), segments, model.initial_state(2), gradient="replay"
    )
    replayed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    whole = plain_pass(model, tokens).sum()
    whole.backward()
    close(loss, whole.detach())
    assert largest_relative_difference(replayed, {n: p.grad for n, p in model.named_parameters()}) < 1e-10


@pytest.mark.parametrize("compact", [False, True])
def test_ragged_lanes_and_documents_that_start_anywhere_cost_what_each_document_does_alone(
    model: HuggingFaceDecoder, compact: bool
) -> None:
    segments = irregular(12)
    losses = read(model, segments, compact=compact)
    tokens, exists = (torch.cat([segment[n] for segment in segments], dim=1) for n in range(2))
    starts = torch.stack([segment.document_start for segment in segments], dim=1)
    seen = 0
    for lane in range(len(tokens)):
        ends = [LENGTH * int(n) for n in starts[lane].nonzero()] + [tokens.shape[1]]
        for first, end in zip([0, *ends], ends, strict=False):
            document = tokens[lane, first:end][exists[lane, first:end]][None]
            if document.numel():
                with torch.no_grad():
                    close(losses[lane, first:end][exists[lane, first:end]][None], plain_pass(model, document))
                seen += 1
    assert seen > 8


def test_a_window_reaches_as_far_back_from_each_segment_as_it_says() -> None:
    tokens, window = text(4 * LENGTH), 7
    place = torch.arange(tokens.shape[1])
    begin = place // LENGTH * LENGTH
    mask = (place <= place[:, None]) & (place >= begin[:, None] - window)
    for build in (llama, gpt2):
        with torch.no_grad():
            got = read(build(window=window).eval(), segments_of(tokens), compact=True)
            close(got, plain_pass(build().eval(), tokens, attention_mask=mask[None, None]))
            assert not torch.allclose(got, plain_pass(build().eval(), tokens))


@pytest.mark.parametrize("name", DECODERS)
def test_a_window_longer_than_the_documents_is_the_whole_cache(name: str) -> None:
    whole, window = (DECODERS[name](window=window).eval() for window in (None, 60))
    close(read(window, irregular(12), compact=True), read(whole, irregular(12), compact=True))


def test_a_window_of_nothing_leaves_the_last_token() -> None:
    model, segments = llama(window=0).eval(), segments_of(text(2 * LENGTH))
    others = [segments[0]._replace(tokens=text(LENGTH, seed=1)), segments[1]]
    others[0].tokens[:, -1] = segments[0].tokens[:, -1]
    assert torch.equal(losses_of(model, segments)[1], losses_of(model, others)[1])
    others[0].tokens[:, -1] = (segments[0].tokens[:, -1] + 1) % VOCAB
    assert not torch.isclose(losses_of(model, segments)[1], losses_of(model, others)[1]).any()


# what is carried


def test_the_cache_grows_by_a_segment_and_its_old_rows_stay() -> None:
    model = llama().eval()
    assert model.growing == {"keys_0": 2, "values_0": 2, "keys_1": 2, "values_1": 2, "exists": 1}
    state = model.initial_state(4)
    for n, segment in enumerate(irregular(5)):
        before, (_, state) = state, model(segment, state)
        for name, axis in model.growing.items():
            field = getattr(state, name)
            assert field.shape[axis] == (n + 1) * LENGTH
            assert torch.equal(field.narrow(axis, 0, n * LENGTH), getattr(before, name))


def test_compaction_leaves_the_rows_that_the_lane_with_most_needs() -> None:
    def rows_after(model: HuggingFaceDecoder, segments: list[Segment]) -> tuple[Tensor, State]:
        state = model.initial_state(len(segments[0].tokens))
        with torch.no_grad():
            for segment in segments:
                _, state = model(segment, state)
        return model.compact(state).exists, state

    # of the lanes of irregular(5), the last three start documents: with segments 4, 1 and 3
    segments = [Segment(*(field[1:] for field in segment[:3])) for segment in irregular(5)]
    exists, _ = rows_after(llama().eval(), segments)
    assert exists.sum(1).tolist() == [5, 4 + 5 + 5 + 0, 5 + 2]
    assert torch.equal(exists, torch.arange(14) >= 14 - exists.sum(1, keepdim=True))
    exists, state = rows_after(llama().eval(), full(3))
    assert llama().compact(state) is state
    # a sliding window of 4 tokens, of which the next input is one
    exists, _ = rows_after(DECODERS["mistral, sliding window"](), full(3))
    assert exists.shape[1] == 3
    exists, _ = rows_after(DECODERS["gemma3, both kinds of layers"](), full(3))
    assert exists.shape[1] == 15
    model = llama(window=7).eval()
    assert model.compact(state := model.initial_state(2)) is state


def test_the_state_has_the_heads_of_keys_and_the_precision_of_the_weights() -> None:
    state = llama().initial_state(3)
    assert type(state).__name__ == "HuggingFaceState"
    assert state._fields == ("keys_0", "values_0", "keys_1", "values_1", "exists", "place", "last")
    assert [list(field.shape) for field in state] == [[3, 2, 0, 2]] * 4 + [[3, 0], [3], [3]]
    assert state.keys_0.dtype is torch.float64
    assert llama(window=7).bfloat16().initial_state(1).values_1.dtype is torch.bfloat16
    assert not llama(window=7).growing


def test_rotations_keep_their_precision_where_weights_lose_theirs() -> None:
    model, other = (llama(options={"head_dim": 16}).float() for _ in range(2))
    exact = dict(other.named_buffers())
    assert not all(torch.equal(buffer, buffer.bfloat16().float()) for buffer in exact.values())
    for name, buffer in model.bfloat16().named_buffers():
        assert torch.equal(buffer, exact[name])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.double().buffers()} == {torch.float64}


def test_a_copy_of_a_model_and_one_that_was_pickled_are_equal_to_it() -> None:
    model = llama()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(losses_of(other, full(2))[1], losses_of(model, full(2))[1])
        assert other.growing == model.growing


# dropout and adapters


@pytest.mark.parametrize("window", [None, 7])
def test_replay_repeats_the_dropout_of_every_kind(window: int | None) -> None:
    def case() -> Case:
        model = gpt2(dropout=0.3, window=window)
        return train_on(model, irregular(5), model.initial_state(4))

    assert_same(outcome(replay_backward, case), outcome(plain_loop, case))
    assert case().module.training


LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def adapted(**options: Any) -> HuggingFaceDecoder:
    """A Llama with adapters that have been trained a little."""
    return llama(lora={**LORA, **options})


def test_adapters_alone_are_trained_and_replay_gives_their_gradient() -> None:
    for options in ({}, {"lora_dropout": 0.3}, {"layers_to_transform": [1]}):

        def case(options: dict[str, Any] = options) -> Case:
            model = adapted(**options)
            return train_on(model, irregular(5), model.initial_state(4))

        replayed = outcome(replay_backward, case)
        assert_same(replayed, outcome(plain_loop, case))
        trained = {name for name, grad in replayed.grads.items() if grad is not None and grad.any()}
        assert trained == {name for name, p in case().module.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        assert len(trained) == (4 if options.get("layers_to_transform") else 8)


def test_advance_draws_what_a_head_with_dropout_draws() -> None:
    model, ends = adapted(lora_dropout=0.3, target_modules=["q_proj", "lm_head"]), []
    for step in (lambda *args: model(*args)[1], model.advance):
        torch.manual_seed(0)
        step(make_segment([5, 5]), model.initial_state(2))
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)
    torch.manual_seed(0)
    llama(dropout=0.3).advance(make_segment([5, 5]), model.initial_state(2))
    assert not torch.equal(torch.get_rng_state(), ends[0])


def test_adapters_and_their_weights_come_back_from_a_configuration() -> None:
    model = adapted()
    other = SegmentModel.from_config(json.loads(json.dumps(model.config()))).double()
    other.load_state_dict(model.state_dict())
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(losses_of(other, full(2))[1], losses_of(model, full(2))[1])


# sessions


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("window", [None, 7])
def test_a_session_gives_the_probabilities_of_the_forward_pass(name: str, window: int | None) -> None:
    model, texts = DECODERS[name](window=window).eval(), [text(n, seed=n) for n in (3, 13, 21)]
    session, wanted = Session(model, lanes=3), []
    for place in range(21):
        there = torch.tensor([place < each.shape[1] for each in texts])
        log_probs = session.log_probs
        tokens = torch.tensor([[int(each[0, min(place, each.shape[1] - 1)])] for each in texts])
        wanted.append(-log_probs.gather(1, tokens).where(there[:, None], 0))
        session.feed(tokens, there[:, None])
    for lane, each in enumerate(texts):
        close(torch.cat(wanted, dim=1)[lane, : each.shape[1]], read(model, segments_of(each), compact=False)[0])


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_text_is_that_of_transformers_own_generate_token_for_token(name: str) -> None:
    model, prompt = DECODERS[name]().eval(), text(2 * LENGTH + 3)
    session, drawn, sampling = Session(model), [], Sampling(temperature=0.0)
    session.feed(prompt)
    for _ in range(12):
        drawn.append(int(session.next(sampling)))
    inputs = torch.cat((torch.tensor([[VOCAB]]), prompt), dim=1)
    theirs = model.language_model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=[VOCAB],
    )
    assert drawn == theirs[0, inputs.shape[1] :].tolist()


# folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of transformers, with more tokens than the tokenizer."""
    model = llama(options={"vocab_size": 16, "bos_token_id": 13}).float()
    model.language_model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_a_folder_gives_its_weights_and_is_not_needed_again(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING):
        model = HuggingFaceDecoder(vocab_size=VOCAB, segment_length=LENGTH, folder=str(folder))
    assert model.training
    tokens, auto = text(2 * LENGTH), import_module("transformers").AutoModelForCausalLM
    with torch.no_grad():
        logits = auto.from_pretrained(folder)(torch.cat((torch.tensor([[13]]), tokens[:, :-1]), dim=1)).logits
    captured = capfd.readouterr()
    losses = F.cross_entropy(logits[0, :, :VOCAB], tokens[0], reduction="none")
    close(torch.cat(losses_of(model, segments_of(tokens)), dim=1)[0], losses, atol=1e-5)
    assert (captured.out, caplog.text) == ("", "")
    config = json.loads(json.dumps(model.config()))
    assert config["folder"] is None
    assert str(folder) not in str(config)
    again = HuggingFaceDecoder(vocab_size=VOCAB, segment_length=LENGTH, folder=str(folder))
    assert again.differences(config) == []
    (folder / "config.json").unlink()
    save_pretrained(model, tmp_path / "ours")
    loaded = load_pretrained(tmp_path / "ours").model
    assert loaded.config() == model.config()
    assert torch.equal(losses_of(loaded, full(2))[1], losses_of(model.eval(), full(2))[1])


def test_weights_are_loaded_in_the_default_dtype(folder: Path) -> None:
    model = llama(options={"vocab_size": 16, "bos_token_id": 13}).bfloat16()
    model.language_model.save_pretrained(folder)
    loaded = HuggingFaceDecoder(vocab_size=VOCAB, folder=str(folder))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert "dtype" not in loaded.decoder


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    take = partial(HuggingFaceDecoder, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"folder='no/such' has no config.json: give a local folder that holds"):
        take(folder="no/such")
    with pytest.raises(ValueError, match="the decoder has 16 tokens, fewer than vocab_size=17"):
        take(vocab_size=17, folder=str(folder))
    changed(folder / "config.json", bos_token_id=None)
    with pytest.raises(ValueError, match="must be one of the decoder's 16 tokens, got None: name one with bos_token"):
        take(folder=str(folder))
    assert take(folder=str(folder), bos_token=0)._bos == 0
    with pytest.raises(ValueError, match="must be one of the decoder's 16 tokens, got 16"):
        take(folder=str(folder), bos_token=16)
    changed(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 9 weights, such as model.layers.2.\S+: save the whole model there"):
        take(folder=str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot load the weights: .*no file named model.safetensors"):
        take(folder=str(folder))
    changed(folder / "config.json", auto_map={"AutoConfig": "code.Config"}, model_type="foreign")
    (folder / "code.py").write_text("raise RuntimeError('code of a folder was run')")
    with pytest.raises(ValueError, match=r"holds no decoder that can be read: .*contains custom code"):
        take(folder=str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no decoder that can be read"):
        take(folder=str(folder))


# what stands before a document


def test_bos_is_a_token_of_its_own_unless_the_configuration_names_one() -> None:
    assert (llama()._bos, len(llama()._table)) == (VOCAB, VOCAB + 1)
    named = llama(options={"bos_token_id": 3})
    assert (named._bos, len(named._table)) == (3, VOCAB)
    assert llama(bos_token=4)._bos == 4
    padded = llama(options={"vocab_size": 64})
    assert (padded._bos, len(padded._table)) == (VOCAB, 64)
    assert losses_of(padded, full(1))[0].isfinite().all()
    with pytest.raises(ValueError, match="must be one of the decoder's 11 tokens, got 11"):
        llama(options={"vocab_size": VOCAB})


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either decoder, .* or folder, .*; got decoder=None and folder=None"),
        ({"decoder": {}, "folder": "x"}, "give either decoder, .* got decoder={} and folder='x'"),
        ({"decoder": {"model_type": "lama"}}, "model_type 'lama' does not exist: did you mean 'llama'"),
        ({"decoder": {"hidden_size": 8}}, "model_type None does not exist"),
        ({"decoder": decoder("llama", hiden_size=8)}, "'llama' has no option 'hiden_size': did you mean 'hidden_size'"),
        (
            {"decoder": decoder("llama", num_attention_heads=3)},
            "cannot build a 'llama': .*not a multiple of the number",
        ),
        ({"decoder": decoder("llama"), "window": -1}, "window must be at least 0, got -1"),
        ({"decoder": {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}}, "layer 0 of this 'mamba' is"),
        (
            {"decoder": decoder("qwen3_next")},
            "layer 0 of this 'qwen3_next' is 'linear_attention', and not one of full_",
        ),
        ({"decoder": decoder("llama4_text")}, "'chunked_attention', and not one of .* not its keys and values. Take a"),
        ({"decoder": {"model_type": "t5"}}, "a 't5' does not read text alone"),
        (
            {"decoder": {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}},
            "sees later tokens: set is_dec",
        ),
        ({"decoder": decoder("gemma2", head_dim=4)}, "cannot build a 'gemma2': .*does not support an attention"),
        (
            {"decoder": decoder("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})},
            "rope_type 'dynamic', which rotates a text in another way once it is long",
        ),
        ({"decoder": decoder("llama"), "lora": {"rank": 2}}, "lora: cannot add the adapters: .*'rank'"),
        (
            {"decoder": decoder("llama"), "lora": {"target_modules": ["nothing"]}},
            "lora: cannot add the adapters: .*nothing.* not found",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFaceDecoder(vocab_size=VOCAB, **arguments)


def test_a_document_longer_than_a_learned_table_is_refused_and_no_other() -> None:
    table = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 12}
    model = build(table)
    # the ragged third segment ends with the last position, and its empty places lie beyond the table
    segments = [make_segment([5]), make_segment([5]), make_segment([2])]
    state = model.initial_state(1)
    for segment in segments:
        _, state = model(segment, state)
    with pytest.raises(ValueError, match=r"more than 12 tokens, and the decoder a learned table of 12 positions"):
        model(make_segment([1]), state)
    model(make_segment([1], document_start=[1]), state)
    session = Session(model)
    session.feed(text(12))
    session.feed(text(1))
    with pytest.raises(ValueError, match="learned table of 12 positions"):
        _ = session.log_probs
    rotary = build(decoder("llama", max_position_embeddings=12))
    assert losses_of(rotary, segments_of(text(20)))[3].isfinite().all()


@pytest.mark.parametrize(("name", "arguments"), [("transformers", {}), ("peft", {"lora": LORA})])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"needs {name}: pip install 'memformer-pl\[hf\]'"):
        llama(**arguments)


def test_the_models_load_neither_transformers_nor_peft() -> None:
    code = "import sys, memformer_pl.models; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "memformer_pl.models.hugging_face_decoder" in loaded
    assert not {"transformers", "peft"} & set(loaded)


def test_nothing_is_printed_and_the_settings_of_transformers_stay(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = import_module("transformers.utils.logging")
    before = settings.get_verbosity(), settings.is_progress_bar_enabled()
    for name, each in DECODERS.items():
        model = each()
        train = train_on(model, irregular(2), model.initial_state(4))
        plain_loop(train.step, train.segments, detach(train.state))
        assert tuple(capfd.readouterr()) == ("", ""), name
    assert caplog.text == ""
    assert (settings.get_verbosity(), settings.is_progress_bar_enabled()) == before


# a run from the command line


@pytest.mark.parametrize("window", ["null", "7"])
def test_a_run_from_a_folder_resumes_and_its_checkpoint_generates_without_it(
    window: str, folder: Path, command: Callable[..., Outcome], small: Path, tmp_path: Path, no_type_checks: None
) -> None:
    llama(options={"vocab_size": 258, "bos_token_id": 257}).float().language_model.save_pretrained(folder)
    model = ["--model.model=HuggingFaceDecoder", f"--model.model.folder={folder}", f"--model.model.window={window}"]

    # a learning rate that does not depend on the number of steps
    rate = ["--model.warmup_steps=null", "--model.lr_scheduler=ConstantLR", "--model.lr_scheduler.factor=1"]

    def fit(version: int, *options: str) -> Path:
        """The last checkpoint of a run."""
        where = f"--trainer.logger.init_args.version={version}"
        fitted = command("fit", f"--config={small}", *model, *rate, where, *options)
        assert fitted.code == 0, fitted.output
        return tmp_path / "run" / f"version_{version}" / "checkpoints" / "last.ckpt"

    checkpoint = fit(0, "--trainer.max_steps=2")
    half, whole, resumed = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (checkpoint, fit(1), fit(2, f"--ckpt_path={checkpoint}"))
    )
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight)
        assert not torch.equal(half[name], weight)
    shutil.rmtree(folder)
    written = command("generate", f"--ckpt_path={checkpoint}", "--prompt=abc", "--length=9")
    assert written.code == 0, written.output
    assert len(written.output) > len("abc")
