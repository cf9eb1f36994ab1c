"""What the commands keep while they work, so that a stopped run goes on where it was."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_aop._version import __version__
from lightning_aop.cli.errors import CommandError
from lightning_aop.data.digests import described, update_with_weights
from lightning_aop.files import write_whole
from lightning_aop.tables import csv_text
from lightning_aop.types import SaliencyMethod


class MapStore:
    """Maps and their figures, each in a file that goes with just this input, network and version."""

    def __init__(self, folder: Path, model: nn.Module, settings: object) -> None:
        """Keep files in `folder`; `settings` is what else the maps hang on, told by its repr."""
        self.folder = folder
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
        path = self._path(key, name)
        if not path.is_file():
            return None
        try:
            entry: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception:  # whatever the unpickler makes of other bytes
            return None
        return entry if isinstance(entry, dict) else None

    def write(self, key: str, name: str, entry: Mapping[str, Any]) -> None:
        """Keep tensors and plain values; a tensor is copied out of the batch that it is a view of."""
        content = io.BytesIO()
        whole = {k: v.cpu().clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        torch.save(whole, content)
        write_whole(self._path(key, name), content.getvalue())

    def _path(self, key: str, name: str) -> Path:
        return self.folder / f"{key}-{name}.pt"


def make_folder(path: Path) -> None:
    """Make the folder of the results, before hours are spent on them.

    Raises:
        CommandError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {path}: no folder can be made there ({error})") from error


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same keys as a table with a heading."""
    heading = [list(rows[0])] if rows else []
    write_whole(path, csv_text([*heading, *(list(row.values()) for row in rows)]).encode())
