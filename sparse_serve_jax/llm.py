"""Text in, text out."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_serve_jax.config import EngineConfig, load_config, override
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import load_model, place_params
from sparse_serve_jax.models.tokenizer import Message
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.metrics import request_metrics
from sparse_serve_jax.serving.request import Request


@dataclasses.dataclass(frozen=True)
class Output:
  """What became of one prompt."""

  text: str
  token_ids: list[int]  # without the stop token
  finish_reason: str  # "stop", "length", or "error"
  metrics: dict[str, float | None]  # serving.metrics.request_metrics
  error: str | None = None  # what ended it: logits that are not finite, or a device that failed


class LLM:
  """A model behind an engine, for scripts and notebooks.

  `LLM("path/to/model", config="psa").generate(["Once upon a time"])`
  """

  def __init__(
    self,
    path_or_name: str | pathlib.Path,
    config: str | pathlib.Path | Mapping[str, Any] | EngineConfig = "sparse_serve",
    overrides: str | Iterable[str] | Mapping[str, Any] = (),
    dtype: str | None = None,
  ):
    """Loads model and configuration.

    Args:
      path_or_name: a directory, or "random:<shape>"; see `load_model`.
      config: a name in configs/serving, a JSON file, a dict of what such a file holds, or the configuration itself.
      overrides: assignments such as "cache.hbm_bytes=8GiB", or a dict such as {"cache.hbm_bytes": "8GiB"}.
      dtype: "float32" or "bfloat16"; None keeps the model's own.
    """
    self.config = override(load_config(config), overrides)
    self.model = load_model(path_or_name, dtype=dtype)
    _ = self.engine  # what does not fit is refused now
    self._weights = place_params(self.model, make_mesh(self.config.tp))  # the engine's, and those of the next one

  @functools.cached_property
  def engine(self) -> Engine:
    return Engine(JaxExecutor(self.config, self.model))

  def generate(self, texts: str | Sequence[str | Sequence[int]], *, seed: int = 0, **options: Any) -> list[Output]:
    """Continues texts, or lists of token ids, all in one batch as far as memory allows. Text i draws with seed + i.
    `options` go to `Engine.add_request`: max_new_tokens (128), temperature (0.0), top_p (1.0), stop_token_ids,
    min_tokens (0), ignore_eos, on_token.

    Returns one output for each text, in order; a single text is a list of one. A request that a failure of the device
    ended, or logits that were not finite, has the `finish_reason` "error"; the next call works again.

    Raises:
      ValueError: one of the texts could never run; none is run then.
    """
    texts = [texts] if isinstance(texts, str) else texts
    encode = self.model.tokenizer.encode
    return self._run([encode(text) if isinstance(text, str) else text for text in texts], seed, options)

  def chat(self, messages: Sequence[Message], *, seed: int = 0, **options: Any) -> Output:
    """Answers a conversation of {"role": ..., "content": ...}, written out by the model's chat template."""
    tokenizer = self.model.tokenizer
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    return self._run([prompt], seed, options)[0]

  def _run(self, prompts: Sequence[Sequence[int]], seed: int, options: dict[str, Any]) -> list[Output]:
    if self.engine.failed:
      del self.engine  # with its cache, before a new one is made
    requests: list[Request] = []
    try:
      for i, prompt in enumerate(prompts):
        requests.append(self.engine.add_request(prompt, seed=seed + i, request_id=f"text-{i}", **options))
      self.engine.run()
    except BaseException:
      if not self.engine.failed:
        self.engine.cancel_all()
      raise
    for request in requests:
      if request.error is not None and request.finish_reason != "error":
        raise request.error  # a callback's
    return [self._output(request) for request in requests]

  def _output(self, request: Request) -> Output:
    assert request.finish_reason is not None
    text = self.model.tokenizer.decode(request.output_tokens)
    error = str(request.error) if request.finish_reason == "error" else None
    return Output(text, request.output_tokens, request.finish_reason, request_metrics(request), error)
