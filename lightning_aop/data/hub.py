"""Image classifiers of Hugging Face by name, and folders that transformers or timm saved."""

import importlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from lightning_aop.data.images import IMAGENET_MEAN, IMAGENET_STD
from lightning_aop.data.networks import Published, fill, published_input
from lightning_aop.data.weights import read_weights
from lightning_aop.errors import FileError, InvalidValueError, MissingPackageError


def is_hub(name: str) -> bool:
    """Say whether a name is `hf/NAME`, or a folder."""
    return name.startswith("hf/") or Path(name).expanduser().is_dir()


def load_hub(
    name: str, weights: Path | None = None
) -> tuple[nn.Module, list[str], bool, Published]:
    """Return a classifier, the names of its classes, whether it is multilabel, and what it wants.

    Args:
        name: `hf/NAME`, as in hf/microsoft/resnet-50; or a folder that `save_pretrained` of
            transformers wrote, or `save_for_hf` of timm.
        weights: a local file with others than those that come with it.

    Raises:
        ImportError: transformers, or timm, is not installed.
        ValueError: it is no image classifier, or the weights don't fit.
        OSError: it can't be downloaded or read.
    """
    place = name.removeprefix("hf/")
    folder = Path(name).expanduser()
    if folder.is_dir():
        place = str(folder)
        config = folder / "config.json"
        if not config.is_file():
            raise FileError(
                f"model {name}: the folder has no config.json: name one that transformers or timm saved"
            )
        settings = json.loads(config.read_text())
        if "architecture" in settings:
            return _timm(folder, settings, weights)
    network, wants = _transformers(name, place)
    labels = network.config.id2label
    if weights is not None:
        fill(network, name, read_weights(weights))
    multilabel = network.config.problem_type == "multi_label_classification"
    return network, [labels[i] for i in range(len(labels))], multilabel, wants


def _timm(
    folder: Path, settings: dict[str, Any], weights: Path | None
) -> tuple[nn.Module, list[str], bool, Published]:
    timm = _module("timm", str(folder))
    try:
        network = timm.create_model(f"local-dir:{folder}", pretrained=weights is None)
    except Exception as error:
        raise FileError(f"model {folder}: timm can't load it ({error})") from error
    if weights is not None:
        fill(network, str(folder), read_weights(weights))
    names = settings.get("label_names") or [f"class {i}" for i in range(network.num_classes)]
    return network, list(names), False, published_input("timm/", network)


def _transformers(name: str, place: str) -> tuple[Any, Published]:
    transformers = _module("transformers", name)
    # Its bars and its notes on the head's weights say nothing that a user could do.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        network = transformers.AutoModelForImageClassification.from_pretrained(place)
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise InvalidValueError(f"model {name} is no image classifier ({first})") from error
    except Exception as error:
        raise FileError(
            f"model {name} can't be read or downloaded ({str(error).splitlines()[0]}): give a folder "
            "that save_pretrained wrote"
        ) from error
    try:
        processor: Any = transformers.AutoImageProcessor.from_pretrained(place).to_dict()
    except Exception:
        # A folder of a training has none beside the network.
        processor = {}
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    own = getattr(network.config, "image_size", None) or 224
    shorter = size.get("shortest_edge") or size.get("height") or own
    side = (crop.get("height") if processor.get("do_center_crop") else None) or shorter
    normalised = processor.get("do_normalize", True)
    mean = processor.get("image_mean") or IMAGENET_MEAN if normalised else (0.0,) * 3
    std = processor.get("image_std") or IMAGENET_STD if normalised else (1.0,) * 3
    return network, Published(side, max(shorter, side), tuple(mean), tuple(std))


def _module(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(f"model {name} needs {package}: pip install {package}") from error
