"""``python -m embtables`` is the ``embtables`` command."""

from embtables.cli.app import main

if __name__ == "__main__":
    main()
