"""What a request holds while it is on the devices, and what an iteration has left for it. Plain Python and numpy."""

from __future__ import annotations

import dataclasses

import numpy as np

from sparse_serve_jax.serving.request import Request


@dataclasses.dataclass(eq=False)
class Resident:
  """A request that holds a lane and pool blocks, and how far it is planned."""

  request: Request
  lane: int
  table: np.ndarray  # int32, its pool blocks in order; on demand it grows
  tokens: np.ndarray  # int32, what is prefilled: the prompt; of a request that was preempted, output tokens after it
  first: int = 0  # of `tokens` that were in the pool already: its prefill begins after them in every layer
  start: int = 0  # of `tokens` before the next piece, in layer `layer`
  layer: int = 0
  working_set: int | None = None  # blocks over all layers and heads; None: to be worked out for its next step
  measured: bool = False  # so `working_set` is that of its last steps
  prefilled_in: int = 0  # the iteration of its newest piece whose blocks are saved beside its program, if some are
  read_from: int = 0  # likewise, of the layers of its next piece, which reads it; 0: none
  known: int = dataclasses.field(init=False)  # output tokens that it had when it was admitted
  read: int = dataclasses.field(init=False)  # output tokens before the one that its next result holds
  steps: int = dataclasses.field(init=False)  # decode steps, with those that a prefill of output tokens stands for
  measured_at: int = dataclasses.field(init=False)  # the step at which the working set was last asked for
  # These two follow from `steps`, and are kept beside it because every iteration looks at those of all residents.
  position: int = dataclasses.field(init=False)  # tokens before the next decode step
  steps_left: int = dataclasses.field(init=False)  # to be planned: the prefill gives a token, each step one

  def __post_init__(self):
    self.known, self.position = len(self.request.output_tokens), len(self.tokens)
    self.steps = self.measured_at = self.read = len(self.tokens) - len(self.request.prompt)
    self.steps_left = self.request.max_new_tokens - 1 - self.steps

  @property
  def again(self) -> int:
    """The token that its next decode step is given, which it had before it was preempted; -1: the one drawn last."""
    return self.request.output_tokens[self.steps] if self.steps < self.known else -1

  def computed(self, n_layers: int, chunked: bool) -> int:
    """Tokens of which it holds KV; of a prefill in segments of layers, as many as make the same KV in all layers."""
    if self.layer == n_layers:
      return self.position
    done = self.start - self.first
    return self.first + (done if chunked else (self.layer * (len(self.tokens) - self.first) + done) // n_layers)

  def step(self) -> None:
    """One more decode step is planned."""
    self.steps += 1
    self.position += 1
    self.steps_left -= 1
    if not self.measured:
      self.working_set = None


@dataclasses.dataclass
class Room:
  """What an iteration has left. Whoever asks first, the oldest of those that can run, gets what it needs whatever is
  left, so no iteration is empty while somebody can run.
  """

  tokens: int
  slots: int
  empty: bool = True  # nobody runs so far

  def take(self, tokens: int, blocks: int) -> bool:
    """Takes them if they fit. Whether they did."""
    if not self.empty and (tokens > self.tokens or blocks > self.slots):
      return False
    self.tokens, self.slots, self.empty = max(0, self.tokens - tokens), max(0, self.slots - blocks), False
    return True
