"""Measures the cost of quantization: bits per byte and KL of the logits on held-out text, bytes of weights and cache.

    python benchmarks/quantization.py --checkpoint RUN [--documents 24] [--json FILE]

Every setting reads the same documents through the engine's cache. The baseline has weights and cache in the dtype of
activations.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # Python searches the script's own folder only

from dsv2_jax import cli  # noqa: E402
from dsv2_jax.config import check  # noqa: E402

SETTINGS = (  # weights, cache; the first is the baseline
    ("compute", "compute"),
    ("compute", "bfloat16"),
    ("compute", "int8"),
    ("compute", "int6"),
    ("int8", "bfloat16"),
    ("float8", "bfloat16"),
    ("float8", "int6"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationBenchmark:
    """Measure quantized weights and caches on held-out text."""

    checkpoint: Path  # a run's folder
    documents: int = 24  # the first ones of at least 64 tokens in the held-out split
    json: Path | None = None  # write the figures to this file

    def __post_init__(self) -> None:
        check(self.documents > 0, f"--documents must be positive, not {self.documents}")


def read(loaded: Any, count: int, length: int) -> list[list[int]]:
    """Token ids of held-out documents, each with its BOS token, truncated to `length`."""
    from dsv2_jax.data import corpora

    tokenizer, held_out = loaded.need_tokenizer(), corpora.prepare(loaded.config.data).held_out
    documents = []
    for i in range(len(held_out)):
        ids = [tokenizer.bos_id, *tokenizer.encode(held_out[i]["text"].decode())][:length]
        documents += [ids] if len(ids) >= 64 else []
        if len(documents) == count:
            break
    check(bool(documents), "the held-out split has no document of 64 tokens")
    return documents


def log_softmax(logits_TW: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64."""
    z = logits_TW.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def main() -> int:
    """Measures every setting and prints the table."""
    options = cli.parse(QuantizationBenchmark, prog="quantization.py")
    from dsv2_jax import loading
    from dsv2_jax.inference.engine import Capacity, Engine

    cli.keep_compiled_programs()
    loaded = loading.load(options.checkpoint)
    length = min(512, loaded.model.max_position_embeddings)
    documents = read(loaded, options.documents, length)
    sizes = loaded.need_tokenizer().bytes_per_token
    text_bytes = sum(int(sizes[ids[1:]].sum()) for ids in documents)
    table = rich.table.Table(
        "weights", "cache", "bits/byte", "change", "KL, nats", "weights, MB", "cache, bits per number",
        title=f"{len(documents)} held-out documents, {sum(map(len, documents)):,} tokens",
    )  # fmt: skip
    figures, reference, first = [], [], 0.0
    for weights, cache in SETTINGS:
        capacity = Capacity(rows=1, length=length, chunk=length, weights=weights, cache=cache)  # pyright: ignore
        engine = Engine(loaded.params, loaded.model, capacity=capacity)
        nll = divergence = 0.0
        for i, ids in enumerate(documents):
            logp_TW = log_softmax(engine.logits(ids)[:-1])
            if len(reference) == i:
                reference.append(logp_TW.astype(np.float32))
            nll -= float(np.take_along_axis(logp_TW, np.array(ids[1:])[:, None], -1).sum())
            divergence += float((np.exp(reference[i]) * (reference[i] - logp_TW)).sum())
        bits = nll / math.log(2) / text_bytes
        first = first or bits
        figures.append(
            {
                "weights": weights,
                "cache": cache,
                "bits_per_byte": bits,
                "change": bits / first - 1,
                "kl_nats": divergence / sum(len(ids) - 1 for ids in documents),
                "weight_bytes": engine.weight_bytes,
                "cache_bits_per_number": 8 * engine.cache_bytes / loaded.model.cache_elements,
            }
        )
        f = figures[-1]
        table.add_row(
            weights, cache, f"{bits:.4f}", f"{f['change']:+.3%}", f"{f['kl_nats']:.6f}",
            f"{f['weight_bytes'] / 1e6:.1f}", f"{f['cache_bits_per_number']:.2f}",
        )  # fmt: skip
    rich.console.Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli.main(main)
