"""What decays, for every parameter of every model; what a module of one's own may declare."""

import math
import re
from functools import partial
from typing import ClassVar

import pytest
import torch
from models import MODELS, ULTRA, infini_attention, transformer
from torch import nn

from memformer_pl import models
from memformer_pl.errors import UsageError
from memformer_pl.training.lr_schedule import lr_factor
from memformer_pl.training.optimizer import FACTOR, FALL, Optimization, falling_rates, parameter_groups

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

MATRIX = "blocks.*.memory"
ADDING = {
    "embedding.tokens.weight",
    *under(MATRIX, "to_query_key_value.weight", "convolution.weight", "to_gate.weight", "to_out.weight"),
    *under("blocks.*.ffn", "up.weight", "down.weight"),
}
DELTA = ADDING | {f"{MATRIX}.gates.to_strength.weight"}
DELTA_AT_REST = ENDS | {f"{MATRIX}.scale"} | resting("blocks", "memory_norm")
STEPS = under(f"{MATRIX}.gates.steps", "log_rate", "step_bias")

BLOCK_RECURRENT = (
    CAUSAL | under("blocks.*.state_attention", *ELSEWHERE) | under("update", "to_queries.weight", "to_update.weight"),
    CAUSAL_AT_REST | under("update", "initial", "identities", "gate", "norm.weight", "norm.bias", "to_update.bias"),
)
MATRICES = under("blocks.*", *(f"{name}.weight" for name in ("reader.to_query", "writer.to_key", "writer.to_value")))
STRENGTH = "blocks.*.writer.to_strength"
ASSOCIATIVE = (CAUSAL | MATRICES | {f"{STRENGTH}.weight"}, CAUSAL_AT_REST | {"memory", f"{STRENGTH}.bias"})

TITANS = (ADDING | {f"{MATRIX}.gates.to_gates.weight"}, DELTA_AT_REST | under(MATRIX, "gates.bias", "initial"))
BESIDE = "blocks.*.attention"
BESIDE_AT_REST = {f"{BESIDE}.persistent"} | under("blocks.*.attention_norm", *NORM)
MAL = (TITANS[0] | under(BESIDE, *AMONG_TOKENS), TITANS[1] | BESIDE_AT_REST)
MAC = (
    MAL[0] | {"blocks.*.to_recall.weight"},
    MAL[1] | under("blocks.*.recalled_norm", *NORM) | under("blocks.*.read_norm", *NORM),
)
MAG = (MAL[0], MAL[1] | under("blocks.*.read_norm", *NORM) | under("blocks.*.found_norm", *NORM))

HADAMARD_MAPS = ("to_query_key_value.weight", "to_strength.weight", "to_out.weight")
ADDED = (
    {"embedding.tokens.weight"} | under(MATRIX, *HADAMARD_MAPS) | under("blocks.*.ffn", "up.weight", "down.weight"),
    ENDS | resting("blocks", "memory_norm"),
)
HADAMARD = (ADDED[0] | {f"{MATRIX}.calibrate.to_content.weight"}, ADDED[1] | {f"{MATRIX}.calibrate.table"})

FADING = "blocks.*.fading"
MAPS = {*under(FADING, "to_decay.weight", "to_hidden.weight", "to_out.weight"), *under(BESIDE, *AMONG_TOKENS)}
FADED = (
    {"embedding.tokens.weight"} | MAPS | under("blocks.*.ffn", "up.weight", "down.weight"),
    ENDS | resting("blocks", "memory_norm") | {f"{FADING}.to_decay.bias"},
)

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


def with_ultra_memory(plain: tuple[set[str], set[str]], *stacks: str) -> tuple[set[str], set[str]]:
    """What decays and what does not if a layer of each stack looks up values, beside one with a dense feed-forward."""
    matrices = ("to_query.weight", "keys", "to_out.weight", "core_parts")
    decays, rests = (
        {f"{stack}.*.ffn.{name}" for stack in stacks for name in names}
        for names in (matrices, ("values", "query_norm.weight"))
    )
    return plain[0] | decays, plain[1] | rests


