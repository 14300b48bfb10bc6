"""Text to token ids and back: a checkpoint's own tokenizer, or bytes."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import tokenizers

from sparse_serve_jax.files import write_text
from sparse_serve_jax.models import chat
from sparse_serve_jax.models.tokenizer_files import check_ids, read_settings, read_special_tokens, read_templates
from sparse_serve_jax.tokenizing import Message, Tokenizer, Typed


class _Chatting:
  """Conversations, for a tokenizer that has templates by name and the texts of its special tokens by name."""

  special_tokens: Mapping[str, str]  # "bos_token" -> "<s>"

  @property
  def _templates(self) -> Mapping[str, str]:
    """By name; as a rule one of them is "default"."""
    raise NotImplementedError

  def apply_chat_template(
    self,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool | str = False,
    **kwargs: Any,
  ) -> str:
    values = {"messages": chat.plain_messages(messages), **_variables(tools, documents, kwargs)}
    return self._rendered(self._template(tools), values, add_generation_prompt, continue_final_message)

  def encode_chat(
    self,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    special_tokens_in_text: Typed = "text",
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool | str = False,
    **kwargs: Any,
  ) -> list[int]:
    template = self._template(tools)
    as_text = _as_text(special_tokens_in_text)
    control = chat.control_tokens(template, self._added() if as_text else {})
    values = {"messages": chat.plain_messages(messages), **_variables(tools, documents, kwargs)}
    if as_text:
      values = chat.marked(values, control)
    text = self._rendered(template, values, add_generation_prompt, continue_final_message)
    parts = list(chat.pieces(text, control)) if as_text else [(text, False)]
    return [i for n, (part, typed) in enumerate(parts) for i in self._encode_piece(part, typed, first=n == 0)]

  def _rendered(self, template: str, values: dict[str, Any], generate: bool, go_on: bool | str) -> str:
    variables: dict[str, Any] = {**self.special_tokens, **values}
    return chat.render(template, variables.pop("messages"), generate, go_on, variables)

  def _template(self, tools: Any) -> str:
    """The template for a conversation with or without tools."""
    if not self._templates:
      raise ValueError(
        "this model's tokenizer has no chat template; it continues texts: `sparse-serve generate`, /v1/completions"
      )
    for name in ("tool_use", "default"):
      if name in self._templates and (name == "default" or tools is not None):
        return self._templates[name]
    raise ValueError(f"this model's chat templates have no 'default': there are {', '.join(sorted(self._templates))}")

  def _added(self) -> dict[str, bool]:
    """Tokens that are found in a text before all others -> whether they are special."""
    raise NotImplementedError

  def _encode_piece(self, text: str, typed: bool, first: bool) -> list[int]:
    """A part of a rendered conversation: the first or a later one, a control token that a user typed or not."""
    raise NotImplementedError


class ByteTokenizer(_Chatting):
  """A `Tokenizer` whose tokens are UTF-8 bytes, then begin and end of text.

  Any ids decode: what is no byte is skipped or replaced. No text becomes a special token.
  """

  vocab_size = 264  # 256 bytes, two specials, and six that stand for nothing: a multiple of 8
  bos_token_id = 256
  eos_token_ids = (257,)
  special_tokens: Mapping[str, str] = {}
  _TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
  )

  @property
  def _templates(self) -> Mapping[str, str]:
    return {"default": self._TEMPLATE}

  def encode(self, text: str, add_special_tokens: bool = True, special_tokens_in_text: Typed = "token") -> list[int]:
    _as_text(special_tokens_in_text)
    return [self.bos_token_id] * add_special_tokens + list(text.encode())

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    of = self._byte if skip_special_tokens else self.token_bytes
    return b"".join(map(of, ids)).decode(errors="replace")

  def token_bytes(self, token: int) -> bytes:
    marks = {self.bos_token_id: b"<bos>", self.eos_token_ids[0]: b"<eos>"}
    return marks.get(token) or self._byte(token)

  def _byte(self, token: int) -> bytes:
    return bytes([token]) if 0 <= token < 256 else b""

  def turn_ends(self) -> dict[int, str]:
    return dict.fromkeys(self.eos_token_ids, "the byte tokenizer")

  def describe(self) -> str:
    return f"tokenizer: UTF-8 bytes, {self.vocab_size} tokens\nbos_token: {self.bos_token_id}\nchat template: built in"

  def save(self, directory: pathlib.Path) -> None:
    write_text(directory / "tokenizer_config.json", json.dumps({"tokenizer_class": "ByteTokenizer"}) + "\n")

  def _added(self) -> dict[str, bool]:
    return {}

  def _encode_piece(self, text: str, typed: bool, first: bool) -> list[int]:
    return list(text.encode())


class FileTokenizer(_Chatting):
  """A tokenizer of the tokenizers library, with the chat templates and special tokens of the files beside it.

  Special tokens that stand in a text become their ids, or with `special_tokens_in_text="text"` what their characters
  are. In `encode_chat` that also holds for other added tokens that the template writes. A control token that is the
  only way to write its characters (one character, in the vocabulary) stays a token.
  """

  def __init__(
    self,
    core: tokenizers.Tokenizer,
    template: str | Mapping[str, str] | None,
    special: Mapping[str, str],
    sources: Mapping[str, str] | None = None,
  ):
    """Args:
    core: is changed: it no longer truncates or pads.
    template: the chat template, or several by name.
    special: "bos_token" -> "<s>".
    sources: what files the special tokens come from, and under "chat_template" the templates.
    """
    core.no_truncation()
    core.no_padding()
    self._core, self.special_tokens, self._sources = core, dict(special), dict(sources or {})
    self._chat = {"default": template} if isinstance(template, str) else dict(template or {})
    self.vocab_size = core.get_vocab_size(with_added_tokens=True)

  @property
  def _templates(self) -> Mapping[str, str]:
    return self._chat

  @property
  def bos_token_id(self) -> int | None:
    """The id of bos_token; None without one."""
    return self._core.token_to_id(self.special_tokens.get("bos_token", ""))

  def encode(self, text: str, add_special_tokens: bool = True, special_tokens_in_text: Typed = "token") -> list[int]:
    core = self._literal if _as_text(special_tokens_in_text) else self._core
    # As a batch of one: `encode` holds Python's lock, 7 s for 10 MB, and all other threads wait for it.
    (encoded,) = core.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoded.ids

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def token_bytes(self, token: int) -> bytes:
    # Twice, as what is first may lose a space before it.
    text = self.decode([token, token], False)[len(self.decode([token], False)) :]
    written = self._core.id_to_token(token) or ""
    if "\ufffd" not in text:
      return text.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", written):
      return bytes([int(written[3:5], 16)])
    letters = _byte_letters()
    return bytes(map(letters.__getitem__, written)) if letters.keys() >= set(written) else text.encode()

  def turn_ends(self) -> dict[int, str]:
    ends = {}
    eos = self.special_tokens.get("eos_token")
    if eos is not None and (i := self._core.token_to_id(eos)) is not None:
      ends[i] = f"eos_token of {self._sources.get('eos_token', 'the tokenizer')}"
    i = self._end_of_turn()
    if i is not None:
      ends[i] = (
        f"{ends[i]}, the end of a turn in the chat template" if i in ends else "the chat template's end of a turn"
      )
    return ends

  def describe(self) -> str:
    lines = [f"tokenizer: {self._sources.get('tokenizer', 'in memory')}, {self.vocab_size} tokens"]
    for name, token in self.special_tokens.items():
      of = f", {self._sources[name]}" if name in self._sources else ""
      lines.append(f"{name}: {token!r} ({self._core.token_to_id(token)}{of})")
    names = [name for name in self._templates if name != "default"]
    also = f", by name {', '.join(names)}" if names else ""
    template = self._sources.get("chat_template", "given") + also if self._templates else "none"
    return "\n".join([*lines, f"chat template: {template}"])

  def save(self, directory: pathlib.Path) -> None:
    write_text(directory / "tokenizer.json", self._core.to_str(pretty=True))
    # The class by which transformers reads a tokenizer.json of any kind.
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(self.special_tokens)
    if list(self._templates) == ["default"]:
      settings["chat_template"] = self._templates["default"]
    elif self._templates:
      settings["chat_template"] = [{"name": name, "template": text} for name, text in self._templates.items()]
    write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")

  @functools.cached_property
  def _literal(self) -> tokenizers.Tokenizer:
    """The same tokenizer, for which special tokens in a text are text: a switch of the library, no argument."""
    core = tokenizers.Tokenizer.from_str(self._core.to_str())
    core.encode_special_tokens = True
    return core

  def _added(self) -> dict[str, bool]:
    return {token.content: token.special for token in self._core.get_added_tokens_decoder().values()}

  def _encode_piece(self, text: str, typed: bool, first: bool) -> list[int]:
    encode = self._characters if typed else functools.partial(self.encode, add_special_tokens=False)
    if first and not typed:
      return encode(text)
    ids = self._continued(encode, text)
    if typed and self._core.token_to_id(text) in ids and len(text) > 1:
      return [i for character in text for i in self._continued(encode, character)]
    return ids

  def _continued(self, encode: Any, text: str) -> list[int]:
    """The ids of a text that follows another: after a line break, lest a space is put before it."""
    newline, ids = self.encode("\n", add_special_tokens=False), encode("\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)

  def _characters(self, text: str) -> list[int]:
    """The ids of a text in which no added token is looked for, special or not."""
    core = self._core
    if core.normalizer is not None:
      text = core.normalizer.normalize_str(text)
    words = [text] if core.pre_tokenizer is None else [word for word, _ in core.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in core.model.tokenize(word)]

  def _end_of_turn(self) -> int | None:
    """The added token that the default template writes after an answer; None if it writes none."""
    answer = "An answer."
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
      text = self.apply_chat_template(messages, add_generation_prompt=False)
    except ValueError:
      return None
    after = text.rpartition(answer)[2].lstrip()
    tokens = re.compile("|".join(map(re.escape, sorted(self._added(), key=len, reverse=True))) or "(?!)")
    match = tokens.match(after) if answer in text else None
    return None if match is None else self._core.token_to_id(match[0])


class NoTokenizer:
  """Stands where a checkpoint has none: token ids work and become no text; a text is an error."""

  vocab_size = 0

  def __init__(self, directory: pathlib.Path):
    self._directory = directory

  def encode(self, text: str, add_special_tokens: bool = True, special_tokens_in_text: Typed = "token") -> list[int]:
    self._refuse()

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    return ""

  def token_bytes(self, token: int) -> bytes:
    return b""

  def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
    self._refuse()

  def encode_chat(self, *args: Any, **kwargs: Any) -> list[int]:
    self._refuse()

  @property
  def special_tokens(self) -> Mapping[str, str]:
    return {}

  def turn_ends(self) -> dict[int, str]:
    return {}

  def describe(self) -> str:
    return "tokenizer: none, so token ids in and out\nchat template: none"

  def save(self, directory: pathlib.Path) -> None:
    pass

  def _refuse(self) -> NoReturn:
    raise ValueError(
      f"{self._directory} has no tokenizer.json, so text cannot be read: pass token ids, which become no text, or add "
      "the file (transformers converts a tokenizer.model: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
    )


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
  """The tokenizer of a model directory; without its files, one that refuses when text is needed.

  Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja and
  additional_chat_templates/ as transformers 5 does: truncation and padding are off; what a tokenizer.json adds to a
  text is added whatever add_bos_token and add_eos_token say; special_tokens_map.json overrides tokenizer_config.json
  unless that one has an added_tokens_decoder. A warning names what is overridden, and a chat template that is broken:
  only conversations need it.

  Raises:
    ValueError: a file is broken; the message has its path.
  """
  settings_file = directory / "tokenizer_config.json"
  settings = read_settings(settings_file)
  if settings.get("tokenizer_class") == "ByteTokenizer":
    return ByteTokenizer()
  file = directory / "tokenizer.json"
  if not file.exists():
    return NoTokenizer(directory)
  try:
    core = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises nothing narrower
    raise ValueError(f"{file} is no tokenizer: {error}") from error
  check_ids(file, core)
  special = read_special_tokens(directory, settings, core)
  templates, source = read_templates(directory, settings)
  for name, fault in [(name, fault) for name, text in templates.items() if (fault := chat.fault(text))]:
    warnings.warn(f"{directory}: the chat template {name!r}, of {source}, is broken in {fault}", stacklevel=3)
  sources = {**special.sources, "tokenizer": "tokenizer.json", "chat_template": source}
  return FileTokenizer(core, templates, special.texts, sources)


def _variables(tools: Any, documents: Any, others: Mapping[str, Any]) -> dict[str, Any]:
  """What templates see besides messages. `tools` and `documents` are always there, as None if absent."""
  for name, values in (("tools", tools), ("documents", documents)):
    if values is not None and not (isinstance(values, Sequence) and all(isinstance(of, Mapping) for of in values)):
      raise ValueError(f"{name} are a list of objects (JSON schemas, or title and text), got {values!r:.80}")
  return {key: chat.plain(value, key) for key, value in {"tools": tools, "documents": documents, **others}.items()}


@functools.cache
def _byte_letters() -> Mapping[str, int]:
  """The letters that byte-level vocabularies write bytes with: what is printable is itself, the rest is in order."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  rest = iter(sorted({*range(256)} - {*map(ord, letters)}))
  return {letter: ord(letter) if ord(letter) < 256 else next(rest) for letter in letters}


def _as_text(typed: Typed) -> bool:
  if typed not in ("token", "text"):
    raise ValueError(f"special_tokens_in_text is {typed!r}, expected 'token' or 'text'")
  return typed == "text"
