"""The command line: ``app`` has the ``embtables`` command, the other modules its sub-commands."""
