"""LongBench's scores against values computed by hand, and against published scores of published predictions."""

from __future__ import annotations

import functools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve_jax.evaluation import scorers

# ------------------------------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize(
  ("prediction", "answer", "expected"),
  [
    ("The red barn.", "a red, barn", 1),
    ("red red barn", "red barn barn", 2 / 3),  # as multisets: 2 of 3 and 2 of 3
    ("It is the old mill", "mill", 2 * (1 / 4) / (1 / 4 + 1)),
    ("another anthem", "other them", 0),  # articles are whole words
    ("a-the b", "athe b", 1),  # punctuation goes first, so no article is left to go
    ("don't", "dont", 1),
    ("It’s", "Its", 0),  # ASCII punctuation only
    ("", "mill", 0),
    ("the", "an", 0),  # nothing is left of either
  ],
)
def test_qa_f1(prediction, answer, expected):
  assert scorers.qa_f1(prediction, answer) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
  ("prediction", "answer", "expected"),
  [
    ("我爱北京", "北京", 2 * (1 / 3) / (1 / 3 + 1)),  # 我 / 爱 / 北京
    ("北京，我爱！", "“我爱北京”。", 1),  # order does not count, nor Chinese punctuation
    ("北京 \n", "北京", 1),
    ("ABC", "abc", 1),
    ("《北京", "北京", 2 * (1 / 2) / (1 / 2 + 1)),  # the opening mark is on no list and stays a word
    ("北京》", "北京", 1),
    ("。。。", "北京", 0),
    ("", "北京", 0),
  ],
)
def test_qa_f1_zh(prediction, answer, expected):
  assert scorers.qa_f1_zh(prediction, answer) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------- ROUGE


@pytest.mark.parametrize(
  ("prediction", "answer", "expected"),
  [
    ("the cat sat", "the cat sat", 1),
    ("the cat lay", "the cat sat", 2 / 3),
    ("sat cat the", "the cat sat", 1 / 3),  # one word in order
    ("The cat sat", "the cat sat", 2 / 3),  # case counts
    ("the the the cat", "the cat", 1),  # word sets
    # By sentences: the answer's first has 3 of its words in both, its second adds 1 more. 4 of 4 and 4 of 5.
    ("a b c. d e", "a b c. d", 2 * (4 / 5) / (4 / 5 + 1)),
    ("", "the cat", 0),
    (" ...", "the cat", 0),
    (".", "the cat", 0),
    ("the cat", "", 0),
  ],
)
def test_rouge(prediction, answer, expected):
  assert scorers.rouge(prediction, answer) == pytest.approx(expected, abs=1e-6)


def test_what_rouge_fails_at_scores_0():
  """A sentence longer than Python recurses, wherever it stands. By its definition it had a score."""

  def words(n: int) -> str:
    return " ".join(map(str, range(n)))

  assert scorers.rouge("top " + words(99), "top") == pytest.approx(2 * 0.01 / 1.01, abs=1e-6)
  assert scorers.rouge("top " + words(1500), "top") == 0
  assert scorers.rouge("top. " + words(1500), "top") == 0


def test_rouge_zh():
  """The same over jieba's words, of which whole Chinese text has no other."""
  assert scorers.rouge_zh("我爱北京", "他爱北京") == pytest.approx(2 / 3, abs=1e-6)
  assert scorers.rouge("我爱北京", "他爱北京") == 0
  assert scorers.rouge_zh("", "北京") == 0


# ----------------------------------------------------------------------------------------------------- classes, numbers


@pytest.mark.parametrize(
  ("prediction", "answer", "expected"),
  [
    ("Type: tall tree", "tall tree", 1),  # "tree" is part of the answer, and not counted
    ("tall tree or house", "tall tree", 1 / 2),
    ("house", "tall tree", 0),
    ("tree", "tall tree", 0),
    ("Tall tree", "tall tree", 0),  # case counts
    ("tall tree", "tree", 1 / 2),  # but the answer is part of another
    ("", "tree", 0),
  ],
)
def test_classification(prediction, answer, expected):
  assert scorers.classification(prediction, answer, ["tree", "tall tree", "house"]) == expected


