"""`config.json` of a Hugging Face directory, to and from ModelConfig.

What this decoder does not compute (sliding windows, experts, other rope types, extra biases, quantized weights) is
refused by name, so that no checkpoint runs as something it is not. Where two fields say different things the result is
what transformers 5 computes, with a warning that names both.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from sparse_serve_jax.config import ModelConfig, RopeConfig
from sparse_serve_jax.models import llama

# model_type -> architecture, what it has, and the values of fields where they are absent. docs/extending.md adds one.
_LLAMA = {
  "name": "LlamaForCausalLM",
  "qkv_bias": False,
  "qk_norm": False,
  "window": None,
  "use_window": True,
  "full_layers": 0,
  "kv_heads": None,
  "head_dim": None,
  "positions": 2048,
}
_QWEN = {"window": 4096, "use_window": False, "full_layers": 28, "kv_heads": 32, "positions": 32768}
FAMILIES: dict[str, dict[str, Any]] = {
  "llama": _LLAMA,
  "mistral": _LLAMA | {"name": "MistralForCausalLM", "window": 4096, "kv_heads": 8, "positions": 131072},
  "qwen2": _QWEN | {"name": "Qwen2ForCausalLM", "qkv_bias": True, "qk_norm": False, "head_dim": None},
  "qwen3": _QWEN | {"name": "Qwen3ForCausalLM", "qkv_bias": False, "qk_norm": True, "head_dim": 128},
}


class _Fields:
  """A JSON object of a file. Every value that is read is checked; an error names file, field and value."""

  def __init__(self, raw: dict[str, Any], where: str):
    self.raw, self.where = raw, where

  def inside(self, key: str) -> _Fields:
    """An object within; a null or absent one is empty."""
    return _Fields(self._typed(key, {}, (dict,), "an object") or {}, f"{self.where}, {key}")

  def number(self, key: str, default: Any = ..., whole: bool = False) -> Any:
    """A number above 0; null counts as absent. The Ellipsis as default: it must be there."""
    value = self._typed(key, default, (int,) if whole else (int, float), "a whole number" if whole else "a number")
    if value is ...:
      raise ValueError(f"{self.where} lacks {key!r}")
    if value is not None and value != default and not 0 < value < math.inf:
      raise self.wrong(key, "a number above 0")
    return value

  def truth(self, key: str, default: bool) -> bool:
    return self._typed(key, default, (bool,), "true or false")

  def text(self, key: str, default: str | None = None) -> str | None:
    return self._typed(key, default, (str,), "text")

  def texts(self, key: str) -> list[str]:
    value = self._typed(key, [], (list,), "a list of text")
    if any(not isinstance(item, str) for item in value):
      raise self.wrong(key, "a list of text")
    return value

  def wrong(self, key: str, wanted: str) -> ValueError:
    return ValueError(f"{self.where}: {key!r} is {self.raw[key]!r}, wanted is {wanted}")

  def chosen(self, first: str, second: str, got: Any, other: Any) -> None:
    """Warns if two places disagree, of which the first is followed."""
    if got is not None and other is not None and got != other:
      message = f"{self.where}: {first} is {got!r} and {second} is {other!r}; {first} is followed, as transformers does"
      warnings.warn(message, stacklevel=2)

  def _typed(self, key: str, default: Any, types: tuple[type, ...], wanted: str) -> Any:
    value = self.raw.get(key)
    if value is None:
      return default
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
      raise self.wrong(key, wanted)
    return value


def config_from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
  """`config.json` as a ModelConfig. float16 becomes bfloat16, the only half precision here.

  Args:
    raw: what is in the file.
    where: the file's path, which errors and warnings begin with.

  Raises:
    ValueError: a field is missing or of a wrong type, or the model is of a kind that this decoder does not compute; of
      the latter all reasons are named at once.
  """
  fields = _Fields(raw, where)
  family, problems = _family(fields)
  problems += _unsupported(fields, family)
  if problems:
    raise ValueError(f"{where} asks for what is not supported: " + "; ".join(problems))
  heads = fields.number("num_attention_heads", whole=True)
  kv_heads = family["kv_heads"] if "num_key_value_heads" not in raw else None  # null: as many as heads
  d_model, rope = fields.number("hidden_size", whole=True), _rope_from_hf(fields, family)
  positions = fields.number("max_position_embeddings", family["positions"], whole=True)
  try:
    return ModelConfig(
      vocab_size=fields.number("vocab_size", whole=True),
      d_model=d_model,
      n_layers=fields.number("num_hidden_layers", whole=True),
      n_heads=heads,
      n_kv_heads=fields.number("num_key_value_heads", kv_heads or heads, whole=True),
      head_dim=fields.number("head_dim", family["head_dim"] or d_model // heads, whole=True),
      d_ff=fields.number("intermediate_size", whole=True),
      max_context=_max_context(positions, rope),
      norm_eps=fields.number("rms_norm_eps", 1e-6),
      rope=rope,
      tie_embeddings=fields.truth("tie_word_embeddings", False),
      qkv_bias=family["qkv_bias"],
      qk_norm=family["qk_norm"],
      dtype="float32" if _hf_dtype(fields) == "float32" else "bfloat16",
    )
  except ValueError as error:
    raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
  """The inverse, in the form that old and new `transformers` read.

  Raises:
    ValueError: no architecture has both qkv_bias and qk_norm.
  """
  wanted = cfg.qkv_bias, cfg.qk_norm
  kind = next((k for k, family in FAMILIES.items() if (family["qkv_bias"], family["qk_norm"]) == wanted), None)
  if kind is None:
    raise ValueError(f"no Hugging Face architecture has qkv_bias={cfg.qkv_bias} with qk_norm={cfg.qk_norm}")
  rope = cfg.rope
  scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
  if rope.kind in ("llama3", "yarn"):
    scaling["original_max_position_embeddings"] = rope.original_context
  if rope.kind == "llama3":
    scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
  if rope.kind == "yarn":
    scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    scaling |= {"attention_factor": llama.rope_amplitude(rope)}
  shrink = rope.factor if rope.kind == "linear" else 1  # see _max_context
  return {
    "architectures": [FAMILIES[kind]["name"]],
    "model_type": kind,
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.d_model,
    "num_hidden_layers": cfg.n_layers,
    "num_attention_heads": cfg.n_heads,
    "num_key_value_heads": cfg.n_kv_heads,
    "head_dim": cfg.head_dim,
    "intermediate_size": cfg.d_ff,
    "max_position_embeddings": round(cfg.max_context / shrink),
    "rms_norm_eps": cfg.norm_eps,
    "hidden_act": "silu",
    "rope_theta": rope.theta,
    "rope_scaling": None if rope.kind == "default" else scaling,
    "tie_word_embeddings": cfg.tie_embeddings,
    "torch_dtype": cfg.dtype,
  }


def token_ids(raw: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
  """The token ids of a field such as eos_token_id: a number, a list of them, or nothing.

  Raises:
    ValueError: anything else; names file, field and value.
  """
  value = raw.get(key)
  ids = [] if value is None else value if isinstance(value, list) else [value]
  if any(type(i) is not int or i < 0 for i in ids):
    raise _Fields(raw, where).wrong(key, "a token id or a list of them")
  return tuple(ids)


def _family(fields: _Fields) -> tuple[dict[str, Any], list[str]]:
  """The entry of `FAMILIES`, by model_type as in transformers, else by architecture; and what is wrong with it."""
  names, kind = fields.texts("architectures"), fields.text("model_type")
  name = names[0] if names else None
  kinds = {family["name"]: kind for kind, family in FAMILIES.items()}
  known = ", ".join(kinds)
  if name is not None and name not in kinds:
    return FAMILIES["llama"], [f"architecture {name!r} (known: {known})"]
  if kind is None:
    kind = kinds.get(str(name))
    return (FAMILIES[kind], []) if kind else (FAMILIES["llama"], [f"no architectures (known: {known})"])
  if kind not in FAMILIES:
    return FAMILIES["llama"], [f"model_type {kind!r} (known: {', '.join(FAMILIES)})"]
  fields.chosen(f"the architecture of model_type {kind!r}", "architectures", FAMILIES[kind]["name"], name)
  return FAMILIES[kind], []


def _hf_dtype(fields: _Fields) -> str:
  new, old = fields.text("dtype"), fields.text("torch_dtype")
  return new or old or "float32"


def _unsupported(fields: _Fields, family: dict[str, Any]) -> list[str]:
  """Names what `config.json` asks for and the decoder does not compute."""
  raw = fields.raw
  kinds = sorted(set(fields.texts("layer_types")) - {"full_attention"})
  experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(key)]
  rope = _rope(fields)
  nested = [key for key, value in rope.raw.items() if isinstance(value, dict)]
  partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1))
  window, dtype = _window(fields, family), _hf_dtype(fields)
  fields.chosen("dtype", "torch_dtype", raw.get("dtype"), raw.get("torch_dtype"))
  checks = {
    f"a sliding window of {window} tokens": window is not None and not kinds,
    f"layer types {', '.join(kinds)}": kinds,
    f"a mixture of experts ({', '.join(f'{key}={raw[key]}' for key in experts)})": experts,
    f"rope parameters by layer type ({', '.join(nested)})": nested,
    f"rope type {_rope_type(rope)!r}": _rope_type(rope) not in ("default", "linear", "llama3", "yarn"),
    f"partial_rotary_factor {partial}": partial != 1,
    f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
    "attention_bias": fields.truth("attention_bias", False),
    "mlp_bias": fields.truth("mlp_bias", False),
    f"dtype {dtype!r}": dtype not in ("float32", "bfloat16", "float16"),
    "quantization_config": raw.get("quantization_config"),
  }
  return [what for what, present in checks.items() if present]


def _window(fields: _Fields, family: dict[str, Any]) -> int | None:
  """Tokens of the sliding window that some layer has; None if every layer attends to everything."""
  raw = fields.raw
  window = fields.number("sliding_window", None, whole=True) if "sliding_window" in raw else family["window"]
  if window is None or not fields.truth("use_sliding_window", family["use_window"]):
    return None
  if family["use_window"]:  # all layers or none
    return window
  full = raw.get("max_window_layers", family["full_layers"])
  if type(full) is not int:
    raise fields.wrong("max_window_layers", "a whole number")
  some = full < fields.number("num_hidden_layers", whole=True)
  if fields.texts("layer_types"):
    if some:
      fields.chosen("layer_types", "use_sliding_window with max_window_layers", raw["layer_types"], full)
    return None
  return window if some else None


def _rope(fields: _Fields) -> _Fields:
  """What is followed: `rope_scaling` if it says anything, else `rope_parameters`."""
  return fields.inside("rope_scaling" if fields.inside("rope_scaling").raw else "rope_parameters")


def _rope_type(rope: _Fields) -> str:
  return rope.text("rope_type") or rope.text("type") or "default"


def _rope_from_hf(fields: _Fields, family: dict[str, Any]) -> RopeConfig:
  """From `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
  rope, raw = _rope(fields), fields.raw
  if rope.raw:
    fields.chosen(
      "rope_scaling", "rope_parameters", raw.get("rope_scaling") or None, raw.get("rope_parameters") or None
    )
  inner, outer = rope.number("rope_theta", None), fields.number("rope_theta", None)
  rope.chosen("its rope_theta", "rope_theta beside it", inner, outer)
  rope.chosen("rope_type", "type", rope.text("rope_type"), rope.text("type"))
  kind = _rope_type(rope)
  made: dict[str, Any] = {"theta": inner or outer or 10000.0, "kind": kind}
  positions = fields.number("max_position_embeddings", family["positions"], whole=True)
  if kind in ("llama3", "yarn"):
    key = "original_max_position_embeddings"
    outer, inner = (at.number(key, None, whole=True) for at in (fields, rope))
    rope.chosen(f"{key} beside it", f"its {key}", outer, inner)
    made["original_context"] = outer or inner or positions
  if kind == "yarn" and "factor" in rope.raw:  # null: from the two lengths
    made["factor"] = rope.number("factor", positions / made["original_context"])
  elif kind != "default":
    made["factor"] = rope.number("factor")
  if kind == "llama3":
    made |= {key: rope.number(key) for key in ("low_freq_factor", "high_freq_factor")}
  if kind == "yarn":
    made |= {"beta_fast": rope.number("beta_fast", 32), "beta_slow": rope.number("beta_slow", 1)}
    made |= {"truncate": rope.truth("truncate", True), "attention_factor": _yarn_attention(rope, made["factor"])}
  try:
    return RopeConfig(**made)
  except ValueError as error:
    raise ValueError(f"{rope.where}: {error}") from None


def _yarn_attention(rope: _Fields, factor: float) -> float:
  """The explicit factor, else the quotient of two magnitudes, else 0: the default of RopeConfig."""
  explicit = rope.number("attention_factor", None)
  if explicit is not None:
    return explicit
  up, down = rope.raw.get("mscale"), rope.raw.get("mscale_all_dim")
  if not (up and down) or factor <= 1:
    return 0.0
  up, down = rope.number("mscale"), rope.number("mscale_all_dim")
  return (0.1 * up * math.log(factor) + 1) / (0.1 * down * math.log(factor) + 1)


def _max_context(positions: int, rope: RopeConfig) -> int:
  """Tokens after scaling. `max_position_embeddings` is the unscaled length for linear scaling, either one for YaRN."""
  if rope.kind == "linear":
    return round(positions * rope.factor)
  return max(positions, round(rope.original_context * rope.factor)) if rope.kind == "yarn" else positions
