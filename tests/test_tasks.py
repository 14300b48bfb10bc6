"""Generated tasks: each can be solved from its prompt, and not without its needle; and the text between needles."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest

from sparse_serve_jax.models.tokenizer import ByteTokenizer
from sparse_serve_jax.tasks import TASKS, Instance, make, text


class WordTokenizer:
  """A token is a word, a digit or a mark, after one that begins the text: about as many as a small BPE makes."""

  def encode(self, text: str) -> list[int]:
    return [0, *map(len, re.findall(r"\d|[^\W\d_]+|[^\w ]", text))]


WORDS = WordTokenizer()
RETRIEVAL = sorted(name for name, task in TASKS.items() if task.group == "retrieval")
LENGTHS = (256, 1024, 4096, 16384)


def parts(prompt: str) -> tuple[str, str]:
  context, question = prompt.rsplit("\nQuestion: ", 1)
  return context, question.split(" Answer:")[0]


# Oracles: what a reader of the prompt answers, by task.


def _codes(context: str, question: str) -> str:
  keys = question.removesuffix("?").split(" of ")[1].split(", ")
  return ", ".join(code for key in keys for code in re.findall(rf"special code of {key} is (\S+)\.", context))


def _pairs(context: str, question: str) -> str:
  return dict(line[2:].split(": ") for line in context.splitlines())[question.removesuffix("?").split(" of ")[1]]


def _variables(context: str, question: str) -> str:
  equal = {question.removesuffix("?").split()[-1]: None}  # in order
  for source, name in re.findall(r"Copy (\w+) into (\w+)\.", context):
    equal |= {name: None} if source in equal else {}
  return ", ".join(equal)


def _question(context: str, question: str) -> str:
  person = re.findall(r"[A-Z]\w+ [A-Z]\w+", question)[0]
  said = {"where": "went to|made a journey to", "what": "(?:bought|paid for) the", "who": "talked with|had a talk with"}
  return re.findall(rf"{person} (?:{said[question.split()[0]]}) ([^.]+)\.", context)[0]


def _two_hops(context: str, question: str) -> str:
  thing = question.removeprefix("where is the ").removesuffix("?")
  person = re.findall(rf"([A-Z]\w+ [A-Z]\w+) took the {thing}\.", context)[0]
  return re.findall(rf"{person} went to ([^.]+)\.", context)[0]


def _copy(context: str, question: str) -> str:
  cue = question.removeprefix("what follows ").removesuffix("?")
  return " ".join(f" {context} ".split(f" {cue} ")[1].split()[:6])


def _classification(context: str, question: str) -> str:
  item = set(question.removeprefix("what is the label of ").removesuffix("?").split())
  alike = collections.Counter()
  for line in context.splitlines():
    words, label = line[2:].split(": ")
    alike[label] = max(alike[label], len(item & set(words.split())))
  return alike.most_common(1)[0][0]


def _most_common(n: int) -> Callable[[str, str], str]:
  return lambda context, _: " ".join(word for word, _ in collections.Counter(context.split()).most_common(n))


def _count(context: str, question: str) -> str:
  return str(context.count(question.removeprefix("how many times does the ").removesuffix(" ring?") + " rings."))


def _values(context: str, _: str) -> str:
  return ", ".join(re.findall(r": (\d+)\b", context))


def _sorted(context: str, _: str) -> str:
  return ", ".join(sorted(context.split(", "), key=lambda line: int(line.split(":")[0])))


ORACLES: dict[str, Callable[[str, str], str]] = {
  "single_noise": _codes,
  "single_text": _codes,
  "single_uuid": _codes,
  "multi_key": _codes,
  "multi_value": _codes,
  "multi_query": _codes,
  "key_value": _pairs,
  "key_value_uuid": _pairs,
  "variable_tracking": _variables,
  "question": _question,
  "question_two_hops": _two_hops,
  "copy": _copy,
  "classification": _classification,
  "common_words": _most_common(5),
  "frequent_words": _most_common(3),
  "count": _count,
  "recite": _values,
  "renumber": _sorted,
}


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_solves_it(task: str):
  cases = [(1024, seed) for seed in range(20)] + [(256, 20), (4096, 21)]
  for length, seed in cases:
    instance = make(task, length, seed, WORDS, split="eval")
    score = TASKS[task].score
    assert score(ORACLES[task](*parts(instance.prompt)), instance) == 1.0, (length, seed)
    assert score(instance.completion, instance) == 1.0
    assert score(instance.completion + "The next sentence.", instance) == 1.0


def test_further_questions_are_of_the_same_context():
  asked = {}
  for task in TASKS:
    instance = make(task, 4096, 0, WORDS, split="train", n_more=20)
    context, _ = parts(instance.prompt)
    for question, completion in instance.more:
      answers = tuple(re.split(", | " if len(instance.answers) > 1 else ", ", completion.strip()))
      assert len(answers) == len(instance.answers) and completion != instance.completion
      answered = ORACLES[task](*parts(f"{context}\n{question}"))
      assert TASKS[task].score(answered, dataclasses.replace(instance, answers=answers)) == 1.0, (task, question)
    assert len(set(instance.more)) == len(instance.more)
    assert dataclasses.replace(instance, more=()) == make(task, 4096, 0, WORDS, split="train")
    asked[task] = len(instance.more)
  without = {task for task in TASKS if task.startswith("single") or TASKS[task].group != "retrieval"}
  assert {task for task, n in asked.items() if n == 0} == without
  assert all(asked[task] == 20 for task in ("multi_key", "key_value", "question", "copy", "classification"))


@pytest.mark.parametrize("task", TASKS)
def test_wrong_and_empty_answers_score_nothing(task: str):
  instance = make(task, 1024, 0, WORDS, split="eval")
  for wrong in ("", "\n", ".", "no idea", "nothing. " + instance.completion, "nothing\n" + instance.completion):
    assert TASKS[task].score(wrong, instance) == 0.0, wrong


@pytest.mark.parametrize(
  "task", ("multi_value", "multi_query", "variable_tracking", "copy", "common_words", "renumber")
)
def test_part_of_the_answers_scores_in_part(task: str):
  instance = make(task, 1024, 0, WORDS, split="eval")
  n = len(instance.answers)
  assert TASKS[task].score(f"{instance.answers[0]}, {instance.answers[2]}, zero.", instance) == pytest.approx(2 / n)


def test_a_long_output_is_scored_by_its_longest_ordered_part():
  instance = make("recite", 1024, 0, WORDS, split="eval")
  score, answers = TASKS["recite"].score, instance.answers
  n = len(answers)
  assert score(", ".join(answers[::-1]), instance) == pytest.approx(1 / n)
  assert score(", ".join(answers[1:]), instance) == pytest.approx((n - 1) / n)
  assert score(", ".join([*answers[3:], *answers[:3]]), instance) == pytest.approx((n - 3) / n)
  assert score(", ".join(a for answer in answers for a in (answer, answer)), instance) == 1.0


def needle_spans(instance: Instance) -> list[tuple[int, int]]:
  """Where the needles are in the context, by their depths: to the end of the sentence, of the line, or ten words."""
  context, _ = parts(instance.prompt)
  end = r"(\S+ ){9}\S+" if instance.task == "copy" else r"[^.\n]*[.\n]?"
  begins = [round(depth * (len(context) + 1)) for depth in instance.depths]
  return [re.compile(end).match(context, begin).span() for begin in begins]  # pyright: ignore


@pytest.mark.parametrize("task", RETRIEVAL)
def test_the_answer_is_in_the_needle_and_nowhere_else(task: str):
  for seed in range(20):
    instance = make(task, 1024, seed, WORDS, split="eval")
    context, _ = parts(instance.prompt)
    spans = needle_spans(instance)
    needles = [context[begin:end] for begin, end in spans]
    for i, answer in enumerate(instance.answers):
      assert answer in needles[0 if len(needles) == 1 else i]
    for begin, end in sorted(spans, reverse=True):
      context = context[:begin] + context[end:]
    if task == "classification":  # what else has the label resembles the item too
      context = re.sub(rf".*: {instance.answers[0]}$", "", context, flags=re.MULTILINE)
    if task == "copy":  # its words are everywhere, what was asked for is not
      assert " ".join(instance.answers) not in context
    else:
      assert not any(re.search(rf"\b{answer}\b", context) for answer in instance.answers)


@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_ends_with_how_the_answer_begins(task: str):
  """In words of the question; where the context says it in the same words, it does so once."""
  others = set("The the at bought is number of talked to went with".split())
  for seed in range(10):
    instance = make(task, 1024, seed, WORDS, split="eval")
    context, end = instance.prompt.rsplit("\nQuestion: ", 1)
    question, lead = end.split(" Answer:")
    assert set(re.findall(r"\w[\w-]*", lead)) <= set(re.findall(r"\w[\w-]*", question)) | others
    if task.startswith(("single", "multi_key", "key_value", "copy")):
      said = f"{lead}{instance.completion.rstrip()}".strip()
      assert context.count(said) == 1, said


@pytest.mark.parametrize("task", RETRIEVAL)
def test_depth_is_uniform(task: str):
  depths = [d for seed in range(500) for d in make(task, 1024, seed, WORDS, split="train").depths]
  assert all(0 <= depth < 1 for depth in depths)
  bins = np.histogram(depths, bins=5, range=(0, 1))[0]
  expected = len(depths) / 5
  assert ((bins - expected) ** 2 / expected).sum() < 18.5, bins  # 1 in 1,000 for four degrees of freedom


@pytest.mark.parametrize("task", TASKS)
def test_is_decided_by_its_arguments(task: str):
  def prompt(length: int = 512, seed: int = 3, split: Literal["train", "eval"] = "train") -> str:
    return make(task, length, seed, WORDS, split=split).text

  assert prompt() == prompt()
  assert len({prompt(), prompt(seed=4), prompt(split="eval"), prompt(length=640)}) == 4


def test_keys_and_values_are_of_the_kind_named():
  uuid = r"([0-9a-f]{4}-){2}[0-9a-f]{4}"
  for task, key, value in (
    ("single_text", r"[a-z]+ [a-z]+", r"\d{5}"),
    ("single_uuid", r"[a-z]+ [a-z]+", uuid),
    ("key_value", r"[a-z]+ [a-z]+", r"\d{5}"),
    ("key_value_uuid", uuid, uuid),
  ):
    instance = make(task, 512, 0, WORDS, split="eval")
    assert re.search(rf" of {key}\? Answer:", instance.prompt) and re.fullmatch(value, instance.answers[0]), task


def test_another_length_hides_another_needle():
  assert len({make("single_noise", length, 0, WORDS, split="eval").answers for length in range(512, 522)}) == 10


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_length(task: str, length: int):
  for seed in range(2):
    instance = make(task, length, seed, WORDS, split="train")
    assert instance.n_tokens == len(WORDS.encode(instance.text)) <= length
    assert instance.n_tokens >= (0.97 if length >= 1024 else 0.85) * length
    assert len(WORDS.encode(instance.prompt)) + instance.max_new_tokens == instance.n_tokens
    assert " Answer:" in instance.prompt[-120:]


class Prepends:
  """Words, of which the first has a space before it whatever the text begins with, as Llama 2's."""

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    return [0] * add_special_tokens + [zlib.crc32(word.encode()) for word in re.findall(r" ?[^ ]+| ", " " + text)]


