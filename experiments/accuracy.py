"""`sparse-serve accuracy`: sparse_serve_jax/commands/accuracy.py."""

from sparse_serve_jax.commands.accuracy import command

if __name__ == "__main__":
  command()
