"""What the benchmarks share: times taken inside one jit, rates measured in the same run, tables and rows,
and what a compiled program and a trace say of its kernels.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import SingleDeviceSharding

from sparse_serve_jax.memory import kv_cache

Row = dict[str, Any]
Op = Callable[[Any, Any, Any], tuple[Any, Any]]  # (state, shared, inputs) -> (state, result)


@dataclasses.dataclass(frozen=True)
class Effort:
  """How long is measured."""

  calls: int = 5  # after one to warm up
  seconds: float = 0.05  # of a call: decides the rounds of a program's loop, so that its dispatch does not count
  rounds: int = 4  # at least
  copy_bytes: int = 2 << 30  # of the buffers that rates are measured with


SMOKE = Effort(calls=1, seconds=0, rounds=2, copy_bytes=1 << 16)  # whether it runs, not how fast


@dataclasses.dataclass(frozen=True)
class Timing:
  """Time of one repetition in us: median over the calls, the best call, and (slowest - fastest) / median."""

  us: float
  best_us: float
  spread: float

  @classmethod
  def of(cls, seconds: Sequence[float], repetitions: int) -> Self:
    """From the seconds of calls of `repetitions` each."""
    us = [1e6 * s / repetitions for s in seconds]
    middle = statistics.median(us)
    return cls(middle, min(us), (max(us) - min(us)) / middle)


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
    state: passes from one op to the next; donated.
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

  # A pool in host memory stays there only if the result says so.
  placed = jax.tree.map(lambda x: x.sharding, state), None, None
  program = jax.jit(run, static_argnums=0, donate_argnums=1, out_shardings=placed)
  results: Any = None

  def call(rounds: int) -> float:
    nonlocal state, results
    start = time.perf_counter()
    state, _, results = jax.block_until_ready(program(rounds, state, shared, variants))
    return time.perf_counter() - start

  rounds = effort.rounds
  call(rounds)  # compiles
  rounds = max(rounds, min(1024, round(rounds * effort.seconds / call(rounds))))
  call(rounds)
  return Timing.of([call(rounds) for _ in range(effort.calls)], rounds * len(variants)), state, results


normal = jax.jit(jax.random.normal, static_argnums=(1, 2))  # key, shape, dtype


def _in_space_of(new: jax.Array, old: jax.Array) -> jax.Array:
  """A kernel's result is typed as device memory; a loop's carry keeps its type."""
  space = jax.typeof(old).memory_space
  return new if jax.typeof(new).memory_space == space else jax.device_put(new, space)


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """Rates that this device reached in this run, bytes a second; `flops` of a bf16 matrix product.

  `hbm` is that of a copy within the device, bytes read plus bytes written: the faster of two ways to make one. Reads
  alone go up to a tenth faster; they are in `hbm_ways`.
  """

  hbm: float
  h2d: float
  d2h: float
  flops: float
  hbm_ways: Mapping[str, float]

  def floor_us(self, *, hbm: float = 0, h2d: float = 0, d2h: float = 0, flops: float = 0) -> float:
    """The least time for that many bytes (and operations) if all that is different overlaps."""
    return 1e6 * max(hbm / self.hbm, h2d / self.h2d, d2h / self.d2h, flops / self.flops)

  @classmethod
  def measure(cls, effort: Effort) -> Self:
    n_bytes, in_flight = effort.copy_bytes, 4

    def dispatched(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
      """Bytes of `x` a second, when the next call is dispatched before the last has ended."""
      return x.nbytes / (1e-6 * clock(lambda: [f(x) for _ in range(in_flight)], effort, in_flight).best_us)

    def looped(op: Op, moved: float, inputs: Any = 1.0, **kwargs: Any) -> float:
      """`moved` a second, bytes or operations, inside one jit."""
      return moved / (1e-6 * measure(op, [inputs], effort, **kwargs)[0].us)

    x = jnp.ones((n_bytes // 4096, 1024), jnp.float32)
    ways = {
      "copy, dispatched": 2 * dispatched(jax.jit(jnp.copy), x),
      "read, dispatched": dispatched(jax.jit(lambda x: x.max(1)), x),
      "read, in a loop": looped(lambda _, x, one: ((), (x + one).max(1)), n_bytes, shared=x),
      "copy, adding in place, in a loop": looped(
        lambda x, _, one: (x + one, ()), 2 * n_bytes, state=x
      ),  # the last: donates x
    }
    x = jnp.ones((min(n_bytes, 1 << 30) // 4,), jnp.float32)
    d2h = dispatched(lambda x: jax.device_put(x, host_sharding()), x)
    h2d = dispatched(lambda x: jax.device_put(x, device_sharding()), jax.device_put(x, host_sharding()))
    n = max(64, min(8192, int(x.nbytes**0.5) // 4))
    a = jnp.ones((n, n), jnp.bfloat16)
    copies = max(rate for way, rate in ways.items() if not way.startswith("read"))
    return cls(copies, h2d, d2h, looped(lambda _, b, a: ((), a @ b), 2 * n**3, a, shared=a), ways)


def device_sharding() -> SingleDeviceSharding:
  return SingleDeviceSharding(jax.devices()[0])


def host_sharding() -> SingleDeviceSharding:
  return SingleDeviceSharding(jax.devices()[0], memory_kind=kv_cache.host_memory_kind())


def row(timing: Timing, floor_us: float, moved: Mapping[str, float], **others: Any) -> Row:
  """A result: the time, the floor of what had to move (as named by `floor_us`), and the floor's share of the time."""
  return dataclasses.asdict(timing) | {"floor_us": floor_us, "fraction": floor_us / timing.us, "moved": moved} | others


