"""`sparse-serve bench`: sparse_serve_jax/commands/bench.py."""

from sparse_serve_jax.commands.bench import command

if __name__ == "__main__":
  command()
