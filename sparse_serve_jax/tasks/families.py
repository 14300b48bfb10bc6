"""The families of tasks: how a context is written of keys, values and filler, and asked about."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparse_serve_jax.tasks import content
from sparse_serve_jax.tasks import text as texts


class Asked(NamedTuple):
  """A question about a context; its answer begins in the prompt and goes on in the completion."""

  prompt: str
  completion: str
  answers: tuple[str, ...]
  depths: tuple[float, ...]


class Draft(NamedTuple):
  context: str
  asked: Iterator[Asked]  # one or more: the first is the task, the others are like it


# Draws what is hidden, and returns how to write a context of n units; more units begin with the fewer.
Family = Callable[[np.random.Generator, texts.Text], Callable[[int], Draft]]


class _Taken:
  """A stream of units, kept, so that fewer units are always the beginning of more."""

  def __init__(self, units: Iterator):
    self._units, self._kept = units, []

  def __call__(self, n: int) -> list:
    self._kept.extend(itertools.islice(self._units, max(0, n - len(self._kept))))
    return self._kept[:n]

  def __iter__(self) -> Iterator:
    return (self(i + 1)[i] for i in itertools.count())


def _every(n: int, rare: Iterator[str], usual: Iterator[str]) -> Iterator[str]:
  """Every n-th unit from `rare`, the others from `usual`."""
  return (next(rare if i % n == n - 1 else usual) for i in itertools.count())


def _mixed(rng: np.random.Generator, groups: Iterator[list]) -> Iterator:
  """The items of eight groups at a time, in random order."""
  while True:
    items = list(itertools.chain.from_iterable(itertools.islice(groups, 8)))
    yield from (items[i] for i in rng.permutation(len(items)))


def _shuffled(order: int, n: int) -> list[int]:
  return np.random.default_rng(order).permutation(n).tolist()


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
  question: str, lead: str, answers: Sequence[str], depths: Sequence[float] = (), completion: str | None = None
) -> Asked:
  """The prompt ends with how the answer begins, as RULER's do (its `answer_prefix`): what comes then is the value."""
  completion = ", ".join(answers) if completion is None else completion
  return Asked(f"Question: {question} Answer:{lead}", f" {completion}\n", tuple(answers), tuple(depths))


def _listed(
  units: Sequence[str], at: float, order: int, question: Callable[[int, float], Asked], after: int = 0
) -> Draft:
  """Units in a row, less their last character. All but the last `after` are asked for, the one `at` of them first.

  `question` takes a unit's index and depth.
  """
  begins, n = [0, *itertools.accumulate(map(len, units))], len(units) - after
  first = int(at * n)
  rest = (i for i in _shuffled(order, n) if i != first)
  asked = (question(i, begins[i] / begins[-1]) for i in itertools.chain([first], rest))
  return Draft("".join(units)[:-1], asked)


# Families


