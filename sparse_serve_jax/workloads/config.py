"""What a workload depends on, read from strict JSON (configs/workloads)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sparse_serve_jax.config import check_fields, find_config, read_config


@dataclasses.dataclass(frozen=True)
class ArrivalConfig:
  """When requests arrive."""

  SECTION = "arrivals"

  process: str = "all_at_once"  # of `arrivals.ARRIVALS`
  rate: float = 0.0  # requests a second; 0: not given
  seed: int = 0
  options: dict = dataclasses.field(default_factory=dict)  # more arguments of the process, by name

  def __post_init__(self):
    check_fields(self, not_negative=("seed",))


@dataclasses.dataclass(frozen=True)
class WorkloadConfig:
  """Where prompts come from and when they arrive. A source refuses fields that it does not read.

  Raises:
    ValueError: a value of the wrong type or size.
  """

  KIND = "workloads"

  source: str  # of WORKLOADS
  path: str = ""  # longbench: the folder that holds config/ and data/; jsonl, trace: the file
  tasks: tuple[str, ...] = ()  # needle: of `tasks.TASKS`, in turns; longbench: names, all, all_e; none: all files there
  limit: int = 0  # requests, for longbench of each task; 0: all there are
  # needle: of prompt and answer; text: of a prompt; others cut longer ones; 0: jsonl no, longbench to leave room.
  prompt_tokens: int = 0
  max_new_tokens: int = 0  # of an output: needle's and text's, the most of the others'; 0: as tasks and rows say
  shortest: float = 1.0  # text: lengths are drawn, evenly, from this share of prompt_tokens and max_new_tokens on
  chat_template: bool = True  # longbench: around the prompts of the tasks that take one
  seed: int = 0  # needle, text, trace: of the prompts
  strict: bool = False  # jsonl, longbench: a row that cannot be served ends the run; else it is refused, the others run
  arrivals: ArrivalConfig = dataclasses.field(default_factory=ArrivalConfig)

  def __post_init__(self):
    check_fields(self, not_negative=("limit", "prompt_tokens", "max_new_tokens", "seed"))
    if not 0 < self.shortest <= 1:
      raise ValueError(f"shortest={self.shortest} is not a share in (0, 1]")
    if self.prompt_tokens == 1:
      raise ValueError("prompt_tokens=1: a prompt whose middle is cut keeps 2 tokens or more")

  def refuse(self, *names: str) -> None:
    """For a source: raises ValueError if one of the fields `names`, which it does not read, is set."""
    for field in dataclasses.fields(self):
      if field.name in names and (value := getattr(self, field.name)) != field.default:
        raise ValueError(f"a workload of {self.source} has no {field.name}, got {value!r}")


def load_workload(name_or_path: str | Path) -> WorkloadConfig:
  """Reads a configuration.

  Args:
    name_or_path: a name in configs/workloads, or a path that ends in ".json".

  Raises:
    ValueError: no such file, or a key or a value that is wrong.
  """
  return read_config(WorkloadConfig, find_config("workloads", name_or_path))
