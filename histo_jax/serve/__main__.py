"""`python -m histo_jax.serve`."""

from histo_jax.serve.command_line import cli

if __name__ == "__main__":
    cli()
