"""What a benchmark keeps: a Parquet file for each finished group of images, and what they belong to.

    RUN_DIR/run.json                         the configuration that was last run
    RUN_DIR/densenet201-0123456789ab/        the results of one network under one set of settings
    RUN_DIR/densenet201-0123456789ab/part-000012-0-89abcdef.parquet

A part holds a row for each image of a group and method, and is there as a whole or not at all. Rows
carry a digest of their method's settings, so that a method that is new or has changed starts afresh
and the others stay.
"""

import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_aop.errors import InvalidValueError, MissingPackageError
from lightning_aop.experiments.groups import Group
from lightning_aop.experiments.paper import method_key
from lightning_aop.files import write_whole
from lightning_aop.methods import controls

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "run.json"


def arrow() -> Any:
    """Return pyarrow with its modules `compute` and `parquet`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            'the results of a benchmark need pyarrow: pip install "lightning-aop[benchmark]"'
        ) from error
    return pyarrow


def schema() -> "pa.Schema":
    """Return the columns of a part.

    `image` is the place in the list of images; `target` the class that was explained, `score` its
    probability for the whole image; the AUCs and curves are in units of that; `evaluations` and
    `seconds` are those of the map of one image, `curve_seconds` those of its curves; `reason` says why
    values are missing, and is null where they are not.
    """
    pa = arrow()
    return pa.schema(
        [
            ("group", pa.int32()),
            ("image", pa.int32()),
            ("file", pa.string()),
            ("method", pa.dictionary(pa.int8(), pa.string())),
            ("method_digest", pa.dictionary(pa.int8(), pa.string())),
            ("label", pa.int32()),
            ("predicted", pa.int32()),
            ("target", pa.int32()),
            ("correct", pa.bool_()),
            ("score", pa.float64()),
            ("deletion", pa.float64()),
            ("insertion", pa.float64()),
            ("overall", pa.float64()),
            ("deletion_curve", pa.list_(pa.float32())),
            ("insertion_curve", pa.list_(pa.float32())),
            ("evaluations", pa.float64()),
            ("seconds", pa.float64()),
            ("curve_seconds", pa.float64()),
            ("reason", pa.string()),
        ]
    )


def write_part(folder: Path, group: int, rank: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of a group, with the keys of `schema`, as a file of their own."""
    pa = arrow()
    content = io.BytesIO()
    pa.parquet.write_table(
        pa.Table.from_pylist([dict(row) for row in rows], schema()), content, compression="zstd"
    )
    name = f"part-{group:06d}-{rank}-{uuid.uuid4().hex[:8]}.parquet"
    write_whole(folder / name, content.getvalue())


def parts(folder: Path, columns: Sequence[str]) -> Iterator["pa.Table"]:
    """Yield some columns of each part, in the order of the groups.

    A damaged file, as a computer that went off may leave, counts as if it were not there.
    """
    pa = arrow()
    names = sorted(e.name for e in os.scandir(folder)) if folder.is_dir() else []
    for name in names:
        if not (name.startswith("part-") and name.endswith(".parquet")):
            continue
        try:
            with pa.parquet.ParquetFile(folder / name) as file:
                yield file.read(columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError):
            continue


def finished(folder: Path, groups: Sequence[Group]) -> dict[str, set[int]]:
    """Return which groups are there as a whole, by the digest of the method."""
    sizes = {number: len(rows) for number, rows in groups}
    done: dict[str, set[int]] = {}
    for part in parts(folder, ["group", "method_digest"]):
        table = part.group_by(["group", "method_digest"]).aggregate([([], "count_all")])
        for row in table.to_pylist():
            if row["count_all"] >= sizes.get(row["group"], row["count_all"] + 1):
                done.setdefault(row["method_digest"], set()).add(row["group"])
    return done


@dataclass(frozen=True)
class Manifest:
    """What the configuration in a folder asks for.

    Attributes:
        version: of the package.
        images: how many are asked for.
        average: "correct" if only correctly classified images are explained, or "all".
        paper: the table of the paper that the values are put beside, or None.
        folders: of the results, by the name of the network.
        methods: of each network, the digests of its methods by name.
        settings: what the digests stand for, to look up.
    """

    version: str
    images: int
    average: str
    paper: str | None
    folders: dict[str, str]
    methods: dict[str, dict[str, str]]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Return the manifest of a folder, or None where there is none."""
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise InvalidValueError(f"{path} is not the work of this version: {error}") from error

    def write(self, folder: Path) -> None:
        """Write it, as a whole or not at all."""
        write_whole(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode() + b"\n")

    def with_everything(self, folder: Path) -> "Manifest":
        """Return this configuration with all images and methods of its networks that have results.

        Several configurations may write to one folder, and one may be run with growing limits.

        Raises:
            ValueError: there are results of several settings under one name, none of them this
                configuration's.
        """
        images, methods = self.images, {}
        for network, own in self.folders.items():
            found: dict[str, set[str]] = {}
            for part in parts(folder / own, ["image", "method", "method_digest"]):
                images = max(images, arrow().compute.max(part["image"]).as_py() + 1)
                for row in part.group_by(["method", "method_digest"]).aggregate([]).to_pylist():
                    found.setdefault(row["method"], set()).add(row["method_digest"])
            earlier = {name: found[name] for name in found if name not in self.methods[network]}
            for name, digests in earlier.items():
                if len(digests) > 1:
                    raise InvalidValueError(
                        f"{folder / own} has results of {len(digests)} settings of {name}: run the "
                        "configuration that counts once more, which computes nothing again"
                    )
            methods[network] = self.methods[network] | {n: min(d) for n, d in earlier.items()}
        return replace(self, images=images, methods=methods)

    def reference(self) -> str:
        """Return the method that the others are compared with.

        SIGCAM, the paper's, where it is there; else the last that is no control.
        """
        names = list(dict.fromkeys(name for own in self.methods.values() for name in own))
        real = [name for name in names if not self._is_control(name)]
        return next((name for name in real if method_key(name) == "sigcam"), (real or names)[-1])

    def _is_control(self, name: str) -> bool:
        """Say whether a method does not depend on the model, by its settings or else its name."""
        own = (of.get("methods", {}) for of in self.settings.values() if isinstance(of, dict))
        told = [methods[name] for methods in own if name in methods]
        if told:
            return any(controls.__name__ in settings for settings in told)
        return method_key(name) in ("random", "centre", "edges")

    def changes(self, earlier: "Manifest") -> list[str]:
        """Say in words which earlier results this configuration leaves aside."""
        told = []
        for name in self.folders:
            if name in earlier.folders and earlier.folders[name] != self.folders[name]:
                told.append(
                    f"{name}: its settings, weights or images are not those of the earlier run "
                    f"here: a new result set is started, the old one stays in {earlier.folders[name]}"
                )
                continue
            before, now = earlier.methods.get(name, {}), self.methods[name]
            told += [
                f"{name}: the settings of {method} have changed: its results are started anew"
                for method in now
                if method in before and before[method] != now[method]
            ]
        return told
