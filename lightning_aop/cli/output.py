"""Where a command writes its picture: refused before the work begins, in the format of the suffix."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lightning_aop.errors import UserError
from lightning_aop.files import write_whole
from lightning_aop.view.heat import Picture

RASTER = (".png", ".jpg", ".jpeg", ".webp", ".pdf")
"""The formats of `write_picture`."""

FIGURE = (".png", ".pdf", ".svg")
"""The formats of a matplotlib figure."""


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Make the folder of a picture, before minutes are spent on it.

    Raises:
        UserError: the suffix names no format, or nothing can be written there.
    """
    if path.is_dir():
        raise UserError(
            f"--output {path}: is a folder; name a file in it, such as {path / 'map.png'}"
        )
    if path.suffix.lower() not in suffixes:
        raise UserError(
            f"--output {path}: must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: its folder can't be made ({error.strerror})") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(
            f"--output {path}: nothing can be written to {path.parent}; name another folder"
        )


def write_picture(picture: Picture, path: Path) -> None:
    """Write a picture in the format that the suffix names."""
    content = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).cpu().contiguous().numpy())
    image.save(content, Image.registered_extensions()[path.suffix.lower()])
    write_whole(path, content.getvalue())