@pytest.mark.parametrize("tokenizer", [Prepends(), ByteTokenizer()])
@pytest.mark.parametrize("task", TASKS)
def test_what_is_to_be_answered_is_what_greedy_decoding_would_write(task: str, tokenizer):
  """Prompt and completion are the tokens of the whole text, whatever a tokenizer makes of the completion alone."""
  instance = make(task, 1024, 0, tokenizer, split="eval")
  ids, n_prompt = instance.encode(tokenizer)
  assert ids == tokenizer.encode(instance.text) and ids[:n_prompt] == tokenizer.encode(instance.prompt)
  assert 0 < n_prompt < len(ids) <= 1024


@pytest.mark.parametrize("task", TASKS)
def test_length_in_bytes(task: str):
  for length in (1024, 4096):
    instance = make(task, length, 5, ByteTokenizer(), split="train")
    assert len(instance.text) + 1 == instance.n_tokens <= length
    assert instance.n_tokens >= min(0.97 * length, length - 130)  # a sentence has up to 130 characters


@pytest.mark.parametrize("task", ("recite", "renumber"))
def test_outputs_are_long_and_never_the_same(task: str):
  instance = make(task, 16384, 0, WORDS, split="eval")
  assert instance.max_new_tokens >= 4000
  assert len(set(instance.answers)) == len(instance.answers) > 500


