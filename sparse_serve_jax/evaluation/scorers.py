"""LongBench's scores of one prediction against one right answer, from 0 to 1.

The definitions are those of Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding"
(arXiv 2308.14508), in the form that the evaluation of github.com/THUDM/LongBench (MIT) gives them. Its peculiarities
are kept, since published numbers rest on them. ROUGE needs the package `rouge`, Chinese words `jieba`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import re
import string
import types
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Literal

CodeSim = Literal["difflib", "indel"]

# The list has the closing 》 but not the opening 《.
_CHINESE_PUNCTUATION = (
  "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"
  "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_PUNCTUATION_ZH = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def qa_f1(prediction: str, answer: str) -> float:
  """F1 of the words, as multisets: lower case, without ASCII punctuation and the articles a, an, the."""
  return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
  """F1 of jieba's words, as multisets: lower case, without ASCII and Chinese punctuation and white space."""
  return _f1(_words_zh(prediction), _words_zh(answer))


def rouge(prediction: str, answer: str) -> float:
  """ROUGE-L, F1, of the package `rouge`: of word sets, by sentences that end at "."; case counts.

  0 wherever the package fails: on a text that is empty but for dots, or a sentence of about 1,000 words, where it
  recurses deeper than Python does.
  """
  scorer = _package("rouge").Rouge(metrics=["rouge-l"], stats=["f"])
  try:
    return scorer.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
  except Exception:
    return 0.0


def rouge_zh(prediction: str, answer: str) -> float:
  """`rouge` of jieba's words."""
  return rouge(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
  """1 / the number of classes that the prediction names if the right one is among them, else 0.

  Named is what stands anywhere in the prediction. A class that is only a part of the right one's name is not counted,
  except where it follows directly on another such class: the list shrinks while it is walked through.
  """
  named = [name for name in all_classes if name in prediction]
  for name in named:
    if name in answer and name != answer:
      named.remove(name)  # the walk then skips the next one
  return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str) -> float:
  """Share of the prediction's numbers that are the one of "Paragraph 7"; 0 if it has none."""
  return _share_of_numbers(prediction, _number_after("Paragraph ", answer))


def retrieval_zh(prediction: str, answer: str) -> float:
  """Share of the prediction's numbers that are the one of "段落7"; 0 if it has none."""
  return _share_of_numbers(prediction, _number_after("段落", answer))


def count(prediction: str, answer: str) -> float:
  """Share of the prediction's numbers that are the answer; 0 if it has none."""
  return _share_of_numbers(prediction, answer)


def code_sim(prediction: str, answer: str, ratio: CodeSim = "difflib") -> float:
  """Similarity, in whole percent, of a line of code and the prediction's first line without a backquote, # or //.

  Args:
    prediction: leading newlines are skipped; if no line is left, the line is empty.
    answer: a line of code.
    ratio: "difflib", the official one: Ratcliff and Obershelp's, as the standard library has it. "indel": 2 LCS / (sum
      of the lengths), which the same package gives where python-Levenshtein is installed; some published numbers do.
  """
  lines = prediction.lstrip("\n").split("\n")
  line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
  if line == answer:
    return 1.0
  same = difflib.SequenceMatcher(None, line, answer).ratio() if ratio == "difflib" else _indel_ratio(line, answer)
  return round(100 * same) / 100


def _f1(prediction: list[str], answer: list[str]) -> float:
  same = (Counter(prediction) & Counter(answer)).total()
  if not same:
    return 0.0
  precision, recall = same / len(prediction), same / len(answer)
  return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
  return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def _words_zh(text: str) -> list[str]:
  words = ("".join(word.lower().translate(_NO_PUNCTUATION_ZH).split()) for word in _cut(text))
  return [word for word in words if word]


def _cut(text: str) -> list[str]:
  return list(_package("jieba").cut(text, cut_all=False))


def _number_after(word: str, answer: str) -> str:
  match = re.search(rf"{word}(\d+)", answer)
  if match is None:
    raise ValueError(f'a right answer is "{word}" and a number, got {answer!r}')
  return match[1]


def _share_of_numbers(prediction: str, number: str) -> float:
  numbers = re.findall(r"\d+", prediction)
  return numbers.count(number) / len(numbers) if numbers else 0.0


def _indel_ratio(a: str, b: str) -> float:
  """2 LCS / (len(a) + len(b)), not both empty.

  Bit-parallel (Hyyrö 2004): a 0 in `row` is where the LCS of a's beginning and what was read of b grows. One addition
  of len(a) bits for each character of b.
  """
  where: Counter[str] = Counter()
  for i, character in enumerate(a):
    where[character] += 1 << i
  row = every = (1 << len(a)) - 1
  for character in b:
    matches = row & where[character]
    row = (row + matches | row - matches) & every
  return 2 * (len(a) - row.bit_count()) / (len(a) + len(b))


@functools.cache
def _package(name: str) -> types.ModuleType:
  try:
    with warnings.catch_warnings(action="ignore"):  # jieba's source has escapes that newer Pythons warn of
      module = importlib.import_module(name)
  except ImportError as error:
    raise ImportError(f"this score needs the package {name!r}: pip install -e '.[eval]'") from error
  if name == "jieba":
    module.setLogLevel(logging.WARNING)
  return module
