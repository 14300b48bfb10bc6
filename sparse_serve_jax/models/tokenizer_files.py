"""The files beside a tokenizer.json: special tokens, added tokens, chat templates."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers

from sparse_serve_jax import files

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class SpecialTokens(NamedTuple):
  """By name, such as "bos_token"."""

  texts: dict[str, str]
  sources: dict[str, str]  # the file that each comes from


def read_settings(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file beside a tokenizer.json; nothing if there is no such file.

  Raises:
    ValueError: something else is in it, or half of a character.
  """
  made = files.read_json(file) if file.exists() else {}
  if wrong := files.lone_surrogate(made):
    raise ValueError(f"{file}: {wrong}")
  return made


def check_ids(file: pathlib.Path, core: tokenizers.Tokenizer) -> None:
  """Raises ValueError if an added token of a tokenizer.json has another id in the tokenizer made of it: ids beyond the
  vocabulary are dealt out anew, in silence.
  """
  entries = files.read_json(file).get("added_tokens") or []
  for token, i in [(entry["content"], entry["id"]) for entry in entries]:
    if (got := core.token_to_id(token)) != i:
      raise ValueError(f"{file}: 'added_tokens' has {token!r} with the id {i}, and the tokenizer gives it {got}")


class _Told(NamedTuple):
  """A special token as a file tells it: text, or text with flags."""

  value: str | Mapping[str, Any]
  file: pathlib.Path

  @property
  def text(self) -> str:
    return self.value if isinstance(self.value, str) else self.value["content"]


def read_special_tokens(
  directory: pathlib.Path, settings: Mapping[str, Any], core: tokenizers.Tokenizer
) -> SpecialTokens:
  """The special tokens of a directory; those that `core` does not know yet are added to it, as transformers does.

  Args:
    directory: of the files.
    settings: what tokenizer_config.json holds.
    core: of tokenizer.json.

  Raises:
    ValueError: a token that is no text, or one whose id in tokenizer_config.json is not that of the tokenizer.
  """
  config, mapped = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
  told = {
    key: _told(key, value, config)
    for key, value in settings.items()
    if key in _NAMES or (key.endswith("_token") and isinstance(value, str))
  }
  extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
  has_extra = bool({"extra_special_tokens", "additional_special_tokens"} & settings.keys())
  if isinstance(extra, dict):
    told |= {key: _told(key, value, config) for key, value in extra.items()}
    extra = []
  extra = _list(extra, "extra_special_tokens", config)
  if "added_tokens_decoder" in settings:
    added = _decoder(settings["added_tokens_decoder"], config)
  else:
    told, extra = _merged(told, extra, has_extra, mapped)
    added = _legacy(directory / "added_tokens.json", [*told.values(), *extra])
  if told.get("pad_token") is None and core.padding is not None:
    told["pad_token"] = _Told(core.padding["pad_token"], directory / "tokenizer.json")
  order = [*_NAMES, *(key for key in told if key not in _NAMES)]
  texts = {key: token for key in order if (token := told.get(key)) is not None}
  _add(core, added, {token.text for token in texts.values()})
  _add_unknown(core, [*texts.values(), *extra])
  _warn_of_ends(core, settings, texts, config)
  return SpecialTokens(
    {key: token.text for key, token in texts.items()}, {key: token.file.name for key, token in texts.items()}
  )


