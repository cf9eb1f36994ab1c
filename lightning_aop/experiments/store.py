"""Files written by a run while it works, so that it goes on where it was stopped."""

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_aop.files import write_whole


class Store:
    """Entries of tensors and plain values, each in a file that is there as a whole or not at all.

    Several processes may write to one folder.
    """

    def __init__(self, folder: Path, fields: Collection[str]) -> None:
        """Keep entries in `folder`; one that lacks one of the fields counts as damaged."""
        self.folder, self.fields = folder, frozenset(fields)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what was kept under this name, or None, also if the file is damaged."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            entry: object = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # whatever the unpickler makes of other bytes
            return None
        return entry if isinstance(entry, dict) and self.fields <= entry.keys() else None

    def write(self, name: str, entry: Mapping[str, Any]) -> None:
        """Keep an entry; a tensor is copied out of the batch that it is a view of."""
        content = io.BytesIO()
        whole = {k: v.cpu().clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        torch.save(whole, content)
        write_whole(self._path(name), content.getvalue())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"
