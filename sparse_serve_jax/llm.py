"""Text in, text out."""

from __future__ import annotations

import functools
import numbers
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack, cast, overload

import numpy as np
from tqdm import tqdm

from sparse_serve_jax import prompting
from sparse_serve_jax.config import EngineConfig, load_config, override
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import place_params
from sparse_serve_jax.models.here import load_model_here
from sparse_serve_jax.outputs import Reading, RequestOutput, Sample
from sparse_serve_jax.sampling_params import SamplingOptions, SamplingParams
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.tokenizing import Message

BAR_DELAY = 3.0  # seconds that pass before a progress bar is shown

Prompt = str | Sequence[int]
OnToken = Callable[[Request, int], None]
Params = SamplingParams | Sequence[SamplingParams]


class ChatOptions(SamplingOptions, total=False):
  """Keyword arguments of `LLM.chat`: of the chat template, and fields of `SamplingParams`."""

  tools: Sequence[Mapping[str, Any]] | None
  documents: Sequence[Mapping[str, Any]] | None
  chat_template_kwargs: Mapping[str, Any] | None
  continue_final_message: bool
  special_tokens_in_text: Literal["text", "token"]


_TEMPLATE_OPTIONS = ChatOptions.__annotations__.keys() - SamplingOptions.__annotations__.keys()


