"""Real loggers, whose pictures are read back as their own readers do. No test reaches a server."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_aop.monitor.loggers import log_image, log_table


@pytest.fixture(params=["colours", "almost black"])
def picture(request: pytest.FixtureRequest) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # What a logger would stretch or take for numbers from 0 to 1 if it could.
    top = 256 if request.param == "colours" else 2
    return torch.randint(0, top, (3, 20, 30), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=["pytorch_lightning.loggers", "lightning.pytorch.loggers"])
def loggers(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def pixels(picture: Tensor) -> Any:
    return picture.permute(1, 2, 0).numpy()


def assert_holds(file: Any, picture: Tensor) -> None:
    with Image.open(file) as stored:
        np.testing.assert_array_equal(np.asarray(stored), pixels(picture))


def run_python(script: str, folder: Path, **variables: str) -> None:
    """Run a script that logs `picture.npy` in a Python of its own: some vendors patch others' code."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------------------
# TensorBoard


def test_tensorboard_holds_the_very_pixels(loggers: Any, picture: Tensor, tmp_path: Path) -> None:
    class Derived(loggers.TensorBoardLogger):  # type: ignore[misc]
        pass

    for cls, prefix, tag in [
        (loggers.TensorBoardLogger, "", "explain/heatmaps"),
        (Derived, "mine", "mine-explain/heatmaps"),
    ]:
        logger = cls(tmp_path, prefix=prefix)
        assert log_image(logger, "explain/heatmaps", picture, 12, caption="not held") is None
        logger.finalize("success")
        (event,) = EventAccumulator(logger.log_dir, {"images": 0}).Reload().Images(tag)
        assert event.step == 12
        assert_holds(io.BytesIO(event.encoded_image_string), picture)


# --------------------------------------------------------------------------------------------------
# W&B


def wandb_records(folder: Path) -> list[Any]:
    """Return what an offline run has written, once its last record is there."""
    from google.protobuf.message import DecodeError

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + 30
    while True:
        try:
            records = parse_wandb(path.read_bytes())
        except DecodeError:  # the last one is being written
            records = []
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < end, f"{path} has no end after {len(records)} records"
        time.sleep(0.05)