def read_templates(directory: pathlib.Path, settings: Mapping[str, Any]) -> tuple[dict[str, str], str]:
  """Chat templates by name, and the files that they come from.

  Files of their own come before tokenizer_config.json.

  Raises:
    ValueError: something else than templates stands there.
  """
  named = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
  default = directory / "chat_template.jinja"
  paths = ({"default": default} if default.exists() else {}) | named
  if paths:
    templates = {name: files.read_text(path) for name, path in paths.items()}
    return templates, ", ".join(str(path.relative_to(directory)) for path in paths.values())
  file, template = directory / "tokenizer_config.json", settings.get("chat_template")
  if template is None:
    return {}, ""
  if isinstance(template, str):
    return {"default": template}, file.name
  made: dict[Any, Any]
  try:
    made = {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else dict(template)
  except (KeyError, TypeError, ValueError):
    made = {0: template}
  if not all(isinstance(text, str) for pair in made.items() for text in pair):
    raise ValueError(f"{file}: 'chat_template' is {template!r:.80}, wanted is text or a list of names and templates")
  return made, file.name


def _merged(
  told: dict[str, _Told | None], extra: list[_Told], has_extra: bool, file: pathlib.Path
) -> tuple[dict[str, _Told | None], list[_Told]]:
  """With what special_tokens_map.json says, which counts where the two differ."""
  for key, value in read_settings(file).items():
    if key == "extra_special_tokens" or (key == "additional_special_tokens" and not has_extra):
      extra = extra + _list(value, key, file)
    elif key in _NAMES:
      new, old = _told(key, value, file), told.get(key)
      if new is not None and old is not None and new.text != old.text:
        _warn(f"{file.parent}: {key} is {new.text!r} in {file.name} and {old.text!r} in {old.file.name}", file.name)
      told[key] = new
  return told, extra


def _told(key: str, value: Any, file: pathlib.Path) -> _Told | None:
  if value is None:
    return None
  text = value.get("content") if isinstance(value, dict) else value
  if not isinstance(text, str):
    raise ValueError(f'{file}: {key!r} is {value!r:.80}, wanted is text or {{"content": text}}')
  return _Told(value, file)


def _list(values: Any, key: str, file: pathlib.Path) -> list[_Told]:
  if not isinstance(values, list):
    raise ValueError(f"{file}: {key!r} is {values!r:.80}, wanted is a list of tokens")
  return [told for value in values if (told := _told(key, value, file)) is not None]


def _decoder(value: Any, file: pathlib.Path) -> dict[int, _Told]:
  if not isinstance(value, dict) or not all(i.isdecimal() for i in value):
    raise ValueError(f"{file}: 'added_tokens_decoder' is {value!r:.80}, wanted is an object of token ids and tokens")
  made = {int(i): _told(f"added_tokens_decoder, {i}", token, file) for i, token in value.items()}
  return {i: token for i, token in sorted(made.items()) if token is not None}


def _legacy(file: pathlib.Path, special: list[_Told | None]) -> dict[int, _Told]:
  """What an added_tokens.json says: tokens and their ids."""
  ids = read_settings(file)
  if wrong := [token for token, i in ids.items() if type(i) is not int]:
    raise ValueError(f"{file}: {wrong[0]!r} is {ids[wrong[0]]!r:.80}, wanted is a token id")
  known = {token.text for token in special if token is not None}
  flags = {text: {"special": text in known, "normalized": text not in known} for text in ids}
  return {i: _Told({"content": text, **flags[text]}, file) for text, i in sorted(ids.items(), key=lambda item: item[1])}


def _add(core: tokenizers.Tokenizer, added: Mapping[int, _Told], special: set[str]) -> None:
  """Adds tokens that have ids. Their flags replace those that a token has; `special` ones are special in any case."""
  for i, token in added.items():
    core.add_tokens([_token(token, **({"special": True} if token.text in special else {}))])
    if (got := core.token_to_id(token.text)) != i:
      raise ValueError(f"{token.file}: {token.text!r} has the id {i} there, and {got} with tokenizer.json")


def _add_unknown(core: tokenizers.Tokenizer, tokens: list[_Told]) -> None:
  """Adds the special tokens that are no added tokens yet."""
  known = {token.content for token in core.get_added_tokens_decoder().values()}
  core.add_tokens([_token(token, special=True) for token in tokens if token.text not in known])


def _token(told: _Told, **flags: bool) -> tokenizers.AddedToken:
  of = told.value if isinstance(told.value, Mapping) else {}
  return tokenizers.AddedToken(told.text, **({flag: bool(of[flag]) for flag in _FLAGS if flag in of} | flags))


def _warn_of_ends(
  core: tokenizers.Tokenizer, settings: Mapping[str, Any], texts: Mapping[str, _Told], file: pathlib.Path
) -> None:
  """Says where add_bos_token or add_eos_token asks for something else than tokenizer.json does."""
  ids = core.encode("a").ids
  for key, name, at in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
    wanted, token = settings.get(key), texts.get(name)
    if isinstance(wanted, bool) and token is not None and ids:
      does = ids[at] == core.token_to_id(token.text)
      if does != wanted:
        verb = "adds" if does else "does not add"
        _warn(
          f"{file.parent}: {key} of {file.name} is {str(wanted).lower()} and tokenizer.json {verb} {token.text!r}",
          "tokenizer.json",
        )


def _warn(message: str, followed: str) -> None:
  warnings.warn(f"{message}; {followed} is followed, as transformers does", stacklevel=2)
