"""The tokenizer of a GGUF file, made of the tokenizers library: byte-level BPE ("gpt2") or SentencePiece ("llama")."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from sparse_serve_jax.models.tokenizer import FileTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how text is split before merges; None: as GPT-2 does; "digits": that, and each digit alone.
_SPLITS: dict[str, str | None] = {
  **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe"), _LLAMA3),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
  "tekken": _TEKKEN,
  "smollm": "digits",
  **dict.fromkeys(("gpt-2", "gpt2"), None),
}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")  # tokens that end an output


class Read(NamedTuple):
  tokenizer: FileTokenizer
  eos: dict[int, str]  # token id -> the field that says that it ends an output


def read_tokenizer(path: pathlib.Path, fields: Mapping[str, Callable[[], Any]]) -> Read:
  """The tokenizer, with the chat templates, that the fields of a file describe; a field's value is read by a call.

  Raises:
    ValueError: there is none, or it is of a kind that is not known; it is named.
  """

  def get(name: str, default: Any = None) -> Any:
    return fields[f"tokenizer.{name}"]() if f"tokenizer.{name}" in fields else default

  kind, tokens = get("ggml.model"), get("ggml.tokens")
  if kind not in ("gpt2", "llama") or not tokens:
    raise ValueError(f"{path}: tokenizer.ggml.model {kind!r} of {len(tokens or ())} tokens (known: gpt2, llama)")
  core = (_byte_level if kind == "gpt2" else _sentence_piece)(path, get, tokens)
  types = get("ggml.token_type") or [1] * len(tokens)
  marked = [(token, of) for token, of in zip(tokens, types, strict=True) if of in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
  core.add_tokens([tokenizers.AddedToken(t, normalized=False, special=of != _USER_DEFINED) for t, of in marked])
  ids = {name: get(f"ggml.{of}_token_id") for name, of in _SPECIAL.items()}
  if wrong := {name: i for name, i in ids.items() if i is not None and not 0 <= i < len(tokens)}:
    raise ValueError(f"{path}: {wrong} is not within the {len(tokens)} tokens")
  special = {name: tokens[i] for name, i in ids.items() if i is not None}
  adds = {"bos": kind == "llama" or _SPLITS.get(str(get("ggml.pre"))) is _LLAMA3, "eos": False}
  added = {
    of: special[f"{of}_token"]
    for of in adds
    if get(f"ggml.add_{of}_token", adds[of]) and ids[f"{of}_token"] is not None
  }
  core.post_processor = processors.TemplateProcessing(
    single=[*([added["bos"]] if "bos" in added else []), "$A", *([added["eos"]] if "eos" in added else [])],
    special_tokens=[(token, core.token_to_id(token)) for token in added.values()],
  )
  templates = {"default": template} if (template := get("chat_template")) else {}
  templates |= {n: get(f"chat_template.{n}") for n in get("chat_templates") or () if get(f"chat_template.{n}")}
  sources = dict.fromkeys((*special, "chat_template"), path.name) | {"tokenizer": path.name}
  eos = {i: f"tokenizer.ggml.{of}_token_id" for of in _ENDS if (i := get(f"ggml.{of}_token_id")) is not None}
  return Read(FileTokenizer(core, templates, special, sources), eos)


def _byte_level(path: pathlib.Path, get: Callable[..., Any], tokens: list[str]) -> tokenizers.Tokenizer:
  pre = get("ggml.pre")
  if pre not in _SPLITS:
    raise ValueError(f"{path}: tokenizer.ggml.pre {pre!r} is not supported (known: {', '.join(_SPLITS)})")
  split = _SPLITS[pre]
  merges = [tuple(merge.split(" ")) for merge in get("ggml.merges") or ()]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  # Llama 3 and Tekken take a word that is a token as it is; their merges do not make every one.
  core = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split in (_LLAMA3, _TEKKEN)))
  first: list[Any] = []
  if split == "digits":
    first = [pre_tokenizers.Digits(individual_digits=True)]
  elif split is not None:
    first = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated")]
  last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, "digits"))
  core.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
  core.decoder = decoders.ByteLevel()
  if split is _QWEN2:
    core.normalizer = normalizers.NFC()  # as its own tokenizer.json has
  return core


def _sentence_piece(path: pathlib.Path, get: Callable[..., Any], tokens: list[str]) -> tokenizers.Tokenizer:
  scores = get("ggml.scores")
  if scores is None or len(scores) != len(tokens):
    raise ValueError(f"{path}: tokenizer.ggml.scores has {len(scores or ())} of {len(tokens)} scores")
  vocabulary = {token: i for i, token in enumerate(tokens)}
  unknown = get("ggml.unknown_token_id", 0)
  merges = _merges(vocabulary, scores)
  model = models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
  core = tokenizers.Tokenizer(model)
  space = get("ggml.add_space_prefix", True)
  core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if space else "never", split=False)
  parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  core.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if space else [])])
  return core


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
  """Pairs of tokens that make a token, the one of the highest score first, as SentencePiece merges them."""
  found = []
  for token, i in vocabulary.items():
    splits = ((token[:n], token[n:]) for n in range(1, len(token)))
    pairs = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    found += [(scores[i], *pair) for pair in pairs]
  found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
  return [(left, right) for _, left, right in found]
