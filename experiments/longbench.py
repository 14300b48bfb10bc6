"""`sparse-serve longbench`: sparse_serve_jax/commands/longbench.py."""

from sparse_serve_jax.commands.longbench import command

if __name__ == "__main__":
  command()
