"""LongBench and LongBench-E: their tasks and prompts.

Tasks, prompts and decoding are those of Bai et al. (arXiv 2308.14508) and of github.com/THUDM/LongBench (MIT), whose
release a user brings: config/dataset2prompt.json, config/dataset2maxlen.json and data/<task>.jsonl, LongBench-E's as
<task>_e.jsonl.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sparse_serve_jax import files, prompting
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads.config import WorkloadConfig
from sparse_serve_jax.workloads.cut import cut_middle
from sparse_serve_jax.workloads.item import FileSource, Item, Refused, unless_strict

SLACK = 32  # tokens by which a prompt whose middle was cut can have grown when it is tokenized again


class Task(NamedTuple):
  """One of the 21."""

  name: str
  category: str
  language: str  # "code" belongs to the English and to the Chinese part
  n_rows: int  # of the official file
  n_rows_e: int  # of LongBench-E's, 0 where it has none

  @property
  def chat(self) -> bool:
    """Whether a chat model's template is put around the prompt. Examples and code are continued as they stand."""
    return self.category not in ("few-shot", "code")


TASKS = {
  row[0]: Task(*row)
  for row in (
    ("narrativeqa", "single-document QA", "en", 200, 0),
    ("qasper", "single-document QA", "en", 200, 224),
    ("multifieldqa_en", "single-document QA", "en", 150, 150),
    ("multifieldqa_zh", "single-document QA", "zh", 200, 0),
    ("hotpotqa", "multi-document QA", "en", 200, 300),
    ("2wikimqa", "multi-document QA", "en", 200, 300),
    ("musique", "multi-document QA", "en", 200, 0),
    ("dureader", "multi-document QA", "zh", 200, 0),
    ("gov_report", "summarization", "en", 200, 300),
    ("qmsum", "summarization", "en", 200, 0),
    ("multi_news", "summarization", "en", 200, 294),
    ("vcsum", "summarization", "zh", 200, 0),
    ("trec", "few-shot", "en", 200, 300),
    ("triviaqa", "few-shot", "en", 200, 300),
    ("samsum", "few-shot", "en", 200, 300),
    ("lsht", "few-shot", "zh", 200, 0),
    ("passage_count", "synthetic", "en", 200, 300),
    ("passage_retrieval_en", "synthetic", "en", 200, 300),
    ("passage_retrieval_zh", "synthetic", "zh", 200, 0),
    ("lcc", "code", "code", 500, 300),
    ("repobench-p", "code", "code", 500, 300),
  )
}
NAMES = {"all": list(TASKS), "all_e": [f"{task.name}_e" for task in TASKS.values() if task.n_rows_e]}


def find_task(name: str) -> Task:
  """The task of a name such as "qasper", or "qasper_e" for LongBench-E's part of it."""
  if name not in (known := NAMES["all"] + NAMES["all_e"]):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(f"LongBench has no task {name!r}; the nearest is {near!r}")
  return TASKS[name.removesuffix("_e")]


