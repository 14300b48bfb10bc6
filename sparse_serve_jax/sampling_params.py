"""What can be asked of a request beside its prompt: `SamplingParams`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypedDict, TypeVar, cast, overload

MAX_LOGPROBS = 20  # most likely tokens that can be listed beside each output token

T = TypeVar("T")
Given = TypeVar("Given")

# Names of the same thing elsewhere.
ELSEWHERE = {
  "do_sample": "temperature",
  "eos_token_id": "stop_token_ids",
  "max_completion_tokens": "max_tokens",
  "max_length": "max_tokens",
  "max_output_tokens": "max_tokens",
  "min_length": "min_tokens",
  "min_new_tokens": "min_tokens",
  "num_return_sequences": "n",
  "random_seed": "seed",
  "stop_sequences": "stop",
  "stop_strings": "stop",
  "top_logprobs": "logprobs",
}


class Setting(Generic[T, Given]):
  """A field of `SamplingParams`: it takes a `Given` and holds a `T`.

  None stands for its default, and what does not fit is refused.
  """

  def __init__(self, default: T, what: str, read: Callable[[object], T | None]):
    """`read` returns what a field holds when it is given a value, None if that is not `what`."""
    self._default, self._what, self._read = default, what, read

  def __set_name__(self, owner: type, name: str) -> None:
    self._name = name

  @overload
  def __get__(self, instance: None, owner: type) -> Given: ...  # the default
  @overload
  def __get__(self, instance: object, owner: type) -> T: ...
  def __get__(self, instance: object | None, owner: type) -> Any:
    return self._default if instance is None else instance.__dict__[self._name]

  def __set__(self, instance: object, value: Given | None) -> None:
    instance.__dict__[self._name] = self._default if value is None else self.check(self._name, value)

  def check(self, name: str, value: object) -> T:
    """What the field holds when it is given a value. Errors call it `name`."""
    read = self._read(value)
    if read is None:
      raise ValueError(f"{name} must be {self._what}, got {value!r:.80}")
    return read


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[object], int | None]:
  """Integers from `low` to `high`; numpy's too, but not True."""

  def read(value: object) -> int | None:
    fits = type(value) is not bool and isinstance(value, numbers.Integral) and low <= int(value) <= high
    return int(cast(int, value)) if fits else None

  return read


def _number(fits: Callable[[float], bool]) -> Callable[[object], float | None]:
  """Finite numbers that fit; numpy's too, but not True."""

  def read(value: object) -> float | None:
    if type(value) is bool or not isinstance(value, numbers.Real):
      return None
    try:
      number = float(value)
    except OverflowError:  # an integer of hundreds of digits
      return None
    return number if math.isfinite(number) and fits(number) else None

  return read


def _truth(value: object) -> bool | None:
  return value if isinstance(value, bool) else None


def _token_ids(value: object) -> tuple[int, ...] | None:
  if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
    return None
  ids = [_integer(-(2**63), 2**63 - 1)(token) for token in cast("Iterable[object]", value)]
  return None if None in ids else tuple(cast("list[int]", ids))