def test_classification_skips_the_part_after_a_part_it_removes():
  """b and c both are parts of the answer. Where they stand side by side, one of the two stays."""
  assert scorers.classification("a b c", "a b c", ["b", "c", "a b c"]) == 1 / 2
  assert scorers.classification("a b c", "a b c", ["b", "a b c", "c"]) == 1
  classes = ["a", "b", "c", "a b c"]
  assert scorers.classification("a b c", "a b c", classes) == 1 / 2
  assert classes == ["a", "b", "c", "a b c"]  # the caller's list stays


@pytest.mark.parametrize(
  ("prediction", "expected"),
  [
    ("Paragraph 7", 1),
    ("7", 1),
    ("7, 7 or 12", 2 / 3),
    ("paragraph 07", 0),  # compared as text
    ("77", 0),
    ("7.5", 1 / 2),
    ("seven", 0),
    ("", 0),
  ],
)
def test_numbers(prediction, expected):
  assert scorers.retrieval(prediction, "Paragraph 7") == expected
  assert scorers.retrieval(prediction, "Paragraph 7 and Paragraph 12") == expected  # the first counts
  assert scorers.retrieval_zh(prediction.replace("Paragraph ", "段落"), "段落7") == expected
  assert scorers.count(prediction, "7") == expected


def test_an_answer_without_a_paragraph_is_an_error():
  with pytest.raises(ValueError, match="is \"Paragraph \" and a number, got 'paragraph 7'"):
    scorers.retrieval("7", "paragraph 7")
  with pytest.raises(ValueError, match="Paragraph 7"):
    scorers.retrieval_zh("7", "Paragraph 7")


# ----------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize(
  ("prediction", "answer", "difflib", "indel"),
  [
    ("x = 1", "x = 1", 1, 1),
    ("\n\nx = 1\ny = 2", "x = 1", 1, 1),
    ("# a remark\n`x`\nf(a) // b\nx = 1\nx = 2", "x = 1", 1, 1),
    ("\n # only\n", "", 1, 1),  # the line after the remark is empty
    ("# only", "x = 1", 0, 0),
    ("", "", 1, 1),
    ("abcd", "bcde", 0.75, 0.75),  # "bcd" is common: 2 * 3 / 8
    ("abc", "ab", 0.8, 0.8),
    ("a", "abcdefgh", 0.22, 0.22),  # 2 / 9, in whole percent
    # XYZ is the longest block, and nothing is left beside it: 2 * 3 / 22. In order stand also a, b, c, d: 2 * 4 / 22.
    ("XYZa1b2c3d4", "a5b6c7d8XYZ", 0.27, 0.36),
  ],
)
def test_code_sim(prediction, answer, difflib, indel):
  assert scorers.code_sim(prediction, answer) == pytest.approx(difflib)
  assert scorers.code_sim(prediction, answer, "indel") == pytest.approx(indel)


def lcs(a: str, b: str) -> int:
  """The longest common subsequence by its recursion."""

  @functools.cache
  def of(i: int, j: int) -> int:
    if not i or not j:
      return 0
    return of(i - 1, j - 1) + 1 if a[i - 1] == b[j - 1] else max(of(i - 1, j), of(i, j - 1))

  return of(len(a), len(b))


@given(st.text("abc", max_size=12), st.text("abcd", max_size=12))
def test_indel_is_the_longest_common_subsequences(a, b):
  expected = 1.0 if a == b else round(200 * lcs(a, b) / (len(a) + len(b))) / 100
  assert scorers.code_sim(a, b, "indel") == expected


# ------------------------------------------------------------------------------------------------------------- packages


@pytest.mark.parametrize(
  ("package", "score"),
  [("rouge", lambda: scorers.rouge("a", "a")), ("jieba", lambda: scorers.qa_f1_zh("a", "a"))],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package, score):
  scorers._package.cache_clear()
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"needs the package '{package}': pip install -e '\.\[eval\]'"):
    score()
  assert scorers.qa_f1("a mill", "mill") == scorers.code_sim("x", "x") == 1
  monkeypatch.undo()
  assert score() == pytest.approx(1)
