"""LongBench and LongBench-E: predictions and scores. Tasks and prompts are those of `workloads.longbench`.

Scores are those of Bai et al. (arXiv 2308.14508) and of github.com/THUDM/LongBench (MIT). Predictions are files in the
official format, named like the release's, with a line for each row:
{"pred": ..., "answers": [...], "all_classes": [...] or null, "length": ...}. A row that no model can be given has an
empty prediction and beside it "error", what is wrong and where. Files of LongBench-E are <task>_e.jsonl, or as the
official code writes them <task>.jsonl in a folder pred_e, or in one of its folders.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_serve_jax import files, results
from sparse_serve_jax.evaluation import scorers
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads import Item, Refused
from sparse_serve_jax.workloads.item import unless_strict
from sparse_serve_jax.workloads.longbench import NAMES, TASKS, Release, Row, Task, find_task

if TYPE_CHECKING:  # brings jax, and scoring needs none
  from sparse_serve_jax.serving.engine import Engine

BINS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}  # of LongBench-E: a row's length is below


METRICS: dict[str, Callable[..., float]] = {  # of a prediction and a right answer, 0 to 1; by task
  **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), scorers.qa_f1),
  **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), scorers.rouge),
  **dict.fromkeys(("dureader", "vcsum"), scorers.rouge_zh),
  **dict.fromkeys(("trec", "lsht"), scorers.classification),
  **dict.fromkeys(("lcc", "repobench-p"), scorers.code_sim),
  "multifieldqa_zh": scorers.qa_f1_zh,
  "triviaqa": scorers.qa_f1,
  "passage_count": scorers.count,
  "passage_retrieval_en": scorers.retrieval,
  "passage_retrieval_zh": scorers.retrieval_zh,
}


# --------------------------------------------------------------------------------------------------------- predictions


class _Asked(NamedTuple):
  """A request, and the row whose prediction it is for."""

  request: Request
  row: Row


class Run:
  """Predictions in a folder, that a later run goes on with.

  Line i of a file is row i's: a prediction waits for those before it, so the lines say what is left to do. A line with
  an "error" is tried again and then replaced. What else is wrong with a task's files ends the task and stands in
  `errors` by its name; the other tasks go on. A `strict` run raises ValueError at the first of all these.
  """

  def __init__(
    self,
    release: Release,
    names: Iterable[str],
    folder: pathlib.Path,
    limit: int | None = None,
    strict: bool = False,
  ):
    """Finds what is to do: the first `limit` rows of each named task, less those that are predicted."""
    self._strict = strict
    self.errors: dict[str, str] = {}
    self.n_rows = self.n_done = 0
    self._release, self._folder, self._limit = release, folder, limit
    self._found: dict[str, results.Rows] = {}  # predictions by task
    for name in dict.fromkeys(names):
      with self._reported(name):
        if (read_as := _task_name(folder / f"{name}.jsonl")) != name:
          raise ValueError(f"{folder}: {name}.jsonl in a folder pred_e is read as {read_as}: choose another folder")
        with release.file(name).open("rb") as lines:
          n_rows = sum(1 for _ in itertools.islice(filter(bytes.strip, lines), limit))
        self._found[name] = results.Rows(self._folder / f"{name}.jsonl")
        self.n_rows += n_rows
        self.n_done += sum("error" not in line for line in self._found[name].all[:n_rows])
    self._held: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)  # lines that wait for those before them

  def predict(
    self, engine: Engine, tokenizer: Tokenizer, max_prompt_tokens: int, chat: bool, max_live: int
  ) -> Iterator[str]:
    """Serves what is to do and writes it; yields a task's name for every prediction.

    Args:
      engine: serves nothing else; of the model that the tokenizer belongs to.
      max_prompt_tokens: longer prompts lose their middle.
      chat: whether to use the model's chat template, in the tasks that take one.
      max_live: requests in the engine at a time; later prompts are not read yet.
    """
    coming = self._ask(engine, tokenizer, max_prompt_tokens, chat)
    live: dict[str, _Asked] = {}
    while True:
      live |= {asked.request.id: asked for asked in itertools.islice(coming, max_live - len(live))}
      if not live:
        return
      for request in engine.step():
        asked = live.pop(request.id)
        if request.error is not None:
          raise request.error
        self._write(asked.row, tokenizer.decode(request.output_tokens))
        yield asked.row.name

  def _ask(self, engine: Engine, tokenizer: Tokenizer, max_prompt_tokens: int, chat: bool) -> Iterator[_Asked]:
    for name, found in self._found.items():
      with self._reported(name):
        for row in self._release.rows(name, self._limit):
          # A line that is there is of a run before this one: rows are asked before they are written.
          if row.index < len(found.all) and "error" not in (line := found.all[row.index]):
            if not line.items() >= row.beside.items():
              raise ValueError(f"{row.where}: line {row.index + 1} of {found.file} is a prediction for another row")
            continue
          asked = self._add(engine, row, self._release.item(row, tokenizer, max_prompt_tokens, chat))
          if isinstance(asked, Refused):
            self._write(row, "", error=str(unless_strict(asked, self._strict)))
          else:
            yield _Asked(asked, row)

  @staticmethod
  def _add(engine: Engine, row: Row, item: Item | Refused) -> Request | Refused:
    if isinstance(item, Refused):
      return item
    try:
      return engine.add_request(item.prompt, item.max_new_tokens, request_id=item.id, **item.options)
    except ValueError as error:
      return Refused(row.id, row.where, str(error))

  def _write(self, row: Row, prediction: str, **error: str) -> None:
    """Appends this row's line and those that waited for it, or nothing yet. Replaces a line that is there."""
    found, held, ready = self._found[row.name], self._held[row.name], []
    line = {"pred": prediction} | row.beside | error
    if row.index < len(found.all):
      found.replace(row.index, line)
      return
    held[row.index] = line
    while (index := len(found.all) + len(ready)) in held:
      ready.append(held.pop(index))
    found.append(*ready)

  @contextlib.contextmanager
  def _reported(self, name: str):
    try:
      yield
    except ValueError as error:
      if self._strict:
        raise
      self.errors[name] = str(error)


