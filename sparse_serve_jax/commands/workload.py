"""Flags that say what is served, for commands that serve.

_ASKED = WorkloadFlags()
...
workload = _ASKED.read()
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from absl import flags

from sparse_serve_jax import workloads
from sparse_serve_jax.commands import cli
from sparse_serve_jax.config import override
from sparse_serve_jax.workloads import Item, Refused

flags.disclaim_key_flags()  # they are their caller's

SEEDED = ("needle", "text", "trace")  # sources that draw their prompts


class WorkloadFlags:
  """Defines the flags when it is made, and reads them after they were parsed."""

  def __init__(self, default: str = "needle", rate: bool = True):
    """Defines flags.

    Args:
      default: the workload, where no flag says another.
      rate: whether --rate is one of them.
    """
    self._default = default
    with cli.group("What is asked"):
      self._workload = flags.DEFINE_string(
        "workload",
        None,
        f"A name in configs/workloads, or a JSON file. By default {default}, or what a flag below is for.",
      )
      self._jsonl = flags.DEFINE_string(
        "jsonl", None, 'jsonl: file of {"prompt": ...}, {"prompt_token_ids": ...} or {"messages": ...}.'
      )
      self._longbench = flags.DEFINE_string("longbench_dir", None, "longbench: folder with config/ and data/.")
      self._trace = flags.DEFINE_string(
        "trace", None, "trace: Mooncake's or Azure's file of arrival times and lengths."
      )
      self._limit = flags.DEFINE_integer(
        "limit", None, "Requests, for longbench of each task; by default as the workload's file says.", lower_bound=1
      )
      self._prompt = flags.DEFINE_integer(
        "prompt_tokens",
        None,
        "Tokens of needle's and text's prompts; longer ones of the others are cut. By default the workload's.",
        lower_bound=2,
      )
      self._max_new = flags.DEFINE_integer(
        "max_new_tokens", None, "Output tokens of each request at most.", lower_bound=1
      )
      self._chat = flags.DEFINE_bool(
        "chat_template", True, "longbench: the model's, around prompts of tasks that take one."
      )
      self._rate = None
      if rate:
        self._rate = flags.DEFINE_float(
          "rate", None, "Poisson arrivals a second; by default as in a trace, else all at once."
        )
      self._seed = flags.DEFINE_integer(
        "seed", 0, "Seed of random weights, generated prompts and arrivals.", lower_bound=0
      )

  @property
  def seed(self) -> int:
    return self._seed.value

  def read(self) -> workloads.WorkloadConfig:
    """What is to be served.

    Raises:
      ValueError: flags contradict each other, or one is missing.
    """
    paths = {"jsonl": self._jsonl, "longbench": self._longbench, "trace": self._trace}
    implied = [name for name, flag in paths.items() if flag.value is not None]
    config = workloads.load_workload(self._workload.value or (implied or [self._default])[0])
    for name in implied:
      if name != config.source:
        asked = self._workload.value or implied[0]
        raise ValueError(f"--{paths[name].name} is for a workload of {name}, and {asked} is one of {config.source}")
    if config.source in paths and not (config.path or implied):
      raise ValueError(f"a workload of {config.source} needs --{paths[config.source].name}")
    changes: dict[str, Any] = {
      "path": paths[config.source].value if implied else None,
      "limit": self._limit.value,
      "prompt_tokens": self._prompt.value,
      "max_new_tokens": self._max_new.value,
      "chat_template": None if self._chat.value else False,
      "seed": self.seed if config.source in SEEDED else None,
      "arrivals.seed": self.seed,
    }
    config = override(config, {key: value for key, value in changes.items() if value is not None})
    if self._rate is None or self._rate.value is None:
      return config
    return at_rate(config, workloads.checked_rate(self._rate.value))


class LadderFlag:
  """--ladder: folders which hold what was served and how, so that only a few flags are read beside it."""

  def __init__(self, what: str, reads: Collection[str]):
    """Defines the flag.

    Args:
      what: it is, in a sentence.
      reads: names of flags that are read beside it. --config, the name of the rung, and --verbose always are.
    """
    self._flag = flags.DEFINE_list("ladder", [], what)
    self._reads = {"ladder", "config", "verbose", *reads}

  def read(self) -> list[pathlib.Path]:
    """The folders, none if the flag is not given.

    Raises:
      ValueError: it is, and beside it one that would not be read.
    """
    told = [name for name in flags.FLAGS if flags.FLAGS[name].present and name not in self._reads]
    if self._flag.value and told:
      raise ValueError(f"--ladder: its folders hold what was served and how, leave out --{', --'.join(told)}")
    return [pathlib.Path(folder) for folder in self._flag.value]


def tell_refused(rows: Iterable[Refused]) -> None:
  """A line on stderr for each row that is refused, with file, line and reason."""
  for row in rows:
    print(f"refused: {row}", file=sys.stderr)


def tell_before(out: pathlib.Path | None, n_before: int, n_left: int) -> None:
  """A line on stderr of which requests the numbers are, if a run before this one has served some."""
  if n_before and n_left:
    print(f"{n_before} requests had rows in {out} before; the numbers are of the others", file=sys.stderr)
  elif n_before:
    print(
      f"nothing is left to run: all {n_before} requests have rows in {out}, and the numbers are of these; each part "
      "of a run has a clock of its own, so there is no throughput",
      file=sys.stderr,
    )


def at_rate(config: workloads.WorkloadConfig, rate: float) -> workloads.WorkloadConfig:
  """The workload, arriving at a mean rate in requests a second: by its own process if that has a rate, else Poisson. At
  a rate of 0 all at once.
  """
  arrivals = config.arrivals
  if rate == 0:
    return override(config, {"arrivals.process": "all_at_once", "arrivals.options": {}, "arrivals.rate": 0.0})
  if arrivals.process in ("all_at_once", "trace") and not arrivals.rate:
    return override(config, {"arrivals.process": "poisson", "arrivals.options": {}, "arrivals.rate": rate})
  return override(config, {"arrivals.rate": rate})


def digest(config: workloads.WorkloadConfig) -> str | None:
  """Of the file that prompts come from; None if they do not come from one."""
  path = pathlib.Path(config.path)
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def left(
  config: workloads.WorkloadConfig, items: list[Item | Refused], before: list[dict[str, Any]]
) -> tuple[list[Item | Refused], np.ndarray]:
  """The items without a row, and when they arrive, in seconds: the first of them at once if it is not all."""
  done = {row["request_id"] for row in before}
  times = workloads.times_of(config, len(items))[[item.id not in done for item in items]]
  return [item for item in items if item.id not in done], times - times.min(initial=np.inf) if done else times
