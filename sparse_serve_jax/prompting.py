"""Prompts as people write them, texts and conversations: checked, and as token ids."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from sparse_serve_jax import files
from sparse_serve_jax.tokenizing import Message, Tokenizer, Typed

FORM = '[{"role": "user", "content": "..."}]'
_NO_VARIABLES = {"self", "messages", "add_generation_prompt", "special_tokens_in_text"}  # whose values come otherwise
ROLES = ("system", "developer", "user", "assistant", "tool")  # a template may know others


def is_message(value: object) -> bool:
  """Whether it may be meant as a message: `checked` says whether it is one."""
  return isinstance(value, Mapping)


def checked(messages: object) -> list[Message]:
  """A conversation whose contents are text: parts of type text are joined. Of mistakes a template may say nothing.

  Raises:
    ValueError: it is none; the message names the place and shows the form.
  """
  if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
    raise ValueError(f"a conversation is a list of messages such as {FORM}, got {messages!r:.80}")
  if not messages:
    raise ValueError(f"a conversation has at least one message, such as {FORM}, got an empty list")
  return [_message(i, message) for i, message in enumerate(cast("Sequence[object]", messages))]


def _message(i: int, value: object) -> Message:
  if not isinstance(value, Mapping):
    raise ValueError(f"message {i} of a conversation such as {FORM} is {value!r:.80}")
  message = cast("Mapping[str, Any]", value)
  role = message.get("role")
  if not isinstance(role, str) or not role:
    raise ValueError(f"message {i} needs a role, one of {', '.join(ROLES)}, got {role!r:.80}: {dict(message)!r:.120}")
  near = difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=0.75)
  if role not in ROLES and near:
    raise ValueError(f"message {i} has the role {role!r}; the nearest is {near[0]!r}")
  content: object = message.get("content")
  if content is None and role == "assistant" and message.get("tool_calls"):
    return message
  where = f"message {i}, of {role!r},"
  if isinstance(content, str):
    return message
  if not isinstance(content, Sequence) or isinstance(content, bytes):
    raise ValueError(f"{where} needs a content, a text or a list of parts of type text, got {content!r:.80}")
  return {**message, "content": joined(where, cast("Sequence[object]", content))}


def joined(where: str, parts: Sequence[object]) -> str:
  """A content that is a list of parts, {"type": "text", "text": ...}, as one text.

  Raises:
    ValueError: a part is something else; the message begins with `where` and names its type.
  """
  texts: list[str] = []
  for i, part in enumerate(parts):
    fields: Mapping[str, Any] = cast("Mapping[str, Any]", part) if isinstance(part, Mapping) else {}
    kind, text = fields.get("type"), fields.get("text")
    if kind != "text" or not isinstance(text, str):
      told = f"of type {kind!r}" if isinstance(kind, str) and kind != "text" else repr(cast(object, part))
      raise ValueError(f'{where} has as part {i} one {told:.80}; only {{"type": "text", "text": "..."}} can be read')
    texts.append(text)
  return "".join(texts)


def encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
  """Token ids of a prompt. What a tokenizer puts before texts is not put before one that begins with it, such as one
  that a chat template has made.

  Raises:
    ValueError: there is half of a character in it.
  """
  if wrong := files.lone_surrogate({"prompt": text}):
    raise ValueError(wrong)
  ids = tokenizer.encode(text, add_special_tokens)
  for n in range(1, 4 if add_special_tokens else 1):
    if len(ids) >= 2 * n and ids[:n] == ids[n : 2 * n]:
      plain = tokenizer.encode(text, False)
      if plain[:n] == ids[:n] and ids[n : n + len(plain)] == plain:
        return ids[n:]
  return ids


def encode_chat(
  tokenizer: Tokenizer,
  messages: object,
  generate: bool = True,
  special_tokens_in_text: Typed = "text",
  options: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
  """Token ids of a conversation, checked, with what begins an answer if `generate`; `options` are the template's."""
  messages = checked(messages)
  if wrong := sorted(_NO_VARIABLES.intersection(options)):
    raise ValueError(f"chat_template_kwargs cannot set {', '.join(wrong)}")
  return tokenizer.encode_chat(messages, generate, special_tokens_in_text=special_tokens_in_text, **options)
