"""What the benchmarks share: times taken inside one jit, rates measured in the same run, tables and rows, and what the
profiler says of kernels.
"""

from __future__ import annotations

import collections
import concurrent.futures
import ctypes
import dataclasses
import datetime
import gzip
import itertools
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from sparse_serve_jax import results, runtime
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.pinned import pinned_buffer

Row = dict[str, Any]
Op = Callable[[Any, Any, Any], tuple[Any, Any]]  # (state, shared, inputs) -> (state, result)
COPY_THREADS = 8  # copy within host memory
Baselines = Mapping[str, Callable[[], "Timing"]]  # what would be used instead


@dataclasses.dataclass(frozen=True)
class Effort:
  """How long is measured."""

  calls: int = 5  # after one to warm up
  seconds: float = 0.05  # of a call: decides the rounds of a program's loop
  rounds: int = 8  # of the short loop that a long one is compared with
  copy_bytes: int = 2 << 30  # of the buffers that rates are measured with


SMOKE = Effort(calls=1, seconds=0, rounds=2, copy_bytes=1 << 16)  # whether it runs, not how fast


@dataclasses.dataclass(frozen=True)
class Timing:
  """Time of one repetition in us: median over the calls, the best call, and (slowest - fastest) / median."""

  us: float
  best_us: float
  spread: float
  repetitions: int  # of a call

  @classmethod
  def of(cls, seconds: Sequence[float], repetitions: int) -> Self:
    """From the seconds of calls of `repetitions` each."""
    us = [1e6 * s / repetitions for s in seconds]
    middle = statistics.median(us)
    return cls(middle, min(us), (max(us) - min(us)) / middle, repetitions)


def clock(f: Callable[[], Any], effort: Effort, repetitions: int = 1) -> Timing:
  """Times calls of `f` by the host's clock, each until its result is there."""
  jax.block_until_ready(f())
  seconds = []
  for _ in range(effort.calls):
    start = time.perf_counter()
    jax.block_until_ready(f())
    seconds.append(time.perf_counter() - start)
  return Timing.of(seconds, repetitions)


def measure(op: Op, variants: Sequence[Any], effort: Effort, *, state: Any = (), shared: Any = ()):
  """Times an op inside one jitted loop. Returns its Timing, the state and the results of the last round.

  Args:
    op: (state, shared, inputs) -> (state, result).
    variants: inputs that take turns, so that an op does not meet what the one before it left in a cache. Each is made
      to depend on the loop's counter and each result is kept, so that nothing is hoisted or dropped.
    effort: how long.
    state: passes from one op to the next; donated. XLA may drop what an op writes to it and the next overwrites unread.
    shared: goes to every op: arrays too large to come in variants, and pools in host memory.
  """

  def run(rounds, state, shared, variants):
    def turn(_, carry):
      state, tick, _ = carry
      results = []
      for inputs in variants:
        inputs, tick = lax.optimization_barrier((inputs, tick))
        new, result = op(state, shared, inputs)
        state = jax.tree.map(_in_space_of, new, state)
        results.append(result)
      return state, tick + 1, results

    shapes = jax.eval_shape(op, state, shared, variants[0])[1]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # The count of rounds is known to the compiler: of another one, the host would ask the device before each round.
    return lax.fori_loop(0, rounds, turn, (state, jnp.int32(0), [nothing] * len(variants)))

  # A pool in host memory stays there only if the result says so. The first state is committed to its place as all
  # later ones are: else the second call would compile anew.
  placed = jax.tree.map(lambda x: x.sharding, state), None, None
  state = jax.device_put(state, placed[0])
  program = jax.jit(run, static_argnums=0, donate_argnums=1, out_shardings=placed)
  results: Any = None

  def call(rounds: int) -> float:
    nonlocal state, results
    start = time.perf_counter()
    state, _, results = jax.block_until_ready(program(rounds, state, shared, variants))
    return time.perf_counter() - start

  # A call costs about a millisecond besides its rounds, so what counts is by how much a long one exceeds a short one.
  few = effort.rounds
  call(few)  # compiles
  short = min(call(few) for _ in range(3))
  more = max(few, round(few * effort.seconds / short))
  call(few + more)  # compiles
  return Timing.of([call(few + more) - short for _ in range(effort.calls)], more * len(variants)), state, results