def beside(rivals: Mapping[str, Callable[[], Timing]]) -> dict[str, float | str]:
  """us of what would be used instead, or why there is none."""
  found: dict[str, float | str] = {}
  for name, rival in rivals.items():
    try:
      found[name] = rival().us
    except Exception as error:
      found[name] = _in_short(error)
  return found


class Report:
  """Prints a table for each op as its rows come; a JSON line each goes to `file`, with where and when it was."""

  def __init__(self, file: pathlib.Path | None, ceilings: Ceilings, commit: str | None):
    self.results: dict[str, Row] = {}
    self._file, self._op = file, ""
    self._stamp = {
      "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "commit": commit or _commit(),
      "ceilings": dataclasses.asdict(ceilings),
    }
    print(json.dumps(self._stamp), flush=True)
    if file is not None:
      file.parent.mkdir(parents=True, exist_ok=True)

  def add(self, op: str, case: str, make: Callable[[], Row]) -> None:
    """A row of a table. One that cannot be made is told on stderr, and the others go on."""
    try:
      result = make()
    except Exception as error:
      result = {"error": _in_short(error)}
      print(f"{op} {case}: {result['error']}", file=sys.stderr)
    self.results[f"{op}-{case}"] = result
    if self._file is not None:
      with self._file.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"op": op, "case": case, **result, **self._stamp}) + "\n")
    if op != self._op:
      print(f"\n{op:<34}{'us':>10} {'±':>5} {'MiB':>8} {'floor':>9} {'share':>6}  beside (us)")
      self._op = op
    print(f"  {case:<32}{_columns(result)}", flush=True)

  def close(self) -> None:
    """Prints all rows as one JSON object; ends the process with 1 if one is missing."""
    print(json.dumps(self.results), flush=True)
    if any("error" in result for result in self.results.values()):
      sys.exit(1)


def _columns(result: Row) -> str:
  if "error" in result:
    return f"  failed: {result['error']}"
  us, spread, floor, share = (result[key] for key in ("us", "spread", "floor_us", "fraction"))
  mib = sum(amount for way, amount in result["moved"].items() if way != "flops") / 2**20
  others = {f"[{key}]": value for key, value in list(result.items())[6:] if not isinstance(value, dict)}
  others = (result.get("beside", {}) | others).items()
  text = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in others)
  return f"{us:10.1f} {spread:5.0%} {mib:8.1f} {floor:9.1f} {share:6.2f}  {text}"


def _in_short(error: Exception) -> str:
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def _commit() -> str:
  """Of the checkout that this file lies in, with a "+" when it was changed since."""
  try:
    git = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(git, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True).stdout.strip()
  except OSError:
    return ""


_NO_KERNEL = "parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id".split()


def kernels_in_loop(hlo: str) -> int:
  """Operations that are kernels in the loop body that has most of them, those of loops within counted once."""
  bodies = {m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*{\n(.*?)^}", hlo, re.M | re.S)}

  def count(name: str) -> int:
    n = 0
    for line in bodies.get(name, "").splitlines():
      if not (found := re.search(r" = .*?\s([a-z][\w-]*)\(", line)):
        continue
      inner = re.findall(r"(?:to_apply|body|(?:true|false)_computation)=%?([\w.-]+)", line)
      inner += re.findall(r"%?([\w.-]+)", "".join(re.findall(r"branch_computations={(.*?)}", line)))
      if found[1] in ("while", "call"):
        n += sum(count(other) for other in inner)
      elif found[1] == "conditional":
        n += max((count(other) for other in inner), default=0)
      elif found[1] not in _NO_KERNEL and not found[1].endswith("-done"):
        n += 1
    return n

  return max((count(name) for name in re.findall(r"body=%?([\w.-]+)", hlo)), default=0)


def kernel_times(trace: Mapping[str, Any], without: str) -> dict[str, float]:
  """us of every kernel on the GPUs' streams of a Chrome trace, the longest first; not of modules named `without`."""
  events: list[dict[str, Any]] = trace["traceEvents"]
  names = {(e["name"], e["pid"], e.get("tid")): e.get("args", {}).get("name", "") for e in events if e.get("ph") == "M"}
  gpus = {pid for (what, pid, _), name in names.items() if what == "process_name" and "GPU" in name}
  times: collections.Counter[str] = collections.Counter()
  for e in events:
    stream = names.get(("thread_name", e.get("pid"), e.get("tid")), "")
    if e.get("ph") == "X" and e["pid"] in gpus and stream.startswith("Stream"):
      times[e["name"]] += 0 if without in e.get("args", {}).get("hlo_module", "") else e["dur"]
  return {name: us for name, us in times.most_common() if us}
