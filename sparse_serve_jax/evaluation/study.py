"""The accuracy experiment in a folder: many settings of one model, of which what is there is not measured again.

The folder holds results.jsonl, rows of `accuracy.measure`; prefill.jsonl, those of cases of sparse prefill;
reuse.jsonl, rows of `selections.reuse`; and traces/*.npz. Every row has the keys task, group, tokens, case, series and
at, so that `report` can make tables of them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_serve_jax import results, tasks
from sparse_serve_jax.evaluation import accuracy, selections
from sparse_serve_jax.evaluation.accuracy import TEXT, Row, Sample
from sparse_serve_jax.evaluation.cases import DEFAULT_METHOD, PSA, RULES, Case
from sparse_serve_jax.evaluation.corpus import Corpus
from sparse_serve_jax.models import Model, place_params
from sparse_serve_jax.models.tokenizer import Tokenizer
from sparse_serve_jax.tasks import text as texts

FORMAT = 5  # of rows; raised when they say other things, or the same in another way
CHECKED = 1 << 22  # tokens of a task's instances that are made before anything is measured: some seconds for all tasks


@dataclasses.dataclass(frozen=True)
class Amounts:
  """How much is measured."""

  instances: int = 200  # of every task and length
  steps: int = 96  # decode steps at most; a longer answer is judged by its beginning
  requests: int = 4  # of which selections are traced, for every task of a long answer
  trace_steps: int = 256  # of these, decode steps of an answer at most
  text: Corpus | None = None  # ordinary text; None: it is generated

  def files(self) -> tuple[str, ...]:
    """That text is taken from; none: it is generated."""
    return tuple(map(str, self.text.files())) if self.text else ()


class Table(results.Rows):
  """Rows of one kind: one for each task, length and case."""

  def left(self, task: str, n_tokens: int, wanted: Iterable[Case]) -> list[Case]:
    """The cases without a row.

    Raises:
      ValueError: a row's case of the same name was configured in another way.
    """
    done = {row["case"]: row["config"] for row in self.all if (row["task"], row["tokens"]) == (task, n_tokens)}
    wanted = list(wanted)
    if other := [case.name for case in wanted if done.get(case.name, _crc(case)) != _crc(case)]:
      raise ValueError(f"{self.file} has rows of another {', '.join(other)}: choose another folder")
    return [case for case in wanted if case.name not in done]

  def add(self, task: str, n_tokens: int, case: Case, told: Row) -> None:
    group = TEXT if task == TEXT else tasks.TASKS[task].group
    key = dict(task=task, group=group, tokens=n_tokens, case=case.name, series=case.series, at=case.at)
    self.append(key | dict(config=_crc(case)) | told)


class Cell(NamedTuple):
  """The settings of one table for a task and a length. Cells do not depend on each other."""

  table: str  # "results", "prefill" or "reuse"
  task: str  # a generated one, or TEXT
  n_tokens: int

  def of(self, wanted: Sequence[Case]) -> list[Case]:
    """The settings that are for this table."""
    if self.table == "reuse":
      return [case for case in wanted if case.series in (DEFAULT_METHOD, *RULES)]
    return [case for case in wanted if case.prefills == (self.table == "prefill")]


def check(tokenizer: Tokenizer, cells: Iterable[Cell], amounts: Amounts) -> None:
  """Raises ValueError if answers of cells' instances, of long prompts the first ones, do not fit tokens or steps; names
  all such tasks."""
  wrong = []
  for table, task, n_tokens in (cell for cell in cells if cell.task != TEXT):
    asked, steps = amounts.instances, amounts.steps
    if table == "reuse":
      asked, steps = amounts.requests, selections.QUESTION + amounts.trace_steps
    n = min(asked, max(2, CHECKED // n_tokens))
    try:
      Sample(task, n_tokens, n, n, steps, amounts.files()).batch(tokenizer, 0)
    except ValueError as error:
      wrong.append(str(error))
  if wrong:
    raise ValueError("; ".join(dict.fromkeys(wrong)))


class Bench:
  """A model that cells are measured with."""

  def __init__(self, model: Model, amounts: Amounts, tokens_at_once: int = 1 << 17, workers: int = 4):
    """Places the model.

    Args:
      model: what answers.
      amounts: how much is measured.
      tokens_at_once: of a batch of instances.
      workers: processes that make instances ahead; 0: this one does.
    """
    self._model, self._amounts, self._at_once, self._workers = model, amounts, tokens_at_once, workers
    self._files = amounts.files()
    self._params = place_params(model)

  def check(self, cell: Cell) -> None:
    """Raises ValueError if not even one sequence of a cell fits into memory."""
    accuracy.most_at_once(self._model.config, cell.n_tokens)

  def measure(self, cell: Cell, wanted: Sequence[Case]) -> list[tuple[Case, Row, selections.Trace | None]]:
    """What each setting answers of a generated task, or predicts of ordinary text. For "reuse" what it selects while
    answers of a task are decoded, and a trace of each budget and of PSA at each threshold.
    """
    _, task, n_tokens = cell
    sample = self._sample(task, n_tokens)
    if cell.table != "reuse":
      return [(*told, None) for told in accuracy.measure(self._model, self._params, sample, wanted, self._workers)]
    # Longer steps than those of answers, hence fewer at once.
    at_once, of = max(1, self._at_once // n_tokens // 2), self._amounts
    sample = sample._replace(instances=of.requests, steps=of.trace_steps, at_once=at_once)
    return [
      (
        case,
        selections.reuse(trace) | dict(requests=of.requests, traced=trace.selected.shape[1]),
        trace if case.series in (DEFAULT_METHOD, PSA) else None,
      )
      for case, trace in selections.measure(self._model, self._params, sample, wanted)
    ]

  def _sample(self, task: str, n_tokens: int) -> Sample:
    of, pieces = self._amounts, None
    if task == TEXT and of.text is not None:
      pieces = of.text.pieces(self._model.tokenizer, n_tokens, of.instances)
    at_once = max(1, self._at_once // n_tokens)
    return Sample(task, n_tokens, of.instances, at_once, of.steps, self._files, pieces)


class Study:
  """One model's rows in a folder, which is claimed for it. What is there already is not measured again."""

  def __init__(
    self,
    model: Model,
    folder: pathlib.Path,
    wanted: Sequence[Case],
    amounts: Amounts,
    device: Mapping[str, Any] | None = None,
  ):
    """Finds out what is there.

    Args:
      model: what answers.
      folder: of the results.
      wanted: the settings.
      amounts: how much is measured.
      device: what cells are measured on, as of `results.claim`.

    Raises:
      ValueError: the folder has rows of another model, or of other amounts.
    """
    # A checkpoint that was trained on has another final norm.
    checkpoint = zlib.crc32(np.asarray(model.params["final_norm"]).tobytes())
    of_model = dict(name=model.name, dtype=model.config.dtype, checkpoint=f"{checkpoint:08x}")
    amounts_of = {key: value for key, value in dataclasses.asdict(amounts).items() if key != "text"}  # is in prompts
    setting = {"model": of_model, "prompts": _prompts(model, amounts.files()), "format": FORMAT, **amounts_of}
    if of_text := amounts.text:
      setting |= {"text": of_text.digest(), "chat": of_text.chat}
    results.claim(folder, setting, device=device)
    self._tables = {name: Table(folder / f"{name}.jsonl") for name in ("results", "prefill", "reuse")}
    self._folder, self._wanted = folder, wanted

  def left(self, cell: Cell) -> Sequence[Case]:
    """The settings of a cell that have no row."""
    return self._tables[cell.table].left(cell.task, cell.n_tokens, cell.of(self._wanted))

  def measure(self, cell: Cell, measure: Callable[[Cell, Sequence[Case]], Any]) -> None:
    """Adds the rows of a cell that are not there, as `Bench.measure` tells them."""
    table = self._tables[cell.table]
    if left := self.left(cell):
      for case, row, trace in measure(cell, left):
        if trace is not None:
          (self._folder / "traces").mkdir(exist_ok=True)
          trace.save(self._folder / "traces" / f"{cell.task}_{cell.n_tokens}_{case.at:g}.npz")
        table.add(cell.task, cell.n_tokens, case, row)

  def rows(self, name: str, cells: Sequence[Cell]) -> list[Row]:
    """Of a table, those of cells in their order behind those of others, whichever was measured first."""
    places = {cell: i for i, cell in enumerate(cells)}
    return sorted(self._tables[name].all, key=lambda row: places.get(Cell(name, row["task"], row["tokens"]), -1))


def _crc(case: Case) -> str:
  """A checksum of all that a case is."""
  return f"{zlib.crc32(repr(case).encode()):08x}"


def _prompts(model: Model, files: Sequence[str]) -> str:
  """A checksum of prompts: it changes when tasks are written in another way, or take other text."""
  text = texts.user_text(*files) if files else texts.sentences
  each = [tasks.make(name, 2048, 0, model.tokenizer, split="eval", text=text).text for name in tasks.TASKS]
  return f"{zlib.crc32(''.join(each).encode()):08x}"