# -------------------------------------------------------------------------------------------------------------- scores


class Score(NamedTuple):
  """Of a file of predictions, 0 to 100 with two decimals: one number, for LongBench-E one per bin of lengths."""

  n_rows: int
  value: float | dict[str, float | None]  # None: no row is so long
  errors: tuple[str, ...] = ()  # of rows that no model was given: they count as empty predictions


def score_folder(
  folder: pathlib.Path, code_sim: scorers.CodeSim = "difflib", but: Collection[str] = ()
) -> tuple[dict[str, Score], dict[str, str]]:
  """Scores every .jsonl file of a folder, those of `but` excepted.

  Returns:
    By names, in LongBench's order: scores, and what is wrong with files that cannot be scored and with rows that have
    no prediction.
  """
  scores: dict[str, Score] = {}
  errors: dict[str, str] = {}
  found: dict[str, pathlib.Path] = {}
  for file in sorted(folder.glob("*.jsonl")):
    if (name := _task_name(file)) in found:
      errors[name] = f"{found[name]} and {file.name} are both of {name}: which is meant?"
    elif name not in but:
      found[name] = file
  order = NAMES["all"] + NAMES["all_e"]
  names = [name for name in order if name in found] + [name for name in found if name not in order]
  for name in [name for name in names if name not in errors]:
    try:
      scores[name] = score = score_file(found[name], code_sim)
    except (ValueError, ImportError) as error:
      errors[name] = str(error)
    else:
      if score.errors:
        n = f"{len(score.errors)} of {score.n_rows} rows"
        errors[name] = f"{n} have no prediction and count as empty ones, the first for: {score.errors[0]}"
  return scores, errors


def _task_name(file: pathlib.Path) -> str:
  """Of a file of predictions: its own, with _e in the official folder for LongBench-E."""
  name, folders = file.stem, pathlib.Path(os.path.abspath(file)).parts[-3:-1]
  return f"{name}_e" if "pred_e" in folders and name in TASKS else name


