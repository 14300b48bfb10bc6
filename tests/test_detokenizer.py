"""Text as it comes, over small tokenizers of the kinds that models have."""

from __future__ import annotations

import contextlib
import functools
import json
import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sparse_serve_jax.detokenizer import Detokenizer, offsets
from sparse_serve_jax.models.tokenizer import ByteTokenizer, FileTokenizer
from sparse_serve_jax.tokenizing import Tokenizer

CORPUS = [
  "The cat sat on the mat, and the other cat sat there too; nothing else is here.\n\nThat is the end.",
  "Überall fließt Wasser über Steine, die größer sind als Häuser. 猫が好きです。猫は寝ている。",
  "emoji \U0001f600 \U0001f44d\U0001f3fd and  two   spaces\tand a tab",
]
REGEX = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDS = [tokenizers.AddedToken(text, special=True) for text in ("<s>", "</s>")]
SPACE = "▁"


def sentencepiece_like(normalizer, decoder, byte_fallback: bool = True) -> tokenizers.Tokenizer:
  """BPE over characters, with tokens for bytes that are used where a character is not in the vocabulary."""
  trained = tokenizers.Tokenizer(models.BPE())
  trained.normalizer, trained.pre_tokenizer = normalizer, pre_tokenizers.Split(SPACE, "merged_with_next")
  trained.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=80, show_progress=False))
  learned = json.loads(trained.to_str())["model"]
  special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
  vocab = {token: i for i, token in enumerate([*special, *learned["vocab"]])}
  merges = [tuple(merge) for merge in learned["merges"]]
  core = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
  core.normalizer, core.decoder = normalizer, decoder
  core.add_tokens(ENDS)
  return core


def llama_2() -> tokenizers.Tokenizer:
  parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
  return sentencepiece_like(normalizer, decoders.Sequence(parts))


def gemma() -> tokenizers.Tokenizer:
  parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  return sentencepiece_like(normalizers.Replace(" ", SPACE), decoders.Sequence(parts))


def metaspace() -> tokenizers.Tokenizer:
  normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
  return sentencepiece_like(normalizer, decoders.Metaspace(), byte_fallback=False)


def byte_level(pre_tokenizer, normalizer=None, size: int = 330) -> tokenizers.Tokenizer:
  core = tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer, core.decoder = pre_tokenizer, decoders.ByteLevel()
  if normalizer:
    core.normalizer = normalizer
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
  core.add_tokens(ENDS)
  return core