class LLM:
  """A model behind an engine, for scripts and notebooks. One thread uses it; `serving.loop` is for many.

  ```
  llm = LLM("path/to/model", config="psa")
  (output,) = llm.generate("Once upon a time", SamplingParams(max_tokens=50))
  print(output.text)
  ```
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
      dtype: "float32" or "bfloat16"; None keeps the model's own, but on a CPU float32 takes the place of bfloat16.

    Raises:
      ValueError: as of `load_model` and `load_config`, or the configuration does not fit model and devices.
      NotImplementedError: as of `JaxExecutor`.
    """
    self.config = override(load_config(config), overrides)
    self.config.sparse.refuse_drawn("LLM")
    self.model = load_model_here(path_or_name, dtype=dtype)
    self._abandoned: deque[tuple[Engine, str]] = deque()  # requests that nobody reads any more
    self._n_streams = 0
    self.config = self.engine.config  # what does not fit is refused now; sizes stay as they have been derived
    self._weights = place_params(self.model, make_mesh(self.config.tp))  # the engine's, and those of the next one

  @functools.cached_property
  def engine(self) -> Engine:
    """What serves the requests: for callbacks that cancel one."""
    return Engine(JaxExecutor(self.config, self.model))

  def generate(
    self,
    prompts: Prompt | Sequence[Prompt],
    params: Params | None = None,
    *,
    on_token: OnToken | None = None,
    **options: Unpack[SamplingOptions],
  ) -> list[RequestOutput]:
    """Continues texts, or lists of token ids, all in one batch as far as memory allows.

    Of several outputs that are drawn, each has a seed of its own. With one `params` for all, sample j of prompt i draws
    with seed + i * n + j; with one for each prompt, sample j with seed + j. The `n` samples of a prompt are requests
    like others; with `cache.prefix` all but the first share what it has made of the prompt.

    Args:
      prompts: a text or a list of token ids, or several of them. A text that begins with BOS gets no other one. An
        empty text is BOS alone, or as wrong as an empty list where the tokenizer adds none.
      params: one for all or one for each prompt.
      on_token: called with the request and each output token, as it is read; `Detokenizer` makes text of them. What it
        raises ends all and is raised.
      **options: fields of `SamplingParams`, instead of `params`: max_tokens=50, temperature=0.8.

    Returns:
      One output for each prompt, in order; a single prompt is a list of one. What a failure of the device ended, or
      logits that were not finite, has the `finish_reason` "error"; the next call works again.

    Raises:
      ValueError: one of the prompts could never run, or a parameter is wrong; nothing is run then.
    """
    prompts = _listed(prompts)
    asked = _params(params, options, len(prompts))
    encoded = [self._encode(i, *of) for i, of in enumerate(zip(prompts, asked, strict=True))]
    return self._run(encoded, asked, on_token)

  @overload
  def chat(
    self,
    messages: Sequence[Message],
    params: SamplingParams | None = None,
    *,
    on_token: OnToken | None = None,
    **options: Unpack[ChatOptions],
  ) -> RequestOutput: ...
  @overload
  def chat(
    self,
    messages: Sequence[Sequence[Message]],
    params: Params | None = None,
    *,
    on_token: OnToken | None = None,
    **options: Unpack[ChatOptions],
  ) -> list[RequestOutput]: ...
  def chat(
    self,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    params: Params | None = None,
    *,
    on_token: OnToken | None = None,
    **options: Unpack[ChatOptions],
  ) -> RequestOutput | list[RequestOutput]:
    """Answers a conversation, or several, written out by the model's chat template.

    Args:
      messages: {"role": ..., "content": ...}, in order; or a list of such conversations. A content is a text, or a list
        of parts {"type": "text", "text": ...}, which are joined.
      params: one for all or one for each conversation.
      on_token: as of `generate`.
      **options: of the template, as `encode_chat` takes them: tools, documents, chat_template_kwargs,
        continue_final_message, special_tokens_in_text. Others are fields of `SamplingParams`, instead of `params`.

    Returns:
      The output of one conversation, or a list of outputs of several.

    Raises:
      ValueError: something is no conversation, the template refuses one, or as of `generate`. Nothing is run then.
    """
    given = cast(object, messages)
    none = isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence)
    if none or (messages and isinstance(messages[0], str)):
      raise ValueError(f"chat takes messages such as {prompting.FORM}, got {messages!r:.80}; generate takes texts")
    one = not messages or prompting.is_message(messages[0])
    conversations = cast("Sequence[Sequence[Message]]", [messages] if one else messages)
    sampling = {name: value for name, value in options.items() if name not in _TEMPLATE_OPTIONS}
    template: Any = {name: value for name, value in options.items() if name in _TEMPLATE_OPTIONS}
    asked = _params(params, sampling, len(conversations))
    outputs = self._run([self.encode_chat(of, **template) for of in conversations], asked, on_token)
    return outputs[0] if one else outputs

  def encode_chat(
    self,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    special_tokens_in_text: Literal["text", "token"] = "text",
  ) -> list[int]:
    """The token ids of a conversation, up to where the answer begins: what `chat` runs.

    Args:
      messages: one conversation; see `chat`.
      tools: JSON schemas of functions, for templates that know tools.
      documents: {"title": ..., "text": ...}, for templates that know documents.
      chat_template_kwargs: other variables of the template, such as {"enable_thinking": False}.
      continue_final_message: the model goes on with the last message instead of answering it.
      special_tokens_in_text: control tokens that somebody typed into a message stay "text", or become a "token".

    Raises:
      ValueError: it is no conversation, or the template refuses it.
    """
    given = {"tools": tools, "documents": documents, "continue_final_message": continue_final_message or None}
    given |= chat_template_kwargs or {}
    options = {name: value for name, value in given.items() if value is not None}
    return prompting.encode_chat(
      self.model.tokenizer, messages, not continue_final_message, special_tokens_in_text, options
    )

  def stream(
    self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
  ) -> TextStream:
    """Continues one prompt, or answers one conversation: `for piece in llm.stream("Once upon a time"): ...`.

    Args:
      prompt: a text, token ids, or messages; `encode_chat` takes options of a chat template.
      params: as of `generate`, with n=1.
      **options: fields of `SamplingParams`, instead of `params`.

    Raises:
      ValueError: as of `generate`.
    """
    (asked,) = _params(params, options, 1)
    if asked.n > 1:
      raise ValueError(f"a stream is one output, got n={asked.n}")
    if isinstance(cast(object, prompt), bytes | Mapping) or not isinstance(cast(object, prompt), Sequence | np.ndarray):
      raise ValueError(f"a stream takes a text, token ids or messages such as {prompting.FORM}, got {prompt!r:.80}")
    self._prepare()
    if not isinstance(prompt, str) and len(prompt) and prompting.is_message(prompt[0]):
      ids = self.encode_chat(cast("Sequence[Message]", prompt))
    else:
      ids = self._encode(0, cast("Prompt", prompt), asked)
    self._n_streams += 1
    engine, name = self.engine, f"stream-{self._n_streams}"
    try:
      return TextStream(self, _Output(self, name, ids, asked, text=True))
    except BaseException:
      self._abandoned.append((engine, name))  # an interrupt may have come before anybody has it
      raise

  def _encode(self, i: int, prompt: Prompt, params: SamplingParams) -> Sequence[int]:
    if isinstance(prompt, str):
      return prompting.encode_text(self.model.tokenizer, prompt, params.add_special_tokens)
    if isinstance(prompt, Mapping):
      raise ValueError(f"prompt {i} is a message, which chat takes; generate takes texts and lists of token ids")
    return prompt

  def _prepare(self) -> None:
    if self.engine.failed:
      self.engine.executor.drop()  # before a new one is made, whoever still has the engine
      del self.engine
    self._cancel_abandoned()

  def _cancel_abandoned(self) -> None:
    """What is interrupted here is left to the next time."""
    while self._abandoned:
      engine, name = self._abandoned[0]
      if not engine.failed:
        engine.cancel(name)
      self._abandoned.popleft()

  def _run(
    self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], on_token: OnToken | None
  ) -> list[RequestOutput]:
    self._prepare()
    outputs = list[list[_Output]]()
    names = [[f"text-{i}-{j}" if of.n > 1 else f"text-{i}" for j in range(of.n)] for i, of in enumerate(params)]
    engine = self.engine
    try:
      for of, prompt, asked in zip(names, prompts, params, strict=True):
        outputs.append([])
        for j, name in enumerate(of):
          outputs[-1].append(_Output(self, name, prompt, asked.later(j), on_token=on_token))
      self._finish([output.request for of in outputs for output in of])
    except BaseException:
      # An interrupt may have come before `outputs` has one.
      self._abandoned.extend([(engine, name) for of in names for name in of])
      self._cancel_abandoned()
      raise
    for output in [output for of in outputs for output in of]:
      output.raise_of_callback()
    return [RequestOutput(of[0].prompt_ids, tuple(output.sample() for output in of)) for of in outputs]

  def _finish(self, requests: Sequence[Request]) -> None:
    """Runs the engine until there is nothing left to do."""
    with tqdm(total=0, unit="token", delay=BAR_DELAY, disable=None, leave=False) as bar:
      while self.engine.has_work and not self.engine.failed:
        self.engine.step()
        if not bar.disable:
          done = [len(request.output_tokens) for request in requests]
          most = [n if request.ended else request.max_new_tokens for n, request in zip(done, requests, strict=True)]
          bar.total = sum(most)
          bar.update(sum(done) - bar.n)


