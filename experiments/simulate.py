"""`sparse-serve simulate`: sparse_serve_jax/commands/simulate.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("simulate")
