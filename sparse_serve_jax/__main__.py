"""`python -m sparse_serve_jax` is `sparse-serve`."""

from __future__ import annotations

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main()
