"""`sparse-serve longbench`: sparse_serve_jax/commands/longbench.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("longbench")
