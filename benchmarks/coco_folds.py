"""Cut the images of COCO that are at hand into folds, for Table 3 where there is only a part of COCO.

    python benchmarks/coco_folds.py COCO_DIR runs/folds

Fold k has a fifth of the images of both splits as its val2017, and the others as its train2017. So
every image is judged once, by a head that hasn't seen it. The images are links, which
`--data.links true` reads.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_aop.files import write_whole

SPLITS = ("train2017", "val2017")


def fold(root: Path, output: Path, folds: int = 5) -> None:
    """Lay the folds out, each as COCO is: links to the images, and their annotations."""
    files: dict[int, Path] = {}
    read: list[dict[str, Any]] = []
    for split in SPLITS:
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        read.append(content)
        files |= {image["id"]: root / split / image["file_name"] for image in content["images"]}
    order = sorted(files)
    random.Random(0).shuffle(order)
    for k in range(folds):
        val = set(order[k::folds])
        for split, own in zip(SPLITS, (set(order) - val, val), strict=True):
            folder = output / str(k) / split
            folder.mkdir(parents=True)
            for image in own:
                (folder / files[image].name).symlink_to(files[image].resolve())
            content = read[0] | {
                "images": [i for part in read for i in part["images"] if i["id"] in own],
                "annotations": [
                    a for part in read for a in part["annotations"] if a["image_id"] in own
                ],
            }
            annotations = output / str(k) / "annotations" / f"instances_{split}.json"
            write_whole(annotations, json.dumps(content).encode())


def main(words: Sequence[str] | None = None) -> None:
    """Lay the folds out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="a folder in COCO's layout")
    parser.add_argument("output", type=Path, help="a new folder, which gets one for each fold")
    parser.add_argument("--folds", type=int, default=5)
    arguments = parser.parse_args(words)
    fold(arguments.root, arguments.output, arguments.folds)


if __name__ == "__main__":
    main()
