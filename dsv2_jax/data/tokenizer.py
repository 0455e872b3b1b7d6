"""Tokenizers: byte-fallback BPE trained on the corpus, or any lossless Hugging Face `tokenizer.json`.

Both run in the `tokenizers` library, so training, evaluation and users of an export split text the same way.
SentencePiece trains; its model is converted to a `tokenizer.json` with spaces in place of U+2581, so that a U+2581 in
the text is not lost.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from dsv2_jax.config import Data, check
from dsv2_jax.data import chat
from dsv2_jax.storage import published

if TYPE_CHECKING:  # corpora.py imports this module
    from dsv2_jax.data.corpora import Corpus

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

_SPACE = "\u2581"  # SentencePiece's
_RECIPE = "1"  # increment when a change of the training gives other ids
_SMALLEST_VOCABULARY = 320  # 256 bytes, three special ids, and some learnt pieces
_SAMPLE_BYTES = 64_000_000  # more text does not improve a BPE
_CHUNK = 1000  # characters per sentence of SentencePiece

# Tests runs of spaces, newlines, several scripts, code, digits, control characters and U+2581.
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
    bytes_per_token: np.ndarray  # int32 [vocab_size]: UTF-8 bytes of an id's text; 0 for special ids
    template: chat.Template  # the chat template in the settings, or DeepSeek-V2's
    plain: tokenizers.Tokenizer  # the same without added tokens and post-processing, for exact offsets

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.bytes_per_token)

    @property
    def identity(self) -> str:
        """A text that is equal for tokenizers that give every document the same ids."""
        return f"{self.bos_id} {self.eos_id} {self.backend.to_str()}"

    def encode(self, text: str) -> list[int]:
        """The ids of the text, without special ids. The name of a special token in the text is encoded as text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special ids give their names, invalid UTF-8 gives U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @functools.cached_property
    def _added(self) -> tuple[re.Pattern[str], list[int]]:
        """A pattern with a group per added token, longest first, begin and end of sequence included; and their ids."""
        ends = {i: tokenizers.AddedToken(self.backend.id_to_token(i)) for i in (self.bos_id, self.eos_id)}
        added = (ends | self.backend.get_added_tokens_decoder()).items()
        groups, ids = [], []
        for i, token in sorted(added, key=lambda item: -len(item[1].content)):
            name = rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
            groups.append("(" + r"\s*" * token.lstrip + name + r"\s*" * token.rstrip + ")")
            ids.append(i)
        return re.compile("|".join(groups)), ids

    def controls(self, text: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, id) of every name of an added token in text[start:stop]."""
        pattern, ids = self._added
        for match in pattern.finditer(text, start, stop):
            assert match.lastindex
            yield match.start(), match.end(), ids[match.lastindex - 1]

    @property
    def pad_id(self) -> int | None:
        """The id of the settings' `pad_token`, or None."""
        return self.backend.token_to_id(_name(self.settings.get("pad_token")))

    def padded(self) -> "Tokenizer":
        """A copy whose `pad_token` differs from the end of sequence, so that padding does not look like an end of text.

        The `pad_token` is that of the settings if it differs, else a special token with "pad" in its name, else the
        begin of sequence, or None if begin and end are the same token.
        """
        special = self.backend.get_added_tokens_decoder().items()
        named = [i for i, token in special if token.special and "pad" in token.content.lower()]
        fit = [i for i in (self.pad_id, *named, self.bos_id) if i not in (None, self.eos_id)]
        pad = self.backend.id_to_token(fit[0]) if fit else None
        return dataclasses.replace(self, settings=self.settings | {"pad_token": pad})

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load` and transformers' AutoTokenizer read."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.settings, indent=2, ensure_ascii=False))

    def save_hf(self, folder: Path) -> None:
        """`save` for an export: always with the chat template, so that every loader renders the same text."""
        template = self.settings.get("chat_template") or self.template.source
        dataclasses.replace(self, settings=self.settings | {"chat_template": template}).save(folder)


def load(path: Path) -> Tokenizer:
    """Loads a `tokenizer.json`, a SentencePiece `.model`, or a folder with either (`tokenizer.json` first).

    `tokenizer_config.json` in the same folder names the begin and end tokens, by default DeepSeek's. The chat template
    comes from `chat_template.jinja` or the same config, and is DeepSeek-V2's by default. Raises ValueError for a path
    without a tokenizer, a damaged file, and a tokenizer that loses or changes text.
    """
    check(path.exists(), f"no tokenizer at {path}: there is no such file or folder")
    file = path
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model"]
        file = next((c for c in candidates if c.is_file()), path)
        check(file != path, f"no tokenizer in {path}: it has neither tokenizer.json nor tokenizer.model")
    config, template = file.with_name("tokenizer_config.json"), file.with_name("chat_template.jinja")
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else _settings()
    if template.exists():  # takes precedence, as in transformers
        settings["chat_template"] = template.read_text(encoding="utf-8")
    if file.suffix == ".model":
        return _assemble(_from_sentencepiece(file), settings, file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no specific type
        raise ValueError(f"{file} is not a tokenizer.json: {error}") from None
    return _assemble(backend, settings, file)


def train(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Trains a byte-fallback BPE and writes it into the folder, with SentencePiece's `tokenizer.model`.

    Equal texts give equal ids. Each digit is a token. At most a quarter of the ids are single characters; rarer
    characters become bytes. A corpus too small for `vocab_size` gives fewer ids. Raises ValueError for fewer than 320
    ids and for empty texts.
    """
    check(
        vocab_size >= _SMALLEST_VOCABULARY,
        f"model.vocab_size ({vocab_size}) is too small to train a tokenizer: at least {_SMALLEST_VOCABULARY} "
        "(256 bytes, special ids, and some to learn)",
    )
    chunks = [chunk for text in _sample(texts) for chunk in _chunks(text)]
    counts = collections.Counter(itertools.chain.from_iterable(chunks))
    check(any(character not in "\n\0" for character in counts), "no text to train a tokenizer on")
    # SentencePiece can leave out at most 2% of a text's characters; Chinese with a small vocabulary needs more.
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


def for_config(data: Data, vocab_size: int, corpus: "Corpus") -> Tokenizer:
    """The tokenizer of the settings: loaded, or trained on the corpus once and stored under `data.folder`.

    Raises ValueError if it has more ids than the model.
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
    """The first `_SAMPLE_BYTES` of the texts. Prepared corpora are shuffled, so this is a random sample."""
    left = _SAMPLE_BYTES
    for text in texts:
        yield text[:left]
        left -= len(text.encode())
        if left <= 0:
            return


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces of full lines; longer lines are cut."""
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
    """Converts a SentencePiece model to `tokenizers`; with special ids, texts start with the begin id."""
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
        f"{file} would change text; a SentencePiece model must be byte-fallback BPE without normalisation, dummy "
        "prefix or removal of spaces (or give a tokenizer.json)",
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
    backend.encode_special_tokens = True  # text must not produce control tokens
    ends = {}
    for key in ("bos_token", "eos_token"):
        name = _name(settings.get(key))
        ends[key] = backend.token_to_id(name)
        check(ends[key] is not None, f"{file} has no id for its {key} {name!r}; set {key} in tokenizer_config.json")
    description = json.loads(backend.to_str())
    plain = tokenizers.Tokenizer.from_str(json.dumps(description | {"added_tokens": [], "post_processor": None}))
    template = _template(settings, file)
    for i, token in backend.get_added_tokens_decoder().items():
        control = token.special or token.content in template.source
        forged = control and i in plain.encode(token.content, add_special_tokens=False).ids
        check(not forged, f"{file} encodes text as the control token {token.content!r}")
    tokenizer = Tokenizer(
        backend=backend,
        settings=settings,
        bos_id=ends["bos_token"],
        eos_id=ends["eos_token"],
        bytes_per_token=_bytes_per_token(backend, description["decoder"] or {}, file),
        template=template,
        plain=plain,
    )
    ids = tokenizer.encode(_PROBE)
    lossless = tokenizer.decode(ids) == _PROBE and tokenizer.bytes_per_token[ids].sum() == len(_PROBE.encode())
    check(lossless, f"{file} does not reproduce text, so bits per byte would be wrong; use a lossless tokenizer")
    return tokenizer


def _name(token: Any) -> str:
    """The name of a token in tokenizer_config.json, which is a string or an object; empty for none."""
    return (token["content"] if isinstance(token, dict) else token) or ""


def _template(settings: dict[str, Any], file: Path) -> chat.Template:
    """The chat template of the settings; of several, the one named default."""
    source = settings.get("chat_template") or chat.TEMPLATE
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        raise ValueError(f"the chat_template of {file} is neither a string nor a list with a default")
    tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
    names = {key: _name(value) for key, value in tokens.items() if value and not isinstance(value, bool)}
    try:
        return chat.Template(source, names)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _bytes_per_token(backend: tokenizers.Tokenizer, decoder: dict[str, Any], file: Path) -> np.ndarray:
    """UTF-8 bytes of each id, int32 [vocab_size]. A byte is a character in byte-level tokenizers, else `<0x0A>`."""
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
