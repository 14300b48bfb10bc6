"""`sparse-serve prefix`: sparse_serve_jax/commands/prefix.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("prefix")