MEMFORMER = (
    DECODER | WRITER | layer("encoder", "memory_reader.attention"),
    MEMFORMER_AT_REST | WRITER_AT_REST | resting("encoder", "self_norm", *READS_MEMORY),
)
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "memformer": MEMFORMER,
    "memformer that overlaps by a token": MEMFORMER,
    "memformer with an overlap, reading memory in the decoder": (
        MEMFORMER[0],
        MEMFORMER[1] | {"slot_norm.weight", "slot_norm.bias"},
    ),
    "memformer with ultra memory": with_ultra_memory(MEMFORMER, "encoder", "decoder"),
    "memformer without memory": (
        DECODER | layer("encoder"),
        MEMFORMER_AT_REST | resting("encoder", "self_norm"),
    ),
    "memformer decoder": (
        {"embedding.tokens.weight"} | WRITER | layer("blocks", "memory_reader.attention"),
        ENDS | {"memory_norm.anchors"} | WRITER_AT_REST | resting("blocks", "self_norm", *READS_MEMORY),
    ),
    "transformer": (CAUSAL, CAUSAL_AT_REST),
    "transformer with ultra memory": with_ultra_memory((CAUSAL, CAUSAL_AT_REST), "blocks"),
    "transformer in chunks": (CAUSAL, CAUSAL_AT_REST),
    "transformer, relative": (RELATIVE, RELATIVE_AT_REST),
    "memory transformer": (CAUSAL, CAUSAL_AT_REST | {"memory"}),
    "recurrent memory transformer": (CAUSAL, CAUSAL_AT_REST | {"memory"}),
    "associative recurrent memory transformer": ASSOCIATIVE,
    "associative recurrent memory transformer without correction": ASSOCIATIVE,
    "parallel recurrent memory transformer": (CAUSAL, CAUSAL_AT_REST | {"memory", "initial"}),
    "transformer xl": (RELATIVE, RELATIVE_AT_REST),
    "compressive transformer": (RELATIVE | {"compressors.*.conv.weight"}, RELATIVE_AT_REST),
    "lamemo": (RELATIVE, RELATIVE_AT_REST | {"blocks.*.ahead_bias"}),
    "lstm": (
        {"embedding.tokens.weight", "blocks.*.weight_ih_l0", "blocks.*.weight_hh_l0"},
        ENDS | {"blocks.*.bias_ih_l0", "blocks.*.bias_hh_l0"},
    ),
    "block-recurrent transformer": BLOCK_RECURRENT,
    "block-recurrent transformer of one layer": BLOCK_RECURRENT,
    "infini attention": (CAUSAL, CAUSAL_AT_REST | {"blocks.*.self_attention.gate"}),
    "infini attention without the delta rule": (CAUSAL, CAUSAL_AT_REST | {"blocks.*.self_attention.gate"}),
    "gated delta net": (DELTA | under(MATRIX, "gates.steps.to_step.weight"), DELTA_AT_REST | STEPS),
    "delta net": (DELTA, DELTA_AT_REST),
    "gla": (ADDING | under(f"{MATRIX}.gates", "down.weight", "up.weight"), DELTA_AT_REST | {f"{MATRIX}.gates.up.bias"}),
    "mamba2": (ADDING | under(MATRIX, "gates.steps.to_step.weight"), DELTA_AT_REST | STEPS),
    "stable hadamard memory": HADAMARD,
    "stable hadamard memory of one row": HADAMARD,
    "stable hadamard memory without calibration": ADDED,
    "bmojo": (FADED[0] | {"blocks.*.predict.weight"}, FADED[1]),
    "bmojo without a store": FADED,
    "bmojo of random places": FADED,
    "titans": TITANS,
    "titans with a linear memory": TITANS,
    "titans, memory as a layer": MAL,
    "titans, memory as context": MAC,
    "titans, memory as a gate": MAG,
    "llama": LLAMA,
    "llama with a window": LLAMA,
}
"""Of each model what decays and what does not; ``*`` is every layer."""
BUILD = {**MODELS, "transformer, relative": partial(transformer, positions="relative")}


def groups(module: nn.Module) -> tuple[set[str], set[str]]:
    """The names in the group of the optimizer that decays, and in the others."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, *others = ([names[id(p)] for p in group["params"]] for group in parameter_groups(module))
    assert len(decayed) + sum(map(len, others)) == len(names)
    assert [group.get("weight_decay") for group in parameter_groups(module)] == [None, *[0.0] * len(others)]
    return set(decayed), set().union(*others)


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


def rates(module: nn.Module) -> dict[str, float]:
    """The factor of the learning rate of each parameter that has one."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(p)]: group[FACTOR] for group in parameter_groups(module) if FACTOR in group for p in group["params"]
    }


