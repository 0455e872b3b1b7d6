"""The shapes that tests, costs and tuning share: for each op, what the models ask of it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDecode:
    """`sequences` decode one token each; `length` slots of a sequence's cache are filled."""

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
