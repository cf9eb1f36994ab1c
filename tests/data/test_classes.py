"""The names of classes, in the files that people have them in."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_aop.data.classes import class_index, read_classes
from lightning_aop.errors import InvalidValueError, MissingFileError

FILES: dict[str, Any] = {
    "lines.txt": "\ufeffcat\ndog\n\n",
    "list.json": ["cat", "dog"],
    "numbered.json": {"1": "dog", "0": "cat"},
    "config.json": {"model_type": "resnet", "id2label": {"10": "dog", "9": "cat"}},
    "coco.json": {"images": [], "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]},
}


@pytest.mark.parametrize("name", FILES)
def test_names_are_read_in_the_order_of_the_outputs(name: str, tmp_path: Path) -> None:
    content, path = FILES[name], tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert read_classes(path) == ["cat", "dog"]


def test_folders_are_classes_as_for_imagefolder(tmp_path: Path) -> None:
    from torchvision.datasets.folder import find_classes

    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert read_classes(tmp_path) == find_classes(tmp_path)[0] == ["cat", "dog"]


@pytest.mark.parametrize("content", ["", "[]", "[1, 2]", '{"cat": 0}', "3", "{"])
def test_a_file_without_names_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(content)
    with pytest.raises(InvalidValueError, match=re.escape(str(path))):
        read_classes(path)
    with pytest.raises(MissingFileError, match=r"did you mean classes\.json"):
        read_classes(tmp_path / "clases.json")


def test_wnids_are_those_of_timm() -> None:
    timm = pytest.importorskip("timm")
    known = timm.data.ImageNetInfo("imagenet-1k").label_names()
    anything = [f"class {i}" for i in range(1000)]
    assert [class_index(wnid, anything) for wnid in known] == list(range(1000))
    assert class_index("n02123045", anything[:10]) is None
    assert class_index("tabby", anything) is None
    assert class_index("n02", anything) is None


def test_names_with_their_own_wnids_go_first() -> None:
    assert class_index("n02123045", ["n01440764 tench", "n02123045 tabby, tabby cat"]) == 1


def test_keys_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"²": "cat", "1": "dog"}', encoding="utf-8")
    with pytest.raises(ValueError, match="no names of classes are found in it"):
        read_classes(tmp_path / "names.json")
