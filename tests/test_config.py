"""Presets against the paper's figures, and impossible configs refused in words that name the field."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs import PRESETS, models
from dsv2_jax import parameters
from dsv2_jax.config import Attention, Batch, Config, Data, Model, Moe, Optimizer, Rope, from_json, to_json


def moe_by_hand(d, layers, heads, queries, first, experts, active, width, vocabulary=102_400):
    """(all, activated) parameters of V2 or Lite by the matrices of the paper's appendix C and section 2.2."""
    attention = queries + d * (512 + 64) + 512 + 512 * heads * (128 + 128) + heads * 128 * d
    expert = 3 * d * width
    outside = (
        vocabulary * d + d + layers * (attention + 2 * d) + 3 * d * first + (layers - 1) * (d * experts + 2 * expert)
    )
    return (
        vocabulary * d + outside + (layers - 1) * experts * expert,
        outside + (layers - 1) * active * expert,
    )


@pytest.mark.parametrize(
    ("model", "by_hand", "billions"),
    [
        (
            models.v2(),
            moe_by_hand(5120, 60, 128, 5120 * 1536 + 1536 + 1536 * 128 * 192, 12288, 160, 6, 1536),
            (236, 21),
        ),
        (models.v2_lite(), moe_by_hand(2048, 27, 16, 2048 * 16 * 192, 10944, 64, 6, 1408), (15.7, 2.4)),
    ],
    ids=["v2", "v2_lite"],
)
def test_counts_of_the_moe_models(model, by_hand, billions):
    counts = parameters.count(model), parameters.count_activated(model)
    assert counts == by_hand
    assert counts[0] / 1e9 == pytest.approx(billions[0], rel=0.002)
    assert counts[1] / 1e9 == pytest.approx(billions[1], rel=0.025)  # the paper gives two digits: 20.9 and 2.45 here


def test_count_of_the_dense_baseline():
    d, layers, ffn, vocabulary = 8192, 95, 22_016, 102_400
    layer = d * 64 * 128 + 2 * d * 8 * 128 + 64 * 128 * d + 3 * d * ffn + 2 * d
    count = parameters.count(models.dense_67b())
    assert count == 2 * vocabulary * d + layers * layer + d
    assert round(count / 1e9) == 67


@pytest.mark.parametrize(("name", "elements"), [("v2", 34_560), ("v2_lite", 15_552), ("dense_67b", 194_560)])
def test_cache_elements_of_a_token(name, elements):
    assert getattr(models, name)().cache_elements == elements


def test_nano_fits_a_laptop():
    assert 5e6 < parameters.count(models.nano()) < 15e6


