"""What a frozen backbone makes of every image, computed once and kept in a file."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from lightning_aop.coco.dataset import CocoMultilabel
from lightning_aop.data.digests import update_with_weights
from lightning_aop.errors import FileError, InvalidValueError

Precision: TypeAlias = Literal["float32", "float16"]

_TODO, _DONE, _BAD = 0, 1, 2


class CachedFeatures(Dataset[tuple[Tensor, Tensor]]):
    """The features of a data set's images with their labels, read from a memory-mapped file.

    Attributes:
        image_dataset: the images that the features are of, in the same order.
        classes: the names of the classes.
        features: [N, D], memory-mapped.
        labels: [N, K], 0 or 1; −1 where the image could not be read.
    """

    def __init__(
        self,
        image_dataset: CocoMultilabel,
        features: Shaped[np.ndarray, "n d"],
        bad: Shaped[np.ndarray, " n"],
    ) -> None:
        self.image_dataset = image_dataset
        self.classes = image_dataset.classes
        self.features = features
        self.labels: Float[Tensor, "n k"] = image_dataset.labels.float()
        self.labels[torch.from_numpy(bad)] = -1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, " d"], Float[Tensor, " k"]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Read a batch in one go."""
        # A copy: the map is read-only, and float16 is only how features are kept.
        features = torch.from_numpy(self.features[indices].astype(np.float32))
        return list(zip(features, self.labels[indices], strict=True))


def default_cache_dir() -> Path:
    """Return where features are kept unless the user names a folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lightning_aop" / "features"


def cached_features(
    backbone: nn.Module,
    dataset: CocoMultilabel,
    directory: Path,
    *,
    precision: Precision = "float32",
    device: torch.device | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> CachedFeatures:
    """Return the features of `dataset`, of which only those that are not in the cache are computed.

    The cache is a folder in `directory`, named by a hash of the backbone (its structure and
    weights), the transform, the precision, and the name, size and time of every image: what
    belongs to anything else is never read. Finished batches are kept, so that a process that is
    stopped or killed goes on where it was. Several processes share the work.

    Args:
        backbone: gives features [B, D]; frozen, and in eval mode.
        dataset: its transform must be deterministic.
        directory: of all caches, seen by all processes.
        precision: how the features are kept.
        device: where to compute; the backbone must be there.
        batch_size: images in one pass.
        num_workers: processes that read images.
        rank: the number of this process.
        world_size: how many processes call this function.
        barrier: waits for all of them.

    Raises:
        ValueError: a feature is not finite, or too large for float16.
        OSError: the folder can't be written, or is not the same one for all processes.
    """
    key = _key(backbone, dataset, precision)
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    folder = directory / key
    if rank == 0 and not folder.is_dir():
        with torch.no_grad():
            blank = torch.zeros_like(dataset[0][0])[None].to(device, dtype)
            size = backbone(blank).shape[1]
        _create(folder, (len(dataset), size), precision, dataset)
    barrier()
    if not folder.is_dir():
        raise FileError(
            f"the feature cache {folder} is not to be seen by process {rank}: name a cache_dir that "
            "all processes share"
        )
    features = np.load(folder / "features.npy", mmap_mode="r+")
    state = np.load(folder / "state.npy", mmap_mode="r+")
    # Images that could not be read are tried again. Shares go by row, so that they fit each other
    # also where another process has begun to write.
    todo = np.flatnonzero(state != _DONE)
    missing = todo[todo % world_size == rank].tolist()
    # The generator keeps the loader from drawing on the global one, and so from changing the run.
    loader = DataLoader(
        Subset(dataset, missing),
        batch_size,
        num_workers=num_workers,
        generator=torch.Generator(),
        pin_memory=device is not None and device.type == "cuda",
    )
    if missing:
        bar = tqdm(
            desc="features",
            total=len(dataset),
            initial=len(dataset) - len(todo),
            unit="image",
            disable=rank > 0,
            dynamic_ncols=True,
        )
        with bar, torch.no_grad():
            done = 0
            for images, labels in loader:
                rows = missing[done : done + len(images)]
                values = backbone(images.to(device, dtype, non_blocking=True)).float().cpu().numpy()
                with np.errstate(over="ignore"):
                    values = values.astype(precision)
                if not np.isfinite(values).all():
                    row = rows[int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])]
                    raise InvalidValueError(
                        f"the features of {dataset.files[row]} are not finite in {precision}: check "
                        "the weights for NaN, or keep float32 features"
                    )
                features[rows] = values
                features.flush()
                # After the features: what is marked as done is there.
                state[rows] = np.where((labels < 0).any(dim=1).numpy(), _BAD, _DONE)
                state.flush()
                done += len(images)
                # The other processes get on at about the same pace.
                bar.update(min(len(images) * world_size, len(dataset) - bar.n))
    barrier()
    state = np.load(folder / "state.npy")
    if (state == _TODO).any():
        raise FileError(
            f"the feature cache {folder} lacks {int((state == _TODO).sum())} of {len(state)} images, "
            "which another process had to compute: run it again"
        )
    bad = state == _BAD
    dataset.mark_skipped(torch.from_numpy(bad))
    return CachedFeatures(dataset, np.load(folder / "features.npy", mmap_mode="r"), bad)


def _key(backbone: nn.Module, dataset: CocoMultilabel, precision: Precision) -> str:
    digest = hashlib.sha256()
    # repr() of a network tells its layers and their settings, and that of a transform its own.
    about = [
        str(backbone),
        repr(dataset.transform),
        precision,
        dataset.on_error,
        dataset.value_range,
    ]
    digest.update(json.dumps(about).encode())
    update_with_weights(digest, backbone)
    digest.update(dataset.fingerprint().encode())
    return digest.hexdigest()[:20]


def _create(
    folder: Path, shape: tuple[int, int], precision: Precision, dataset: CocoMultilabel
) -> None:
    """Make an empty cache; it appears whole, and never in the place of another."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        np.lib.format.open_memmap(draft / "features.npy", "w+", precision, shape).flush()
        np.save(draft / "state.npy", np.full(shape[0], _TODO, dtype=np.uint8))
        about = {
            "pictures": str(dataset.folder.resolve()),
            "transform": repr(dataset.transform),
            "shape": shape,
            "precision": precision,
        }
        (draft / "about.json").write_text(json.dumps(about, indent=1))
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError:
        if not folder.is_dir():  # else another run was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
