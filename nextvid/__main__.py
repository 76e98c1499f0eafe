"""`nextvid COMMAND`: what stops it is caught before anything that takes time is imported."""

from nextvid.stopping import stoppable


def main() -> None:
    """Entry point of the command line."""
    stoppable("what is made is kept: the same command goes on from there")
    from nextvid import commands

    commands.main()


if __name__ == "__main__":
    main()