def codes(
  n_keys: int = 1,
  n_values: int = 1,
  every: int = 0,
  values: texts.Text = content.numbers,
  haystack: texts.Text | None = None,
) -> Family:
  """n_keys keys are asked for, each with n_values codes. Every `every`-th unit, if not 0, is a code of other keys."""
  code, verb = ("special code", "is") if n_keys * n_values == 1 else ("special codes", "are")

  def told(key: str, value: str) -> str:
    return f" The special code of {key} is {value}."

  def question(keys: Sequence[str], answers: Sequence[str], depths: Sequence[float] = ()) -> Asked:
    of = f"{code} of {', '.join(keys)}"
    return _ask(f"what {verb} the {of}?", f" The {of} {verb}", answers, depths)

  def family(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
    keys, codes, units, order = content.things(rng), values(rng), (haystack or text)(rng), int(rng.integers(2**32))
    hidden = [(key, next(codes)) for key in itertools.islice(keys, n_keys) for _ in range(n_values)]
    needles = [told(*pair) for pair in hidden]
    at = rng.random(len(needles)).tolist()
    if n_values > 1:
      at.sort()  # the answers are in the order of the text
    others = _Taken(_mixed(rng, ([(key, next(codes)) for _ in range(n_values)] for key in keys)))
    units = _Taken(_every(every, itertools.starmap(told, others), units) if every else units)

    def asked(n: int, depths: Sequence[float]) -> Iterator[Asked]:
      yield question(list(dict(hidden)), [value for _, value in hidden], depths)
      values_of: dict[str, list[str]] = {}
      for key, value in others(n // every) if every else ():
        values_of.setdefault(key, []).append(value)
      whole = [key for key, found in values_of.items() if len(found) == n_values]
      mixed = [whole[i] for i in _shuffled(order, len(whole))]
      for some in zip(*[iter(mixed)] * n_keys, strict=False):
        yield question(some, [value for key in some for value in values_of[key]])

    def write(n: int) -> Draft:
      context, depths = _hide(units(n), needles, at)
      return Draft(context, asked(n, depths))

    return write

  return family


def pairs(keys: texts.Text, values: texts.Text) -> Family:
  """The whole context is a list of pairs, one of which is asked for."""

  def family(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
    at, order = rng.random(), int(rng.integers(2**32))
    pairs = _Taken(zip(keys(rng), values(rng), strict=True))

    def write(n: int) -> Draft:
      listed = pairs(n)

      def question(i: int, depth: float) -> Asked:
        key, value = listed[i]
        return _ask(f"what is the value of {key}?", f"\n- {key}:", [value], [depth])

      return _listed([f"- {key}: {value}\n" for key, value in listed], at, order, question)

    return write

  return family


def variables(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Three chains of four variables in noise: into each but the first goes a copy of the one before."""
  names, values = list(itertools.islice(content.invented(rng), 12)), list(itertools.islice(content.numbers(rng), 3))
  chains = [[value, *names[4 * i : 4 * i + 4]] for i, value in enumerate(values)]
  needles = [f" Copy {source} into {name}." for chain in chains for source, name in itertools.pairwise(chain)]
  at = np.sort(rng.random((3, 4)), axis=1).ravel().tolist()
  units = _Taken(content.noise(rng))

  def write(n: int) -> Draft:
    context, depths = _hide(units(n), needles, at)

    def question(i: int) -> Asked:
      value, *names = chains[i]
      lead = f" The variables equal to {value} are"
      return _ask(f"which variables are equal to {value}?", lead, names, depths[4 * i : 4 * i + 4])

    return Draft(context, map(question, range(3)))

  return write


_FACTS = (  # what is said of a person, in two ways, and the question; an answer begins in the first of the ways
  (("{} went to {}.", "{} made a journey to {}."), "where did {} go?"),
  (("{} bought the {}.", "{} paid for the {}."), "what did {} buy?"),
  (("{} talked with {}.", "{} had a talk with {}."), "who did {} talk with?"),
)


def questions(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Of the three facts about a person one is asked for. Every fourth sentence is a fact about somebody else."""
  people, order = content.people(rng), int(rng.integers(2**32))
  objects = content.places(rng), content.things(rng), content.people(rng)

  def told(person: str, kind: int, what: str) -> str:
    return " " + _FACTS[kind][0][rng.integers(2)].format(person, what)

  def question(person: str, kind: int, what: str, depths: Sequence[float] = ()) -> Asked:
    ways, asked = _FACTS[kind]
    return _ask(asked.format(person), " " + ways[0].format(person, "").removesuffix(" ."), [what], depths)

  person, kind, at = next(people), int(rng.integers(3)), rng.random(3).tolist()
  facts = [(person, i, next(objects[i])) for i in range(3)]
  needles = list(itertools.starmap(told, facts))
  others = _Taken((other, i, next(objects[i])) for other in people for i in [int(rng.integers(3))])
  units = _Taken(_every(4, itertools.starmap(told, others), text(rng)))

  def write(n: int) -> Draft:
    context, depths = _hide(units(n), needles, at)
    more = others(n // 4)
    asked = itertools.starmap(question, (more[i] for i in _shuffled(order, len(more))))
    return Draft(context, itertools.chain([question(*facts[kind], [depths[kind]])], asked))

  return write


def two_hops(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Who took a thing and where they went are told apart; asked is where the thing is."""
  facts, at = zip(content.people(rng), content.things(rng), content.places(rng), strict=True), rng.random(2).tolist()
  order = int(rng.integers(2**32))

  def told(person: str, thing: str, place: str) -> list[str]:
    return [f" {person} took the {thing}.", f" {person} went to {place}."]

  def question(thing: str, place: str, depths: Sequence[float] = ()) -> Asked:
    return _ask(f"where is the {thing}?", f" The {thing} is at", [place], depths)

  first = next(facts)
  others = _Taken(_mixed(rng, ([(sentence, fact) for sentence in told(*fact)] for fact in facts)))
  units = _Taken(_every(4, (sentence for sentence, _ in others), text(rng)))

  def write(n: int) -> Draft:
    context, depths = _hide(units(n), told(*first), at)
    said = collections.Counter(fact for _, fact in others(n // 4))
    whole = [fact for fact, count in said.items() if count == 2]
    asked = (question(*whole[i][1:]) for i in _shuffled(order, len(whole)))
    return Draft(context, itertools.chain([question(*first[1:], [depths[1]])], asked))

  return write


def copy(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Random words: four that stand somewhere among them are given, the six that follow them there are asked for."""
  at, order, words = rng.random(), int(rng.integers(2**32)), _Taken(texts.rounds(rng, content.WORDS))

  def write(n: int) -> Draft:
    listed = words(n)

    def question(i: int, depth: float) -> Asked:
      cue, following = " ".join(listed[i : i + 4]), listed[i + 4 : i + 10]
      return _ask(f"what follows {cue}?", f" {cue}", following, [depth], " ".join(following))

    return _listed([f"{word} " for word in listed], at, order, question, after=9)

  return write


def classification(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """Forty labels, eight words to each; an example is three of the words and the label.

  The new item has two words of one of the examples, the other way round, and another word of the same label.
  """
  words = rng.permutation(content.ITEMS)[:320].reshape(40, 8).tolist()
  labels = rng.permutation(texts.ADJECTIVES)[:40].tolist()
  at, shuffle = rng.random(), int(rng.integers(2**32))

  def example() -> tuple[int, list[int]]:
    return int(rng.integers(40)), rng.permutation(8).tolist()

  examples = _Taken(example() for _ in itertools.count())

  def write(n: int) -> Draft:
    lines = [f"- {' '.join(words[label][i] for i in order[:3])}: {labels[label]}\n" for label, order in examples(n)]

    def question(i: int, depth: float) -> Asked:
      label, order = examples(n)[i]
      item = " ".join(words[label][order[j]] for j in (2, 0, 3))
      return _ask(f"what is the label of {item}?", f"\n- {item}:", [labels[label]], [depth])

    return _listed(lines, at, shuffle, question)

  return write


def common(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A list of words: each of five makes up 1/40 of it, or 4 words; 1,328 others come equally often, up to one."""
  order, words = int(rng.integers(2**32)), rng.permutation(content.WORDS).tolist()
  common, rare = words[:5], _Taken(texts.rounds(rng, words[5:]))

  def write(n: int) -> Draft:
    each = max(4, n // 40)
    listed = np.random.default_rng(order).permutation(common * each + rare(n - 5 * each)).tolist()
    answers = sorted(common, key=listed.index)
    question, lead = "which five words are the most common in the list?", " The five most common words are"
    return Draft(" ".join(listed), iter([_ask(question, lead, answers)]))

  return write


def frequent(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A list of invented words: the r-th makes up the share 6 / (pi r)^2, the zeta distribution of exponent 2."""
  order, words = int(rng.integers(2**32)), _Taken(content.invented(rng))

  def write(n: int) -> Draft:
    counts = [int(n * 6 / (np.pi * r) ** 2) for r in range(1, int(n**0.5) + 1)]
    counts = [count for count in counts if count]
    counts += [1] * (n - sum(counts))
    listed = np.random.default_rng(order).permutation(np.repeat(words(len(counts)), counts)).tolist()
    question, lead = "which three words are the most frequent in the list?", " The three most frequent words are"
    return Draft(" ".join(listed), iter([_ask(question, lead, words(3))]))

  return write


def count(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A bell rings 1 to 9 times, another one too."""
  towns, times = rng.choice(texts.TOWNS, 2, replace=False).tolist(), rng.integers(1, 10, 2).tolist()
  rings = [f" The bell of {town} rings." for town, n in zip(towns, times, strict=True) for _ in range(n)]
  at, units = rng.random(len(rings)).tolist(), _Taken(text(rng))

  def write(n: int) -> Draft:
    question, lead = f"how many times does the bell of {towns[0]} ring?", " The number of times is"
    return Draft(_hide(units(n), rings, at)[0], iter([_ask(question, lead, [str(times[0])])]))

  return write


def recite(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A list of pairs, to be written once more."""
  pairs = _Taken(zip(content.things(rng), content.numbers(rng), strict=True))

  def write(n: int) -> Draft:
    listed, (first, _) = ", ".join(f"{key}: {value}" for key, value in pairs(n)), pairs(n)[0]
    question, lead, values = f"what is the list from {first} on?", f" {first}:", [value for _, value in pairs(n)]
    return Draft(listed, iter([_ask(question, lead, values, completion=listed.removeprefix(f"{first}: "))]))

  return write


def renumber(rng: np.random.Generator, text: texts.Text) -> Callable[[int], Draft]:
  """A numbered list out of order, to be written in order."""
  order, keys = int(rng.integers(2**32)), _Taken(key.replace(" ", "-") for key in content.things(rng))

  def write(n: int) -> Draft:
    items = [f"{i}: {key}" for i, key in enumerate(keys(n), 1)]
    listed, completion = ", ".join(items[i] for i in _shuffled(order, n)), ", ".join(items).removeprefix("1: ")
    return Draft(listed, iter([_ask("what is the list from 1 on?", " 1:", keys(n), completion=completion)]))

  return write
