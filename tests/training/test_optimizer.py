"""What decays, for every parameter of every model; what a module of one's own may declare."""

import re
from functools import partial

import pytest
import torch
from models import MODELS, transformer
from torch import nn

from memformer_pl import models
from memformer_pl.errors import UsageError
from memformer_pl.training.optimizer import parameter_groups

AMONG_TOKENS = ("to_query_key_value.weight", "to_out.weight")
ELSEWHERE = ("to_query.weight", "to_key_value.weight", "to_out.weight")
BY_DISTANCE = (*ELSEWHERE, "to_distance.weight")
NORM = ("weight", "bias")


def under(prefix: str, *names: str) -> set[str]:
    """Names of parameters of a part."""
    return {f"{prefix}.{name}" for name in names}


def layer(stack: str, *parts: str, among: tuple[str, ...] = AMONG_TOKENS) -> set[str]:
    """What decays of each layer of a stack: attention among tokens, attention of other parts, and the feed-forward
    layers."""
    names = {f"{part}.{name}" for part in parts for name in ELSEWHERE} | under("self_attention", *among)
    return under(f"{stack}.*", *names, "ffn.up.weight", "ffn.down.weight")


def resting(stack: str, *norms: str) -> set[str]:
    """What does not decay of each layer of a stack: its norms, and the biases of the feed-forward layers."""
    names = {f"{norm}.{name}" for norm in (*norms, "ffn_norm") for name in NORM}
    return under(f"{stack}.*", *names, "ffn.up.bias", "ffn.down.bias")


WRITER = under("writer", "to_query.weight", "to_key.weight", "to_value.weight")
WRITER_AT_REST = {"writer.norm.weight", "writer.norm.bias"}
READS_MEMORY = ("memory_norm", "memory_reader.norm")
ENDS = {"embedding.start", "embedding.norm.weight", "embedding.norm.bias"}
MEMFORMER_AT_REST = {
    *("start", "memory_norm.anchors", "encoder_norm.weight", "encoder_norm.bias"),
    *("decoder_norm.weight", "decoder_norm.bias"),
    *resting("decoder", "self_norm", "cross_norm"),
}
CAUSAL = {"embedding.tokens.weight"} | layer("blocks")
CAUSAL_AT_REST = ENDS | resting("blocks", "self_norm")
RELATIVE = {"embedding.tokens.weight"} | layer("blocks", among=BY_DISTANCE)
RELATIVE_AT_REST = CAUSAL_AT_REST | under("blocks.*.self_attention", "content_bias", "distance_bias")
DECODER = {"embedding.weight"} | layer("decoder", "cross_attention")

LLAMA_ATTENTION = under("self_attn", *(f"{name}_proj.weight" for name in "qkvo"))
LLAMA_LAYER = {*LLAMA_ATTENTION, *under("mlp", *(f"{name}_proj.weight" for name in ("gate", "up", "down")))}
LLAMA = (
    under("language_model", "model.embed_tokens.weight", "lm_head.weight", *under("model.layers.*", *LLAMA_LAYER)),
    under(
        "language_model.model",
        "norm.weight",
        *under("layers.*", "input_layernorm.weight", "post_attention_layernorm.weight"),
    ),
)

