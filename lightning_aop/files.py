"""Writing files in a way that leaves no halves, and reading those that people write."""

import os
import uuid
from pathlib import Path

from lightning_aop.errors import FileError, InvalidValueError


def read_text(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8, with or without the byte order mark that Excel writes.

    Args:
        path: the file.
        what: it is, for an error message.

    Raises:
        OSError: it can't be read.
        ValueError: it is no text in UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FileError(f"{what} {path}: it can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InvalidValueError(
            f"{what} {path}: it is no text in UTF-8; name another, or save it as such"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that a reader never sees half of; missing folders are made.

    Raises:
        OSError: the file cannot be written; an existing one is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and would stay so under the new name.
    draft = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
