"""Interrupts where they can come: no request lives on, no memory is lost, and what comes next is what it would be."""

from __future__ import annotations

import copy
import dis
import functools
import itertools
import subprocess
import sys
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sparse_serve_jax import LLM
from sparse_serve_jax.detokenizer import Detokenizer
from sparse_serve_jax.memory import writer
from sparse_serve_jax.memory.host_pool import HostPool
from sparse_serve_jax.memory.writer import Writer
from sparse_serve_jax.serving import executor as executors
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from tests.tiny import SMALL_SERVING, check_nothing_is_held

ROOT = Path(__file__).resolve().parent.parent
N = 8
TEXT = "A heron stands in the shallow water. " * 3
OPTIONS: dict[str, Any] = {"max_tokens": N, "ignore_eos": True}


@pytest.fixture(scope="module", params=["direct", "staged"])
def llm(request) -> LLM:
  return LLM("random:tiny", overrides=[*SMALL_SERVING, f"cache.save={request.param}", "cache.hbm_bytes=2MiB"])


@pytest.fixture(scope="module")
def expected(llm: LLM) -> str:
  return llm.generate(TEXT, **OPTIONS)[0].text


def check_goes_on(llm: LLM, expected: str) -> None:
  assert llm.generate([TEXT, TEXT], **OPTIONS)[1].text == expected
  assert not llm.engine.has_work and not llm._abandoned
  check_nothing_is_held(llm.engine)


class Once:
  """Calls what it stands for, and is interrupted before or after it, once."""

  def __init__(self, whole: Callable, at: int = 1, after: bool = True):
    self.whole, self.left, self.after = whole, at, after

  def __call__(self, *args, **options):
    self.left -= 1
    if not self.left and not self.after:
      raise KeyboardInterrupt
    result = self.whole(*args, **options)
    if not self.left:
      raise KeyboardInterrupt
    return result

  def __get__(self, owner, _=None):
    return self if owner is None else functools.partial(self, owner)

  def __getattr__(self, name: str):
    return getattr(self.whole, name)


# ------------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("at", [1, 2])
def test_a_request_that_was_just_given_is_cancelled(llm: LLM, expected, monkeypatch, at):
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Engine, "add_request", Once(Engine.add_request, at))
    llm.generate([TEXT, TEXT], **OPTIONS)
  assert not llm.engine._live
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Engine, "add_request", Once(Engine.add_request))
    llm.stream(TEXT, **OPTIONS)
  llm._prepare()
  assert not llm.engine._live
  check_goes_on(llm, expected)


def test_a_second_interrupt_leaves_no_request(llm: LLM, expected, monkeypatch):
  """It comes while those that the first one left are cancelled."""
  engine, open_stream = llm.engine, llm.stream(TEXT, **OPTIONS)

  def interrupted(request, token):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Engine, "cancel", Once(Engine.cancel, after=False))
    llm.generate([TEXT, TEXT], on_token=interrupted, **OPTIONS)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Engine, "cancel", Once(Engine.cancel, after=False))
    llm.generate(TEXT, **OPTIONS)
  llm._prepare()
  assert [*engine._live] == [open_stream._output.request.id]
  open_stream.close()
  check_goes_on(llm, expected)
  assert llm.engine is engine


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("torn", [(Detokenizer, "push"), (Engine, "_hand_over")])
@pytest.mark.parametrize("after", [False, True])
def test_a_stream_that_is_interrupted_goes_on_where_it_was(llm: LLM, expected, monkeypatch, at, torn, after):
  stream, pieces = llm.stream(TEXT, **OPTIONS), []
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(*torn, Once(getattr(*torn), at, after))
    for piece in stream:
      pieces.append(piece)
  assert "".join([*pieces, *stream]) == expected == stream.output.text
  check_goes_on(llm, expected)


