"""What goes wrong on the command line in a way that the user can mend."""


class CommandError(Exception):
    """Shown in one line, without a traceback."""
