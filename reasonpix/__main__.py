"""`python -m reasonpix` is the command `reasonpix`, for launchers that start modules."""

from reasonpix.cli.main import main

if __name__ == "__main__":
    main(prog_name="reasonpix")
