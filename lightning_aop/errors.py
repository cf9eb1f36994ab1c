"""What the user can fix, told from a bug: the command line shows a `UserError` in one line.

A library's user catches these as the built-in errors that they also are. Nothing of ours is imported
here, so that every module may import it.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix; its message says what is wrong, what was expected, what to do."""


class InvalidValueError(UserError, ValueError):
    """A value that cannot be meant."""


class InvalidTypeError(UserError, TypeError):
    """A value of another type than what is needed."""


class FileError(UserError, OSError):
    """A file that cannot be read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file that is not there."""


class ExistingFileError(FileError, FileExistsError):
    """A file or folder that is in the way."""


class MissingPackageError(UserError, ImportError):
    """A package that is not installed."""


class NonFiniteScoreError(InvalidValueError):
    """The model gave NaN or infinity where a score was needed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the up to three nearest of the known names, or nothing."""
    by_lower = {word.lower(): word for word in known}
    near = [by_lower[word] for word in get_close_matches(name.lower(), by_lower, 3)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def did_you_mean_file(path: Path) -> str:
    """Return what `did_you_mean` says of a missing file's name, among what its folder holds."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
        return did_you_mean(path.name, [name for name in names if name != path.name])
    except OSError:
        return ""
