"""Conversations as text, by the Jinja templates of checkpoints, rendered as transformers 5 renders them.

Templates are code of strangers: they run in a sandbox and see plain JSON values only.

What a user typed can be told from what the template wrote: `marked` puts two private characters around every control
token in the user's text, they travel through the template, and `pieces` takes the text apart where they stand.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from sparse_serve_jax import files
from sparse_serve_jax.prompting import FORM, joined
from sparse_serve_jax.tokenizing import Message

_START, _END = "\U000f0000", "\U000f0001"  # private use: around a control token that a user typed
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # its space shows whether the template keeps one
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that a message's reasoning has had


def render(
  template: str,
  messages: Sequence[Message],
  add_generation_prompt: bool,
  continue_final_message: bool | str,
  variables: Mapping[str, Any],
) -> str:
  """The conversation as text.

  Args:
    template: Jinja.
    messages: {"role": ..., "content": ...}, as `plain_messages` returns them.
    add_generation_prompt: end with what begins an answer.
    continue_final_message: end within the last message, which the model goes on with; text names its field.
    variables: all else that the template may use; absent ones are undefined there.

  Raises:
    ValueError: the template is broken or refuses the conversation.
  """
  if continue_final_message and add_generation_prompt:
    raise ValueError("continue_final_message and add_generation_prompt exclude each other: one message, or the next")
  chat = [_with_reasoning(message) for message in messages]
  final = _tag_final(template, chat, continue_final_message) if continue_final_message else None
  try:
    text = _compiled(template).render(messages=chat, add_generation_prompt=add_generation_prompt, **variables)
  except _Refused as error:
    raise ValueError(f"the chat template refuses this conversation: {error}") from None
  except Exception as error:  # whatever a template can do wrong
    raise ValueError(f"the chat template does not render: {type(error).__name__}: {error}") from error
  return text if final is None else _cut(text, final)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
  """Messages as templates expect them: plain values, nothing that is null, the text parts of a content joined.

  Raises:
    ValueError: something that is no message, or a content part that is no text; it is named.
  """
  made = []
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise ValueError(f"message {i} is {message!r:.80}, wanted is a conversation such as {FORM}")
    values = {key: plain(value, f"message {i}, {key!r}") for key, value in message.items() if value is not None}
    if isinstance(values.get("content"), list):
      values["content"] = joined(f"message {i}", values["content"])
    made.append(values)
  return made


def plain(value: Any, where: str) -> Any:
  """A copy made of plain JSON values.

  Raises:
    ValueError: there is something else in it.
  """
  if value is None or type(value) in (int, float, bool):
    return value
  if isinstance(value, str):
    if wrong := files.lone_surrogate({"text": value}):
      raise ValueError(f"{where}: {wrong}")
    return str.__str__(value)  # an enumeration is one too
  if isinstance(value, Mapping):
    return {key: plain(item, f"{where}, {key!r}") for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item, where) for item in value]
  raise ValueError(f"{where} is a {type(value).__name__}: templates take text, numbers, lists and objects")


def fault(template: str) -> str | None:
  """What is wrong with the syntax of a template, and in which line; None if nothing is."""
  try:
    _environment().parse(template)
  except jinja2.TemplateSyntaxError as error:
    return f"line {error.lineno}: {error.message}"
  return None


def control_tokens(template: str, added: Mapping[str, bool]) -> re.Pattern[str]:
  """Matches what must not come from a user: special tokens, and other added tokens that the template writes.

  `added`: each added token of a tokenizer -> whether it is special.
  """
  try:
    tree = _environment().parse(template)
  except jinja2.TemplateError:  # rendering says what is wrong with it
    written = ""
  else:
    parts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    parts |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    written = "\0".join(sorted(parts))
  return _any_of(token for token, special in added.items() if special or (token in written and not token.isspace()))


def marked(value: Any, control: re.Pattern[str]) -> Any:
  """A plain value with marks around the control tokens in its texts. Keys of objects stay."""
  if isinstance(value, str):
    return control.sub(f"{_START}\\g<0>{_END}", value.replace(_START, "").replace(_END, ""))
  if isinstance(value, dict):
    return {key: marked(item, control) for key, item in value.items()}
  return [marked(item, control) for item in value] if isinstance(value, list) else value


def pieces(text: str, control: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
  """What was rendered from marked values, in order, without marks: (part of the text, whether it is a typed token).

  A template can part the marks of a token (by split or trim); a lone one ends a piece too, so that nothing becomes a
  token across it.
  """
  split = re.split(f"{_START}({control.pattern}){_END}|[{_START}{_END}]", text)
  return ((piece, i % 2 == 1) for i, piece in enumerate(split) if piece)


def _any_of(tokens: Iterator[str]) -> re.Pattern[str]:
  return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
  """The reasoning of a message under the names that templates read."""
  reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
  if reasoning is None:
    return dict(message)
  return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tag_final(template: str, chat: list[dict[str, Any]], of: bool | str) -> str:
  """Marks the end of the last message's field, and returns what stood there."""
  field = of if isinstance(of, str) else "content"
  text = chat[-1].get(field) if chat else None
  if not isinstance(text, str):
    raise ValueError(f"continue_final_message: the last message has no {field!r} to go on with")
  names = [name for name in _REASONING if chat[-1].get(name) == text] if field in _REASONING else [field]
  if not any(name in template for name in names):
    raise ValueError(f"continue_final_message: the chat template does not use {field!r}")
  for name in names:
    chat[-1][name] = text + _TAG
  return text


def _cut(text: str, final: str) -> str:
  """The text up to the end of the final message."""
  if final.strip() not in text or _TAG.strip() not in text:
    raise ValueError(f"continue_final_message: the template does not keep the last message {final.strip()!r:.80}")
  end = text.rindex(_TAG.strip())
  return text[:end] if text.startswith(_TAG, end) else text[:end].rstrip()


class _Refused(jinja2.TemplateError):
  """By raise_exception in a template."""


class _Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}: what an assistant wrote. It says so to a trainer and renders as it is."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    # A block that is called, as in transformers: what is set inside is not seen after it.
    return jinja2.nodes.CallBlock(self.call_method("_whole"), [], [], body).set_lineno(line)

  def _whole(self, caller: Any) -> str:
    return caller()


class _Dict:
  """`dict` in templates, without the attributes of the type."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)

  def fromkeys(self, *args: Any) -> dict[Any, Any]:
    return dict.fromkeys(*args)


def _to_json(
  value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
  """The filter `tojson`. (Jinja's own escapes HTML.)"""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
  raise _Refused(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _to_json
  environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": _Dict()}
  return environment


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
  return _environment().from_string(template)
