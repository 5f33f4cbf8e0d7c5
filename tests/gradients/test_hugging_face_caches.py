"""A decoder of transformers, with its cache as the state: replay in segments is one pass over the whole text."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    StaticCache,
)

from memformer_pl.gradients import growing as growing_module
from memformer_pl.gradients.replay import replay_backward
from memformer_pl.gradients.rollout import GRADIENTS

VOCAB, LENGTH, LANES = 40, 6, 2
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
GROUPED = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}

CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **options: LlamaConfig(**GROUPED, **options),
    "qwen": lambda **options: Qwen3Config(**GROUPED, **options),
    "mistral": lambda **options: MistralConfig(**GROUPED, **options, sliding_window=9),
    "gpt2": lambda attention_dropout=0.0: GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=4,
        embd_pdrop=attention_dropout,
        attn_pdrop=attention_dropout,
        resid_pdrop=attention_dropout,
    ),
}


def decoder(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](**options)).double()


def text(horizon: int) -> Tensor:
    return torch.randint(VOCAB, (LANES, horizon * LENGTH + 1), generator=torch.Generator().manual_seed(1))


def segments_of(tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    starts = range(0, tokens.shape[1] - 1, LENGTH)
    return [(tokens[:, t : t + LENGTH], tokens[:, t + 1 : t + LENGTH + 1]) for t in starts]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def stepping(model: Any) -> Callable[..., Any]:
    def step(segment: tuple[Tensor, Tensor], cache: Any) -> tuple[Tensor, Any]:
        inputs, targets = segment
        return loss_of(model(inputs, cache=cache, use_cache=True).logits, targets), cache

    return step


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        scale = grad.abs().max().clamp(min=1e-300)
        assert (found[1][name] - grad).abs().max() / scale < 1e-10, name


def whole(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient of one pass over the whole text."""
    model.zero_grad()
    loss = loss_of(model(tokens[:, :-1], use_cache=False).logits, tokens[:, 1:])
    loss.backward()
    return loss.detach(), gradients(model)


def by(name: str, model: Any, tokens: Tensor, cache: Any, growing: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by one of our methods."""
    model.zero_grad()
    loss, last = GRADIENTS[name](stepping(model), segments_of(tokens), cache, growing=growing)
    assert type(last) is DynamicCache
    assert last.get_seq_length() == tokens.shape[1] - 1
    return loss, gradients(model)


@pytest.mark.parametrize("name", ["replay", "sparse_replay", "bptt", "checkpointed"])
@pytest.mark.parametrize("growing", [None, 2])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_text_in_eight_segments_has_the_gradient_of_one_pass(kind: str, lazy: bool, growing: Any, name: str) -> None:
    """With layers made from the configuration, or with the first tokens."""
    model, tokens = decoder(kind), text(8)
    cache = DynamicCache() if lazy else DynamicCache(config=model.config)
    if kind == "mistral" and not lazy:
        growing = None  # its layers drop rows that no window reaches
    assert_equal(by(name, model, tokens, cache, growing), whole(model, tokens))
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("growing", [None, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_draws_what_a_plain_loop_draws(kind: str, growing: Any) -> None:
    model, tokens = decoder(kind, attention_dropout=0.2), text(5)
    assert model.training
    torch.manual_seed(3)
    found, stream = by("replay", model, tokens, DynamicCache(config=model.config), growing), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(3)
    cache, total = DynamicCache(config=model.config), torch.zeros((), dtype=torch.float64)
    for segment in segments_of(tokens):
        loss, cache = stepping(model)(segment, cache)
        total = total + loss
    total.backward()
    assert_equal(found, (total.detach(), gradients(model)))
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("growing", [None, 2])
def test_lora_trains_its_adapters_alone(growing: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model, tokens = get_peft_model(decoder("llama"), config).double(), text(8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they begin as zeros, and then those before them have no gradient
            torch.nn.init.normal_(parameter, std=0.3)
    found = by("replay", model, tokens, DynamicCache(config=model.config), growing)
    assert_equal(found, whole(model, tokens))
    assert set(found[1]) == {name for name, _ in model.named_parameters() if "lora" in name}


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[growing_module.Storage]:
    """The storages of states that a rollout makes."""
    made: list[growing_module.Storage] = []
    build = growing_module.Storage.__init__

    def noted(self: growing_module.Storage, growing: Any) -> None:
        build(self, growing)
        made.append(self)

    monkeypatch.setattr(growing_module.Storage, "__init__", noted)
    return made


@pytest.mark.parametrize(("growing", "times"), [(2, 1.0), (None, 32.0)])
def test_64_states_take_the_memory_of_the_last_cache_or_of_32(
    stored: list[growing_module.Storage], growing: Any, times: float
) -> None:
    """The states that enter the segments, when the second pass begins: all storages that they hold, each once."""
    model, tokens, measured = decoder("llama"), text(64), []
    step = stepping(model)

    def measuring(segment: tuple[Tensor, Tensor], cache: Any) -> tuple[Tensor, Any]:
        if torch.is_grad_enabled() and not measured:
            last = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
            states = [*stored[-1]._states, *stored[0]._states]
            kept = [tensor for state in states for tensor in state.tensors().values()]
            kept += [*stored[-1]._last.values(), *last]
            size = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.dim() == 4}
            measured.append(sum(size.values()) / sum(t.numel() * t.element_size() for t in last))
        return step(segment, cache)

    replay_backward(measuring, segments_of(tokens), DynamicCache(config=model.config), growing=growing)
    assert measured == [times]


def test_a_cache_that_is_written_in_place_is_refused_with_its_field() -> None:
    model, tokens = decoder("llama"), text(3)
    cache = StaticCache(config=model.config, max_cache_len=100)
    with pytest.raises(
        TypeError, match=r"step edited state\.layers\[0\]\.\w+ in place, but .*: return a new tensor, or edit"
    ):
        replay_backward(stepping(model), segments_of(tokens), _filled(model, cache))


def _filled(model: Any, cache: Any) -> Any:
    with torch.no_grad():
        model(text(1), cache=cache, use_cache=True)
    return cache


def test_layers_with_a_window_do_not_only_grow_and_are_refused_with_their_field() -> None:
    model, tokens = decoder("mistral"), text(4)
    with pytest.raises(TypeError, match=r"growing says that state\.layers\[0\]\.keys only gains rows along axis 2"):
        by("replay", model, tokens, DynamicCache(config=model.config), [{"keys": 2}, None])
