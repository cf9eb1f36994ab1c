"""The configurations that come with the package."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from lightning_aop.errors import UserError, did_you_mean, did_you_mean_file
from lightning_aop.files import read_text


def config_folder() -> Path:
    """Return the folder of the configurations, in a wheel or in a checkout."""
    package = Path(str(importlib.resources.files("lightning_aop")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs(below: str = "") -> list[str]:
    """Return the names that --config takes; those of a folder below carry its name."""
    folder = config_folder()
    found = (path.relative_to(folder) for path in (folder / below).glob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in found)


def resolved(value: str, below: str = "") -> str:
    """Return the file of a shipped configuration that is meant by name; a file of the user's goes first.

    `configs/coco_resnet50.yaml`, as in a checkout, works from anywhere too.

    Raises:
        UserError: there is no such file, and no configuration of this name; or it is no text.
    """
    if Path(value).is_file():
        read_text(Path(value), "--config")
        return value
    name = value.removesuffix(".yaml").removeprefix("configs/")
    known = [*shipped_configs(), *shipped_configs("benchmark")]
    for candidate in (name, f"{below}/{name}"):
        if candidate in known:
            return str(config_folder() / f"{candidate}.yaml")
    if not Path(value).exists():
        short = [own.removeprefix("benchmark/") for own in known]
        raise UserError(
            f"--config {value}: no such file, and none of {', '.join(short)}"
            + (did_you_mean(name, short) or did_you_mean_file(Path(value)))
        )
    return value


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """Replace the names of shipped configurations by their files."""
    result: list[str] = []
    for word in words:
        if result and result[-1] in ("--config", "-c"):
            word = resolved(word, "benchmark")
        elif word.startswith("--config="):
            word = "--config=" + resolved(word.removeprefix("--config="), "benchmark")
        result.append(word)
    return result
