"""Bodies of requests in OpenAI's form, checked: what is asked, as prompts and `SamplingParams`.

What the engine cannot do is refused, not ignored, if it would change the answer.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_serve_jax import prompting
from sparse_serve_jax.sampling_params import MAX_LOGPROBS, SamplingParams
from sparse_serve_jax.server.errors import Refused
from sparse_serve_jax.tokenizing import Tokenizer

COMPLETION_TOKENS = 16  # max_tokens of a completion that says nothing, as of OpenAI
MOST_OUTPUTS = 128  # of one request: prompts x n
_MOST_STOPS = {"stop": 128, "stop_token_ids": 1024}  # each stop string is looked for with each token

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos")
_EXTENSIONS = ("cache_salt", "n", "max_tokens")
_SHARED = {*_SAMPLING, *_EXTENSIONS, "model", "stream", "stream_options", "logprobs"}
_COMPLETION = {*_SHARED, "prompt", "echo", "add_special_tokens"}
_TEMPLATE = ("chat_template_kwargs", "continue_final_message", "special_tokens_in_text")
_CHAT = {*_SHARED, *_TEMPLATE, "messages", "max_completion_tokens", "top_logprobs"}
# They say who asks or how it is kept, not what the answer is.
_IGNORED = {
  "user",
  "metadata",
  "store",
  "service_tier",
  "safety_identifier",
  "prompt_cache_key",
  "prompt_cache_retention",
}
# Values of what cannot be done that ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
  "presence_penalty": (0,),
  "frequency_penalty": (0,),
  "repetition_penalty": (1,),
  "logit_bias": ({},),
  "suffix": ("",),
  "tools": ([],),
  "tool_choice": ("none", "auto"),
  "functions": ([],),
  "parallel_tool_calls": (True, False),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
}


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request for completions, of texts or of a conversation."""

  chat: bool
  prompts: list[list[int]]  # token ids
  params: SamplingParams
  max_tokens: int  # 0: nothing but the prompt is wanted
  echoes: list[str]  # texts of the prompts, if they are to be told; one that is given as ids is decoded
  stream: bool
  usage: bool  # a stream ends with one

  def params_of(self, i: int, j: int) -> SamplingParams:
    """Of sample `j` of prompt `i`: seeds are those that `LLM.generate` gives."""
    return self.params.later(i * self.params.n + j)


def read(
  body: object, chat: bool, tokenizer: Tokenizer, vocab_size: int, served: str, max_request_tokens: int
) -> Asked:
  """Checks a body and encodes its prompts, which may take long.

  Raises:
    Refused: something in it is wrong, cannot be done, or does not fit.
  """
  fields = _known(body, _CHAT if chat else _COMPLETION)
  check_model(fields, served)
  stream, options = _truth(fields, "stream"), _object(fields, "stream_options")
  for name, value in options.items():
    nothing = value is None or (name == "include_obfuscation" and value is False)
    if name != "include_usage" and not nothing:
      raise Refused(400, f"there is no parameter {name!r:.80} of stream_options", "stream_options")
  if options and not stream:
    raise Refused(400, "stream_options is for stream=true", "stream_options")
  prompts = [_conversation(fields, tokenizer)] if chat else prompts_of(fields, tokenizer)
  for prompt in prompts:
    if not prompt:
      raise Refused(400, "the prompt is empty, at least one token is needed", "messages" if chat else "prompt")
    check_ids(prompt, vocab_size, "prompt")
  longest = max(len(prompt) for prompt in prompts)
  most, default = _max_tokens(fields, chat), max(1, max_request_tokens - longest) if chat else COMPLETION_TOKENS
  max_tokens = default if most is None else most
  if longest + max_tokens > max_request_tokens:
    raise Refused(
      400,
      f"a prompt of {longest} tokens and max_tokens={max_tokens} are {longest + max_tokens} tokens; a request can have "
      f"{max_request_tokens}",
      code="context_length_exceeded",
    )
  params = _params(fields, chat, max_tokens)
  if len(prompts) * params.n > MOST_OUTPUTS:
    raise Refused(400, f"{len(prompts)} prompts with n={params.n} are more than {MOST_OUTPUTS} outputs", "n")
  best_of = fields.get("best_of")
  if best_of is not None and not (_is_id(best_of) and best_of == params.n):
    raise Refused(400, f"best_of={best_of!r:.40} is not n={params.n}: no output is chosen among others", "best_of")
  echoes = _echoes(fields, prompts, tokenizer) if _truth(fields, "echo") else []
  return Asked(chat, prompts, params, max_tokens, echoes, stream, _truth(options, "include_usage"))


def check_model(fields: Mapping[str, Any], served: str) -> None:
  model = fields.get("model")
  if model is not None and model != served:
    raise Refused(404, f"there is no model {model!r:.80}; this server has {served!r}", "model", "model_not_found")


def check_text(tokenizer: Tokenizer, param: str) -> None:
  if not tokenizer.vocab_size:
    raise Refused(400, "the model has no tokenizer, so it reads no texts: give /v1/completions token ids", param)


def object_of(body: object) -> Mapping[str, Any]:
  if not isinstance(body, Mapping):
    raise Refused(400, f"a request is a JSON object, got {type(body).__name__}")
  return body