def test_the_gates_of_infini_attention_alone_have_a_learning_rate_of_their_own() -> None:
    own = {name: found for name, build in BUILD.items() if (found := rates(build()))}
    gates = {f"blocks.{n}.self_attention.gate": 10.0 for n in range(2)}
    assert own == {"infini attention": gates, "infini attention without the delta rule": gates}


def test_a_gate_moves_ten_times_as_far_as_another_vector_through_warmup_and_decay() -> None:
    """Adam moves each entry by about the learning rate, whatever the gradient."""
    model = infini_attention()
    options = Optimization(learning_rate=1e-3, warmup_steps=2, weight_decay=0.5, optimizer=None, lr_scheduler=None)
    optimizer, schedule = options.build(model, total_steps=6)
    gate, bias = model.blocks[0].self_attention.gate, model.blocks[0].ffn.up.bias
    for step in range(6):
        before = gate.detach().clone(), bias.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        rate = 1e-3 * lr_factor(step, warmup_steps=2, total_steps=6)
        optimizer.step()
        torch.testing.assert_close(before[0] - gate, torch.full_like(gate, 10 * rate), rtol=1e-6, atol=0)
        torch.testing.assert_close(before[1] - bias, torch.full_like(bias, rate), rtol=1e-6, atol=0)
        schedule.step()


def test_another_optimizer_and_schedule_keep_the_factor() -> None:
    options = Optimization(
        learning_rate=None,
        warmup_steps=None,
        weight_decay=None,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    )
    optimizer, schedule = options.build(infini_attention(), total_steps=-1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 1.0])
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.5])


def test_the_factor_of_looked_up_values_falls_from_four_to_one_in_the_last_step_whatever_the_schedule() -> None:
    """Adam moves each entry by about the learning rate, whatever the gradient."""
    model = transformer(feed_forward={**ULTRA, "layers": [1]})
    for schedule in (None, partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=6)):
        options = Optimization(None, None, 0.5, None, schedule)
        optimizer, schedule = options.build(model, total_steps=5)
        values, bias = model.blocks[1].ffn.values, model.blocks[0].ffn.up.bias
        factors = []
        for step in range(5):
            before = values.detach().clone(), bias.detach().clone()
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            rates = [group["lr"] for group in optimizer.param_groups]
            with falling_rates(optimizer, step=step, total_steps=5):
                optimizer.step()
            assert [group["lr"] for group in optimizer.param_groups] == rates
            moved = ((before[0] - values) / (before[1] - bias).mean()).detach()
            torch.testing.assert_close(moved, moved[:1, :1].expand_as(moved), rtol=1e-6, atol=0)
            factors.append(float(moved.mean()))
            schedule.step()
        assert factors == pytest.approx([4, 3.25, 2.5, 1.75, 1], rel=1e-6)


def test_without_a_last_step_a_factor_stays_at_its_first_value() -> None:
    optimizer = torch.optim.SGD(parameter_groups(transformer(feed_forward={**ULTRA, "layers": [0, 1]})), lr=0.1)
    assert [group.get(FALL) for group in optimizer.param_groups] == [None, None, (4.0, 1.0)]
    with falling_rates(optimizer, step=1000, total_steps=-1):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 0.4])


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


class Fast(OwnModel):
    """Two of its parameters have a rate of their own; one of them is a matrix."""

    learning_rates: ClassVar = {"gain": 3.0, "matrix": 0.5, "absent": 2.0}


class Faster(Fast):
    """Changes one rate, and keeps the other."""

    learning_rates: ClassVar = {"gain": 4.0}


def test_a_class_gives_its_parameters_rates_and_a_class_below_may_change_them() -> None:
    assert rates(Fast()) == {"gain": 3.0, "matrix": 0.5}
    assert rates(Faster()) == {"gain": 4.0, "matrix": 0.5}
    assert rates(OwnModel()) == {}
    assert groups(Fast())[1] == groups(OwnModel())[1] | {"matrix"}


