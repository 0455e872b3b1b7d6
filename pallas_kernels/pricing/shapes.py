"""Shapes of each op in the models, for tests, costs and tuning."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDecode:
    """`sequences` sequences decode one token each; each has `length` filled slots in the cache."""

    heads: int
    latent: int
    rope: int
    sequences: int
    length: int
    page: int  # slots


LATENT_DECODE = {
    "v2": LatentDecode(heads=128, latent=512, rope=64, sequences=64, length=8192, page=256),
    "v2_lite": LatentDecode(heads=16, latent=512, rope=64, sequences=64, length=8192, page=256),
    "nano": LatentDecode(heads=4, latent=64, rope=32, sequences=8, length=512, page=128),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Training on rows of `tokens` tokens; rope is 0 for MHA, GQA and MQA, which have no shared key."""

    heads: int
    kv_heads: int
    nope: int
    rope: int
    value: int
    tokens: int


LATENT_ATTENTION = {
    "v2": LatentAttention(heads=128, kv_heads=128, nope=128, rope=64, value=128, tokens=4096),
    "v2_lite": LatentAttention(heads=16, kv_heads=16, nope=128, rope=64, value=128, tokens=4096),
    "gqa": LatentAttention(heads=64, kv_heads=8, nope=128, rope=0, value=128, tokens=4096),
    "nano": LatentAttention(heads=4, kv_heads=4, nope=32, rope=32, value=32, tokens=512),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertDispatch:
    """The routed experts of one layer on one device, with `rows` kept (token, expert) pairs."""

    tokens: int
    active: int
    rows: int
    experts: int
    hidden: int
    width: int


EXPERT_DISPATCH = {
    # 160 experts over 8 devices, 3 devices per token, a budget of 4,096 tokens' pairs for each device
    "v2": ExpertDispatch(tokens=12_288, active=6, rows=24_576, experts=20, hidden=5120, width=1536),
    "v2_lite": ExpertDispatch(tokens=32_768, active=6, rows=196_608, experts=64, hidden=2048, width=1408),
    "nano": ExpertDispatch(tokens=2048, active=4, rows=8192, experts=16, hidden=256, width=128),
}

EXPERT_DECODE = {
    # one token of each of 64 sequences per device, and of about 430; devices as above
    "v2_decode": ExpertDispatch(tokens=192, active=6, rows=384, experts=20, hidden=5120, width=1536),
    "v2_decode_full": ExpertDispatch(tokens=1280, active=6, rows=2560, experts=20, hidden=5120, width=1536),
}
