"""The names of a network's classes, from the files that people have them in."""

import json
import re
from pathlib import Path
from typing import Any

from lightning_aop.errors import InvalidValueError, MissingFileError, did_you_mean_file
from lightning_aop.files import read_text

_WNID = re.compile(r"n\d{8}")


def read_classes(path: Path) -> list[str]:
    """Return the names of classes in the order of the network's outputs.

    Args:
        path: a text file with a line for each class; a JSON file with a list, with names or
            `[wnid, name]` by index (`imagenet_class_index.json`), with `id2label` (Hugging Face), or in
            COCO's format, whose categories count by their ids; or a folder with a folder for each class,
            as torchvision's ImageFolder takes it.

    Raises:
        OSError: there is nothing of this name.
        ValueError: it holds no names.
    """
    if path.is_dir():
        return _checked(sorted(entry.name for entry in path.iterdir() if entry.is_dir()), path)
    if not path.is_file():
        raise MissingFileError(f"classes {path}: no such file{did_you_mean_file(path)}")
    text = read_text(path, "classes")
    if path.suffix.lower() != ".json":
        return _checked([line.strip() for line in text.splitlines() if line.strip()], path)
    try:
        return _checked(_of_json(json.loads(text)), path)
    except json.JSONDecodeError as error:
        raise InvalidValueError(f"classes {path}: it is no JSON ({error})") from error


def _of_json(content: Any) -> list[Any]:
    if isinstance(content, dict) and isinstance(content.get("categories"), list):
        categories = [c for c in content["categories"] if isinstance(c, dict) and "id" in c]
        return [c.get("name") for c in sorted(categories, key=lambda c: float(c["id"]))]
    if isinstance(content, dict):
        content = content.get("id2label", content)
        if not all(str(key).isdecimal() for key in content):
            return []
        content = [content[key] for key in sorted(content, key=int)]
    if not isinstance(content, list):
        return []
    # torchvision's and Keras's index of ImageNet gives a wnid and a name.
    return [" ".join(c) if isinstance(c, list) and len(c) == 2 else c for c in content]


def _checked(names: list[Any], path: Path) -> list[str]:
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidValueError(
            f"classes {path}: no names of classes are found in it: give a text file with a line for "
            "each class, a JSON list, a file in COCO's format, or a folder with a folder for each class"
        )
    return names


def class_index(name: str, classes: list[str]) -> int | None:
    """Return the index of the class with a wnid, such as n02123045, or None for another name.

    It is looked for at the start of the names, as in LOC_synset_mapping.txt; where they have none, a
    network with 1,000 classes has ImageNet's.
    """
    if not _WNID.fullmatch(name):
        return None
    known = [c.split()[0] if _WNID.match(c) else "" for c in classes]
    if not any(known) and len(classes) == 1000:
        known = Path(__file__).with_name("imagenet_wnids.txt").read_text().split()
    return known.index(name) if name in known else None
