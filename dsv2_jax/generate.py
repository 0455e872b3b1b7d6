"""python -m dsv2_jax.generate --checkpoint DIR --prompt TEXT: continues a text, streamed to the terminal."""

import dataclasses
from pathlib import Path

import numpy as np

from dsv2_jax import cli
from dsv2_jax.config import Compute, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continues a text or rows of token ids."""

    checkpoint: Path  # a run's folder or a Hugging Face folder
    prompt: str = ""  # the text to continue; without one the model begins a document
    prompt_ids: Path | None = None  # instead of a text: a .npy of ids [B, T]
    out_ids: Path | None = None  # with --prompt-ids: where prompt and new ids go, .npy [B, T + max_new]
    max_new: int = 128  # tokens to add
    temperature: float = 0.8  # 0 is greedy
    top_p: float = 0.95  # the fewest tokens whose probabilities reach this stay in the draw
    seed: int = 0


def main() -> None:
    """The command line."""
    args = cli.parse(Generate, prog="python -m dsv2_jax.generate")
    from dsv2_jax import loading
    from dsv2_jax.inference import generation
    from dsv2_jax.inference.sampling import Sampling

    cli.keep_compiled_programs()
    check((args.prompt_ids is None) == (args.out_ids is None), "--prompt-ids and --out-ids belong together")
    check(args.prompt_ids is None or not args.prompt, "give --prompt or --prompt-ids, not both")
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p)
    prompts = None if args.prompt_ids is None else cli.read_ids(args.prompt_ids)
    loaded = loading.load(args.checkpoint)
    words = loaded.tokenizer
    if prompts is None:
        words = loaded.need_tokenizer()
        prompts = np.array([[words.bos_id, *words.encode(args.prompt)]])
    compute = Compute()
    prepared = generation.prepare(loaded.params, compute)
    new = generation.generate(
        prepared,
        prompts.tolist(),
        args.max_new,
        model=loaded.model,
        compute=compute,
        sampling=sampling,
        seed=args.seed,
    )
    if args.out_ids is not None:
        ids_BT = np.stack([*prompts.T, *new], axis=1)
        np.save(args.out_ids, ids_BT.astype(np.int64))
        print(f"wrote ids [{', '.join(map(str, ids_BT.shape))}] to {args.out_ids}")
        return
    assert words is not None
    print(args.prompt, end="", flush=True)
    ids, shown = [], ""
    for (token,) in new:
        if token == words.eos_id:
            break
        ids.append(int(token))
        text = words.decode(ids).rstrip("\ufffd")  # the bytes of a character may still be on their way
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()


if __name__ == "__main__":
    cli.main(main)
