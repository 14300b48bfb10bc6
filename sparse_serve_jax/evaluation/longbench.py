"""LongBench and LongBench-E: prompts, predictions, scores.

Tasks, prompts, decoding and scores are those of Bai et al. (arXiv 2308.14508) and of github.com/THUDM/LongBench (MIT),
whose release a user brings: config/dataset2prompt.json, config/dataset2maxlen.json and data/<task>.jsonl, LongBench-E's
as <task>_e.jsonl. Predictions are files of the same names in the official format, a row a line:
{"pred": ..., "answers": [...], "all_classes": [...] or null, "length": ...}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import pathlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_serve_jax import results
from sparse_serve_jax.evaluation import scorers
from sparse_serve_jax.serving import metrics, workload
from sparse_serve_jax.serving.request import Request

if TYPE_CHECKING:  # both bring jax, and scoring needs none
  from sparse_serve_jax.models import Tokenizer
  from sparse_serve_jax.serving.engine import Engine

SLACK = 32  # tokens by which a prompt whose middle was cut can have grown when it is tokenized again
BINS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}  # of LongBench-E: a row's length is below


class Task(NamedTuple):
  """One of the 21."""

  name: str
  metric: Callable[..., float]
  category: str
  language: str  # "code" belongs to the English and to the Chinese part
  n_rows: int  # of the official file
  n_rows_e: int  # of LongBench-E's, 0 where it has none

  @property
  def chat(self) -> bool:
    """Whether a chat model's template is put around the prompt. Examples and code are continued as they stand."""
    return self.category not in ("few-shot", "code")

  @property
  def first_line(self) -> bool:
    """Whether only a prediction's first line is scored, leading newlines skipped."""
    return self.category == "few-shot"


TASKS = {
  row[0]: Task(*row)
  for row in (
    ("narrativeqa", scorers.qa_f1, "single-document QA", "en", 200, 0),
    ("qasper", scorers.qa_f1, "single-document QA", "en", 200, 224),
    ("multifieldqa_en", scorers.qa_f1, "single-document QA", "en", 150, 150),
    ("multifieldqa_zh", scorers.qa_f1_zh, "single-document QA", "zh", 200, 0),
    ("hotpotqa", scorers.qa_f1, "multi-document QA", "en", 200, 300),
    ("2wikimqa", scorers.qa_f1, "multi-document QA", "en", 200, 300),
    ("musique", scorers.qa_f1, "multi-document QA", "en", 200, 0),
    ("dureader", scorers.rouge_zh, "multi-document QA", "zh", 200, 0),
    ("gov_report", scorers.rouge, "summarization", "en", 200, 300),
    ("qmsum", scorers.rouge, "summarization", "en", 200, 0),
    ("multi_news", scorers.rouge, "summarization", "en", 200, 294),
    ("vcsum", scorers.rouge_zh, "summarization", "zh", 200, 0),
    ("trec", scorers.classification, "few-shot", "en", 200, 300),
    ("triviaqa", scorers.qa_f1, "few-shot", "en", 200, 300),
    ("samsum", scorers.rouge, "few-shot", "en", 200, 300),
    ("lsht", scorers.classification, "few-shot", "zh", 200, 0),
    ("passage_count", scorers.count, "synthetic", "en", 200, 300),
    ("passage_retrieval_en", scorers.retrieval, "synthetic", "en", 200, 300),
    ("passage_retrieval_zh", scorers.retrieval_zh, "synthetic", "zh", 200, 0),
    ("lcc", scorers.code_sim, "code", "code", 500, 300),
    ("repobench-p", scorers.code_sim, "code", "code", 500, 300),
  )
}
NAMES = {"all": list(TASKS), "all_e": [f"{task.name}_e" for task in TASKS.values() if task.n_rows_e]}


def find_task(name: str) -> Task:
  """The task of a name such as "qasper", or "qasper_e" for LongBench-E's part of it."""
  if name not in (known := NAMES["all"] + NAMES["all_e"]):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(f"LongBench has no task {name!r}; the nearest is {near!r}")
  return TASKS[name.removesuffix("_e")]


# ------------------------------------------------------------------------------------------------------------- prompts