normal = jax.jit(jax.random.normal, static_argnums=(1, 2))  # key, shape, dtype


def writable(x: jax.Array) -> np.ndarray:
  """The memory of an array that lies where the CPU can write it, as bytes; nothing on the device may be using it."""
  memory: Any = (ctypes.c_uint8 * x.nbytes).from_address(x.unsafe_buffer_pointer())
  return np.frombuffer(memory, np.uint8)


def fill_pool(pool: jax.Array) -> None:
  """Writes random blocks, over and over, to a pool [K, L, M, 2, S, D] in host memory."""
  source = np.asarray(normal(jax.random.key(0), (min(4096, math.prod(pool.shape[:3])), *pool.shape[3:]), pool.dtype))
  memory, source = writable(jax.block_until_ready(pool)), source.ravel().view(np.uint8)

  def fill(start: int) -> None:
    part = memory[start : start + source.size]
    part[:] = source[: part.size]

  with concurrent.futures.ThreadPoolExecutor(COPY_THREADS) as threads:
    list(threads.map(fill, range(0, memory.size, source.size)))


def memcpy_each(
  loads: bool, host: jax.Array, blocks: np.ndarray, device: jax.Array, slots: np.ndarray, n_bytes: int
) -> Callable[[], None]:
  """A function that copies blocks of `n_bytes`, each by a call of the CUDA driver, and then waits.

  From `blocks` [n] of `host`, which is pinned, to `slots` [n] of `device`, or back; nothing else may use these arrays.

  Raises:
    NotImplementedError: there is no NVIDIA GPU.
    RuntimeError: the driver failed. The function raises it too.
  """
  if jax.default_backend() != "gpu":
    raise NotImplementedError("needs an NVIDIA GPU")
  cuda, arrays = ctypes.CDLL("libcuda.so.1"), jax.block_until_ready((host, device))

  def function(name: str, *types: Any) -> Callable[..., int]:
    f = getattr(cuda, name)
    f.argtypes, f.restype = types, ctypes.c_int
    return f

  def check(*codes: int) -> None:
    if any(codes):
      raise RuntimeError(f"the CUDA driver returned {next(filter(None, codes))}")

  handle, address, context = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p()
  check(function("cuInit", ctypes.c_uint)(0))
  check(function("cuDevicePrimaryCtxRetain", ctypes.POINTER(handle), ctypes.c_int)(ctypes.byref(context), 0))
  check(function("cuCtxSetCurrent", handle)(context))
  name = "cuMemcpyHtoDAsync_v2" if loads else "cuMemcpyDtoHAsync_v2"  # to, from, bytes, stream
  copy, synchronize = function(name, address, address, ctypes.c_size_t, handle), function("cuStreamSynchronize", handle)

  def at(array, ids):
    return (array.unsafe_buffer_pointer() + ids.astype(np.int64) * n_bytes).tolist()

  ends = at(device, slots), at(host, blocks)
  calls = [(*to_from, n_bytes, None) for to_from in zip(*(ends if loads else ends[::-1]), strict=True)]
  return lambda _alive=arrays: check(*itertools.starmap(copy, calls), synchronize(None))


