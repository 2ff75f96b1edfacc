"""The ``embtables`` command, which ``python -m embtables`` is too."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; what it is made of may be missing, since the library needs none of it."""
    try:
        from embtables.cli.app import main as run
    except ImportError as error:
        print(
            f"Error: the embtables command needs {error.name}, which the library alone does not install: "
            "pip install 'embtables[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