def split() -> pre_tokenizers.PreTokenizer:
  parts = [pre_tokenizers.Split(tokenizers.Regex(REGEX), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
  return pre_tokenizers.Sequence(parts)


KINDS = {
  "bytes": None,
  "llama-2": llama_2,
  "gemma": gemma,
  "metaspace": metaspace,
  "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
  "llama-3": lambda: byte_level(split()),
  "qwen": lambda: byte_level(split(), normalizers.NFC()),
}


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
  make = KINDS[kind]
  return FileTokenizer(make(), None, {}) if make else ByteTokenizer()


def pieces_of(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
  detokenizer = Detokenizer(tokenizer, **options)
  pieces = [detokenizer.push(token) for token in ids]
  pieces.append(detokenizer.finish())
  assert detokenizer.text == "".join(pieces)
  return pieces


ALL_KINDS = pytest.mark.parametrize("kind", list(KINDS))


@ALL_KINDS
@given(data=st.data())
def test_pieces_are_the_text_of_any_tokens(kind, data):
  """Whatever a model emits: halves of characters, special tokens, ids that no token has."""
  tokenizer = tokenizer_of(kind)
  n = tokenizer.vocab_size
  token = st.one_of(st.integers(0, n + 2), st.integers(0, min(n, 300)), st.integers(n - 4, n - 1))
  ids = data.draw(st.lists(token, max_size=100))
  assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@ALL_KINDS
@given(text=st.text(max_size=60))
def test_pieces_of_a_text_hold_whole_characters(kind, text):
  """All of Unicode; also after other text, so that the beginning is no special case."""
  tokenizer = tokenizer_of(kind)
  for before in ("", "The cat sat on the mat. "):
    ids = tokenizer.encode(before + text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
      assert not [piece for piece in pieces if "\ufffd" in piece]


@ALL_KINDS
def test_pieces_of_long_outputs(kind):
  """Longer than what is decoded again with each token."""
  tokenizer, rng = tokenizer_of(kind), random.Random(0)
  ids = [rng.randrange(tokenizer.vocab_size) for _ in range(1500)]
  assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)
  ids = tokenizer.encode(" ".join(CORPUS * 5))
  assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@ALL_KINDS
def test_text_comes_with_its_token(kind):
  tokenizer = tokenizer_of(kind)
  ids = tokenizer.encode("the cat sat on the mat", add_special_tokens=False)
  pieces = pieces_of(tokenizer, ids)
  assert pieces[-1] == "" and "".join(pieces).lstrip() == "the cat sat on the mat"
  assert sum(not piece for piece in pieces[:-1]) <= 1  # a space that begins the text may be none of it


@ALL_KINDS
@given(text=st.text(max_size=60))
def test_bytes_of_tokens_are_those_of_the_text(kind, text):
  """And each token that is no part of a character stands in the text where it begins."""
  tokenizer = tokenizer_of(kind)
  ids = tokenizer.encode("The " + text)
  whole, at = tokenizer.decode(ids, skip_special_tokens=False), offsets(tokenizer, ids)
  parts = list(map(tokenizer.token_bytes, ids))
  assert b"".join(parts).decode() in (whole, " " + whole)
  assert at == sorted(at)
  for part, begins in zip(parts[1:], at[1:], strict=True):
    with contextlib.suppress(UnicodeDecodeError):
      assert whole.startswith(part.decode(), begins)


@pytest.mark.parametrize("kind", ["bytes", "gpt-2", "llama-3", "qwen"])
@given(data=st.data())
def test_tokens_begin_where_they_stand(kind, data):
  """Of any tokens: halves that become no character too."""
  tokenizer = tokenizer_of(kind)
  ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
  whole, at = tokenizer.decode(ids, skip_special_tokens=False), offsets(tokenizer, ids)
  assert at == sorted(at)
  for token, begins in zip(ids, at, strict=True):
    with contextlib.suppress(UnicodeDecodeError):
      assert whole.startswith(tokenizer.token_bytes(token).decode(), begins)


@ALL_KINDS
def test_every_token_has_bytes(kind):
  tokenizer = tokenizer_of(kind)
  for token in range(tokenizer.vocab_size + 2):
    text = tokenizer.decode([65, token], skip_special_tokens=False)
    assert tokenizer.token_bytes(token).decode(errors="replace") in (text, text[len(tokenizer.decode([65])) :])


def test_a_character_of_four_tokens_comes_once_it_is_whole():
  assert pieces_of(ByteTokenizer(), [97, *"\U0001f600".encode(), 98]) == ["a", "", "", "", "\U0001f600", "b", ""]
  tokenizer = tokenizer_of("llama-2")
  ids = tokenizer.encode("the \U0001f600 cat")
  assert next(filter(None, pieces_of(tokenizer, ids))) == "the"
  assert "".join(pieces_of(tokenizer, ids)) == "the \U0001f600 cat"


# -------------------------------------------------------------------------------------------------------- stop strings


def before_stop(text: str, stops: list[str]) -> str:
  """The text before the stop string that ends first, the longest of these."""
  found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
  return text[: min(found)[1]] if found else text


@ALL_KINDS
@given(text=st.text("ab c\u00e9\U0001f600", max_size=30), stops=st.lists(st.text("ab \u00e9", min_size=1, max_size=4)))
def test_text_ends_before_the_first_stop_string(kind, text, stops):
  """However tokens cut it. What is told is never taken back, as pieces are only added."""
  tokenizer = tokenizer_of(kind)
  ids = tokenizer.encode(text)
  detokenizer, told = Detokenizer(tokenizer, stops), ""
  for token in ids:
    told += detokenizer.push(token)
    if detokenizer.stopped:
      break
  told += detokenizer.finish()
  expected = before_stop(tokenizer.decode(ids), stops)
  assert told == detokenizer.text == expected
  assert detokenizer.stopped == (expected != tokenizer.decode(ids))


def test_what_may_become_a_stop_string_is_held_back():
  ids = list(b"one</st two</stop> three")
  detokenizer = Detokenizer(ByteTokenizer(), ["</stop>"])
  pieces = [detokenizer.push(token) for token in ids]
  assert pieces[:8] == ["o", "n", "e", "", "", "", "", "</st "]  # four held, then told
  assert "".join(pieces) == detokenizer.text == "one</st two" and detokenizer.stopped
  assert not any(pieces[ids.index(ord("w")) + 2 :]) and detokenizer.finish() == ""
  assert "".join(pieces_of(ByteTokenizer(), list(b"one</st"), stop=["</stop>"])) == "one</st"


def test_stop_strings_are_not_looked_for_in_the_first_tokens():
  ids = list(b"\n\none\n\ntwo")
  expected = ["", "", "\n\none", "\n\none", "\n\none\n\ntwo"]
  for n, text in zip((0, 1, 2, 6, 7), expected, strict=True):
    assert "".join(pieces_of(ByteTokenizer(), ids, stop=["\n\n"], min_tokens=n)) == text
