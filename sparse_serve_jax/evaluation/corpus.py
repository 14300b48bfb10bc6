"""Texts that people bring, cut into pieces of one length: files, folders of them, contexts of LongBench."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import zlib
from collections.abc import Callable

import numpy as np

from sparse_serve_jax import files
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads.longbench import Release, in_template

SUFFIXES = (".txt", ".md")  # of files in a folder


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Where texts come from, and how a model is given them."""

  paths: tuple[str, ...] = ()  # UTF-8 files, each one text, and folders of such, at any depth
  longbench: str | None = None  # a folder with config/ and data/, whose rows' contexts are texts
  tasks: tuple[str, ...] = ()  # LongBench's names; none: all whose rows are there
  chat: bool = False  # a piece is the beginning of a user's message, in the model's chat template

  def files(self) -> list[pathlib.Path]:
    """The files, those of a folder in the order of their names.

    Raises:
      ValueError: a folder has none.
    """
    found: list[pathlib.Path] = []
    for path in map(pathlib.Path, self.paths):
      inside = [path] if not path.is_dir() else sorted(of for of in path.rglob("*") if of.suffix in SUFFIXES)
      if not inside:
        raise ValueError(f"{path} has no files that end in {' or '.join(SUFFIXES)}")
      found += [file for file in inside if file not in found]
    return found

  def documents(self) -> list[str]:
    """All texts, each once: first those of files, then contexts in the order of tasks and rows, without broken rows."""
    texts = [files.read_text(file) for file in self.files()]
    if self.longbench is not None:
      release = Release.read(self.longbench)
      rows = (row for name in release.names(self.tasks) for row in release.rows(name))
      texts += [row.fields["context"] for row in rows if not row.wrong and isinstance(row.fields.get("context"), str)]
    return list(dict.fromkeys(text for text in texts if text.strip()))

  def digest(self) -> str:
    """A checksum of all texts."""
    whole = "\0".join(self.documents())
    return f"{zlib.crc32(whole.encode()):08x}"

  def pieces(self, tokenizer: Tokenizer, n_tokens: int, n: int) -> np.ndarray:
    """Token ids [n, n_tokens] int32 of pieces that share no token.

    Texts come in a random order, always the same: the first piece of each, then the second of each, ... A piece begins
    with what the tokenizer puts before a text or the template before a user's message, and has no end of it. Of a text
    what is left after its last whole piece is not used.

    Raises:
      ValueError: there are fewer pieces, or with `chat` no template.
    """
    head = _head((lambda text: in_template(tokenizer, text)) if self.chat else tokenizer.encode)
    size = n_tokens - len(head)
    if size < 1:
      raise ValueError(f"{n_tokens} tokens are taken up by the {len(head)} that stand before a text")
    texts, cut = self.documents(), []
    for i in np.random.default_rng(0).permutation(len(texts)):
      cut += [whole] if (whole := _whole(tokenizer.encode(texts[i], False, "text"), size)) else []
      if len(cut) == n:  # of the others none is needed
        break
    rounds = [piece for nth in itertools.zip_longest(*cut) for piece in nth if piece is not None]
    if len(rounds) < n:
      given = f"{len(texts)} texts give {len(rounds)} pieces of {n_tokens} tokens, and {n} are asked for"
      raise ValueError(f"{given}: ask for fewer instances, or shorter ones")
    return np.array([[*head, *piece] for piece in rounds[:n]], np.int32)


def _whole(ids: list[int], size: int) -> list[list[int]]:
  return [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]


def _head(encode: Callable[[str], list[int]]) -> list[int]:
  """The ids that stand before any text."""
  pairs = zip(encode("a"), encode("b"), strict=False)
  return [ours for ours, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