def _in_space_of(new: jax.Array, old: jax.Array) -> jax.Array:
  """A kernel's result is typed as device memory; a loop's carry keeps its type."""
  space = jax.typeof(old).memory_space
  return new if jax.typeof(new).memory_space == space else jax.device_put(new, space)


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """Rates that this device reached in this run, bytes a second; `flops` of a bf16 matrix product."""

  hbm: float  # of a copy within the device, read plus written: the faster of two ways to make one
  hbm_read: float  # of reads alone, which go up to a tenth faster; no floor uses it
  h2d: float
  d2h: float
  flops: float

  def floor_us(self, *, hbm: float = 0, h2d: float = 0, d2h: float = 0, flops: float = 0) -> float:
    """The least time for that many bytes (and operations) if all that is different overlaps."""
    return 1e6 * max(hbm / self.hbm, h2d / self.h2d, d2h / self.d2h, flops / self.flops)

  @classmethod
  def measure(cls, effort: Effort) -> Self:
    in_flight = 4

    def rate(amount: float, f: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
      """`amount` a second, when the next call is dispatched before the last has ended."""
      return 1e6 * amount / clock(lambda: [f(x) for _ in range(in_flight)], effort, in_flight).best_us

    n_bytes, device, host = effort.copy_bytes, device_sharding(), host_sharding()
    x = jnp.ones((n_bytes // 4096, 1024), jnp.float32)
    read, copy = rate(n_bytes, jax.jit(lambda x: x.max(1)), x), rate(2 * n_bytes, jax.jit(jnp.copy), x)
    in_place = measure(lambda x, _, one: (x + one, ()), [1.0], effort, state=x)[0]
    n_bytes = min(n_bytes, 1 << 30)
    x = jnp.ones((n_bytes // 4,), jnp.float32)
    n = max(64, min(8192, int(n_bytes**0.5) // 4))
    return cls(
      hbm=max(copy, 2e6 * effort.copy_bytes / in_place.us),
      hbm_read=read,
      h2d=rate(n_bytes, lambda x: jax.device_put(x, device), jax.device_put(x, host)),
      d2h=rate(n_bytes, lambda x: jax.device_put(x, host), x),
      flops=rate(
        2 * n**3, jax.jit(lambda a: a @ a), normal(jax.random.key(0), (n, n), jnp.bfloat16)
      ),  # ones run faster
    )


def device_sharding() -> SingleDeviceSharding:
  return SingleDeviceSharding(jax.devices()[0])


def host_sharding() -> SingleDeviceSharding:
  return SingleDeviceSharding(jax.devices()[0], memory_kind=host_pool.memory_kind())


def row(timing: Timing, floor_us: float, moved: Mapping[str, float], **others: Any) -> Row:
  """A result: the time, the floor of what had to move (as named by `floor_us`), and the floor's share of the time."""
  return dataclasses.asdict(timing) | {"floor_us": floor_us, "fraction": floor_us / timing.us, "moved": moved} | others


def measure_baselines(baselines: Baselines) -> dict[str, float | str]:
  """us of what would be used instead, or why there is none."""
  found: dict[str, float | str] = {}
  for name, baseline in baselines.items():
    try:
      found[name] = baseline().us
    except Exception as error:
      found[name] = _in_short(error)
  return found


def start(
  effort: Effort, file: pathlib.Path | None, implementation: str | None = None, commit: str | None = None
) -> Report:
  """What every benchmark begins with: sets JAX up and measures the device's rates.

  Args:
    effort: how long is measured.
    file: a .jsonl file that rows are added to; its folder is made.
    implementation: of the ops; by default triton on a GPU, else xla.
    commit: what rows are stamped with; by default that of the checkout, if there is one.

  Raises:
    ValueError: the folder of `file` cannot be written to, or another process writes there.
    NotImplementedError: there is no GPU, and `effort` is not SMOKE.
  """
  rows = None
  if file is not None:
    results.take_folder(file.parent)
    rows = results.Rows(file)
  runtime.configure()
  if effort != SMOKE and jax.default_backend() != "gpu":
    raise NotImplementedError(f"needs an NVIDIA GPU, JAX runs on {jax.default_backend()}; --smoke tries it anywhere")
  return Report(rows, Ceilings.measure(effort), effort, implementation or implementation_here(), commit)


def following(pool: jax.Array) -> host_pool.HostPool:
  """What code of the host reads and writes a pool through. The caller keeps it as long as it is used."""
  host = host_pool.HostPool(1, pinned_buffer if host_pool.memory_kind() else None)
  host.follow(pool)
  return host


def implementation_here() -> str:
  """The implementation of the ops where the caller names none."""
  return "triton" if jax.default_backend() == "gpu" else "xla"


class Report:
  """How long, of which implementation and against what is measured, and what comes of it.

  Prints a table for each op as its rows come; each goes to `rows` too, with where and when it was.
  """

  def __init__(
    self, rows: results.Rows | None, ceilings: Ceilings, effort: Effort, implementation: str, commit: str | None
  ):
    self.ceilings, self.effort, self.implementation, self.smoke = ceilings, effort, implementation, effort == SMOKE
    self.results: dict[str, Row] = {}
    self._rows, self._op = rows, ""
    self._stamp = {
      "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "commit": commit or results.commit(),
      "implementation": implementation,
      "smoke": self.smoke,
      "ceilings": dataclasses.asdict(ceilings),
    }
    print(json.dumps(self._stamp), flush=True)

  def add(self, op: str, case: str, make: Callable[[], Row]) -> None:
    """A row of a table. One that cannot be made is told on stderr, and the others go on."""
    try:
      result = make()
    except Exception as error:
      result = {"error": _in_short(error)}
      print(f"{op} {case}: {result['error']}", file=sys.stderr)
    self.results[f"{op}-{case}"] = result
    if self._rows is not None:
      self._rows.append({"op": op, "case": case, **result, **self._stamp})
    if op != self._op:
      print(f"\n{op:<34}{'us':>10} {'±':>5} {'MiB':>8} {'floor':>9} {'share':>6}  baselines (us)")
      self._op = op
    print(f"  {case:<32}{_columns(result)}", flush=True)

  def close(self) -> int:
    """Prints all rows as one JSON object. Returns the exit status, 1 if one is missing."""
    if self.smoke:
      print("\nsmoke: times mean nothing")
    print(json.dumps(self.results), flush=True)
    return int(any("error" in result for result in self.results.values()))


_COLUMNS = ("us", "best_us", "spread", "repetitions", "floor_us", "fraction", "moved", "baselines")


def _columns(result: Row) -> str:
  if "error" in result:
    return f"  failed: {result['error']}"
  mib = sum(amount for way, amount in result["moved"].items() if way != "flops") / 2**20
  others = {f"[{key}]": value for key, value in result.items() if key not in _COLUMNS and not isinstance(value, dict)}
  others = (result.get("baselines", {}) | others).items()
  text = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in others)
  times = f"{result['us']:10.1f} {result['spread']:5.0%} {mib:8.1f} {result['floor_us']:9.1f}"
  return f"{times} {result['fraction']:6.2f}  {text}"


def _in_short(error: Exception) -> str:
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def profile(run: Callable[[], Any], without: str) -> dict[str, tuple[int, float]]:
  """`kernel_times` of a call."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (file,) = pathlib.Path(folder).rglob("*.trace.json.gz")
    return kernel_times(json.loads(gzip.decompress(file.read_bytes())), without)


def kernel_times(trace: Mapping[str, Any], without: str) -> dict[str, tuple[int, float]]:
  """Launches and us of every kernel on the GPUs' streams of a Chrome trace, the longest first.

  Kernels of HLO modules that have `without` in their names are left out.
  """
  events: list[dict[str, Any]] = trace["traceEvents"]
  names = {(e["name"], e["pid"], e.get("tid")): e.get("args", {}).get("name", "") for e in events if e.get("ph") == "M"}
  gpus = {pid for (what, pid, _), name in names.items() if what == "process_name" and "GPU" in name}
  times = collections.defaultdict(list)
  for e in events:
    stream = names.get(("thread_name", e.get("pid"), e.get("tid")), "")
    on_gpu = e.get("ph") == "X" and e["pid"] in gpus and stream.startswith("Stream")
    if on_gpu and without not in e.get("args", {}).get("hlo_module", ""):
      times[e["name"]].append(e["dur"])
  totals = {name: (len(us), sum(us)) for name, us in times.items()}
  return dict(sorted(totals.items(), key=lambda item: -item[1][1]))