class Row(NamedTuple):
  """A line of data/<name>.jsonl."""

  name: str
  index: int  # from 0, blank lines aside
  where: str  # file:line
  fields: dict[str, Any]
  wrong: str = ""  # why it is no row

  @property
  def id(self) -> str:
    return f"{self.name}-{self.index}"

  @property
  def beside(self) -> dict[str, Any]:
    """What the official format writes beside a prediction."""
    return {"answers": self.fields.get("answers", [])} | {
      key: self.fields.get(key) for key in ("all_classes", "length")
    }


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
    made = []
    for kind, of in (("dataset2prompt", str), ("dataset2maxlen", int)):
      file = directory / "config" / f"{kind}.json"
      made.append(files.read_json(file))
      if wrong := [f"{key}: {value!r:.80}" for key, value in made[-1].items() if type(value) is not of]:
        raise ValueError(f"{file}: expected {of.__name__} for every task, got {wrong[0]}")
    return cls(directory, *made)

  @property
  def digest(self) -> str:
    """SHA-256 of templates and lengths, to tell releases apart."""
    return hashlib.sha256(json.dumps([self.templates, self.max_new_tokens], sort_keys=True).encode()).hexdigest()

  def names(self, given: Iterable[str] = ()) -> list[str]:
    """`given` with all and all_e written out, each name once; none given: all whose rows are there."""
    if named := [name for of in given for name in NAMES.get(of, [of])]:
      return list(dict.fromkeys(named))
    there = {file.stem for file in (self.directory / "data").glob("*.jsonl")}
    known = [name for name in NAMES["all"] + NAMES["all_e"] if name in there]
    if not known:
      raise ValueError(f"{self.directory / 'data'} has no rows of LongBench's tasks, such as qasper.jsonl")
    return known

  def file(self, name: str) -> pathlib.Path:
    """The rows of a task. Raises ValueError if they, the template or the length are missing."""
    task, file = find_task(name).name, self.directory / "data" / f"{name}.jsonl"
    for kind, known in (("dataset2prompt", self.templates), ("dataset2maxlen", self.max_new_tokens)):
      if task not in known:
        raise ValueError(f"{self.directory / 'config' / kind}.json: nothing for task {task!r}")
    if not file.is_file():
      raise ValueError(f"{file} is missing")
    return file

  def rows(self, name: str, limit: int | None = None) -> Iterator[Row]:
    """Yields the first `limit` rows of a task, by default all; broken ones say what is `wrong`."""
    file = self.file(name)
    for index, (line, fields) in enumerate(itertools.islice(files.read_rows(file), limit)):
      where = f"{file}:{line}"
      yield (
        Row(name, index, where, {}, str(fields))
        if isinstance(fields, ValueError)
        else self._row(Row(name, index, where, fields))
      )

  def _row(self, row: Row) -> Row:
    """The row, and what is wrong with it."""
    fields = row.fields
    missing = [key for key in ("answers", "all_classes", "length") if key not in fields]
    if missing:
      return row._replace(wrong=f"the row lacks {missing[0]!r}")
    if not isinstance(fields["answers"], list) or not all(isinstance(text, str) for text in fields["answers"]):
      return row._replace(
        fields={**fields, "answers": []}, wrong=f"'answers' should be texts, got {fields['answers']!r:.80}"
      )
    return row._replace(wrong=files.lone_surrogate(fields) or "")

  def prompt(self, row: Row) -> str:
    """The whole prompt of a row, before any cut or chat template."""
    return self.templates[find_task(row.name).name].format(**row.fields)

  def item(self, row: Row, tokenizer: Tokenizer, max_tokens: int, chat: bool) -> Item | Refused:
    """The request for a row, as the official code makes it.

    A prompt of more than `max_tokens` is cut in its middle; then it goes into the chat template, if `chat` and if its
    task takes one. samsum ends at a newline, which is not its first token. A row that is broken is refused.
    """
    if row.wrong:
      return Refused(row.id, row.where, row.wrong)
    task = find_task(row.name)
    try:
      ids = encode_prompt(tokenizer, task, self.prompt(row), max_tokens, chat)
    except KeyError as error:
      return Refused(row.id, row.where, f"the row lacks {error}")
    except ValueError as error:
      return Refused(row.id, row.where, str(error))
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1:]
    options: dict[str, Any] = {"stop_token_ids": newline, "min_tokens": 1} if task.name == "samsum" else {}
    return Item(row.id, np.array(ids, np.int32), self.max_new_tokens[task.name], options, about=row.beside)

  def room_for_prompts(self, tokenizer: Tokenizer, max_request_tokens: int, chat: bool, most_output: int = 0) -> int:
    """Tokens to cut prompts to: the window without the longest output, an empty chat template and `SLACK`.

    Args:
      tokenizer: of the model.
      max_request_tokens: the window, prompt and output.
      chat: whether the chat template is used.
      most_output: tokens that outputs are capped at; 0: they are as long as the release says.

    Raises:
      ValueError: nothing is left.
    """
    template = len(in_template(tokenizer, "")) if chat else 0
    output = max(self.max_new_tokens.values())
    output = min(most_output or output, output)
    left = max_request_tokens - output - template - SLACK
    if left < 2:
      raise ValueError(
        f"requests of {max_request_tokens} tokens have no room for a prompt beside {output} of output, {template} of a "
        f"chat template and {SLACK} to spare: give more context, or say how long prompts may be"
      )
    return left


def encode_prompt(tokenizer: Tokenizer, task: Task, text: str, max_tokens: int, chat: bool) -> list[int]:
  """Token ids [T] of a whole prompt: cut first, then in the chat template if there is one and the task takes it."""
  text = cut_middle(tokenizer, text, max_tokens)
  return in_template(tokenizer, text) if chat and task.chat else prompting.encode_text(tokenizer, text, True)


def in_template(tokenizer: Tokenizer, text: str) -> list[int]:
  """Token ids [T] of a text as a user's message. Raises ValueError if the model has no chat template for it."""
  return prompting.encode_chat(tokenizer, [{"role": "user", "content": text}])


def read(config: WorkloadConfig) -> FileSource:
  """The prompts of `config.tasks`, in the order of names and rows.

  Raises:
    ValueError: something of the release is missing, or no row can be served, or with `config.strict` one cannot; names
      file and line.
  """
  config.refuse("seed", "shortest")
  if not config.path:
    raise ValueError("a workload of longbench needs path, the folder that holds config/ and data/")
  release = Release.read(config.path)
  rows = [
    _writable(release, row) for of in release.names(config.tasks) for row in release.rows(of, config.limit or None)
  ]
  refused = [unless_strict(Refused(row.id, row.where, row.wrong), config.strict) for row in rows if row.wrong]
  if rows and len(refused) == len(rows):
    raise ValueError(f"none of {len(rows)} rows can be served: {refused[0]}")
  cap, chat = config.max_new_tokens, config.chat_template

  def items(tokenizer: Tokenizer, max_request_tokens: int) -> list[Item | Refused]:
    if chat:
      try:
        in_template(tokenizer, "")
      except ValueError as error:
        raise ValueError(f"{error}; or set chat_template to false") from error
    room = config.prompt_tokens or release.room_for_prompts(tokenizer, max_request_tokens, chat, cap)
    made = [release.item(row, tokenizer, room, chat) for row in rows]
    for item in made:
      if isinstance(item, Refused):
        unless_strict(item, config.strict)
    return [_capped(item, cap) if cap and isinstance(item, Item) else item for item in made]

  return FileSource(items, tuple(refused))


def _writable(release: Release, row: Row) -> Row:
  """The row; it is `wrong` if its prompt cannot be written."""
  try:
    if not row.wrong:
      release.prompt(row)
  except KeyError as error:
    return row._replace(wrong=f"the row lacks {error}")
  return row


def _capped(item: Item, most: int) -> Item:
  return dataclasses.replace(item, max_new_tokens=min(item.max_new_tokens, most))