TABLE: dict[str, tuple[set[str], set[str]]] = {
    "memformer": (
        DECODER | WRITER | layer("encoder", "memory_reader.attention"),
        MEMFORMER_AT_REST | WRITER_AT_REST | resting("encoder", "self_norm", *READS_MEMORY),
    ),
    "memformer without memory": (
        DECODER | layer("encoder"),
        MEMFORMER_AT_REST | resting("encoder", "self_norm"),
    ),
    "memformer decoder": (
        {"embedding.tokens.weight"} | WRITER | layer("blocks", "memory_reader.attention"),
        ENDS | {"memory_norm.anchors"} | WRITER_AT_REST | resting("blocks", "self_norm", *READS_MEMORY),
    ),
    "transformer": (CAUSAL, CAUSAL_AT_REST),
    "transformer in chunks": (CAUSAL, CAUSAL_AT_REST),
    "transformer, relative": (RELATIVE, RELATIVE_AT_REST),
    "memory transformer": (CAUSAL, CAUSAL_AT_REST | {"memory"}),
    "recurrent memory transformer": (CAUSAL, CAUSAL_AT_REST | {"memory"}),
    "transformer xl": (RELATIVE, RELATIVE_AT_REST),
    "compressive transformer": (RELATIVE | {"compressors.*.conv.weight"}, RELATIVE_AT_REST),
    "lamemo": (RELATIVE, RELATIVE_AT_REST | {"blocks.*.ahead_bias"}),
    "lstm": (
        {"embedding.tokens.weight", "blocks.*.weight_ih_l0", "blocks.*.weight_hh_l0"},
        ENDS | {"blocks.*.bias_ih_l0", "blocks.*.bias_hh_l0"},
    ),
    "llama": LLAMA,
    "llama with a window": LLAMA,
}
"""Of each model what decays and what does not; ``*`` is every layer."""
BUILD = {**MODELS, "transformer, relative": partial(transformer, positions="relative")}


def groups(module: nn.Module) -> tuple[set[str], set[str]]:
    """The names in the two groups of the optimizer."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in parameter_groups(module))
    assert len(decayed) + len(others) == len(names)
    return set(decayed), set(others)


@pytest.mark.parametrize("name", BUILD)
def test_every_parameter_of_every_model_decays_or_not_as_the_table_says(name: str) -> None:
    for got, expected in zip(groups(BUILD[name]()), TABLE[name], strict=True):
        assert {re.sub(r"\.\d+\.", ".*.", parameter) for parameter in got} == expected


def test_the_table_has_every_model() -> None:
    kinds = {type(build()).__name__ for build in BUILD.values()}
    assert TABLE.keys() == BUILD.keys()
    assert kinds == {name for name in models.__all__ if isinstance(getattr(models, name), type)}


def test_each_group_keeps_the_order_of_the_model() -> None:
    """A checkpoint knows parameters by their place alone."""
    for build in MODELS.values():
        model = build()
        place = {id(parameter): n for n, parameter in enumerate(model.parameters())}
        for group in parameter_groups(model):
            places = [place[id(parameter)] for parameter in group["params"]]
            assert places == sorted(places)


class OwnModel(nn.Module):
    """What somebody else might write."""

    no_decay = ("tokens", "absent")

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.matrix = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
        self.scale, self.gain = nn.Parameter(torch.ones(4)), nn.Parameter(torch.tensor(1.0))
        self.absent = None
        self.rnn, self.conv = nn.GRU(4, 4), nn.Conv2d(1, 2, 3)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norms = nn.ModuleList([nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4)), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)])


def test_matrices_of_a_model_of_ones_own_decay_but_what_it_declares_and_the_scales_of_norms() -> None:
    decayed, others = groups(OwnModel())
    assert decayed == {
        *("matrix", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "conv.weight"),
        *("attention.in_proj_weight", "attention.out_proj.weight"),
    }
    assert {"tokens", "scale", "gain", "attention.bias_k", "norms.0.weight", "norms.1.weight"} <= others


class Below(OwnModel):
    """Declares what it adds; what stands above it stays declared."""

    no_decay = ("more",)

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.ones(2, 4))


def test_a_class_declares_its_own_parameters_beside_those_of_the_class_above() -> None:
    assert groups(Below())[1] >= {"tokens", "more"}
    assert groups(Below())[0] == groups(OwnModel())[0]


def test_a_table_that_two_modules_share_is_left_out_where_one_of_them_declares_it() -> None:
    model = OwnModel()
    linear = nn.Linear(4, 3)
    linear.weight = model.tokens
    assert groups(nn.ModuleDict({"linear": linear, "model": model}))[1] >= {"linear.weight"}


@pytest.mark.parametrize("declared", [("token",), ("rnn.weight_ih_l0",), "tokens"])
def test_a_declaration_of_what_is_not_there_is_refused_with_what_there_is(declared: object) -> None:
    wrong = type("Wrong", (OwnModel,), {"no_decay": declared})
    with pytest.raises(UsageError, match=r"Wrong.no_decay must be a tuple of names .*\(tokens, matrix, scale, gain\)"):
        parameter_groups(wrong())
