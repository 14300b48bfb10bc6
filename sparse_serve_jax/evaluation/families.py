"""The families of tasks: keys, values, filler, and how a prompt is written of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparse_serve_jax.evaluation import text as texts


class Draft(NamedTuple):
  prompt: str
  completion: str
  answers: tuple[str, ...]
  depths: tuple[float, ...]


# Draws what is hidden, and returns how to write a prompt of n units; more units begin with the fewer.
Family = Callable[[np.random.Generator, texts.Text], Callable[[int], Draft]]


class _Taken:
  """A stream of units, kept, so that fewer units are always the beginning of more."""

  def __init__(self, units: Iterator):
    self._units, self._kept = units, []

  def __call__(self, n: int) -> list:
    self._kept.extend(itertools.islice(self._units, max(0, n - len(self._kept))))
    return self._kept[:n]


# Keys, values and content


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
_ITEMS = [word for word in dict.fromkeys(texts.NOUNS) if word not in set(texts.ADJECTIVES)]
_WORDS = [*texts.ADJECTIVES, *_ITEMS]
_SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]


def things(rng: np.random.Generator) -> Iterator[str]:
  """Adjective and noun, 420,000 of them."""
  for i in _unique(rng, len(texts.ADJECTIVES) * len(_ITEMS)):
    yield f"{texts.ADJECTIVES[i % len(texts.ADJECTIVES)]} {_ITEMS[i // len(texts.ADJECTIVES)]}"


def numbers(rng: np.random.Generator) -> Iterator[str]:
  """Of five digits; the project's own text has no number above 2,100."""
  return (str(10_000 + i) for i in _unique(rng, 90_000))


def uuids(rng: np.random.Generator) -> Iterator[str]:
  """48 random bits each, as three groups of hexadecimal digits."""
  return (f"{i >> 32:04x}-{i >> 16 & 0xFFFF:04x}-{i & 0xFFFF:04x}" for i in _unique(rng, 2**48))


