"""``python -m clkit``: the command line, of the Python that runs it."""

from clkit.cli import script

if __name__ == "__main__":
    script()
