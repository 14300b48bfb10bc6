"""What the scheduler tells an executor, and what comes back. Plain Python and numpy: a simulator can execute a plan
too.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from sparse_serve_jax.buckets import PrefillProgram
from sparse_serve_jax.config import EngineConfig, ModelConfig
from sparse_serve_jax.memory.shape import CacheShape

if TYPE_CHECKING:
  from collections.abc import Sequence

MAX_BANNED = 8  # token ids a row: the width of an array that every program which draws is given


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. `temperature` 0 is greedy. A draw depends on (seed, position) alone."""

  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0
  banned: frozenset[int] = frozenset()  # token ids that are not drawn, as if they did not exist; at most MAX_BANNED
  top_k: int = 0  # tokens are drawn from so many most likely ones; 0: all
  min_p: float = 0.0  # and from those of at least this part of the probability of the most likely one
  logprobs: bool = False  # log probabilities come with the token

  @property
  def plain(self) -> bool:
    """Whether the token is simply the most likely one."""
    return not (self.temperature > 0 or self.banned)


@dataclasses.dataclass(frozen=True)
class Admission:
  """A request takes a lane, with its block table."""

  request_id: str
  lane: int  # where the request's tail and table live
  table: np.ndarray  # int32, pool blocks of its prompt at least; others may have the first ones too


@dataclasses.dataclass(frozen=True)
class PrefillWork:
  """Layers [first_layer, first_layer + n_layers) of the prompt tokens [start, start + len(tokens))."""

  request_id: str
  lane: int
  tokens: np.ndarray  # int32, this piece's tokens
  start: int  # a multiple of block_tokens
  first_layer: int
  n_layers: int
  last: bool  # ends the prompt: its result holds the next output token
  sampling: Sampling

  @property
  def whole(self) -> bool:
    """Whether it is all of a prompt, of which nothing has been prefilled."""
    return self.start == 0 and self.first_layer == 0 and self.last


class PrefillCall(NamedTuple):
  """One call of a program: some layers of a piece of one prompt, or whole short prompts that are packed."""

  program: PrefillProgram
  works: tuple[PrefillWork, ...]


@dataclasses.dataclass(frozen=True)
class DecodeRow:
  """One request's next token."""

  request_id: str
  lane: int
  position: int  # tokens whose KV is in the cache; the token decoded now stands there
  step: int  # decode steps this request has made before
  sampling: Sampling
  fills: int = -1  # the pool block of its tail, which this token fills; -1: it does not
  token: int = -1  # the token decoded now; -1: the one drawn last


class AuditOf(NamedTuple):
  """The stops of a plan that are audited: those of a row in a layer."""

  row: int  # of the decode rows
  layer: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """One iteration: release, then admit, then prefill, then measure, then decode."""

  iteration: int
  # int32, pool blocks freed since the last plan, or nobody's until this one: their residency is cleared.
  release: np.ndarray
  admit: tuple[Admission, ...]
  prefill: tuple[PrefillCall, ...]
  decode: tuple[DecodeRow, ...]
  measure: tuple[DecodeRow, ...]  # requests whose working set is wanted, as it is before this iteration's decode
  await_saves: bool = False  # nothing can be done before saves that are out have landed: the result waits for them
  # Requests that have lost lane and blocks since the last plan. They wait, and are admitted again.
  preempt: tuple[str, ...] = ()
  threshold: float | None = None  # of PSA's stop test; None: the configuration's
  audit: AuditOf | None = None
  # int32, pool blocks that are kept, and whose last owner has left since the last plan: their slots are the next to go.
  idle: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

  @property
  def works(self) -> tuple[PrefillWork, ...]:
    """Of all pieces."""
    return tuple(work for piece in self.prefill for work in piece.works)

  @property
  def empty(self) -> bool:
    work = self.prefill or self.decode or self.measure or self.preempt
    return not (self.release.size or work or self.await_saves)


def blocks_saved(plan: Plan, shape: CacheShape) -> int:
  """Blocks of all layers and heads that a plan writes to the pool."""
  full = sum(len(w.tokens) // shape.S * w.n_layers for w in plan.works)
  return (full + sum((r.position + 1) % shape.S == 0 for r in plan.decode) * shape.L) * shape.K


@dataclasses.dataclass(frozen=True)
class StepStats:
  """Blocks, summed over layers and KV heads of all devices, in one iteration."""

  attended: int = 0  # full blocks that decode attended to
  missed: int = 0  # of these, read from DRAM (0 without offload)
  loaded: int = 0  # all blocks read from DRAM: those, and what came before a piece of a prompt
  saved: int = 0  # written to the pool
  slots_used: int = 0  # slots that hold a block after the iteration; 0 if it neither prefilled nor decoded


class TokenLogprobs(NamedTuple):
  """Natural logarithms of probabilities, as the model gives them: before temperature, bans and cuts."""

  logprob: float  # of the token
  top: dict[int, float]  # of the most likely tokens, in that order


class Audited(NamedTuple):
  """What an audit found in one row and layer."""

  share: np.ndarray  # float32 [K, G]: of each query head's attention mass, what was read
  unread: np.ndarray  # int32 [K], full blocks that the lists left out


@dataclasses.dataclass(frozen=True)
class StepResult:
  """What an iteration produced. Reading it waits for the device; iterations are read in order."""

  tokens: dict[str, int]  # request_id -> new token, of decode rows and of prompts that ended
  working_sets: dict[str, int]  # request_id -> blocks over all layers and heads
  stats: StepStats
  not_finite: frozenset[str] = frozenset()  # requests whose logits were NaN or infinite: they have no token
  # The last iteration of which, and of all before, the blocks are in the pool. None: this one.
  landed: int | None = None
  logprobs: dict[str, TokenLogprobs] = dataclasses.field(default_factory=dict)  # of the tokens that want them
  audit: Audited | None = None  # if the plan has one and the executor can


class Dispatched(Protocol):
  """An iteration on its way."""

  def result(self) -> StepResult:
    """Waits for all that the iteration does, but for saves beside its programs. Raises what the device failed with,
    then and ever after."""
    ...

  def on_delivered(self) -> None:
    """Called once the result's tokens have been handed out. Work that would delay them starts here: staged saves."""


class Observed(NamedTuple):
  """An iteration that has run. Times are seconds of the engine's clock."""

  plan: Plan
  result: StepResult
  planned: float  # handed to the executor
  dispatched: float  # the executor has returned
  done: float  # the result was read
  pool_blocks: int  # that requests own while it runs


class ServedModel(Protocol):
  """What an engine needs to know of a model."""

  @property
  def config(self) -> ModelConfig: ...

  @property
  def eos_token_ids(self) -> Sequence[int]: ...


class Executor(Protocol):
  """Runs plans. It has the configuration that an engine over it works with."""

  @property
  def config(self) -> EngineConfig: ...

  @property
  def model(self) -> ServedModel: ...

  @property
  def shape(self) -> CacheShape: ...

  def begin(self) -> None:
    """Before an engine's first plan, while nothing runs: what an earlier one has left in the cache is forgotten."""
    ...

  def submit(self, plan: Plan) -> Dispatched:
    """Dispatches the plan and returns at once."""
    ...

  def wait(self) -> None:
    """Blocks until nothing runs any more."""
    ...

  def drop(self) -> None:
    """Gives up the cache, for another executor's; only `reset` can follow."""
    ...

  def reset(self) -> None:
    """After a failure: an empty cache, and nothing on its way. Raises if the device cannot go on."""
    ...
