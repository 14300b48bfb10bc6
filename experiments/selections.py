"""`sparse-serve selections`: sparse_serve_jax/commands/selections.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("selections")
