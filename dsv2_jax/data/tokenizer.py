"""Text to ids and back: byte-fallback BPE learnt from the corpus, or any lossless Hugging Face `tokenizer.json`.

Both run in the `tokenizers` library, so training, evaluation and whoever loads an export split text the same way.
SentencePiece is the trainer: what it learns is rewritten as a `tokenizer.json` with plain spaces where it has U+2581,
so that a U+2581 of the text itself is not lost.
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
    template: chat.Template  # of conversations: the one in the settings, else DeepSeek-V2's
    plain: tokenizers.Tokenizer  # the same without added tokens, and with offsets that nothing trims

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

    @functools.cached_property
    def _added(self) -> tuple[re.Pattern[str], list[int]]:
        """A pattern with a group for each added token, begin and end among them, the longest first; and their ids."""
        ends = {i: tokenizers.AddedToken(self.backend.id_to_token(i)) for i in (self.bos_id, self.eos_id)}
        added = (ends | self.backend.get_added_tokens_decoder()).items()
        groups, ids = [], []
        for i, token in sorted(added, key=lambda item: -len(item[1].content)):
            name = rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
            groups.append("(" + r"\s*" * token.lstrip + name + r"\s*" * token.rstrip + ")")
            ids.append(i)
        return re.compile("|".join(groups)), ids

    def controls(self, text: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, id) of every added token that text[start:stop] spells."""
        pattern, ids = self._added
        for match in pattern.finditer(text, start, stop):
            assert match.lastindex
            yield match.start(), match.end(), ids[match.lastindex - 1]

    @property
    def pad_id(self) -> int | None:
        """The id of the settings' `pad_token`, if they name one."""
        return self.backend.token_to_id(_name(self.settings.get("pad_token")))

    def padded(self) -> "Tokenizer":
        """The same with a `pad_token` that is not the end of sequence, so that no text ends with it.

        The settings' own if it is another; else a special token with pad in its name; else the begin of sequence. None
        where the two ends are one token.
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
        """`save` for an export: the settings name a chat template in any case, so all who load it render alike."""
        template = self.settings.get("chat_template") or self.template.source
        dataclasses.replace(self, settings=self.settings | {"chat_template": template}).save(folder)


def load(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`, a SentencePiece `.model`, or a folder with either (the first, when it has both).

    The names of the ids for begin and end come from `tokenizer_config.json` beside it, else they are DeepSeek's; the
    chat template from `chat_template.jinja` or the same file, else it is DeepSeek-V2's. Raises ValueError for a path
    without a tokenizer, a damaged file, and one that loses or changes text.
    """
    check(path.exists(), f"no tokenizer at {path}: there is no such file or folder")
    file = path
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model"]
        file = next((c for c in candidates if c.is_file()), path)
        check(file != path, f"no tokenizer in {path}: it has neither tokenizer.json nor tokenizer.model")
    beside, template = file.with_name("tokenizer_config.json"), file.with_name("chat_template.jinja")
    settings = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else _settings()
    if template.exists():  # in transformers' own order
        settings["chat_template"] = template.read_text(encoding="utf-8")
    if file.suffix == ".model":
        return _assemble(_from_sentencepiece(file), settings, file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{file} is not a tokenizer.json: {error}") from None
    return _assemble(backend, settings, file)


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
    ends = {}
    for key in ("bos_token", "eos_token"):
        name = _name(settings.get(key))
        ends[key] = backend.token_to_id(name)
        check(ends[key] is not None, f"{file} has no id for its {key} {name!r}; name it in tokenizer_config.json")
    description = json.loads(backend.to_str())
    plain = tokenizers.Tokenizer.from_str(json.dumps(description | {"added_tokens": [], "post_processor": None}))
    template = _template(settings, file)
    for i, token in backend.get_added_tokens_decoder().items():
        control = token.special or token.content in template.source
        forged = control and i in plain.encode(token.content, add_special_tokens=False).ids
        check(not forged, f"{file} makes the control token {token.content!r} of text that spells it")
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
    check(lossless, f"{file} does not give text back as it was, so bits per byte would be wrong; choose a lossless one")
    return tokenizer


def _name(token: Any) -> str:
    """A token of tokenizer_config.json, which holds its name or an object with it; empty for none."""
    return (token["content"] if isinstance(token, dict) else token) or ""


def _template(settings: dict[str, Any], file: Path) -> chat.Template:
    """The chat template that the settings hold: the one named default where they hold several."""
    source = settings.get("chat_template") or chat.TEMPLATE
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        raise ValueError(f"the chat_template of {file} is neither a text nor a list with a default")
    tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
    names = {key: _name(value) for key, value in tokens.items() if value and not isinstance(value, bool)}
    try:
        return chat.Template(source, names)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _bytes_per_token(backend: tokenizers.Tokenizer, decoder: dict[str, Any], file: Path) -> np.ndarray:
    """int32 [vocab_size]. Byte-level tokenizers spell a byte as a character, byte-fallback ones as `<0x0A>`."""
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