def _texts(value: object) -> tuple[str, ...] | None:
  values = (value,) if isinstance(value, str) else value
  if isinstance(values, bytes | Mapping) or not isinstance(values, Iterable):
    return None
  texts = tuple(cast("Iterable[object]", values))
  return cast("tuple[str, ...]", texts) if all(isinstance(text, str) and text for text in texts) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How the tokens of an output are drawn, when it ends, and what is told of it.

  Each field may be None, which is its default. The tokens of a request depend on its prompt, these fields and the
  position alone, never on the requests beside it.

  Raises:
    ValueError: a value of the wrong type or size, or a name that there is not; the message has name and value.
  """

  max_tokens: Setting[int, int] = Setting(128, "an integer of at least 1 and below 2**31", _integer(1))
  """Output tokens at most; the stop token is not counted."""
  min_tokens: Setting[int, int] = Setting(0, "an integer of at least 0 and below 2**31", _integer(0))
  """No stop token is drawn, and no stop string looked for, before there are so many output tokens."""
  temperature: Setting[float, float] = Setting(0.0, "finite and at least 0", _number(lambda t: t >= 0))
  """Logits are divided by it before a token is drawn; 0 takes the most likely token."""
  top_k: Setting[int, int] = Setting(0, "an integer of at least 0 and below 2**31", _integer(0))
  """Tokens are drawn from so many most likely ones; 0: from all."""
  top_p: Setting[float, float] = Setting(1.0, "above 0 and at most 1", _number(lambda p: 0 < p <= 1))
  """Of these, from the most likely ones that together have this share of the probability."""
  min_p: Setting[float, float] = Setting(0.0, "at least 0 and at most 1", _number(lambda p: 0 <= p <= 1))
  """Of these, from those with at least this part of the probability of the most likely one."""
  seed: Setting[int, int] = Setting(0, "an integer of at least 0 and below 2**31", _integer(0))
  """Of the draws. `LLM` says which seeds it gives to several prompts and samples."""
  stop: Setting[tuple[str, ...], str | Iterable[str]] = Setting((), "a text or a list of texts, none empty", _texts)
  """Texts that end the output, which ends before the first of them. They may span tokens."""
  stop_token_ids: Setting[tuple[int, ...], Iterable[int]] = Setting((), "a list of token ids", _token_ids)
  """Tokens that end the output, besides the model's EOS tokens. They are not output."""
  ignore_eos: Setting[bool, bool] = Setting(False, "True or False", _truth)
  """The model's EOS tokens are output like others."""
  n: Setting[int, int] = Setting(1, "an integer of at least 1 and below 2**31", _integer(1))
  """Outputs of one prompt."""
  logprobs: Setting[int | None, int | None] = Setting(
    None, f"an integer from 0 to {MAX_LOGPROBS}", _integer(0, MAX_LOGPROBS)
  )
  """The log probability of each output token is told, and those of so many most likely tokens; None: nothing is."""
  add_special_tokens: Setting[bool, bool] = Setting(True, "True or False", _truth)
  """A prompt that is text gets what the tokenizer puts around texts, such as BOS, unless it begins with it already."""
  cache_salt: Setting[str | None, str | None] = Setting(None, "a text", lambda v: v if isinstance(v, str) else None)
  """Requests share what the cache holds of prompts only with those of the same salt."""

  max_new_tokens: dataclasses.InitVar[int | None] = None
  """Another name of `max_tokens`."""

  def __new__(cls, **options: Any) -> SamplingParams:
    if unknown := [name for name in options if name not in _NAMES]:
      raise ValueError(f"there is no sampling parameter {unknown[0]!r}; {_nearest(unknown[0])}")
    return super().__new__(cls)

  def __post_init__(self, max_new_tokens: int | None) -> None:
    if max_new_tokens is not None:
      n = cast("Setting[int, int]", vars(SamplingParams)["max_tokens"]).check("max_new_tokens", max_new_tokens)
      if self.max_tokens not in (n, SamplingParams.max_tokens):
        raise ValueError(f"max_new_tokens={n} is another name of max_tokens={self.max_tokens}: give one of them")
      object.__setattr__(self, "max_tokens", n)
    if self.min_tokens > self.max_tokens:
      raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")

  def later(self, draws: int) -> SamplingParams:
    """The same with the seed that comes `draws` after this one; after 2**31 - 1 comes 0."""
    return dataclasses.replace(self, seed=(self.seed + draws) % 2**31) if draws else self


class SamplingOptions(TypedDict, total=False):
  """Fields of `SamplingParams` as keyword arguments."""

  max_tokens: int | None
  min_tokens: int | None
  temperature: float | None
  top_k: int | None
  top_p: float | None
  min_p: float | None
  seed: int | None
  stop: str | Iterable[str] | None
  stop_token_ids: Iterable[int] | None
  ignore_eos: bool | None
  n: int | None
  logprobs: int | None
  add_special_tokens: bool | None
  cache_salt: str | None
  max_new_tokens: int | None


_NAMES = list(SamplingParams.__annotations__)


def _nearest(name: str) -> str:
  near = ELSEWHERE.get(name.lower()) or next(iter(difflib.get_close_matches(name, _NAMES, n=1)), None)
  return f"the nearest is {near!r}" if near else f"there are {', '.join(_NAMES)}"
