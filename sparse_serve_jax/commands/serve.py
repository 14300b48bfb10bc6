"""Serves a model over HTTP, in the form of OpenAI's API.

  sparse-serve serve MODEL --port=8000

MODEL is a model directory, a GGUF file, "reference", or random:<name in configs/models>. The server is for this machine
alone unless --host says otherwise. SIGTERM or an interrupt ends it after the requests that it has; a second, at once.
Needs `pip install "sparse-serve-jax[server]"`. --replicas=2 and more are engines in processes of their own, each with
--set tp=... GPUs: on this machine, or on those of a Ray cluster (RAY_ADDRESS); `pip install "sparse-serve-jax[ray]"`.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import NoReturn

from absl import flags, logging

from sparse_serve_jax import runtime
from sparse_serve_jax.commands import cli
from sparse_serve_jax.config import load_config, override
from sparse_serve_jax.models.here import load_model_for_others, load_model_here
from sparse_serve_jax.server.limits import STUCK_S, Limits

KEY = "SPARSE_SERVE_API_KEY"

with cli.group("The model"):
  _DTYPE = cli.define_dtype()
  _NAME = flags.DEFINE_string("served_model_name", None, "What clients call it; by default the last part of MODEL.")
_CONFIG, _SET = cli.define_serving()
with cli.group("The server"):
  _REPLICAS = flags.DEFINE_integer("replicas", 1, "Engines, in processes of their own if several.", lower_bound=1)
  _HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 is all of the machine's.")
  _PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 takes a free one.", lower_bound=0, upper_bound=65535)
  _COMPILE = flags.DEFINE_bool(
    "compile",
    False,
    "Compile all programs but those of log probabilities before requests are taken, not when one needs them.",
  )
  _API_KEY = flags.DEFINE_string("api_key", None, f"Key that clients must give; {KEY} is better, as others see flags.")
  _BODY = flags.DEFINE_integer("max_body_bytes", Limits.max_body_bytes, "Bytes of a request at most.", lower_bound=1)
  _WAITING = flags.DEFINE_integer(
    "max_waiting", Limits.max_waiting, "Outputs that may wait for their first token.", lower_bound=1
  )
  _BODY_SECONDS = flags.DEFINE_float(
    "body_seconds", Limits.body_seconds, "Seconds that a body may take to come.", lower_bound=0.001
  )
  _STUCK = flags.DEFINE_float(
    "stuck_seconds", STUCK_S, "Seconds after which an engine that does not go on is given up.", lower_bound=1
  )
  _DRAIN = flags.DEFINE_float(
    "drain_seconds",
    Limits.drain_seconds,
    "Seconds that answers may take after a signal; then connections are closed.",
    lower_bound=0,
  )


def main(model_path: str | None = None) -> int:
  """Returns 1 if the engine failed, or all of them."""
  if model_path is None:
    raise ValueError("give a model: sparse-serve serve MODEL")
  try:
    from sparse_serve_jax.server import engines, serve
  except ImportError as error:
    raise ValueError(f'the server needs {error.name}: pip install "sparse-serve-jax[server]"') from error
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  key = _API_KEY.value if _API_KEY.value is not None else os.environ.get(KEY)
  if key == "":
    raise ValueError(f"an API key has at least one character: --api_key or {KEY} is empty")
  config = override(load_config(_CONFIG.value), _SET.value)
  config.sparse.refuse_drawn("a server")
  listener = serve.bind((_HOST.value, _PORT.value))  # before what takes long
  if _REPLICAS.value > 1:
    from sparse_serve_jax.server.replicas import Fleet

    model = load_model_for_others(model_path, _DTYPE.value)
    served_by = Fleet(_REPLICAS.value, config, model_path, _DTYPE.value, _STUCK.value, compiled=_COMPILE.value)
  else:
    model = load_model_here(model_path, dtype=_DTYPE.value)
    served_by = engines.One.start(config, model, _STUCK.value, compiled=_COMPILE.value)
  limits = Limits(_BODY.value, _WAITING.value, _BODY_SECONDS.value, _DRAIN.value)
  served = _NAME.value or pathlib.Path(model_path).name or model.name  # "." has no name
  return 0 if serve.serve(served_by, model, served, listener, limits, key) else 1


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, ["MODEL"], argv=argv)
