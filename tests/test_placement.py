"""Weights on devices: a piece at a time, none of them left on the host, shared while somebody uses them."""

from __future__ import annotations

import dataclasses
import gc
import os
import pathlib
import shutil
import tracemalloc
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sparse_serve_jax import models
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import ByteTokenizer, Model, initial, leaves, llama, placement
from sparse_serve_jax.models.leaves import AHEAD, Leaf

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def tree_equal(a: llama.Params, b: llama.Params) -> bool:
  return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def host(model: Model) -> llama.Params:
  return jax.tree.map(np.asarray, model.params)


def large(n_layers: int = 48) -> Model:
  """Random weights of 190 MB when they are placed, half of them one leaf of 48 layers."""
  cfg = models.load_model("random:tiny").config
  cfg = dataclasses.replace(cfg, d_model=256, d_ff=1024, n_layers=n_layers, n_heads=8, n_kv_heads=8, head_dim=32)
  return Model(cfg, initial.random_params(cfg, 0), ByteTokenizer(), (257,), "large")


class Watched:
  """A model's leaves, with weak references to every array that they have read."""

  def __init__(self, model: Model):
    self.read, self.alive, self.most = 0, [], 0
    self.model = dataclasses.replace(model, params=jax.tree.map(self._watched, model.params))

  def _watched(self, leaf: Leaf) -> Leaf:
    def read(i: int) -> np.ndarray:
      part = leaf.read(i)
      self.read += part.nbytes
      self.alive.append(weakref.ref(part))
      self.most = max(self.most, self.bytes_alive())
      return part

    return dataclasses.replace(leaf, read=read)

  def bytes_alive(self) -> int:
    return sum(part.nbytes for part in (ref() for ref in list(self.alive)) if part is not None)


def test_placing_takes_a_few_layers_of_host_memory(tmp_path):
  models.save_hf(large(), tmp_path / "hf")
  model = models.load_model(tmp_path / "hf")
  sizes = {leaf.name: leaf.nbytes for leaf in jax.tree.leaves(model.params)}
  largest, total = max(sizes.values()), sum(sizes.values())
  layer = largest // model.config.n_layers
  assert total > 180e6 and largest == sizes["layers.w_gate_up"] > 100e6
  models.place_params(models.load_model(tmp_path / "hf"))  # compiles, which takes memory that stays
  watched = Watched(model)
  tracemalloc.start()
  params = models.place_params(watched.model)
  gc.collect()
  left, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert watched.read == total
  assert watched.bytes_alive() < total / 100
  whole = sum(size for size in sizes.values() if size <= placement.WHOLE_BYTES)
  assert left < whole + total / 50  # a CPU device may use an array that it is given whole where it is
  assert layer <= watched.most <= (AHEAD + 2) * layer  # AHEAD, the one that is placed, and those small arrays
  assert watched.most <= peak < largest / 4
  assert tree_equal(params, host(model))


def test_loading_reads_no_weight(tmp_path):
  models.save_hf(large(), tmp_path / "hf")
  models.load_model(tmp_path / "hf")  # what is imported late
  tracemalloc.start()
  kept = models.load_model(tmp_path / "hf")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 5e6 and isinstance(kept.params["embed"], Leaf)


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("limit", [0, placement.WHOLE_BYTES])
def test_by_layer_or_whole_they_are_where_the_specs_say(monkeypatch, n_devices, limit):
  monkeypatch.setattr(placement, "WHOLE_BYTES", limit)
  model, mesh = models.load_model("random:tiny-qwen3", dtype="bfloat16"), make_mesh(n_devices)
  params = models.place_params(model, mesh)
  assert tree_equal(params, models.init_params(model.config, 0))
  specs = llama.param_specs(model.config, n_devices)
  placed = jax.tree.map(lambda a, spec: a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim), params, specs)
  assert jax.tree.all(placed)


def test_arrays_are_shared_while_they_are_used():
  watched = Watched(models.load_model("random:tiny"))
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(watched.model.params))
  first = models.place_params(watched.model)
  named = dataclasses.replace(watched.model, name="the same weights")
  second = models.place_params(named, make_mesh(1))
  assert watched.read == size and all(a is b for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))
  two = models.place_params(watched.model, make_mesh(2))
  assert watched.read == 2 * size and tree_equal(first, two)
  del first
  assert models.place_params(watched.model)["embed"] is second["embed"] and watched.read == 2 * size
  second["embed"].delete()
  third = models.place_params(watched.model)
  assert watched.read == 2 * size + third["embed"].nbytes
  del second, third
  gc.collect()
  models.place_params(watched.model)
  assert watched.read == 3 * size + watched.model.params["embed"].nbytes


def test_arrays_may_be_of_the_host_or_of_devices():
  model = models.load_model("random:tiny")
  params = models.place_params(dataclasses.replace(model, params=host(model)))
  assert tree_equal(params, host(model))
  again = models.place_params(dataclasses.replace(model, params=params))
  assert again["embed"].unsafe_buffer_pointer() == params["embed"].unsafe_buffer_pointer()
  two = models.place_params(dataclasses.replace(model, params=params), make_mesh(2))
  assert two["lm_head"].addressable_shards[0].data.shape[1] == model.config.vocab_size // 2


def test_layers_can_be_read_in_any_order():
  leaf, stacked = (models.load_model("random:tiny").params[name] for name in ("embed", "layers"))
  wo, whole = stacked["wo"], np.asarray(stacked["wo"])
  for i in (2, 0, 1):
    np.testing.assert_array_equal(wo.part(i), whole[i])
  assert np.asarray(leaf, np.float64).dtype == np.float64 and leaf.part(0).shape == leaf.shape
  with pytest.raises(ValueError, match="weight 'embed' is not in memory"):
    np.asarray(leaf, copy=False)


@pytest.mark.parametrize("save", [models.save_hf, models.save_model])
def test_what_can_no_longer_be_read_is_named(tmp_path, save):
  save(models.load_model(GOLDENS / "qwen3"), tmp_path / "m")
  model = models.load_model(tmp_path / "m")
  leaf = model.params["layers"]["wo"]
  (file,) = leaf.files
  os.utime(file.path, ns=(0, file.modified + 1))
  with pytest.raises(ValueError, match=rf"'embed' cannot be read: {file.path} is changed since the model was loaded"):
    models.place_params(model)
  os.utime(file.path, ns=(0, file.modified))
  assert models.place_params(model)["embed"].shape == model.params["embed"].shape
  shutil.rmtree(tmp_path / "m")
  with pytest.raises(ValueError, match=rf"'layers.wo' cannot be read: {file.path} is gone since"):
    np.asarray(leaf)
  assert models.load_model("random:tiny").params["embed"].files == ()


def test_what_fails_while_it_is_read_is_named():
  def broken(i: int) -> np.ndarray:
    raise OSError("Input/output error")

  leaf = dataclasses.replace(models.load_model("random:tiny").params["layers"]["wqkv"], read=broken)
  with pytest.raises(OSError, match="Input/output error") as error:
    np.asarray(leaf)
  assert error.value.__notes__ == ["while part 0 of the weight 'layers.wqkv' was read"]


def test_mismatches_are_listed():
  wanted, found = {"a": (1,), "b": (2,), "c": (3,)}, {"b": (2,), "c": (4,), "d": (5,)}
  assert leaves.mismatches(wanted, found) == [
    "missing: a (1,)",
    "unknown: d (5,)",
    "shape: c is (4,), the configuration says (3,)",
  ]
