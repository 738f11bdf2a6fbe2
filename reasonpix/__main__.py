"""`python -m reasonpix` is the command `reasonpix`, for launchers that start modules."""

from reasonpix.cli.main import cli

if __name__ == "__main__":
    cli(prog_name="reasonpix")