class TextStream(Iterator[str]):
  """The text of one output, piece by piece, as it is made: whole characters, none of them taken back.

  All pieces together are the text of `output`, which is there after the last one. The model runs only while a piece is
  waited for, or while other calls of its LLM run. A stream that is dropped or closed before its end is cancelled.
  """

  def __init__(self, llm: LLM, output: _Output):
    self._engine, self._output, self._abandoned = output.engine, output, llm._abandoned  # pyright: ignore[reportPrivateUsage]
    self._n_told = 0  # characters of its text

  def __next__(self) -> str:
    """Waits for the next piece.

    Raises:
      RuntimeError: the output ended with an error.
    """
    output = self._output
    while len(text := output.text()) == self._n_told and not output.request.ended:
      self._engine.step()
    if piece := text[self._n_told :]:
      self._n_told += len(piece)
      return piece
    if output.sample().error is not None:
      raise RuntimeError(output.sample().error) from output.request.error
    raise StopIteration

  @property
  def output(self) -> RequestOutput:
    """What became of the prompt. Raises RuntimeError before the end."""
    if not self._output.request.ended:
      raise RuntimeError("the stream has not ended: read its pieces first, or close it")
    return RequestOutput(self._output.prompt_ids, (self._output.sample(),))

  def close(self) -> None:
    """Ends the output here, with the finish_reason "cancelled" if it has not ended."""
    if not (self._output.request.ended or self._engine.failed):
      self._engine.cancel(self._output.request.id)

  def __enter__(self) -> TextStream:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def __del__(self) -> None:
    if "_output" in self.__dict__ and not self._output.request.ended:  # the engine may be within a step now
      self._abandoned.append((self._engine, self._output.request.id))


