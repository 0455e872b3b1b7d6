"""Text to ids and back: byte-fallback BPE learnt from the corpus, or any lossless Hugging Face `tokenizer.json`.

Both run in the `tokenizers` library, so training, evaluation and whoever loads an export split text the same way.
SentencePiece is the trainer: what it learns is rewritten as a `tokenizer.json` with plain spaces where it has U+2581,
so that a U+2581 of the text itself is not lost.
"""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from dsv2_jax.config import Data, check
from dsv2_jax.data import chat
from dsv2_jax.data.corpora import Corpus
from dsv2_jax.storage import published

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

_SPACE = "\u2581"  # SentencePiece's
_RECIPE = "1"  # raise it when training would give other ids
_SMALLEST_VOCABULARY = 320  # 256 bytes, three special ids, and some room to learn
_SAMPLE_BYTES = 64_000_000  # more text teaches a BPE nothing new
_CHUNK = 1000  # characters of what SentencePiece calls a sentence

# Runs of blanks, line ends, several scripts, code, digits, control characters and U+2581 itself.
_PROBE = (
    "The quick brown fox's 3.14159 jumps;  over\tthe lazy dog.\n\n    if x[0] != 'y':\r\n        return None  # ok\n"
    "滚滚长江东逝水，浪花淘尽英雄。\u3000天下大势 🙂👨‍👩‍👧 naïve e\u0301 \u2581 \x01\x7f\u00a0\ufeff русский ١٢  \n "
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A lossless tokenizer: decode(encode(text)) == text for every text without unpaired surrogates."""

    backend: tokenizers.Tokenizer
    settings: dict[str, Any]  # the contents of tokenizer_config.json
    bos_id: int
    eos_id: int
    bytes_per_token: np.ndarray  # int32 [vocab_size]: UTF-8 bytes an id stands for; 0 of special ids

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.bytes_per_token)

    @property
    def identity(self) -> str:
        """Equal for tokenizers that give every document the same ids."""
        return f"{self.bos_id} {self.eos_id} {self.backend.to_str()}"

    def encode(self, text: str) -> list[int]:
        """The ids of the text, no special ones added. A special token's name in the text is text like any other."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special ids show their names, bytes that are not UTF-8 show as U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load` and transformers' AutoTokenizer read."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.settings, indent=2, ensure_ascii=False))

    save_hf = save  # a run's folder and an export hold the same two files


def load(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`, a SentencePiece `.model`, or a folder with either (the first, when it has both).

    The names of the ids for begin and end come from `tokenizer_config.json` beside it, else they are DeepSeek's.
    Raises ValueError for a path without a tokenizer, a damaged file, and one that loses or changes text.
    """
    check(path.exists(), f"no tokenizer at {path}: there is no such file or folder")
    file = path
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model"]
        file = next((c for c in candidates if c.is_file()), path)
        check(file != path, f"no tokenizer in {path}: it has neither tokenizer.json nor tokenizer.model")
    beside = file.with_name("tokenizer_config.json")
    if file.suffix == ".model":
        return _assemble(_from_sentencepiece(file), _settings(), file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{file} is not a tokenizer.json: {error}") from None
    return _assemble(backend, json.loads(beside.read_text()) if beside.exists() else _settings(), file)


def train(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Learns a byte-fallback BPE and writes it into the folder, with SentencePiece's own `tokenizer.model` beside.

    The same texts give the same ids. Digits stand one by one; a quarter of the ids at most are single characters, the
    rarer ones become bytes. A corpus too small for `vocab_size` gives fewer ids, not an error. Raises ValueError below
    320 ids and for texts without a character to learn from.
    """
    check(
        vocab_size >= _SMALLEST_VOCABULARY,
        f"model.vocab_size ({vocab_size}) is too small to train a tokenizer: at least {_SMALLEST_VOCABULARY} "
        "(256 bytes, special ids, and some to learn)",
    )
    chunks = [chunk for text in _sample(texts) for chunk in _chunks(text)]
    counts = collections.Counter(itertools.chain.from_iterable(chunks))
    check(any(character not in "\n\0" for character in counts), "no text to train a tokenizer on")
    # SentencePiece leaves out at most 2% of the characters of a text; Chinese in a small vocabulary needs more.
    common = {c for c, _ in counts.most_common(min(vocab_size // 4, (vocab_size - 259) // 2))}
    cut = {ord(c): "\0" for c in counts if c not in common}
    sentences = [part for chunk in chunks for part in chunk.translate(cut).split("\0") if part]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        max_sentence_length=1 << 20,
        bos_id=0,
        eos_id=1,
        unk_id=2,
        pad_id=-1,
        bos_piece=BOS,
        eos_piece=EOS,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    load(folder / "tokenizer.model").save(folder)
    return load(folder)


def for_config(data: Data, vocab_size: int, corpus: Corpus) -> Tokenizer:
    """The tokenizer that the settings name: trained on the corpus once and kept under `data.folder`, or loaded.

    Raises ValueError when it has more ids than the model.
    """
    if data.tokenizer != "train":
        tokenizer = load(Path(data.tokenizer))
    else:
        recipe = f"{_RECIPE} {corpus.digest} {vocab_size} {sentencepiece.__version__}"
        folder = data.folder / "tokenizers" / hashlib.blake2b(recipe.encode(), digest_size=8).hexdigest()
        if not folder.exists():
            with published(folder, first_wins=True) as scratch:
                train((example["text"].decode() for example in corpus.train), vocab_size, scratch)
        tokenizer = load(folder)
    check(
        tokenizer.vocab_size <= vocab_size,
        f"the tokenizer has {tokenizer.vocab_size} ids and the model only {vocab_size}; "
        f"raise model.vocab_size or choose another data.tokenizer",
    )
    return tokenizer


def _sample(texts: Iterable[str]) -> Iterator[str]:
    """The first texts, as many as teach something. Prepared corpora come shuffled, so they are a fair sample."""
    left = _SAMPLE_BYTES
    for text in texts:
        yield text[:left]
        left -= len(text.encode())
        if left <= 0:
            return


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces of whole lines; longer lines are cut."""
    part = ""
    for line in text.splitlines(keepends=True):
        for at in range(0, len(line), _CHUNK):
            if part and len(part) + len(line[at : at + _CHUNK]) > _CHUNK:
                yield part
                part = ""
            part += line[at : at + _CHUNK]
    if part:
        yield part


def _settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat.TEMPLATE,
    }


def _from_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """The same vocabulary and merges for the other library; a begin id comes first when special ids are asked for."""
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:
        raise ValueError(f"{file} is not a SentencePiece model: {error}") from None
    trainer, normalizer, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    check(
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and not (normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces),
        f"{file} would change text; only byte-fallback BPE without normalisation, dummy prefix or removal of spaces "
        "is read from a SentencePiece model (else give the tokenizer.json)",
    )
    learnt = {p.piece.replace(_SPACE, " "): p.score for p in proto.pieces if p.type == kinds.NORMAL}
    vocabulary = {
        p.piece if p.type != kinds.NORMAL else p.piece.replace(_SPACE, " "): i for i, p in enumerate(proto.pieces)
    }
    merges = []
    for piece in sorted(learnt, key=lambda p: -learnt[p]):
        halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(left, right) for left, right in halves if left in learnt and right in learnt]
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=False)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    special = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    if BOS in vocabulary:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[BOS, "$A"], pair=[BOS, "$A", BOS, "$B:1"], special_tokens=[(BOS, vocabulary[BOS])]
        )
    return backend


def _assemble(backend: tokenizers.Tokenizer, settings: dict[str, Any], file: Path) -> Tokenizer:
    backend.encode_special_tokens = True  # a corpus that spells a special token must not forge one
    named = {}
    for key in ("bos_token", "eos_token"):
        token = settings.get(key)
        name = token["content"] if isinstance(token, dict) else token
        named[key] = backend.token_to_id(name) if name else None
        check(named[key] is not None, f"{file} has no id for its {key} {name!r}; name it in tokenizer_config.json")
    tokenizer = Tokenizer(backend, settings, named["bos_token"], named["eos_token"], _bytes_per_token(backend, file))
    ids = tokenizer.encode(_PROBE)
    lossless = tokenizer.decode(ids) == _PROBE and tokenizer.bytes_per_token[ids].sum() == len(_PROBE.encode())
    check(lossless, f"{file} does not give text back as it was, so bits per byte would be wrong; choose a lossless one")
    return tokenizer


def _bytes_per_token(backend: tokenizers.Tokenizer, file: Path) -> np.ndarray:
    """int32 [vocab_size]. Byte-level tokenizers spell a byte as a character, byte-fallback ones as `<0x0A>`."""
    description = json.loads(backend.to_str())
    decoder = description["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    byte_level = "ByteLevel" in kinds
    check(byte_level or "ByteFallback" in kinds, f"{file} is neither a byte-level nor a byte-fallback tokenizer")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int32)
    for piece, i in vocabulary.items():
        if byte_level:
            sizes[i] = len(piece)
        else:
            sizes[i] = 1 if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else len(piece.encode())
    for i, added in backend.get_added_tokens_decoder().items():
        sizes[i] = 0 if added.special else len(added.content.encode())
    return sizes