CHAT = """
import sys
from sparse_serve_jax import llm
from sparse_serve_jax.commands import chat

class Model:
  def __init__(self, *_, **__):
    pass

  def encode_chat(self, _):
    pass

  def stream(self, *_):
    raise KeyboardInterrupt

llm.LLM = Model
chat.command(["chat", "model", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
  ("flags", "ends"), [([], (0, "", "\n[interrupted]\n")), (["--message=Hi"], (130, "\n", "interrupted\n"))]
)
def test_an_interrupt_ends_an_answer_and_the_command_that_has_one(flags, ends):
  """In a process of its own: commands define flags of the same names."""
  command = [sys.executable, "-c", CHAT, *flags]
  done = subprocess.run(command, cwd=ROOT, input="Hi\n", capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == ends


# --------------------------------------------------------------------------------------------------------------- memory


def broken(llm: LLM, name: str, ready: Callable[[], bool] = lambda: True) -> None:
  """A program of which an interrupt loses the results, as of one that JAX calls for the first time."""

  class Lost(Once):
    def __call__(self, *args):
      result = self.whole(*args)
      if ready():
        jax.block_until_ready(result)
        raise KeyboardInterrupt
      return result

  executor: Any = llm.engine.executor
  programs = copy.copy(executor.programs)
  setattr(programs, name, Lost(getattr(programs, name)))
  executor.programs = programs


def test_an_engine_that_was_interrupted_gives_up_its_cache(llm: LLM, expected):
  """Though a stream of it is still there."""
  stream, engine = llm.stream(TEXT, **OPTIONS), llm.engine
  broken(llm, "decode")
  with pytest.raises(KeyboardInterrupt):
    list(stream)
  assert engine.failed
  check_goes_on(llm, expected)
  executor: Any = stream._engine.executor
  assert llm.engine is not engine is stream._engine and executor.cache is None and not executor._results
  with pytest.raises(RuntimeError, match="this engine has failed: KeyboardInterrupt"):
    next(stream)


def test_no_save_writes_to_a_pool_that_is_lost(monkeypatch):
  """Its memory may be another's by then."""
  staged = LLM("random:tiny", overrides=[*SMALL_SERVING, "cache.save=staged", "cache.hbm_bytes=2MiB"])
  expected = staged.generate(TEXT, **OPTIONS)[0].text
  executor: Any = staged.engine.executor
  stream = staged.stream(TEXT, max_tokens=50, ignore_eos=True)
  assert all(next(stream) for _ in range(3))  # from now on it decodes beside others
  jobs = executor._writer._jobs
  broken(staged, "decode", lambda: bool(jobs) and not jobs[-1].begin.is_set())
  written = []
  with monkeypatch.context() as patch:
    patch.setattr(writer, "_put", lambda *args: written.append(args))
    patch.setattr(writer, "_LONGEST_HELD", 60.0)  # a program that is compiled takes longer than a save is held
    with pytest.raises(KeyboardInterrupt):
      staged.generate(TEXT, **OPTIONS)
    assert executor.cache.pool.is_deleted() and not jobs[-1].placed.done()
    for job in [job for job in jobs if job.begin.is_set()]:  # earlier ones
      job.placed.result(timeout=60)
    n_written = len(written)
    executor.wait()
    assert jobs[-1].placed.result() is None and len(written) == n_written
  check_goes_on(staged, expected)


def test_a_save_is_waited_for_that_is_in_no_list():
  """Whoever gave it was interrupted before it was noted."""

  class Interrupted(deque):
    def append(self, job):
      raise KeyboardInterrupt

  pool = np.zeros((1, 1, 4, 2, 8, 16), np.float32)
  host = HostPool(1)
  host.rows = [pool.view(np.uint8).reshape(1, 1, 4, -1)]
  slab = jax.numpy.ones((1, 1, 1, 2, 8, 16))
  of = Writer(host, slab.nbytes)
  of._jobs = Interrupted()
  with pytest.raises(KeyboardInterrupt):
    of.save(1, slab, range(1), np.array([2]), alive=None)
  of.drain()
  assert (pool[0, 0] == np.array([0, 0, 1, 0])[:, None, None, None]).all()