def parse_wandb(content: bytes) -> list[Any]:
    """Read LevelDB's log format: records in parts that end with the blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    position, parts, records = 7, b"", []
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]  # 1: whole, 2: first, 3: middle, 4: last
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for record in records:
        if record.HasField("history"):
            rows.append({})
            for item in record.history.item:
                row, names = rows[-1], list(item.nested_key) or [item.key]
                for name in names[:-1]:
                    row = row.setdefault(name, {})
                row[names[-1]] = json.loads(item.value_json)
    return rows


@pytest.fixture
def wandb_logger(loggers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")  # Lightning sets it, and leaves it
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))

    class Derived(loggers.WandbLogger):  # type: ignore[misc]
        pass

    logger = Derived(project="p", save_dir=tmp_path, offline=True)
    yield logger
    wandb.finish()


def test_wandb_holds_pictures_at_the_step_of_the_scalars(
    wandb_logger: Any, picture: Tensor, tmp_path: Path
) -> None:
    for step in (7, 120, 120, 3):  # even a step that was passed is kept
        wandb_logger.log_metrics({"explain/insertion": step / 2}, step=step)
        caption = None if step == 3 else f"at step {step}"
        assert log_image(wandb_logger, "explain/heatmaps", picture, step, caption=caption) is None
    wandb_logger.experiment.finish()
    rows = history_of(wandb_records(tmp_path))
    scalars = [r for r in rows if "explain/insertion" in r]
    assert [(r["trainer/global_step"], r["explain/insertion"]) for r in scalars] == [
        (7, 3.5),
        (120, 60),
        (120, 60),
        (3, 1.5),
    ]
    pictures = [r for r in rows if "explain/heatmaps" in r]
    assert [r["trainer/global_step"] for r in pictures] == [7, 120, 120, 3]
    captions = [r["explain/heatmaps"].get("captions") for r in pictures]
    assert captions[:3] == [["at step 7"], ["at step 120"], ["at step 120"]]
    assert not captions[3]
    for row in pictures:
        (name,) = row["explain/heatmaps"]["filenames"]
        (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{name}")
        assert_holds(file, picture)


def test_wandb_holds_a_table_with_pictures(
    wandb_logger: Any, picture: Tensor, tmp_path: Path
) -> None:
    columns = ["epoch", "class", "score", "map"]
    rows = [[0, "cat", 0.25, pixels(picture)], [1, "dog", None, pixels(picture)]]
    assert log_table(wandb_logger, "explain/table", columns, rows, 9) is True
    with pytest.raises(ValueError, match=r"explain/table has 1 cells for 4 columns: give"):
        log_table(wandb_logger, "explain/table", columns, [[1]], 9)
    wandb_logger.experiment.finish()
    records = wandb_records(tmp_path)
    (row,) = history_of(records)
    assert row["trainer/global_step"] == 9
    assert row["explain/table"]["_type"] == "table-file"
    (artifact,) = [r.artifact for r in records if r.HasField("artifact")]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    table = json.loads(files["explain/table.table.json"].read_text())
    assert table["columns"] == columns
    assert [cells[:3] for cells in table["data"]] == [[0, "cat", 0.25], [1, "dog", None]]
    for cells in table["data"]:
        assert_holds(files[cells[3]["path"]], picture)


def test_only_wandb_has_tables(loggers: Any, tmp_path: Path) -> None:
    for logger in (None, loggers.CSVLogger(tmp_path), loggers.TensorBoardLogger(tmp_path)):
        assert log_table(logger, "a", ["b"], [[1]], 0) is False
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# MLflow


@pytest.mark.sample(2)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_gives_the_pictures_back(
    loggers: Any, picture: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    if store == "sqlite":
        pytest.importorskip("sqlalchemy")
        pytest.importorskip("alembic")
        uri = f"sqlite:///{tmp_path}/runs.db"
    else:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = f"file:{tmp_path}/runs"

    class Derived(loggers.MLFlowLogger):  # type: ignore[misc]
        pass

    logger = Derived(tracking_uri=uri, artifact_location=f"file:{tmp_path}/artifacts")
    for step in (3, 120):
        logger.log_metrics({"explain/insertion": step / 2}, step=step)
        assert log_image(logger, "explain/heat: maps", picture, step, caption=f"é {step}") is None
    logger.finalize("success")

    from mlflow.tracking import MlflowClient

    client, run = MlflowClient(uri), logger.run_id
    history = client.get_metric_history(run, "explain/insertion")
    assert [(m.step, m.value) for m in history] == [(3, 1.5), (120, 60)]
    assert client.get_run(run).data.tags["mlflow.loggedImages"] == "True"
    paths = [a.path for a in client.list_artifacts(run, "images") if a.path.endswith(".png")]
    assert len(paths) == 2
    for step in (3, 120):
        marks = [f"explain.heat maps{mark}step{mark}{step}{mark}" for mark in "+%"]
        (path,) = [p for p in paths if any(m in p for m in marks)]
        assert_holds(client.download_artifacts(run, path), picture)
        text = f"captions/explain/heat maps/step-{step:08d}.txt"
        assert Path(client.download_artifacts(run, text)).read_text("utf-8") == f"é {step}"


# --------------------------------------------------------------------------------------------------
# Comet


@pytest.mark.parametrize("package", ["pytorch_lightning.loggers", "lightning.pytorch.loggers"])
def test_comet_archives_the_pictures_offline(package: str, picture: Tensor, tmp_path: Path) -> None:
    if not importlib.util.find_spec("comet_ml"):
        pytest.skip("comet_ml is not installed")
    pytest.importorskip(package)
    np.save(tmp_path / "picture.npy", picture.numpy())
    run_python(
        f"""
        import numpy as np, torch
        from {package} import CometLogger
        from lightning_aop.monitor.loggers import log_image

        class Derived(CometLogger):
            pass

        picture = torch.from_numpy(np.load("picture.npy"))
        logger = Derived(project="p", prefix="mine", offline_directory="archives")
        logger.log_metrics({{"explain/insertion": 6.0}}, step=12)
        assert log_image(logger, "explain/heatmaps", picture, 12, caption="a caption") is None
        logger.finalize("success")
        logger.experiment.end()
        """,
        tmp_path,
        COMET_START_ONLINE="0",
    )
    (path,) = (tmp_path / "archives").glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("messages.json").decode().splitlines()
        payloads = [json.loads(line)["payload"] for line in lines]
        metrics = [p["metric"] for p in payloads if "metric" in p]
        assert ("mine_explain/insertion", 12) in {(m["metricName"], m["step"]) for m in metrics}
        (upload,) = [p for p in payloads if p.get("upload_type") == "visualization"]
        parameters = upload["additional_params"]
        assert (parameters["figName"], parameters["step"]) == ("mine_explain/heatmaps", 12)
        assert upload["metadata"] == {"caption": "a caption"}
        assert_holds(io.BytesIO(archive.read(upload["file_path"])), picture)


def test_comet_that_takes_no_picture_is_an_error(tmp_path: Path) -> None:
    if not importlib.util.find_spec("comet_ml"):
        pytest.skip("comet_ml is not installed")
    run_python(
        """
        import torch
        from pytorch_lightning.loggers import CometLogger
        from lightning_aop.monitor.loggers import log_image

        logger = CometLogger(online=False, offline_directory="archives")
        try:
            log_image(logger, "a", torch.zeros(3, 2, 2, dtype=torch.uint8), 0)
        except RuntimeError as error:
            assert "Comet took no picture" in str(error), error
        else:
            raise AssertionError
        """,
        tmp_path,
        COMET_START_ONLINE="0",
    )


# --------------------------------------------------------------------------------------------------
# others, whose packages `make test-others` installs


def logged_by(script: str, package: str, picture: Tensor, folder: Path) -> None:
    """Run a script in which `picture` is to be logged, and `log_image` and Trainer are at hand."""
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    np.save(folder / "picture.npy", picture.numpy())
    before = """
        import numpy as np, torch
        from lightning_aop.monitor.loggers import log_image
        picture = torch.from_numpy(np.load("picture.npy"))
    """
    run_python(textwrap.dedent(before) + textwrap.dedent(script), folder)


def test_aim_holds_the_very_pixels(picture: Tensor, tmp_path: Path) -> None:
    logged_by(
        """
        from aim.pytorch_lightning import AimLogger

        class Derived(AimLogger):
            pass

        logger = Derived(repo=".", system_tracking_interval=None, capture_terminal_logs=False)
        for step in (3, 120):
            logger.log_metrics({"explain/insertion": 0.5}, step=step)
            assert log_image(logger, "explain/heatmaps", picture, step, caption=f"at {step}") is None

        from aim.storage.context import Context

        sequence = logger.experiment.get_image_sequence("explain/heatmaps", Context({}))
        steps, images = sequence.values.sparse_list()
        assert list(steps) == [3, 120], steps
        for step, image in zip(steps, images):
            assert image.caption == f"at {step}"
            stored = np.asarray(image.to_pil_image())
            np.testing.assert_array_equal(stored, picture.permute(1, 2, 0).numpy())
        """,
        "aim",
        picture,
        tmp_path,
    )


def test_dvclive_has_a_folder_with_a_picture_for_each_step(picture: Tensor, tmp_path: Path) -> None:
    logged_by(
        """
        from dvclive.lightning import DVCLiveLogger

        class Derived(DVCLiveLogger):
            pass

        logger = Derived(save_dvc_exp=False, dvcyaml=None, prefix="mine")
        for step in (3, 120):
            logger.log_metrics({"explain/insertion": 0.5}, step=step)
            assert log_image(logger, "explain/heatmaps", picture, step, caption="not held") is None
        logger.finalize("success")
        """,
        "dvclive",
        picture,
        tmp_path,
    )
    folder = tmp_path / "dvclive/plots/images/mine/explain/heatmaps"
    assert sorted(path.name for path in folder.iterdir()) == ["120.png", "3.png"]
    for path in folder.iterdir():
        assert_holds(path, picture)


def test_swanlab_holds_the_very_pixels_offline(picture: Tensor, tmp_path: Path) -> None:
    logged_by(
        """
        from swanlab.integration.pytorch_lightning import SwanLabLogger

        class Derived(SwanLabLogger):
            pass

        logger = Derived(project="p", log_dir="logs", mode="offline")
        logger.log_metrics({"explain/insertion": 0.5}, step=12)
        assert log_image(logger, "explain/heatmaps", picture, 12, caption="a caption") is None
        logger.experiment.finish()
        """,
        "swanlab",
        picture,
        tmp_path,
    )
    (path,) = (tmp_path / "logs").rglob("*.png")
    assert_holds(path, picture)


def test_litlogger_is_given_the_very_pixels(
    loggers: Any, picture: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning AI's experiments live on a server: its own series and picture end where one is sent."""
    pytest.importorskip("litlogger")
    from litlogger.series import Series

    sent = []

    class Experiment:
        def __getitem__(self, key: str) -> Series:
            return Series(self, key)

        def _register_key_type(self, key: str, kind: str) -> None:
            assert kind == "file_series"

        def _log_file_series_value(self, key: str, file: Any, index: int, step: int) -> None:
            sent.append((key, file, step))

    class Derived(loggers.LitLogger):  # type: ignore[misc]
        experiment = Experiment()

    logger = Derived(tmp_path)
    assert log_image(logger, "explain/heatmaps", picture, 12, caption="a caption") is None
    ((key, file, step),) = sent
    assert (key, step, file.description) == ("explain/heatmaps", 12, "a caption")
    path = file._get_upload_path()
    assert_holds(path, picture)
    os.unlink(path)