def test_the_papers_recipe():
    v2, lite = PRESETS["v2"](), PRESETS["v2_lite"]()
    assert (v2.batch.ramp_from, v2.batch.size, v2.batch.ramp_tokens) == (2304, 9216, 225 * 10**9)
    assert (v2.optimizer.peak_lr, v2.optimizer.decay_at, v2.tokens) == (2.4e-4, (0.6, 0.9), 8_100 * 10**9)
    assert (lite.optimizer.peak_lr, lite.optimizer.decay_at, lite.tokens) == (4.2e-4, (0.8, 0.9), 5_700 * 10**9)
    assert (lite.batch.size, lite.model.moe.capacity_factor, lite.model.moe.device_balance) == (4608, 0, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_json_gives_the_config_back(name):
    config = PRESETS[name]()
    assert from_json(Config, to_json(config)) == config


def test_json_with_an_unknown_field_or_without_one_that_has_no_default_is_refused():
    text = to_json(PRESETS["tiny"]())
    with pytest.raises(ValueError, match=r"Config\.batch has no field sise"):
        from_json(Config, text.replace('"size": 4', '"size": 4, "sise": 3'))
    with pytest.raises(ValueError, match="Config lacks the field workdir, which has no default"):
        from_json(Config, text.replace('"workdir": "runs/tiny",', ""))


@pytest.mark.parametrize(
    "names",
    [("seed",), ("grpo",), ("batch", "micro_size"), ("model", "rope", "kind"), ("model", "moe", "budget_sequences")],
    ids=".".join,
)
def test_a_field_that_did_not_exist_yet_takes_its_default(names):
    """The config of an old run keeps its fields; a new field gives the behaviour of the code before that field."""
    config = PRESETS["nano_long"]()
    raw = json.loads(to_json(config))
    holder, wanted = raw, config
    for name in names[:-1]:
        holder, wanted = holder[name], getattr(wanted, name)
    del holder[names[-1]]
    found = from_json(Config, json.dumps(raw))
    for name in names[:-1]:
        found = getattr(found, name)
    default = next(f.default for f in dataclasses.fields(wanted) if f.name == names[-1])
    assert found == dataclasses.replace(wanted, **{names[-1]: default})


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Moe(n_group=7), "moe.n_routed_experts (160) must be a multiple of moe.n_group (7)"),
        (lambda: Moe(topk_group=9), "moe.topk_group (9) cannot exceed moe.n_group (8)"),
        (lambda: Moe(num_experts_per_tok=61), "exceeds the 60 experts of moe.topk_group (3) groups"),
        (lambda: Moe(exempt_fraction=1.5), "moe.exempt_fraction"),
        (lambda: Attention(qk_rope_head_dim=63), "attention.qk_rope_head_dim must be even"),
        (lambda: Attention(num_key_value_heads=8), "attention.num_key_value_heads belongs to kind gqa"),
        (
            lambda: Attention(kind="gqa", num_key_value_heads=3),
            "must be a multiple of attention.num_key_value_heads (3)",
        ),
        (lambda: Rope(factor=0.5), "rope.factor must be at least 1"),
        (lambda: Model(first_k_dense_replace=61), "model.first_k_dense_replace (61)"),
        (lambda: Model(max_position_embeddings=8192), "exceeds the range of RoPE"),
        (lambda: Data(held_out_fraction=0.0), "data.held_out_fraction"),
        (lambda: Batch(size=10, micro_size=4), "batch.size (10) must be a multiple of batch.micro_size (4)"),
        (lambda: Batch(size=8, micro_size=4, ramp_from=6, ramp_tokens=9), "batch.ramp_from (6)"),
        (lambda: Batch(size=8, micro_size=4, ramp_from=4), "batch.ramp_tokens must be positive"),
        (lambda: Optimizer(decay_at=(0.9, 0.6)), "optimizer.decay_at must be rising fractions"),
        (lambda: Config(workdir=Path("x"), batch=Batch(length=4097)), "batch.length (4097) exceeds"),
        (lambda: Config(workdir=Path("x"), tokens=100), "tokens (100) is less than one batch"),
    ],
)
def test_impossible_configs(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert words in str(error.value)


def test_a_check_runs_on_replace_too():
    with pytest.raises(ValueError, match=r"batch\.length"):
        dataclasses.replace(PRESETS["tiny"](), batch=Batch(size=4, length=2048))


def floats(value, path=()):
    """Where a config holds floats."""
    if isinstance(value, float):
        yield path
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from floats(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, tuple):
        for i, one in enumerate(value):
            yield from floats(one, (*path, i))


def replaced(value, path, new):
    if not path:
        return new
    if isinstance(value, tuple):
        return (*value[: path[0]], replaced(value[path[0]], path[1:], new), *value[path[0] + 1 :])
    return dataclasses.replace(value, **{path[0]: replaced(getattr(value, path[0]), path[1:], new)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_no_number_is_nan_or_infinite(bad):
    config = PRESETS["nano"]()
    paths = list(floats(config))
    assert ("optimizer", "weight_decay") in paths and ("model", "moe", "expert_balance") in paths and len(paths) > 25
    for path in paths:
        with pytest.raises(ValueError, match=r"must|exceeds"):
            replaced(config, path, bad)
    text = to_json(config)
    assert from_json(type(config), text) == config
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay must be a finite number, not nan"):
        from_json(type(config), text.replace('"weight_decay": 0.1', '"weight_decay": NaN'))
