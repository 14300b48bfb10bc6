"""`sparse-serve run`: sparse_serve_jax/commands/run.py."""

from sparse_serve_jax.commands.run import command

if __name__ == "__main__":
  command()