def _invented(rng: np.random.Generator) -> Iterator[str]:
  """Words of three syllables that mean nothing, 512,000 of them."""
  s, n = _SYLLABLES, len(_SYLLABLES)
  return (s[i % n] + s[i // n % n] + s[i // n**2] for i in _unique(rng, n**3))


def _places(rng: np.random.Generator) -> Iterator[str]:
  """6,000 of them; the project's own text has towns only."""
  return (f"{texts.TOWNS[i // 6]} {_KINDS[i % 6]}" for i in _unique(rng, 6 * len(texts.TOWNS)))


def _people(rng: np.random.Generator) -> Iterator[str]:
  """First and last name, 200,000 of them; the project's own text has first names only."""
  n = len(texts.NAMES)
  return (f"{texts.NAMES[i % n]} {texts.TOWNS[i // n]}" for i in _unique(rng, n * len(texts.TOWNS)))


def noise(rng: np.random.Generator) -> Iterator[str]:
  return itertools.cycle(_NOISE)


def _every(n: int, rare: Iterator[str], usual: Iterator[str]) -> Iterator[str]:
  """Every n-th unit from `rare`, the others from `usual`."""
  return (next(rare if i % n == n - 1 else usual) for i in itertools.count())


def _hide(units: list[str], needles: Sequence[str], at: Sequence[float]) -> tuple[str, tuple[float, ...]]:
  """Puts each needle among the units, `at` from 0 for the beginning to 1 for the end; a tie keeps the needles' order.

  Returns the context without its leading space, and where in it the needles begin.
  """
  places = [int(a * (len(units) + 1)) for a in at]
  parts: list[str] = []
  index, done = [0] * len(needles), 0
  for i in sorted(range(len(needles)), key=places.__getitem__):
    parts += units[done : places[i]]
    done = places[i]
    index[i] = len(parts)
    parts.append(needles[i])
  parts += units[done:]
  begins = [0, *itertools.accumulate(map(len, parts))]
  return "".join(parts)[1:], tuple(begins[i] / begins[-1] for i in index)


def _ask(
  context: str,
  question: str,
  lead: str,
  answers: Sequence[str],
  depths: Sequence[float] = (),
  completion: str | None = None,
) -> Draft:
  """The prompt ends with how the answer begins, as RULER's do (its `answer_prefix`): what comes then is the value."""
  completion = ", ".join(answers) if completion is None else completion
  return Draft(f"{context}\nQuestion: {question} Answer:{lead}", f" {completion}\n", tuple(answers), tuple(depths))


# Families


def _code(key: str, value: str) -> str:
  return f" The special code of {key} is {value}."


def codes(
  n_keys: int = 1,
  n_values: int = 1,
  every: int = 0,
  values: texts.Text = numbers,
  haystack: texts.Text | None = None,
) -> Family:
  """n_keys keys are asked for, each with n_values codes. Every `every`-th unit, if not 0, is another key's code."""

  def family(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
    keys, codes, units = things(rng), values(rng), (haystack or text)(rng)
    asked = list(itertools.islice(keys, n_keys))
    answers = list(itertools.islice(codes, n_keys * n_values))
    needles = [_code(asked[i // n_values], answer) for i, answer in enumerate(answers)]
    at = rng.random(len(needles)).tolist()
    if n_values > 1:
      at.sort()  # the answers are in the order of the text
    units = _Taken(_every(every, map(_code, keys, codes), units) if every else units)
    code, verb = ("special code", "is") if len(answers) == 1 else ("special codes", "are")
    of = f"{code} of {', '.join(asked)}"

    def write(n: int) -> Draft:
      context, depths = _hide(units(n), needles, at)
      return _ask(context, f"what {verb} the {of}?", f" The {of} {verb}", answers, depths)

    return write

  return family


def pairs(keys: texts.Text, values: texts.Text) -> Family:
  """The whole context is a list of pairs, one of which is asked for."""

  def family(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
    at, pairs = rng.random(), _Taken(zip(keys(rng), values(rng), strict=True))

    def write(n: int) -> Draft:
      lines = [f"- {key}: {value}\n" for key, value in pairs(n)]
      asked = int(at * n)
      key, value = pairs(n)[asked]
      depth = sum(map(len, lines[:asked])) / sum(map(len, lines))
      return _ask("".join(lines)[:-1], f"what is the value of {key}?", f"\n- {key}:", [value], [depth])

    return write

  return family


def variables(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Three chains of four variables in noise: each but the first is set to the one before."""
  names, values = list(itertools.islice(_invented(rng), 12)), list(itertools.islice(numbers(rng), 3))
  chains = [[value, *names[4 * i : 4 * i + 4]] for i, value in enumerate(values)]
  needles = [f" Let {name} = {source}." for chain in chains for source, name in itertools.pairwise(chain)]
  at = np.sort(rng.random((3, 4)), axis=1).ravel().tolist()
  units = _Taken(noise(rng))

  def write(n: int) -> Draft:
    context, depths = _hide(units(n), needles, at)
    question, lead = f"which variables are equal to {values[0]}?", f" The variables equal to {values[0]} are"
    return _ask(context, question, lead, names[:4], depths[:4])

  return write


_FACTS = (  # what is said of a person, in two ways, and the question; an answer begins in the first of the ways
  (("{} went to {}.", "{} made a journey to {}."), "where did {} go?"),
  (("{} bought the {}.", "{} paid for the {}."), "what did {} buy?"),
  (("{} talked with {}.", "{} had a talk with {}."), "who did {} talk with?"),
)


def questions(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Of the three facts about a person one is asked for. Every fourth sentence is a fact about somebody else."""
  people, objects = _people(rng), (_places(rng), things(rng), _people(rng))

  def fact(person: str, kind: int) -> tuple[str, str]:
    what = next(objects[kind])
    return " " + _FACTS[kind][0][rng.integers(2)].format(person, what), what

  person, kind, at = next(people), int(rng.integers(3)), rng.random(3).tolist()
  needles = [fact(person, i) for i in range(3)]
  others = (fact(other, int(rng.integers(3)))[0] for other in people)
  units = _Taken(_every(4, others, text(rng)))

  def write(n: int) -> Draft:
    context, depths = _hide(units(n), [sentence for sentence, _ in needles], at)
    ways, question = _FACTS[kind]
    lead = " " + ways[0].format(person, "").removesuffix(" .")
    return _ask(context, question.format(person), lead, [needles[kind][1]], [depths[kind]])

  return write


def two_hops(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Who took a thing and where they went are told apart; asked is where the thing is."""
  told_of, at = zip(_people(rng), things(rng), _places(rng), strict=True), rng.random(2).tolist()

  def told(person: str, thing: str, place: str) -> list[str]:
    return [f" {person} took the {thing}.", f" {person} went to {place}."]

  _, thing, place = asked = next(told_of)
  others = (sentence for facts in told_of for sentence in told(*facts))
  units = _Taken(_every(4, others, text(rng)))

  def write(n: int) -> Draft:
    context, depths = _hide(units(n), told(*asked), at)
    return _ask(context, f"where is the {thing}?", f" The {thing} is at", [place], [depths[1]])

  return write


def copy(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Random words: four that stand somewhere among them are given, the six that follow them there are asked for."""
  at, words = rng.random(), _Taken(texts.rounds(rng, _WORDS))

  def write(n: int) -> Draft:
    listed = words(n)
    first = int(at * (n - 9))
    cue, following = listed[first : first + 4], listed[first + 4 : first + 10]
    context = " ".join(listed)
    depth = len(" ".join([*listed[:first], ""])) / (len(context) + 1)
    given = " ".join(cue)
    return _ask(context, f"what follows {given}?", f" {given}", following, [depth], " ".join(following))

  return write


def classification(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Forty labels, eight words to each; an example is three of the words and the label.

  The new item has two words of one of the examples, the other way round, and another word of the same label.
  """
  words = rng.permutation(_ITEMS)[:320].reshape(40, 8).tolist()
  labels = rng.permutation(texts.ADJECTIVES)[:40].tolist()
  at = rng.random()

  def example() -> tuple[int, list[int]]:
    return int(rng.integers(40)), rng.permutation(8).tolist()

  examples = _Taken(example() for _ in itertools.count())

  def write(n: int) -> Draft:
    lines = [f"- {' '.join(words[label][i] for i in order[:3])}: {labels[label]}\n" for label, order in examples(n)]
    like = int(at * n)
    label, order = examples(n)[like]
    item = " ".join(words[label][order[i]] for i in (2, 0, 3))
    depth = sum(map(len, lines[:like])) / sum(map(len, lines))
    return _ask("".join(lines)[:-1], f"what is the label of {item}?", f"\n- {item}:", [labels[label]], [depth])

  return write


def common(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A list of words: each of five makes up 1/40 of it, or 4 words; 1,328 others come equally often, up to one."""
  order, words = int(rng.integers(2**32)), rng.permutation(_WORDS).tolist()
  common, rare = words[:5], _Taken(texts.rounds(rng, words[5:]))

  def write(n: int) -> Draft:
    each = max(4, n // 40)
    listed = np.random.default_rng(order).permutation(common * each + rare(n - 5 * each)).tolist()
    answers = sorted(common, key=listed.index)
    question, lead = "which five words are the most common in the list?", " The five most common words are"
    return _ask(" ".join(listed), question, lead, answers)

  return write


def frequent(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A list of invented words: the r-th makes up the share 6 / (pi r)^2, the zeta distribution of exponent 2."""
  order, words = int(rng.integers(2**32)), _Taken(_invented(rng))

  def write(n: int) -> Draft:
    counts = [int(n * 6 / (np.pi * r) ** 2) for r in range(1, int(n**0.5) + 1)]
    counts = [count for count in counts if count]
    counts += [1] * (n - sum(counts))
    listed = np.random.default_rng(order).permutation(np.repeat(words(len(counts)), counts)).tolist()
    question, lead = "which three words are the most frequent in the list?", " The three most frequent words are"
    return _ask(" ".join(listed), question, lead, words(3))

  return write


def count(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A bell rings 1 to 9 times, another one too."""
  towns, times = rng.choice(texts.TOWNS, 2, replace=False).tolist(), rng.integers(1, 10, 2).tolist()
  rings = [f" The bell of {town} rings." for town, n in zip(towns, times, strict=True) for _ in range(n)]
  at, units = rng.random(len(rings)).tolist(), _Taken(text(rng))

  def write(n: int) -> Draft:
    question, lead = f"how many times does the bell of {towns[0]} ring?", " The number of times is"
    return _ask(_hide(units(n), rings, at)[0], question, lead, [str(times[0])])

  return write


def recite(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A list of pairs, to be written once more."""
  pairs = _Taken(zip(things(rng), numbers(rng), strict=True))

  def write(n: int) -> Draft:
    listed = ", ".join(f"{key}: {value}" for key, value in pairs(n))
    return _ask(listed, "what is the list?", "", [value for _, value in pairs(n)], completion=listed)

  return write


def renumber(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A numbered list out of order, to be written in order."""
  order, keys = int(rng.integers(2**32)), _Taken(key.replace(" ", "-") for key in things(rng))

  def write(n: int) -> Draft:
    items = [f"{i}: {key}" for i, key in enumerate(keys(n), 1)]
    shuffled = np.random.default_rng(order).permutation(n).tolist()
    listed = ", ".join(items[i] for i in shuffled)
    return _ask(listed, "what is the list in order?", "", keys(n), completion=", ".join(items))

  return write
