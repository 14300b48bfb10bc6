"""`sparse-serve plot`: sparse_serve_jax/commands/plot.py."""

from sparse_serve_jax.commands.plot import command

if __name__ == "__main__":
  command()
