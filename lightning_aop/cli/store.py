"""What the commands keep while they work, so that a stopped run goes on where it was."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_aop._version import __version__
from lightning_aop.data.digests import described, update_with_weights
from lightning_aop.errors import UserError
from lightning_aop.experiments.store import Store
from lightning_aop.files import write_whole
from lightning_aop.tables import csv_text
from lightning_aop.types import SaliencyMethod


class MapStore:
    """Maps and their metrics, each in an entry that goes with just this input, network and version."""

    def __init__(
        self, folder: Path, model: nn.Module, settings: object, fields: Collection[str]
    ) -> None:
        """Keep entries with these fields; `settings` is what else they depend on, by its repr."""
        self._store = Store(folder, fields)
        self._digest = hashlib.sha256(f"{__version__} {settings!r}".encode())
        update_with_weights(self._digest, model)

    def key(self, image: Tensor, target: Tensor, method: SaliencyMethod) -> str:
        """Return what names an image [C, H, W] with a class, and how it is explained."""
        digest = self._digest.copy()
        digest.update(described(method).encode())
        digest.update(image.cpu().contiguous().numpy().tobytes())
        digest.update(str(int(target)).encode())
        return digest.hexdigest()[:16]

    def read(self, key: str, name: str) -> dict[str, Any] | None:
        """Return what was kept under this name, or None, also if the file is damaged."""
        return self._store.read(f"{key}-{name}")

    def write(self, key: str, name: str, entry: Mapping[str, Any]) -> None:
        """Keep the fields of an entry."""
        self._store.write(f"{key}-{name}", entry)


def make_folder(path: Path, option: str = "--output") -> None:
    """Make the folder of the results, before hours are spent on them.

    Raises:
        UserError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file: name another folder" if path.is_file() else error
        raise UserError(f"{option} {path}: no folder can be made there ({why})") from error


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same keys as a table with a heading."""
    heading = [list(rows[0])] if rows else []
    text = csv_text([*heading, *(list(row.values()) for row in rows)])
    # The name of a photo may be no UTF-8.
    write_whole(path, text.encode(errors="backslashreplace"))
