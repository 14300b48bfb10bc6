"""`sparse-serve demo`: sparse_serve_jax/commands/demo.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("demo")
