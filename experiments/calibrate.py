"""`sparse-serve calibrate`: sparse_serve_jax/commands/calibrate.py."""

from sparse_serve_jax.commands.calibrate import command

if __name__ == "__main__":
  command()
