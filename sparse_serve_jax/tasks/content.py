"""Keys, values and filler of the tasks: streams of what is drawn, in the form of `text.Text`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from sparse_serve_jax.tasks import text as texts


def _unique(rng: np.random.Generator, size: int) -> Iterator[int]:
  """Yields different numbers below `size`, which is to be far more than are taken."""
  seen = set()
  while True:
    for i in rng.integers(size, size=256).tolist():
      if i not in seen:
        seen.add(i)
        yield i


_NOISE = (
  " The rain falls on the roof.",
  " The clock ticks in the hall.",
  " A cart rolls down the lane.",
  " Nothing else happens here.",
)
_KINDS = "Bay Hill Lane Park Pier Street".split()
ITEMS = [word for word in dict.fromkeys(texts.NOUNS) if word not in set(texts.ADJECTIVES)]
WORDS = [*texts.ADJECTIVES, *ITEMS]
_SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]


def things(rng: np.random.Generator) -> Iterator[str]:
  """Adjective and noun, 420,000 of them."""
  for i in _unique(rng, len(texts.ADJECTIVES) * len(ITEMS)):
    yield f"{texts.ADJECTIVES[i % len(texts.ADJECTIVES)]} {ITEMS[i // len(texts.ADJECTIVES)]}"


def numbers(rng: np.random.Generator) -> Iterator[str]:
  """Of five digits; the project's own text has no number above 2,100."""
  return (str(10_000 + i) for i in _unique(rng, 90_000))


def uuids(rng: np.random.Generator) -> Iterator[str]:
  """48 random bits each, as three groups of hexadecimal digits."""
  return (f"{i >> 32:04x}-{i >> 16 & 0xFFFF:04x}-{i & 0xFFFF:04x}" for i in _unique(rng, 2**48))


def invented(rng: np.random.Generator) -> Iterator[str]:
  """Words of three syllables that mean nothing, 512,000 of them."""
  s, n = _SYLLABLES, len(_SYLLABLES)
  return (s[i % n] + s[i // n % n] + s[i // n**2] for i in _unique(rng, n**3))


def places(rng: np.random.Generator) -> Iterator[str]:
  """6,000 of them; the project's own text has towns only."""
  return (f"{texts.TOWNS[i // 6]} {_KINDS[i % 6]}" for i in _unique(rng, 6 * len(texts.TOWNS)))


def people(rng: np.random.Generator) -> Iterator[str]:
  """First and last name, 200,000 of them; the project's own text has first names only."""
  n = len(texts.NAMES)
  return (f"{texts.NAMES[i % n]} {texts.TOWNS[i // n]}" for i in _unique(rng, n * len(texts.TOWNS)))


def noise(rng: np.random.Generator) -> Iterator[str]:
  return itertools.cycle(_NOISE)