def score_file(file: pathlib.Path, code_sim: scorers.CodeSim = "difflib") -> Score:
  """Scores the predictions of one task, whose name is the file's: the mean over rows of the best over right answers.
  Rows with an error count as empty predictions, in LongBench-E only if their length is known.

  Raises:
    ValueError: unknown task, no row, or a row that is none; names file and line.
    ImportError: a package that the score needs is missing.
  """
  with files.placed(str(file)):
    task = find_task(_task_name(file))
  rows = list(files.read_lines(file))
  if not rows:
    raise ValueError(f"{file} holds no predictions")
  metric = METRICS[task.name]
  if metric is scorers.classification:
    last, row = next((of for of in reversed(rows) if "error" not in of[1]), rows[-1])
    with files.placed(f"{file}:{last}"):
      classes = [] if "error" in row else row["all_classes"]
      metric = functools.partial(metric, all_classes=_texts("all_classes", classes))  # for all rows
  elif metric is scorers.code_sim:
    metric = functools.partial(metric, ratio=code_sim)
  extended = _task_name(file).endswith("_e")
  values: dict[str, list[float]] = {name: [] for name in (BINS if extended else ("any",))}
  for line, row in rows:
    with files.placed(f"{file}:{line}"):
      (prediction,) = _texts("pred", [row["pred"]])
      if first_line_only(task):
        prediction = prediction.lstrip("\n").split("\n")[0]
      best = max((metric(prediction, answer) for answer in _texts("answers", row["answers"])), default=0.0)
      if not (extended and "error" in row and row["length"] is None):
        values[_bin(row["length"]) if extended else "any"].append(best)
  scores = {name: round(100 * sum(inside) / len(inside), 2) if inside else None for name, inside in values.items()}
  errors = tuple(str(row["error"]) for _, row in rows if "error" in row)
  return Score(len(rows), scores if extended else scores["any"] or 0.0, errors)


def first_line_only(task: Task) -> bool:
  """Whether only a prediction's first line is scored, leading newlines skipped."""
  return task.category == "few-shot"


def unofficial(scores: Mapping[str, Score], code_sim: scorers.CodeSim = "difflib") -> list[str]:
  """Why these are no official scores, in a few words each; nothing if they are of all rows of v1, of E or of both."""
  told = []
  for benchmark, names in (("LongBench", NAMES["all"]), ("LongBench-E", NAMES["all_e"])):
    found = [name for name in names if name in scores]
    if found and len(found) < len(names):
      told.append(f"{len(found)} of the {len(names)} tasks of {benchmark}")
  for name, score in scores.items():
    task = find_task(name)
    official = task.n_rows_e if name.endswith("_e") else task.n_rows
    if score.n_rows != official:
      told.append(f"{score.n_rows} rows of {name}, which has {official}")
      if score.n_rows == task.n_rows_e:
        told[-1] += f" (LongBench-E has so many: of that, the file is {name}_e.jsonl, or {name}.jsonl in pred_e)"
  if code_sim != "difflib" and any(METRICS[find_task(name).name] is scorers.code_sim for name in scores):
    told.append(f"code compared by {code_sim}")
  return told


def averages(scores: Mapping[str, Score]) -> dict[str, float]:
  """The averages in use, over LongBench without E: those whose tasks are all there.

  category_mean_en, category_mean_zh: the official ones, the mean over six categories of the mean over a category's
  tasks in the language; code belongs to both. task_mean_en_code: the plain mean of the 16 tasks in English and code,
  which papers on KV caches mostly report. task_mean_all: the plain mean of all 21.
  """
  by_category: dict[str, dict[str, list[str]]] = {"en": defaultdict(list), "zh": defaultdict(list)}
  for task in TASKS.values():
    for language in by_category if task.language == "code" else (task.language,):
      by_category[language][task.category].append(task.name)
  groups = {f"category_mean_{language}": list(of.values()) for language, of in by_category.items()}
  groups["task_mean_en_code"] = [[task.name] for task in TASKS.values() if task.language != "zh"]
  groups["task_mean_all"] = [[name] for name in TASKS]
  known = {name: score.value for name, score in scores.items() if isinstance(score.value, float)}
  return {
    name: round(_mean([_mean([known[task] for task in group]) for group in of]), 2)
    for name, of in groups.items()
    if known.keys() >= set(itertools.chain(*of))
  }


def table(scores: Mapping[str, Score]) -> str:
  """Scores of v1 and averages in the first column, of LongBench-E in those of its bins."""
  plain = {name: None if isinstance(score.value, dict) else score.value for name, score in scores.items()}
  bins = {name: score.value for name, score in scores.items() if isinstance(score.value, dict)}
  columns: dict[str, Mapping[str, Any]] = {"score": plain | averages(scores)}
  columns["rows"] = {name: score.n_rows for name, score in scores.items()}
  if bins:
    columns |= {key: {name: value[key] for name, value in bins.items()} for key in BINS}
  return metrics.table(columns)


def _mean(values: list[float]) -> float:
  return sum(values) / len(values)


def _bin(length: Any) -> str:
  if not isinstance(length, int | float):
    raise ValueError(f"'length' should be a number, got {length!r}")
  return next(name for name, end in BINS.items() if length < end)


def _texts(key: str, value: Any) -> list[str]:
  if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
    raise ValueError(f"{key!r} should be text, got {value!r:.80}")
  return value