class _Output:
  """A request in the engine, which a stream, a callback or nobody follows."""

  def __init__(
    self,
    llm: LLM,
    name: str,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    on_token: OnToken | None = None,
    text: bool = False,
  ):
    self._begin = functools.partial(Reading, llm.model.tokenizer, params, pieces=text)
    self._reading, self._torn, self._on_token = self._begin(), False, on_token
    self.engine, self._reads = llm.engine, text or bool(params.stop)
    called = self._take if self._reads else on_token
    self.request = self.engine.add_request(prompt, params=params, request_id=name, on_token=called)
    self.prompt_ids: list[int] = self.request.prompt.tolist()

  def _take(self, request: Request, token: int) -> None:
    if self._reading.stopped:
      return
    self.text()
    if self._on_token is not None:
      self._on_token(request, token)
    if self._reading.stopped and not request.ended:
      self.engine.cancel(request.id, "stop")

  def text(self) -> str:
    """That of all tokens so far, as far as it is certain. What an interrupt has torn is read anew."""
    if self._torn:
      self._reading = self._begin()
    self._torn = True
    for token in self.request.output_tokens[self._reading.n_tokens :]:
      if not self._reading.stopped:
        self._reading.push(token)
    if self.request.ended:
      self._reading.finish()
    self._torn = False
    return self._reading.text

  def sample(self) -> Sample:
    if self._reads:
      self.text()
    return self._reading.sample(self.request)

  def raise_of_callback(self) -> None:
    if self.request.error is not None and self.request.finish_reason != "error":
      raise self.request.error


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
  """Several prompts; one is a list of one."""
  if isinstance(prompts, str) or (isinstance(prompts, np.ndarray) and prompts.ndim == 1):
    return [cast("Prompt", prompts)]
  if isinstance(prompts, bytes | Mapping) or not isinstance(cast(object, prompts), Sequence | np.ndarray):
    raise ValueError(f"prompts are a text or a list of token ids, or a list of these, got {prompts!r:.80}")
  if len(prompts) and isinstance(prompts[0], numbers.Integral):
    return [cast("Prompt", prompts)]
  return cast("Sequence[Prompt]", prompts)


def _params(params: Params | None, options: Mapping[str, Any], n: int) -> list[SamplingParams]:
  """Those of each of `n` prompts."""
  if params is not None and options:
    raise ValueError(f"give params or single options, got both: {params!r:.80} and {', '.join(options)}")
  if params is None or isinstance(params, SamplingParams):
    one = SamplingParams(**options) if params is None else params
    return [one.later(i * one.n) for i in range(n)]
  wrong = f"params are a SamplingParams, such as SamplingParams(max_tokens=50), or a list of {n}, one for each prompt"
  if isinstance(cast(object, params), str | Mapping) or not isinstance(cast(object, params), Sequence):
    raise ValueError(f"{wrong}; got {params!r:.80}")
  if other := [of for of in params if not isinstance(cast(object, of), SamplingParams)]:
    raise ValueError(f"{wrong}; got {other[0]!r:.80}")
  if len(params) != n:
    raise ValueError(f"{wrong}; got {len(params)}")
  return list(params)