@pytest.mark.parametrize("given", [{"tokn": 2.0}, {"rnn.weight_ih_l0": 2.0}, ("gain",)])
def test_rates_of_what_is_not_there_are_refused_with_what_there_is(given: object) -> None:
    wrong = type("Wrong", (OwnModel,), {"learning_rates": given})
    with pytest.raises(
        UsageError, match=r"Wrong.learning_rates must be a dictionary .*\(tokens, matrix, scale, gain\)"
    ):
        parameter_groups(wrong())


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan, (4.0, 0.0), (math.nan, 1.0)])
def test_a_factor_that_is_no_rate_is_refused(factor: float | tuple[float, float]) -> None:
    wrong = type("Wrong", (OwnModel,), {"learning_rates": {"gain": factor}})
    message = f"Wrong.learning_rates must hold factors above 0 and finite, got {factor}"
    with pytest.raises(UsageError, match=re.escape(message)):
        parameter_groups(wrong())


def test_two_modules_that_share_a_parameter_must_agree_on_its_rate() -> None:
    one, other = Fast(), Faster()
    other.gain = one.gain
    message = (
        "Faster.learning_rates gives a parameter the factor 4.0, and another module that shares it 3.0: give it one"
    )
    with pytest.raises(UsageError, match=message):
        parameter_groups(nn.ModuleList([one, other]))


def by_name(module: nn.Module, chosen: dict[str, float]) -> dict[str, tuple[object, object]]:
    """The factor and the weight decay of each parameter; None where the group has none."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(p)]: (group.get(FACTOR, group.get(FALL)), group.get("weight_decay"))
        for group in parameter_groups(module, chosen)
        for p in group["params"]
    }


def test_chosen_factors_multiply_declared_ones_and_change_nothing_about_what_decays() -> None:
    before, after = by_name(Fast(), {}), by_name(Fast(), {"ma*": 3.0, "attention.*": 0.5, "gain": 2.0})
    changed = {name: after[name] for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == {
        "matrix": (1.5, 0.0),
        "gain": (6.0, 0.0),
        "attention.in_proj_weight": (0.5, None),
        "attention.in_proj_bias": (0.5, 0.0),
        "attention.out_proj.weight": (0.5, None),
        "attention.out_proj.bias": (0.5, 0.0),
        "attention.bias_k": (0.5, 0.0),
        "attention.bias_v": (0.5, 0.0),
    }
    model = transformer(feed_forward={**ULTRA, "layers": [1]})
    assert by_name(model, {"*.values": 0.5})["blocks.1.ffn.values"] == ((2.0, 0.5), 0.0)


def test_the_groups_of_chosen_factors_stand_behind_all_others_and_depend_on_the_patterns_alone() -> None:
    """A checkpoint knows groups, and parameters in them, by their place: another value must not change it."""
    model = Fast()
    plain, chosen = parameter_groups(model), parameter_groups(model, {"rnn.*": 2.0, "conv.*": 2.0})
    sizes = [len(group["params"]) for group in chosen]
    assert len(chosen) == len(plain) + 4
    assert sizes == [len(group["params"]) for group in parameter_groups(model, {"rnn.*": 2.0, "conv.*": 3.0})]
    assert [group[FACTOR] for group in chosen[-4:]] == [2.0] * 4


@pytest.mark.parametrize("chosen", [{"*": 3.0}, {"matrix": 3.0, "[!m]*": 3.0}])
def test_adam_moves_by_the_learning_rate_times_the_chosen_factor(chosen: dict[str, float]) -> None:
    model = OwnModel()
    options = Optimization(1e-3, 0, 0.0, None, None, chosen)
    optimizer, _ = options.build(model, total_steps=-1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old - new, torch.full_like(old, 3e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (
            {"wroter.*": 2.0},
            "'wroter.*' with the factor 2.0 must match a parameter, .* are tokens, matrix, scale, gain",
        ),
        ({"gain": 0.0}, "'gain' with the factor 0.0 must match a parameter, with a factor above 0 and finite"),
        ({"gain": math.nan}, "'gain' with the factor nan"),
        ({"rnn.*": 2.0, "*_l0": 3.0}, r"'\*_l0' and 'rnn.\*' both match rnn.weight_ih_l0: give it one"),
    ],
)
def test_impossible_patterns_are_refused_with_what_there_is(chosen: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=f"learning_rate_factors: {told}"):
        parameter_groups(OwnModel(), chosen)
