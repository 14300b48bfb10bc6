"""Text to token ids and back: a checkpoint's own tokenizer, or bytes."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from sparse_serve_jax.models.hf import read_json
from sparse_serve_jax.tokenizing import Message, Tokenizer


class ByteTokenizer:
  """A token is a UTF-8 byte; then begin and end of text. Any ids decode: what is no byte is skipped or replaced."""

  vocab_size = 264  # 256 bytes, two specials, and six that stand for nothing: a multiple of 8
  bos_token_id = 256
  eos_token_ids = (257,)
  _TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
  )

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    return [self.bos_token_id] * add_special_tokens + list(text.encode())

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    marks = {} if skip_special_tokens else {self.bos_token_id: b"<bos>", self.eos_token_ids[0]: b"<eos>"}
    return b"".join(bytes([i]) if 0 <= i < 256 else marks.get(i, b"") for i in ids).decode(errors="replace")

  def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    return _render(self._TEMPLATE, messages, add_generation_prompt, {})

  def save(self, directory: pathlib.Path) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByteTokenizer"}) + "\n")


class FileTokenizer:
  """tokenizer.json, with the chat template and the special tokens of tokenizer_config.json."""

  def __init__(self, core: tokenizers.Tokenizer, template: str | None, special: Mapping[str, str]):
    self._core, self._template, self._special = core, template, dict(special)
    self.vocab_size = core.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    return self._core.encode(text, add_special_tokens=add_special_tokens).ids

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    if self._template is None:
      raise ValueError("this model's tokenizer has no chat template: write the prompt out")
    return _render(self._template, messages, add_generation_prompt, self._special)

  def save(self, directory: pathlib.Path) -> None:
    self._core.save(str(directory / "tokenizer.json"))
    # The class by which transformers reads a tokenizer.json of any kind.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | self._special
    if self._template is not None:
      settings["chat_template"] = self._template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class NoTokenizer:
  """Stands where a checkpoint has none: token ids work, text is an error."""

  vocab_size = 0

  def __init__(self, directory: pathlib.Path):
    self._directory = directory

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    self._refuse()

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    self._refuse()

  def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    self._refuse()

  def save(self, directory: pathlib.Path) -> None:
    pass

  def _refuse(self) -> NoReturn:
    raise ValueError(
      f"{self._directory} has no tokenizer.json, so text cannot be read or written: pass token ids, or add the file "
      "(a tokenizer.model alone is converted by transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...))"
    )


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
  """The tokenizer of a model directory; without its files, one that refuses when text is needed."""
  settings_file = directory / "tokenizer_config.json"
  settings = read_json(settings_file) if settings_file.exists() else {}
  if settings.get("tokenizer_class") == "ByteTokenizer":
    return ByteTokenizer()
  if not (directory / "tokenizer.json").exists():
    return NoTokenizer(directory)
  template = settings.get("chat_template")
  if isinstance(template, list):  # several, by name
    template = {entry["name"]: entry["template"] for entry in template}.get("default")
  template_file = directory / "chat_template.jinja"
  if template_file.exists():
    template = template_file.read_text()
  special = {
    key: value["content"] if isinstance(value, dict) else value
    for key, value in settings.items()
    if key.endswith("_token") and isinstance(value, str | dict)
  }
  file = directory / "tokenizer.json"
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises nothing narrower
    raise ValueError(f"{file} is no tokenizer: {error}") from error
  return FileTokenizer(tokenizer, template, special)


def _render(template: str, messages: Sequence[Message], generate: bool, special: Mapping[str, str]) -> str:
  """Renders untrusted jinja in a sandbox, with the environment that checkpoints' templates expect.

  Raises:
    ValueError: the template is broken or refuses the conversation.
  """

  def refuse(message: str) -> NoReturn:
    raise ValueError(f"the chat template refuses this conversation: {message}")

  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )
  env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
  env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
  try:
    return env.from_string(template).render(messages=messages, add_generation_prompt=generate, **special)
  except jinja2.TemplateError as error:
    raise ValueError(f"the chat template does not render: {error}") from error