def test_an_interrupt_of_compilation_waits_for_what_has_begun_alone(monkeypatch):
  llm, compiled = LLM("random:tiny", overrides=SMALL_SERVING), []

  class Lowered:
    def compile(self):
      time.sleep(0.3)
      compiled.append(True)

  def interrupted(self):
    raise KeyboardInterrupt

  executor: Any = llm.engine.executor
  monkeypatch.setattr(executors, "COMPILED_AT_ONCE", 1)
  monkeypatch.setattr(executor, "_lowered", lambda *_: [Lowered()] * 10)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Future, "result", interrupted)
    executor.compile([20])
  assert compiled == [True]


# --------------------------------------------------------------------------------------- where Python looks for signals

CALLS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME"}


@functools.cache
def looks(code: types.CodeType) -> set[int]:
  """Offsets of instructions before which it does."""
  instructions = list(dis.get_instructions(code))
  after = {then.offset for before, then in itertools.pairwise(instructions) if before.opname in CALLS}
  return after | {of.argval for of in instructions if "JUMP_BACKWARD" in of.opname}


class Interrupt:
  """Interrupts the n-th time that Python looks for signals in some functions; `places` are those so far."""

  def __init__(self, functions: Sequence[Callable], n: int):
    self._codes = {code for of in functions if (code := getattr(of, "__code__", None))}  # C functions have none
    self._n, self.places = n, list[str]()

  def __enter__(self) -> Interrupt:
    if sys.version_info < (3, 12):
      self._before = sys.gettrace()
      sys.settrace(self._called)
      return self
    of = sys.monitoring
    of.use_tool_id(of.DEBUGGER_ID, "interrupts")
    of.register_callback(of.DEBUGGER_ID, of.events.INSTRUCTION, self._at)
    for code in self._codes:
      of.set_local_events(of.DEBUGGER_ID, code, of.events.INSTRUCTION)
    return self

  def __exit__(self, *_: object) -> None:
    if sys.version_info < (3, 12):
      sys.settrace(self._before)
      return
    of = sys.monitoring
    for code in self._codes:
      of.set_local_events(of.DEBUGGER_ID, code, of.events.NO_EVENTS)
    of.register_callback(of.DEBUGGER_ID, of.events.INSTRUCTION, None)
    of.free_tool_id(of.DEBUGGER_ID)

  def _at(self, code: types.CodeType, offset: int) -> None:
    """Before each instruction."""
    if offset in looks(code):
      line = next(line for start, end, line in code.co_lines() if start <= offset < end)
      self.places.append(f"{code.co_name}, line {line}")
      if len(self.places) == self._n:
        raise KeyboardInterrupt

  def _called(self, frame: types.FrameType, event: str, _: Any) -> Callable | None:
    if frame.f_code not in self._codes:
      return None
    frame.f_trace_opcodes, frame.f_trace_lines = True, False
    return self._within

  def _within(self, frame: types.FrameType, event: str, _: Any) -> Callable:
    if event == "opcode":
      self._at(frame.f_code, frame.f_lasti)
    return self._within


def interrupts(functions: Sequence[Callable], act: Callable[[], object]) -> Iterator[str]:
  """Where each interrupt came, after it."""
  for n in itertools.count(1):
    at = Interrupt(functions, n)
    try:
      with at:
        act()
    except KeyboardInterrupt:
      yield at.places[-1]
    else:
      return


def test_wherever_a_dispatch_is_interrupted_its_results_are_kept():
  """So that whoever ends the process can wait for them, and threads write to memory that is the pool's."""
  staged = LLM("random:tiny", overrides=[*SMALL_SERVING, "cache.save=staged", "cache.hbm_bytes=2MiB"])
  functions = JaxExecutor._call, JaxExecutor._release_and_admit, JaxExecutor._prefill, JaxExecutor._decode
  act = functools.partial(staged.generate, "The", max_tokens=2, ignore_eos=True)
  act()
  executor: Any = staged.engine.executor
  found = Counter()
  for place in interrupts(functions, act):
    found[place.partition(",")[0]] += 1
    kept = [of.unsafe_buffer_pointer() for of in jax.live_arrays() if of.shape == executor.cache.pool.shape]
    assert executor._host._addresses[0] in kept, place
    staged._prepare()
    executor = staged.engine.executor
  assert set(found) == {of.__name__ for of in functions} and found["_call"] > 9, found
