"""The shapes that tests compile and the cost tool prices, by op."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExpertDispatch:
    """What one device has to do for one layer's experts."""

    tokens: int
    active: int
    rows: int  # pairs kept
    experts: int
    hidden: int
    width: int


EXPERT_DISPATCH = {
    # 160 experts over 8 devices, 3 devices a token, a budget of 4,096 tokens' pairs for each device
    "v2": ExpertDispatch(tokens=12_288, active=6, rows=24_576, experts=20, hidden=5120, width=1536),
    "v2_lite": ExpertDispatch(tokens=32_768, active=6, rows=196_608, experts=64, hidden=2048, width=1408),
    "nano": ExpertDispatch(tokens=2048, active=4, rows=8192, experts=16, hidden=256, width=128),
}
