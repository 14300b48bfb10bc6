"""Token ids to text as they come: whole characters, never taken back, together what `decode` makes of all ids."""

from __future__ import annotations

import codecs
import contextlib
import functools
from collections.abc import Sequence

from sparse_serve_jax.tokenizing import Tokenizer

_HALF = "\ufffd"  # what bytes that are no character decode to
_PROBE = "\U0010fffd"  # a character that no vocabulary has as one token: where bytes are tokens, it is four of them
_CONTEXT, _WINDOW = 16, 64  # tokens that are decoded again with the next one: at least, and before there are fewer


class Detokenizer:
  """The text of one output, piece by piece.

  ```
  detokenizer = Detokenizer(tokenizer, stop=["\\n\\n"])
  for token in tokens:
    print(detokenizer.push(token), end="")
    if detokenizer.stopped:
      break
  print(detokenizer.finish())
  ```

  Without stop strings all pieces together are `tokenizer.decode(tokens)`. With them they are what comes before the
  first one: the one that ends first, the longest of these. What may yet become part of one is held back.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0):
    """`stop` is looked for in the text of the tokens after the first `min_tokens`.

    Raises:
      ValueError: there are stop strings, and no tokenizer that makes text.
    """
    if stop and not tokenizer.vocab_size:
      raise ValueError(f"stop strings {list(stop)} need text, and the model has no tokenizer: give stop_token_ids")
    self._pieces, self._stop, self._min_tokens = _Pieces(tokenizer), _Stop(stop), min_tokens
    self._n_tokens = 0
    self.text = ""  # of all pieces so far

  @property
  def stopped(self) -> bool:
    """Whether a stop string has come: there is no more text then."""
    return self._stop.found

  @property
  def offset(self) -> int:
    """Where the newest token begins in the text of all, a stop string included: characters before it, or before the
    one that it is a part of.
    """
    return self._pieces.offset

  def push(self, token: int) -> str:
    """Takes the next token. Returns the text that is certain now and was not before, often none."""
    self._n_tokens += 1
    return self._tell(self._stop.push(self._pieces.push(token), self._n_tokens > self._min_tokens))

  def finish(self) -> str:
    """After the last token: returns the rest of the text."""
    rest = self._stop.push(self._pieces.finish(), self._n_tokens > self._min_tokens)
    return self._tell(rest + self._stop.finish())

  def _tell(self, piece: str) -> str:
    self.text += piece
    return piece


def offsets(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
  """Where each token begins in the text of all, in which special tokens stand too: see `Detokenizer.offset`."""
  pieces, at = _Pieces(tokenizer, skip_special_tokens=False), list[int]()
  for token in tokens:
    pieces.push(token)
    at.append(pieces.offset)
  return at


class _Pieces:
  """Pieces of `decode` of all tokens. Only the newest tokens are decoded with each that comes."""

  def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
    self._decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
    self._token_bytes, self._probe = tokenizer.token_bytes, _first_byte(tokenizer)
    self._n, self._begun, self._newest = 0, 0, ""  # characters of all pieces, those before the newest, and this one
    self._run = codecs.getincrementaldecoder("utf-8")("ignore")
    self._n_run = 0  # whole characters of the run that goes on
    self._bytes: dict[int, bool] = {}  # token -> whether it may be part of a run of byte tokens
    self._window: list[int] = []  # the newest tokens
    self._told = 0  # characters of the window's text that are told

  @property
  def offset(self) -> int:
    """As of `Detokenizer`. A half before the newest token may have become a character, or none, by it."""
    with contextlib.suppress(UnicodeDecodeError):
      text = self._token_bytes(self._window[-1]).decode()
      if text and self._newest.endswith(text):
        return self._n - len(text)
    return self._begun

  def push(self, token: int) -> str:
    self._window.append(token)
    self._begun, self._newest = self._n + self._n_run, ""
    if self._in_run(token):  # whose bytes are characters only if all of the run is
      if self._n and self._decode([token, token]):  # a space that begins the text is none of it
        self._n_run += len(self._run.decode(self._token_bytes(token)))
      return ""
    self._run.reset()
    text = self._decode(self._window)
    whole = text[:-1] if text.endswith(_HALF) else text
    piece, self._told = whole[self._told :], max(self._told, len(whole))
    self._n, self._n_run, self._newest = self._n + len(piece), 0, piece
    if whole is text and len(self._window) >= _WINDOW:
      self._shorten()
    return piece

  def finish(self) -> str:
    text = self._decode(self._window)
    piece, self._told = text[self._told :], len(text)
    return piece

  def _in_run(self, token: int) -> bool:
    """Of a tokenizer that makes characters of runs of byte tokens: whether the token may go on with a run. Those that
    have no text do. A byte before another one that ends no character is none either.
    """
    if self._probe is None:
      return False
    if token not in self._bytes:
      self._bytes[token] = self._decode([token, self._probe]) in (_HALF, 2 * _HALF)
    return self._bytes[token]

  def _shorten(self) -> None:
    """All text is told: what comes is decoded after a few tokens that have text, the first of which takes all that is
    special about a beginning.
    """
    context = self._window[-_CONTEXT:]
    if text := self._decode(context):
      self._window, self._told = context, len(text)


def _first_byte(tokenizer: Tokenizer) -> int | None:
  """The byte token that begins `_PROBE`, of a tokenizer whose byte tokens are characters only if all of a run of them
  are. None for others, whose bytes are characters as soon as they are whole.
  """
  try:
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)[-4:]
    after = [*ids, ids[0]]
    collapses = len(ids) == 4 and tokenizer.decode(ids).endswith(_PROBE) and tokenizer.decode(after) == 5 * _HALF
  except ValueError:  # there is no tokenizer
    return None
  return ids[0] if collapses else None


class _Stop:
  """Lets text through until a stop string comes."""

  def __init__(self, stop: Sequence[str]):
    self._stop, self._held, self.found = tuple(stop), "", False

  def push(self, piece: str, look: bool) -> str:
    """Takes the next piece of text; whether to `look` for stop strings that end in it. Returns what is sure to stay."""
    if self.found:
      return ""
    text, n_old = self._held + piece, len(self._held)
    ends = [(end, start) for of in self._stop if look for start, end in [_find(text, of, n_old)] if start >= 0]
    if ends:
      self.found, self._held = True, ""
      return text[: min(ends)[1]]
    n_held = max(
      (n for of in self._stop for n in range(1, min(len(of), len(text) + 1)) if text.endswith(of[:n])), default=0
    )
    self._held = text[len(text) - n_held :]
    return text[: len(text) - n_held]

  def finish(self) -> str:
    rest, self._held = self._held, ""
    return rest


def _find(text: str, what: str, after: int) -> tuple[int, int]:
  """Start and end of the first `what` in a text that ends after so many characters; start -1: there is none."""
  start = text.find(what, max(0, after - len(what) + 1))
  return start, start + len(what)
