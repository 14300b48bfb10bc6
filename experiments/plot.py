"""`sparse-serve plot`: sparse_serve_jax/commands/plot.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("plot")