@pytest.mark.parametrize(
  ("task", "length", "seed", "split", "message"),
  (
    ("single", 1024, 0, "eval", "no task 'single'"),
    ("copy", 1024, 0, "test", "got 'test'"),
    ("copy", 0, 0, "eval", "length=0"),
    ("copy", 1024, -1, "eval", "seed=-1"),
    ("multi_value", 64, 0, "eval", r"at least \d+ tokens .* got length=64"),
  ),
)
def test_refuses(task: str, length: int, seed: int, split, message: str):
  with pytest.raises(ValueError, match=message):
    make(task, length, seed, WORDS, split=split)


def test_instances_are_made_quickly():
  start = time.perf_counter()
  n = sum(make(task, 4096, 7, WORDS, split="train").n_tokens for task in TASKS)
  assert n / (time.perf_counter() - start) > 20_000  # tokens a second; ten times as many on one idle core


def test_text_does_not_repeat_itself():
  words = text.document(np.random.default_rng(0), 13_000).split()  # about 16k tokens
  runs = [tuple(words[i : i + 16]) for i in range(len(words) - 15)]
  assert len(set(runs)) == len(runs)
  assert len({tuple(words[i : i + 4]) for i in range(len(words))}) > 0.8 * len(words)


def test_text_has_thousands_of_words_and_comes_quickly():
  start = time.perf_counter()
  document = text.document(np.random.default_rng(1), 300_000)
  assert len(document) / (time.perf_counter() - start) > 1e6  # twenty times as many on one idle core
  assert len(set(re.findall(r"[a-z]+", document.lower()))) > 3000
  assert max(map(int, re.findall(r"\d+", document))) < 2100
  assert not re.search(r"[{}%]|  |\ba [aeiou]", document)


