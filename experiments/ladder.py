"""`sparse-serve ladder`: sparse_serve_jax/commands/ladder.py."""

from sparse_serve_jax.commands.ladder import command

if __name__ == "__main__":
  command()