@dataclasses.dataclass(frozen=True)
class Release:
  """A user's copy of LongBench."""

  directory: pathlib.Path
  templates: Mapping[str, str]
  max_new_tokens: Mapping[str, int]

  @classmethod
  def read(cls, directory: str | pathlib.Path) -> Release:
    """Raises ValueError if one of the two files of config/ is missing or broken."""
    directory = pathlib.Path(directory)
    kinds = ("dataset2prompt", "dataset2maxlen")
    return cls(directory, *(workload.read_json(directory / "config" / f"{kind}.json") for kind in kinds))

  @property
  def digest(self) -> str:
    """SHA-256 of templates and lengths, to tell releases apart."""
    return hashlib.sha256(json.dumps([self.templates, self.max_new_tokens], sort_keys=True).encode()).hexdigest()

  def file(self, name: str) -> pathlib.Path:
    """The rows of a task. Raises ValueError if they, the template or the length are missing."""
    task, file = find_task(name).name, self.directory / "data" / f"{name}.jsonl"
    for kind, known in (("dataset2prompt", self.templates), ("dataset2maxlen", self.max_new_tokens)):
      if task not in known:
        raise ValueError(f"{self.directory / 'config' / kind}.json: nothing for task {task!r}")
    if not file.is_file():
      raise ValueError(f"{file} is missing")
    return file

  def prompt(self, name: str, row: Mapping[str, Any]) -> str:
    """The whole prompt of a row, before any cut or chat template."""
    return self.templates[find_task(name).name].format(**row)

  def room_for_prompts(self, tokenizer: Tokenizer, max_request_tokens: int, chat: bool) -> int:
    """Tokens to cut prompts to: the window without the longest output, an empty chat template and `SLACK`.

    Raises:
      ValueError: nothing is left.
    """
    template = len(_in_template(tokenizer, "")) if chat else 0
    output = max(self.max_new_tokens.values())
    left = max_request_tokens - output - template - SLACK
    if left < 2:
      raise ValueError(
        f"requests of {max_request_tokens} tokens have no room for a prompt beside {output} of output, {template} of a "
        f"chat template and {SLACK} to spare: give more context, or say how long prompts may be"
      )
    return left


def encode_prompt(tokenizer: Tokenizer, task: Task, text: str, max_tokens: int, chat: bool) -> list[int]:
  """Token ids [T] of a whole prompt: cut first, then in the chat template if there is one and the task takes it."""
  text = workload.cut_middle(tokenizer, text, max_tokens)
  return _in_template(tokenizer, text) if chat and task.chat else tokenizer.encode(text)


def _in_template(tokenizer: Tokenizer, text: str) -> list[int]:
  conversation = tokenizer.apply_chat_template([{"role": "user", "content": text}])
  return tokenizer.encode(conversation, add_special_tokens=False)


# --------------------------------------------------------------------------------------------------------- predictions


class _Asked(NamedTuple):
  """A request, and the prediction it is for."""

  request: Request
  name: str
  index: int
  beside: dict[str, Any]  # what the prediction's line holds beside the prediction


class Run:
  """Predictions in a folder, that a later run goes on with.

  Line i of a file is row i's: a prediction waits for those before it, so the lines say what is left to do. Whatever is
  wrong with a task's files stands in `errors` by the task's name, and the other tasks go on.
  """

  def __init__(self, release: Release, names: Iterable[str], folder: pathlib.Path, limit: int | None = None):
    """Finds what is to do: the first `limit` rows of each named task, less those that are predicted."""
    self.errors: dict[str, str] = {}
    self.n_rows = self.n_done = 0
    self._release, self._folder, self._limit = release, folder, limit
    self._found: dict[str, results.Rows] = {}  # predictions by task
    for name in dict.fromkeys(names):
      with self._reported(name):
        with release.file(name).open("rb") as lines:
          n_rows = sum(1 for _ in itertools.islice(filter(bytes.strip, lines), limit))
        self._found[name] = results.Rows(self._folder / f"{name}.jsonl")
        self.n_rows += n_rows
        self.n_done += min(len(self._found[name].all), n_rows)
    self._held: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)  # rows that wait for those before them

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
        self._write(asked, tokenizer.decode(request.output_tokens))
        yield asked.name

  def _ask(self, engine: Engine, tokenizer: Tokenizer, max_prompt_tokens: int, chat: bool) -> Iterator[_Asked]:
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    for name, found in self._found.items():
      task, file, n_new = find_task(name), self._release.file(name), self._release.max_new_tokens[find_task(name).name]
      ending: dict[str, Any] = {"stop_token_ids": [newline], "min_tokens": 1} if task.name == "samsum" else {}
      with self._reported(name):
        for index, (line, row) in enumerate(itertools.islice(workload.read_lines(file), self._limit)):
          with _placed(f"{file}:{line}"):
            beside = {key: row[key] for key in ("answers", "all_classes", "length")}
            if index < len(found.all):  # by a run before this one: here rows are asked before they are written
              if not found.all[index].items() >= beside.items():
                raise ValueError(f"line {index + 1} of {found.file} is a prediction for another row")
              continue
            ids = encode_prompt(tokenizer, task, self._release.prompt(name, row), max_prompt_tokens, chat)
            request = engine.add_request(ids, n_new, request_id=f"{name}-{index}", **ending)
          yield _Asked(request, name, index, beside)

  def _write(self, asked: _Asked, prediction: str) -> None:
    """Appends this row and those that waited for it, or nothing yet."""
    found, held, ready = self._found[asked.name], self._held[asked.name], []
    held[asked.index] = {"pred": prediction} | asked.beside
    while (index := len(found.all) + len(ready)) in held:
      ready.append(held.pop(index))
    found.append(*ready)

  @contextlib.contextmanager
  def _reported(self, name: str):
    try:
      yield
    except ValueError as error:
      self.errors[name] = str(error)