def prompts_of(fields: Mapping[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
  """Token ids of `prompt`: a text, ids, or a list of either. A text may have none."""
  prompt, special = fields.get("prompt"), fields.get("add_special_tokens")
  form = "prompt must be a text, a list of token ids, or a list of these"
  if special not in (None, True, False):
    raise Refused(400, f"add_special_tokens must be true or false, got {special!r:.80}", "add_special_tokens")
  if not isinstance(prompt, str | list) or prompt == []:
    raise Refused(400, f"{form}, got {prompt!r:.80}", "prompt")
  found = list[list[int]]()
  for one in _listed(prompt):
    if isinstance(one, str):
      check_text(tokenizer, "prompt")
      found.append(prompting.encode_text(tokenizer, one, special is not False))
    elif isinstance(one, list) and all(_is_id(token) for token in one):
      found.append(one)
    else:
      raise Refused(400, f"{form}, got {one!r:.80}", "prompt")
    if wrong := [token for token in found[-1] if not 0 <= token < 2**31]:
      raise Refused(400, f"{wrong[0]} is no token id", "prompt")
  return found


def _listed(prompt: str | list[Any]) -> list[Any]:
  return prompt if isinstance(prompt, list) and not _is_id(prompt[0]) else [prompt]


def _echoes(fields: Mapping[str, Any], prompts: Sequence[list[int]], tokenizer: Tokenizer) -> list[str]:
  given = zip(_listed(fields["prompt"]), prompts, strict=True)
  return [one if isinstance(one, str) else tokenizer.decode(ids, skip_special_tokens=False) for one, ids in given]


def _is_id(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _known(body: object, names: set[str]) -> Mapping[str, Any]:
  """The fields that are given. Those that ask for something that there is not are refused."""
  fields = {name: value for name, value in object_of(body).items() if value is not None and name not in _IGNORED}
  for name, value in fields.items():
    if name in names or name == "best_of":
      continue
    if name not in _NOTHING:
      raise Refused(400, f"there is no parameter {name!r:.80}", name[:80])
    if not any(type(value) is not bool and value == nothing for nothing in _NOTHING[name]) and not (
      name == "parallel_tool_calls" and isinstance(value, bool)
    ):
      raise Refused(400, f"{name}={value!r:.80} cannot be done here", name)
  return fields


def _conversation(fields: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
  check_text(tokenizer, "messages")
  options, goes_on = _object(fields, "chat_template_kwargs"), _truth(fields, "continue_final_message")
  typed = fields.get("special_tokens_in_text", "text")
  if typed not in ("text", "token"):
    raise Refused(400, f"special_tokens_in_text must be text or token, got {typed!r:.80}", "special_tokens_in_text")
  given = {**options, **({"continue_final_message": True} if goes_on else {})}
  try:
    return prompting.encode_chat(tokenizer, fields.get("messages"), not goes_on, typed, given)
  except (TypeError, ValueError) as error:
    of = "chat_template_kwargs" if str(error).startswith("chat_template_kwargs ") else "messages"
    raise Refused(400, str(error), of) from None


def _max_tokens(fields: Mapping[str, Any], chat: bool) -> int | None:
  low = 1 if chat else 0
  values = {name: fields[name] for name in ("max_tokens", "max_completion_tokens") if name in fields}
  for name, value in values.items():
    if not _is_id(value) or not low <= value < 2**31:
      raise Refused(400, f"{name} must be an integer of at least {low}, got {value!r:.80}", name)
  if len(set(values.values())) > 1:
    raise Refused(400, f"max_tokens and max_completion_tokens are two names of one number, got {values}", "max_tokens")
  return next(iter(values.values()), None)


def _params(fields: Mapping[str, Any], chat: bool, max_tokens: int) -> SamplingParams:
  """As OpenAI's defaults are: temperature 1, and a seed that nobody knows."""
  given = {name: fields[name] for name in (*_SAMPLING, "cache_salt", "n") if name in fields}
  for name, most in _MOST_STOPS.items():
    if isinstance(given.get(name), list) and len(given[name]) > most:
      raise Refused(400, f"{name} has {len(given[name])} entries; it can have {most}", name)
  given = {"temperature": 1.0, "seed": random.getrandbits(31)} | given
  try:
    return SamplingParams(max_tokens=max(1, max_tokens), logprobs=_logprobs(fields, chat), **given)
  except ValueError as error:
    raise Refused(400, str(error), next((name for name in fields if str(error).startswith(f"{name} ")), None)) from None


def _logprobs(fields: Mapping[str, Any], chat: bool) -> int | None:
  if not chat:
    return fields.get("logprobs")
  wanted, top = _truth(fields, "logprobs"), fields.get("top_logprobs")
  if top is not None and not (_is_id(top) and 0 <= top <= MAX_LOGPROBS):
    raise Refused(400, f"top_logprobs must be an integer from 0 to {MAX_LOGPROBS}, got {top!r:.80}", "top_logprobs")
  if top and not wanted:
    raise Refused(400, f"top_logprobs={top} takes logprobs=true", "top_logprobs")
  return (top or 0) if wanted else None


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  value = fields.get(name, {})
  if not isinstance(value, Mapping):
    raise Refused(400, f"{name} must be an object, got {value!r:.80}", name)
  return value


def _truth(fields: Mapping[str, Any], name: str) -> bool:
  value = fields.get(name, False)
  if value is not None and not isinstance(value, bool):
    raise Refused(400, f"{name} must be true or false, got {value!r:.80}", name)
  return bool(value)


def check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
  if (wrong := max(ids, default=0)) >= vocab_size:
    raise Refused(400, f"{wrong} is outside the vocabulary of {vocab_size}", name)


def token_ids(fields: Mapping[str, Any]) -> Sequence[int]:
  """Those of a request to /detokenize."""
  tokens = fields.get("tokens")
  if not isinstance(tokens, list) or not all(_is_id(token) and 0 <= token < 2**31 for token in tokens):
    raise Refused(400, f"tokens must be a list of token ids, got {tokens!r:.80}", "tokens")
  return tokens
