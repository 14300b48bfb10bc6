"""The decoder against transformers' numbers, its parts against the whole, two devices against one, and sampling."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sparse_serve_jax import models
from sparse_serve_jax.config import ModelConfig, RopeConfig, find_config, read_config
from sparse_serve_jax.mesh import AXIS, make_mesh
from sparse_serve_jax.models import ByteTokenizer, initial, llama, sampling

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FAMILIES = sorted(path.parent.name for path in GOLDENS.glob("*/expected.npz"))
SCALED = [name for name in FAMILIES if name.endswith(("llama3", "linear", "yarn"))]
SHAPES = ["tiny", "tiny-mha", "tiny-qwen2", "tiny-qwen3"]


def placed(model: models.Model) -> models.Model:
  return dataclasses.replace(model, params=models.place_params(model))


@functools.cache
def golden(name: str) -> tuple[models.Model, dict[str, np.ndarray]]:
  return placed(models.load_model(GOLDENS / name, dtype="float32")), dict(np.load(GOLDENS / name / "expected.npz"))


@functools.cache
def random_model(name: str) -> models.Model:
  return placed(models.load_model(f"random:{name}"))


run = jax.jit(models.forward, static_argnums=0, static_argnames="hidden")
sample, ban, logprobs = jax.jit(sampling.sample), jax.jit(sampling.ban), jax.jit(sampling.logprobs, static_argnums=2)


def test_every_family_has_a_golden():
  assert {"llama2", "llama3", "llama_linear", "llama_yarn", "mistral", "qwen2", "qwen3", "qwen3_yarn"} <= set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_and_logits_match_transformers(name):
  model, expected = golden(name)
  logits, hidden = run(model.config, model.params, expected["tokens"], hidden=True)
  assert hidden.shape == expected["hidden"].shape
  for layer, (ours, theirs) in enumerate(zip(hidden, expected["hidden"], strict=True)):
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0, err_msg=f"state {layer}")
  np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", SCALED)
def test_goldens_notice_rope_scaling(name):
  model, expected = golden(name)
  plain = dataclasses.replace(model.config, rope=RopeConfig(theta=model.config.rope.theta))
  error = np.abs(run(plain, model.params, expected["tokens"]) - expected["logits"])
  assert error.max() > 0.05


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_bfloat16_stays_near_float32(name):
  _, expected = golden(name)
  model = placed(models.load_model(GOLDENS / name))
  assert model.config.dtype == "bfloat16" and model.params["embed"].dtype == jnp.bfloat16
  logits, hidden = run(model.config, model.params, expected["tokens"], hidden=True)
  assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  assert np.abs(logits - expected["logits"]).mean() < 0.02


@pytest.mark.parametrize("name", ["llama2", "qwen2", "qwen3_yarn"])
def test_parts_compose_to_the_golden(name):
  """A batch of sequences, layers by traced index, attention written out here."""
  model, expected = golden(name)
  cfg, tokens = model.config, jnp.stack([expected["tokens"], expected["tokens"][::-1]])
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))

  @jax.jit
  def logits(params):
    def layer(i, x):
      lp = llama.layer_params(params, i)
      q, k, v = llama.qkv(cfg, lp, x, llama.rope(cfg, positions))
      scores = jnp.einsum("btkgd,bskd->bkgts", q, k, precision="highest") / np.sqrt(cfg.head_dim).astype(np.float32)
      p = jax.nn.softmax(jnp.where(causal[None, None, None], scores, -jnp.inf), axis=-1)
      o = jnp.einsum("bkgts,bskd->btkgd", p, v, precision="highest")
      return llama.mlp(cfg, lp, llama.attention_out(lp, x, o, None), None)

    x = jax.lax.fori_loop(0, cfg.n_layers, layer, llama.embed(params, tokens))
    return llama.logits(cfg, params, x, None)

  np.testing.assert_allclose(logits(model.params)[0], expected["logits"], atol=2e-5, rtol=0)


def test_one_token_at_a_time_equals_a_sequence():
  cfg, params = random_model("tiny-qwen3").config, random_model("tiny-qwen3").params
  x = np.random.default_rng(0).standard_normal((5, cfg.d_model), dtype=np.float32)
  positions = np.asarray([0, 9, 3, 31_999, 7], np.int32)
  lp = llama.layer_params(params, 2)
  project = jax.jit(lambda x, positions: llama.qkv(cfg, lp, x, llama.rope(cfg, positions)))
  rows = [project(x[i], positions[i]) for i in range(len(x))]
  for whole, parts in zip(project(x, positions), zip(*rows, strict=True), strict=True):
    np.testing.assert_allclose(whole, np.stack(parts), atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_scores_depend_on_distance_alone(name):
  """What rope is for; with absolute positions the two would differ in the first digit."""
  cfg, params = random_model(name).config, random_model(name).params
  x = jnp.asarray(np.random.default_rng(1).standard_normal((2, cfg.d_model), dtype=np.float32))
  lp = llama.layer_params(params, 0)
  project = jax.jit(lambda positions: llama.qkv(cfg, lp, x, llama.rope(cfg, positions)))

  def score(first: int, distance: int):
    q, k, _ = project(np.asarray([first, first + distance], np.int32))
    return np.einsum("kgd,kd->kg", q[1], k[0])

  np.testing.assert_allclose(score(0, 5), score(1000, 5), atol=2e-3)
  assert np.abs(score(0, 5) - score(0, 50)).max() > 0.1


def test_a_token_changes_nothing_before_it():
  cfg, params = random_model("tiny").config, random_model("tiny").params
  tokens = np.arange(60, dtype=np.int32)
  a, b = run(cfg, params, tokens), run(cfg, params, np.where(tokens == 40, 99, tokens))
  np.testing.assert_array_equal(a[:40], b[:40])
  assert np.abs(a[41:] - b[41:]).max() > 0.1


def test_llama3_frequencies_by_wavelength():
  """Llama 3.2: pairs that turn less than once in 8192 tokens are slowed 32-fold, those of 4 turns and more are kept."""
  cfg = read_config(ModelConfig, find_config("models", "llama-3.2-1b"))
  plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
  turns, ratio = 8192 * plain / (2 * np.pi), llama.rope_frequencies(cfg) / plain
  np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-5)
  np.testing.assert_allclose(ratio[turns < 1], 1 / 32, rtol=1e-5)
  between = ratio[(turns >= 1) & (turns <= 4)]
  assert between.size and np.all(np.diff(ratio) <= 1e-6) and np.all((between > 1 / 32) & (between < 1))


@pytest.mark.parametrize(("name", "vocab"), [("tiny", 264), ("tiny-qwen2", 264), ("tiny-qwen3", 263)])
def test_two_devices_equal_one(name, vocab):
  assert len(jax.devices()) >= 2, "run with XLA_FLAGS=--xla_force_host_platform_device_count=2"
  cfg = dataclasses.replace(random_model(name).config, vocab_size=vocab)
  params = models.init_params(cfg, 0)
  tokens = np.arange(40, dtype=np.int32) * 7 % vocab
  mesh, specs = make_mesh(2), llama.param_specs(cfg, 2)
  sharded = models.place_params(models.Model(cfg, params, ByteTokenizer(), (), name), mesh)
  local = sharded["layers"]["wqkv"].addressable_shards[0].data
  assert local.shape[2] == cfg.n_kv_heads // 2
  # The gathered vocabulary is the same on both devices, which the check of varying axes cannot know.
  two = jax.shard_map(
    functools.partial(models.forward, cfg, axis=AXIS),
    mesh=mesh,
    in_specs=(specs, PartitionSpec()),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  np.testing.assert_allclose(jax.jit(two)(sharded, tokens), run(cfg, params, tokens), atol=1e-4)


def test_a_mesh_has_devices_that_there_are():
  n = len(jax.devices())
  assert make_mesh(1) == make_mesh(1) and make_mesh(n).size == n and make_mesh(1).axis_names == (AXIS,)
  for wrong in (0, n + 1):
    with pytest.raises(
      ValueError, match=f"tp={wrong} asks for {wrong} devices, and there are {n}: give tp=1 up to tp={n}"
    ):
      make_mesh(wrong)


def test_specs_refuse_what_does_not_divide():
  with pytest.raises(ValueError, match=r"tp=3 must divide n_kv_heads=2 and d_ff=128"):
    llama.param_specs(random_model("tiny").config, 3)


@pytest.mark.parametrize("name", SHAPES)
def test_random_parameters(name):
  cfg, params = random_model(name).config, random_model(name).params
  shapes = jax.tree.map(lambda a: a.shape, params)
  assert shapes == llama.param_shapes(cfg)
  assert ("lm_head" in params) != cfg.tie_embeddings
  same, other = models.init_params(cfg, 0), models.init_params(cfg, 1)
  assert jax.tree.all(jax.tree.map(np.array_equal, params, same))
  assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, params, other)))
  assert not np.array_equal(params["layers"]["wo"][0], params["layers"]["wo"][1])
  y = np.sort(run(cfg, params, np.arange(200, dtype=np.int32)), axis=-1)
  assert 3 < y.std() < 5
  assert (y[:, -1] - y[:, -2]).min() > 1e-4  # float32 reordering moves logits by 1e-5


def test_pieces_of_a_large_leaf_are_drawn_alike_each_time_and_differ(monkeypatch):
  cfg = read_config(ModelConfig, find_config("models", "tiny"))
  whole = models.init_params(cfg, 0)["embed"]
  monkeypatch.setattr(initial, "_PIECE", 100 * cfg.d_model)
  first, second = (models.init_params(cfg, 0)["embed"] for _ in range(2))
  assert (first == second).all() and (first[:100] == whole[:100]).all()
  assert len(np.unique(first, axis=0)) == cfg.vocab_size and (first[100:] != whole[100:]).mean() > 0.9


# Sampling


def settings(rows: int, temperature=1.0, top_p=1.0, seed=0, top_k=0, min_p=0.0):
  return (
    np.arange(rows, dtype=np.int32),
    np.full(rows, temperature, np.float32),
    np.full(rows, top_p, np.float32),
    np.full(rows, seed, np.uint32),
    np.full(rows, top_k, np.int32),
    np.full(rows, min_p, np.float32),
  )


def draws(logits: np.ndarray, rows: int = 8000, **kwargs) -> np.ndarray:
  """Counts of each token over `rows` positions."""
  tokens = sample(np.tile(np.asarray(logits, np.float32), (rows, 1)), *settings(rows, **kwargs))
  assert tokens.shape == (rows,) and tokens.dtype == jnp.int32
  return np.bincount(tokens, minlength=len(logits))


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
  expected = counts.sum() * p
  return float((((counts - expected) ** 2) / expected).sum())


def test_greedy_takes_the_lowest_of_equals():
  logits = np.asarray([[0, 3, 3, 1], [5, 1, 5, 5], [-1, -1, -1, -1]], np.float32)
  tokens = sample(logits, *settings(3, temperature=0.0, top_p=0.5))
  assert tokens.tolist() == [1, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_follows_the_softmax(temperature):
  logits = np.asarray([0.0, 1.0, -1.0, 2.0, 0.5, 1.5, -0.5, 0.25])
  p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  assert chi_square(draws(logits, temperature=temperature), p) < 24.3  # 7 degrees of freedom, p = 0.001
  assert chi_square(draws(logits, temperature=temperature * 1.3), p) > 24.3


def test_top_p_keeps_the_smallest_set_that_reaches_it():
  p = np.asarray([0.05, 0.4, 0.1, 0.3, 0.15])
  counts = draws(np.log(p), top_p=0.8)  # 0.4 + 0.3 < 0.8 <= 0.4 + 0.3 + 0.15
  assert counts[[0, 2]].tolist() == [0, 0]
  assert chi_square(counts[[1, 3, 4]], p[[1, 3, 4]] / 0.85) < 13.8  # 2 degrees of freedom, p = 0.001
  assert np.flatnonzero(draws(np.log(p), top_p=0.69)).tolist() == [1, 3]
  assert np.flatnonzero(draws(np.log(p), top_p=1e-6)).tolist() == [1]
  assert np.flatnonzero(draws(np.log(p), top_p=1.0)).tolist() == [0, 1, 2, 3, 4]
  assert np.flatnonzero(draws(np.zeros(8), top_p=0.5)).tolist() == [0, 1, 2, 3]  # ties to the lowest ids


def test_top_k_and_min_p_cut_before_and_after_top_p():
  p = np.asarray([0.05, 0.4, 0.1, 0.3, 0.15])
  kept = lambda **cuts: np.flatnonzero(draws(np.log(p), **cuts)).tolist()  # noqa: E731
  assert [kept(top_k=k) for k in (1, 2, 4, 0, 9)] == [[1], [1, 3], [1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
  assert np.flatnonzero(draws(np.zeros(8), top_k=3)).tolist() == [0, 1, 2]  # ties to the lowest ids
  assert [kept(min_p=m) for m in (0.1, 0.3, 0.7, 1.0)] == [[0, 1, 2, 3, 4], [1, 3, 4], [1, 3], [1]]
  # 0.4 and 0.3 are 0.7 of all, but 0.82 of the three most likely: the third is not needed to reach 0.8 of these.
  assert (kept(top_p=0.8), kept(top_p=0.8, top_k=3)) == ([1, 3, 4], [1, 3])
  assert kept(top_k=4, top_p=0.9, min_p=0.5) == [1, 3]
  counts = draws(np.log(p), top_k=3)
  assert chi_square(counts[[1, 3, 4]], p[[1, 3, 4]] / 0.85) < 13.8  # 2 degrees of freedom, p = 0.001


def test_log_probabilities_are_those_of_the_softmax():
  logits = np.random.default_rng(3).standard_normal((4, 50)).astype(np.float32) * 3
  tokens = np.asarray([7, 0, 49, -1], np.int32)  # of -1 nothing is asked
  token, ids, top = (np.asarray(part) for part in logprobs(logits, tokens, 5))
  expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
  np.testing.assert_allclose(token[:3], expected[np.arange(3), tokens[:3]], atol=1e-5)
  assert ids.tolist() == np.argsort(-logits, -1)[:, :5].tolist() and ids.dtype == np.int32
  np.testing.assert_allclose(top, np.take_along_axis(expected, ids, -1), atol=1e-5)


def test_what_is_banned_does_not_exist():
  """For the most likely token, for draws and for the mass that top-p counts; and in its own row only."""
  p = np.asarray([0.05, 0.4, 0.1, 0.3, 0.15])
  banned = np.asarray([[1, -1, -1], [3, 1, 3], [-1, -1, -1], [5, -1, 4]], np.int32)  # 5 and -1 are no tokens
  logits = np.asarray(ban(np.tile(np.log(p).astype(np.float32), (4, 1)), banned))
  assert sample(logits, *settings(4, temperature=0.0)).tolist() == [3, 4, 1, 1]
  for row, gone in zip(logits, ([1], [1, 3], [], [4]), strict=True):
    q = np.where(np.isin(np.arange(5), gone), 0, p)
    left = np.flatnonzero(q)
    counts = draws(row)
    assert np.flatnonzero(counts).tolist() == left.tolist()
    assert chi_square(counts[left], q[left] / q.sum()) < 18.5  # at most 4 degrees of freedom, p = 0.001
  assert np.flatnonzero(draws(logits[0], top_p=0.7)).tolist() == [3, 4]  # 0.3 < 0.7 * 0.6 <= 0.3 + 0.15


def test_a_draw_ignores_its_neighbours():
  rng = np.random.default_rng(0)
  n, vocab = 24, 264
  logits = rng.standard_normal((n, vocab), dtype=np.float32) * 2
  positions = rng.integers(0, 1000, n).astype(np.int32)
  temperature = np.where(np.arange(n) % 3 == 0, 0.0, 0.8).astype(np.float32)
  top_p = np.where(np.arange(n) % 2 == 0, 0.9, 1.0).astype(np.float32)
  seeds = rng.integers(0, 2**32, n, dtype=np.uint32)
  top_k = np.where(np.arange(n) % 5 == 0, 7, 0).astype(np.int32)
  min_p = np.where(np.arange(n) % 7 == 0, 0.1, 0.0).astype(np.float32)
  args = (logits, positions, temperature, top_p, seeds, top_k, min_p)
  together = np.asarray(sample(*args))
  alone = np.concatenate([sample(*(a[i : i + 1] for a in args)) for i in range(n)])
  order = rng.permutation(n)
  assert alone.tolist() == together.tolist()
  assert np.asarray(sample(*(a[order] for a in args))).tolist() == together[order].tolist()


def test_draws_differ_by_seed_and_position():
  logits = np.zeros(4096)
  a, b = (sample(np.tile(logits, (50, 1)).astype(np.float32), *settings(50, seed=s)) for s in (0, 1))
  assert len(set(a.tolist())) > 45 and (np.asarray(a) == np.asarray(b)).sum() < 3
