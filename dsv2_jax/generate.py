"""python -m dsv2_jax.generate --checkpoint DIR --prompt TEXT: continues a text and streams it to the terminal."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv2_jax import cli
from dsv2_jax.config import check
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request
from dsv2_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continues a text or rows of token ids."""

    checkpoint: Path  # a run's folder or a Hugging Face folder
    prompt: str = ""  # the text to continue; without it the model starts a document
    prompt_ids: Path | None = None  # a .npy of ids [B, T], in place of a text
    out_ids: Path | None = None  # with --prompt-ids: output .npy of prompt and new ids [B, T + max_new]
    max_new: int = 128  # new tokens
    temperature: float = 0.8  # 0 is greedy
    top_p: float = 0.95  # samples from the fewest tokens whose probabilities sum to this
    seed: int = 0


def main() -> None:
    """Reads the command line and generates."""
    args = cli.parse(Generate, prog=cli.called("python -m dsv2_jax.generate"))
    from dsv2_jax import loading
    from dsv2_jax.parallel import xla

    xla.choose()
    cli.keep_compiled_programs()
    check((args.prompt_ids is None) == (args.out_ids is None), "--prompt-ids and --out-ids need each other")
    check(args.prompt_ids is None or not args.prompt, "give --prompt or --prompt-ids, not both")
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p)
    prompts = None if args.prompt_ids is None else cli.read_ids(args.prompt_ids)
    loaded = loading.load_for_engine(args.checkpoint)
    if prompts is None:
        stream(loaded, args, sampling)
        return
    requests = [
        Request(prompt=tuple(row), max_new=args.max_new, sampling=sampling, seed=args.seed + i)
        for i, row in enumerate(prompts.tolist())
    ]
    new = [result.tokens for result in engine(loaded, requests).generate(requests)]
    ids_BT = np.concatenate([prompts, np.array(new)], axis=1)
    np.save(args.out_ids, ids_BT.astype(np.int64))  # pyright: ignore[reportArgumentType]
    print(f"wrote ids [{', '.join(map(str, ids_BT.shape))}] to {args.out_ids}")


def engine(loaded: Any, requests: Sequence[Request]) -> Engine:
    """An engine with the capacity that these requests need."""
    longest = max(len(request.prompt) + request.max_new for request in requests)
    capacity = Capacity(
        rows=min(len(requests), 16), length=min(longest, loaded.model.max_position_embeddings), chunk=64
    )
    return Engine(loaded.params, loaded.model, capacity=capacity, tokenizer=loaded.tokenizer)


def stream(loaded: Any, args: Generate, sampling: Sampling) -> None:
    """Writes the prompt and its continuation to the terminal, token by token."""
    tokenizer = loaded.need_tokenizer()
    request = Request(
        prompt=(tokenizer.bos_id, *tokenizer.encode(args.prompt)),
        max_new=args.max_new,
        sampling=sampling,
        seed=args.seed,
        stop_ids=(tokenizer.eos_id,),
        text=True,
    )
    running = engine(loaded, [request])
    running.add(request)
    print(args.prompt, end="", flush=True)
    while running.unfinished:
        for event in running.step():
            print(event.text, end="", flush=True)
    print()


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