@contextlib.contextmanager
def _placed(where: str):
  """Errors over a row, with where it stands."""
  try:
    yield
  except KeyError as error:
    raise ValueError(f"{where}: the row lacks {error}") from None
  except (IndexError, ValueError) as error:
    raise ValueError(f"{where}: {error}") from error


# -------------------------------------------------------------------------------------------------------------- scores


class Score(NamedTuple):
  """Of a file of predictions, 0 to 100 with two decimals: one number, for LongBench-E one per bin of lengths."""

  n_rows: int
  value: float | dict[str, float | None]  # None: no row is so long


def score_folder(
  folder: pathlib.Path, code_sim: scorers.CodeSim = "difflib", but: Collection[str] = ()
) -> tuple[dict[str, Score], dict[str, str]]:
  """Scores every .jsonl file of a folder, those of `but` excepted.

  Returns:
    By names, in LongBench's order: scores, and what is wrong with the files that cannot be scored.
  """
  scores: dict[str, Score] = {}
  errors: dict[str, str] = {}
  files = {file.stem: file for file in sorted(folder.glob("*.jsonl")) if file.stem not in but}
  order = NAMES["all"] + NAMES["all_e"]
  for name in [name for name in order if name in files] + [name for name in files if name not in order]:
    try:
      scores[name] = score_file(files[name], code_sim)
    except (ValueError, ImportError) as error:
      errors[name] = str(error)
  return scores, errors


def score_file(file: pathlib.Path, code_sim: scorers.CodeSim = "difflib") -> Score:
  """Scores the predictions of one task, whose name is the file's: the mean over rows of the best over right answers.

  Raises:
    ValueError: unknown task, no row, or a row that is none; names file and line.
    ImportError: a package that the score needs is missing.
  """
  with _placed(str(file)):
    task = find_task(file.stem)
  rows = list(workload.read_lines(file))
  if not rows:
    raise ValueError(f"{file} holds no predictions")
  metric = task.metric
  if metric is scorers.classification:
    with _placed(f"{file}:{rows[-1][0]}"):
      metric = functools.partial(metric, all_classes=_texts("all_classes", rows[-1][1]["all_classes"]))  # for all rows
  elif metric is scorers.code_sim:
    metric = functools.partial(metric, ratio=code_sim)
  extended = file.stem.endswith("_e")
  values: dict[str, list[float]] = {name: [] for name in (BINS if extended else ("any",))}
  for line, row in rows:
    with _placed(f"{file}:{line}"):
      (prediction,) = _texts("pred", [row["pred"]])
      if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
      best = max((metric(prediction, answer) for answer in _texts("answers", row["answers"])), default=0.0)
      values[_bin(row["length"]) if extended else "any"].append(best)
  scores = {name: round(100 * sum(inside) / len(inside), 2) if inside else None for name, inside in values.items()}
  return Score(len(rows), scores if extended else scores["any"] or 0.0)


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
  if code_sim != "difflib" and any(find_task(name).metric is scorers.code_sim for name in scores):
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
