"""What this machine has, how fast it moves bytes, and what models and contexts fit: some seconds.

  sparse-serve doctor
  sparse-serve doctor MODEL --config=psa

MODEL is a model directory, a GGUF file, "reference", or random:<name in configs/models>; without it the shapes of
configs/models are tried. Sizes that the configuration leaves open are derived from what is free now. The last line of
stdout is one JSON object. Ends with 1 if something keeps the project from a GPU that is here, which a line says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax
from absl import logging

from sparse_serve_jax import __version__, runtime
from sparse_serve_jax.attention import get_method
from sparse_serve_jax.benchmarks import machine
from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.commands import cli
from sparse_serve_jax.config import EngineConfig, ModelConfig, find_config, load_config, override, read_config, shipped
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.models import load_model
from sparse_serve_jax.models.here import load_model_here
from sparse_serve_jax.serving import budget, sizes

with cli.group("The model"):
  _DTYPE = cli.define_dtype()
_CONFIG, _SET = cli.define_serving()
_VERBOSE = cli.define_verbose()


def main(model: str | None = None) -> int:
  """Returns 1 if something keeps the project from a GPU."""
  runtime.configure()
  logging.set_verbosity(logging.ERROR)  # JAX tells of every backend it does not find; so does the table
  config = override(load_config(_CONFIG.value), _SET.value)
  here = machine.Machine.here()
  rows = about(here)
  if not here.backend:
    print(f"trouble: {here.trouble}", file=sys.stderr)
    cli.end_with(_table(rows), {"machine": dataclasses.asdict(here), "trouble": here.trouble})
    return 1
  free, rates = sizes.free_here(), machine.rates()
  of_jax = "JAX takes 75 % of a device unless XLA_PYTHON_CLIENT_MEM_FRACTION says another share"
  rows["device memory"] = "the host's" if free.device is None else f"{budget.gib(free.device)} free on each; {of_jax}"
  pinned = "none: a CPU needs none" if free.device is None else budget.gib(int(sizes.PINNED_SHARE * free.host))
  rows |= {"host memory": f"{budget.gib(free.host)} free", "can be pinned": pinned}
  rows |= {name: f"{rate / 1e9:.1f} GB/s" for name, rate in rates.items()}
  fits = {name: fit(config, cfg, free) for name, cfg in _models(model).items()}
  rows |= {f"fits: {name}": of.text for name, of in fits.items()}
  best = max((name for name in fits if fits[name].refused is None), key=lambda n: fits[n].weights, default=None)
  line = None
  if best is not None:
    line = proposed(model or "MODEL", fits[best])
    rows["proposed" if model else f"proposed, for {best}"] = line
  if here.trouble:
    print(f"trouble: {here.trouble}", file=sys.stderr)
  told = {
    "machine": dataclasses.asdict(here),
    "free": dataclasses.asdict(free),
    "rates": rates,
    "trouble": here.trouble,
  }
  fitting = {name: dataclasses.asdict(of) for name, of in fits.items()}
  cli.end_with(_table(rows), told | {"fits": fitting, "command": line})
  return int(here.trouble is not None)


@dataclasses.dataclass(frozen=True)
class Fit:
  """What a model's memory comes to, in bytes over all devices, or why it does not fit."""

  weights: int
  hbm_bytes: int = 0
  dram_bytes: int = 0  # 0: the pool lies in HBM
  kv_tokens: int = 0  # of all requests
  max_context: int = 0  # tokens of a request
  refused: str | None = None

  @property
  def text(self) -> str:
    """For a reader."""
    if self.refused:
      return f"no: {self.refused}"
    return (
      f"weights {budget.gib(self.weights)}, KV of {self.kv_tokens:,} tokens in {budget.gib(self.dram_bytes)} of DRAM "
      f"and {budget.gib(self.hbm_bytes)} of HBM, requests of up to {self.max_context:,} tokens"
    )


def fit(config: EngineConfig, cfg: ModelConfig, free: sizes.Free) -> Fit:
  """Whether a model fits what is free, and with what."""
  n, gpu = config.tp, free.device is not None
  weights = n * budget.weight_bytes(cfg, n)
  try:
    config.check_model(cfg)
    budget.check_pool(config, lambda: free.host)
    cudnn = gpu and cfg.dtype == "bfloat16"
    config = sizes.resolve(host_pool.chosen(config), cfg, free, cudnn)
    shape = CacheShape.of(cfg, config, get_method(config.sparse.method).vectors)
  except ValueError as error:
    return Fit(weights, refused=str(error))
  needs = budget.Needs.of(cfg, config, shape, Buckets.of(config, cfg.n_layers, shape.max_context), cudnn)
  each = needs.weights + needs.activations + needs.kv
  where = [(each, free.device, "a device")] if free.device is not None else []
  where.append((needs.pool + (0 if gpu else n * each), free.host, "the host"))
  for taken, there, what in where:
    if taken > there:
      return Fit(weights, refused=f"it takes {budget.gib(taken)} of {what}, and {budget.gib(there)} are free")
  dram = shape.pool_bytes if shape.offload else 0
  return Fit(weights, shape.hbm_bytes, dram, shape.M * shape.S, shape.max_context)


def about(here: machine.Machine) -> dict[str, str]:
  """Rows on devices and versions."""
  counts = {kind: here.devices.count(kind) for kind in here.devices}
  devices = ", ".join(f"{n} x {kind}" for kind, n in counts.items()) or "none"
  return {
    "devices": devices + (f", compute capability {here.capability}" if here.capability else ""),
    "driver": here.driver or "no NVIDIA driver",
    "versions": ", ".join(f"{name} {v}" for name, v in {"sparse-serve-jax": __version__, **here.versions}.items()),
  }


def proposed(model: str, of: Fit) -> str:
  """A command line that serves within these sizes, whole MiB of them."""
  sized = {"hbm": of.hbm_bytes, "dram": of.dram_bytes}
  memory = [f"--set cache.{name}_bytes={n >> 20}MiB" for name, n in sized.items() if n]
  given = [f"--config={_CONFIG.value}", *(f"--set {shlex.quote(one)}" for one in _SET.value if "_bytes" not in one)]
  return " ".join(
    ["sparse-serve serve", shlex.quote(model), *given, *memory, f"--set scheduler.max_context={of.max_context}"]
  )


def _models(given: str | None) -> dict[str, ModelConfig]:
  """By name: the model that is given, or the shapes of configs/models and the reference model, if it is there."""
  if given is not None:
    return {given: load_model_here(given, dtype=_DTYPE.value).config}
  dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else None)  # as `load_model_here`
  names = [name for name in shipped("models") if not name.startswith("tiny")]
  made = {name: read_config(ModelConfig, find_config("models", name)) for name in names}
  made = {name: dataclasses.replace(cfg, dtype=dtype or cfg.dtype) for name, cfg in made.items()}
  with contextlib.suppress(ValueError):
    made["reference"] = load_model("reference", dtype=dtype).config
  return made


def _table(rows: Mapping[str, str]) -> str:
  width = max(map(len, rows))
  return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, ["MODEL"], argv=argv)