def test_document_has_the_words_asked_for():
  for n in (0, 1, 50, 5000):
    document = text.document(np.random.default_rng(2), n)
    assert n <= len(document.split()) < n + 40
    assert document == text.document(np.random.default_rng(2), n)
  assert document.startswith(text.document(np.random.default_rng(2), 50))


def test_a_file_takes_the_place_of_the_text(tmp_path):
  file = tmp_path / "user.txt"
  file.write_text("One two\nthree. Is it four?\n\n" + "word " * 50 + "\n\n \nThe end\n", encoding="utf-8")
  units = ["\nOne two three.", " Is it four?", "\n" + "word " * 39 + "word", " " + "word " * 9 + "word", "\nThe end"]
  stream = text.user_text(file)(np.random.default_rng(0))
  seen = [next(stream) for _ in range(10)]
  first = units.index(seen[0])
  assert seen == (units[first:] + units[:first]) * 2
  instance = make("single_text", 1024, 0, WORDS, split="eval", text=text.user_text(file))
  assert instance.n_tokens > 960 and instance.prompt.count("Is it four?") > 3
  assert TASKS["single_text"].score(_codes(*parts(instance.prompt)), instance) == 1.0


def test_a_file_without_words_is_refused(tmp_path):
  with pytest.raises(ValueError, match="missing"):
    text.user_text(tmp_path / "none.txt")
  (tmp_path / "latin.txt").write_bytes("a\ncafé".encode("latin-1"))
  with pytest.raises(ValueError, match=r"latin\.txt:2: not UTF-8"):
    text.user_text(tmp_path / "latin.txt")
  (tmp_path / "empty.txt").write_text(" \n\n")
  with pytest.raises(ValueError, match="no words"):
    text.user_text(tmp_path / "empty.txt")