def test_clearml_captures_what_tensorboard_is_given(picture: Tensor, tmp_path: Path) -> None:
    logged_by(
        """
        import os
        os.environ.update(CLEARML_OFFLINE_MODE="1", CLEARML_CACHE_DIR=os.path.abspath("cache"))
        from clearml import Task
        task = Task.init("p", "t", auto_connect_frameworks={"tensorboard": True})
        from pytorch_lightning.loggers import TensorBoardLogger

        logger = TensorBoardLogger(".")
        assert log_image(logger, "explain/heatmaps", picture, 12) is None
        logger.finalize("success")
        task.flush(wait_for_uploads=True)
        task.close()
        """,
        "clearml",
        picture,
        tmp_path,
    )
    (archive,) = (tmp_path / "cache").rglob("*.zip")
    with zipfile.ZipFile(archive) as kept:
        (name,) = [name for name in kept.namelist() if name.endswith((".png", ".jpeg"))]
        with Image.open(io.BytesIO(kept.read(name))) as image:
            assert image.size == (30, 20)


# --------------------------------------------------------------------------------------------------
# any other


def test_a_logger_without_pictures_gets_files(picture: Tensor, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    path = log_image(logger, "explain/heatmaps", picture, 12)
    assert path == Path(logger.log_dir) / "images" / "explain/heatmaps" / "step-00000012.png"
    assert_holds(path, picture)


def test_a_logger_with_log_image_is_asked_first(picture: Tensor) -> None:
    calls: list[Any] = []

    class Own:
        def log_image(self, key: str, images: list[Any], step: int) -> None:
            calls.append((key, images[0], step))

    log_image(Own(), "a/b", picture, 3, caption="it takes none")
    ((key, image, step),) = calls
    assert (key, step) == ("a/b", 3)
    np.testing.assert_array_equal(image, pixels(picture))


def test_the_own_log_image_of_a_derived_logger_counts(picture: Tensor, tmp_path: Path) -> None:
    calls: list[Any] = []

    class Own(CSVLogger):
        def log_image(self, key: str, images: list[Any], step: int, caption: list[str]) -> None:
            calls.append((key, step, caption))

    assert log_image(Own(tmp_path), "a/b", picture, 3, caption="c") is None
    assert calls == [("a/b", 3, ["c"])]


@pytest.mark.parametrize("name", ["CometLogger", "AimLogger", "WandbLogger"])
def test_a_logger_of_the_users_own_that_shares_a_name_is_no_such_logger(
    name: str, picture: Tensor, tmp_path: Path
) -> None:
    logger = type(name, (CSVLogger,), {"__module__": "mine"})(tmp_path)
    path = log_image(logger, "explain/heatmaps", picture, 12)
    assert path is not None
    assert_holds(path, picture)
    assert log_table(logger, "a", ["b"], [[1]], 0) is False


def test_an_experiment_with_add_image_is_asked(picture: Tensor) -> None:
    calls: list[Any] = []

    class Writer:
        def add_image(self, tag: str, image: Tensor, step: int) -> None:
            calls.append((tag, image, step))

    class Own:
        experiment = Writer()

    assert log_image(Own(), "a/b", picture, 3, caption="c") is None
    assert calls == [("a/b", picture, 3)]


def test_a_logger_without_a_directory(picture: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"object can't hold pictures and has no directory.*give"):
        log_image(object(), "a", picture, 0)
    assert log_image(object(), "a", picture, 0, fallback=tmp_path) is not None
