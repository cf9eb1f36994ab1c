"""What a run stores is read back as it was, also where the process was ended in the middle."""

import json
import math
import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import pytorch_lightning as pl
import scipy.stats
import torch
from conftest import SmallNet
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import ExplanationMonitor
from lightning_aop.history.rows import COLUMNS, evolution_rows
from lightning_aop.history.store import History, HistoryWriter, Record, readable, stored
from lightning_aop.methods.cam import GradCAM

IMAGES = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
MASKS = IMAGES[:, 0] > 100


def record(step: int, pairs: list[tuple[int, int]]) -> Record:
    return Record(
        step=step,
        epoch=step,
        title=f"epoch {step}",
        values={"overall_auc": 0.5 / (1 + step), "pointing_game": math.nan},
        images=[image for image, _ in pairs],
        targets=[target for _, target in pairs],
        scores=[0.25] * len(pairs),
        blank=[False] * len(pairs),
        drift=[None] * len(pairs),
        deletion_auc=[0.125 * image if image else None for image, _ in pairs],
        insertion_auc=[0.25 * image if image else None for image, _ in pairs],
        controls={"random map": {"overall_auc": 0.01}} if step == 1 else {},
        control_aucs={"random map": [0.01 * image or None for image, _ in pairs]}
        if step == 1
        else {},
    )


def maps(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 10, 15), dtype=torch.uint8, generator=generator)


def begin(folder: Path) -> HistoryWriter:
    return HistoryWriter(
        folder,
        IMAGES,
        configuration={"method": 'a "quoted" one'},
        class_names={3: "Käse"},
        masks={(0, 3): MASKS[0], (1, 2): MASKS[1]},
    )


PAIRS = [[(0, 3)], [(0, 3), (1, 2), (1, 0)], [(1, 2), (0, 3)]]


def written(folder: Path) -> HistoryWriter:
    writer = begin(folder)
    for step, pairs in enumerate(PAIRS):
        writer.add(record(step, pairs), maps(step, len(pairs)))
    return writer


def check(folder: Path, count: int) -> None:
    found = History.load(folder)
    assert len(found.records) == count
    for step, pairs in enumerate(PAIRS[:count]):
        each = found.records[step]
        assert (each.step, each.title) == (step, f"epoch {step}")
        assert each.pairs == pairs
        made = record(step, pairs)
        assert each.deletion_auc == made.deletion_auc
        assert each.insertion_auc == made.insertion_auc
        assert each.controls == made.controls
        assert each.control_aucs == made.control_aucs
        assert each.values["overall_auc"] == 0.5 / (1 + step)
        assert math.isnan(each.values["pointing_game"])
        expected = maps(step, len(pairs)).numpy()
        assert np.array_equal(found.maps[each.first : each.end], expected)


def test_all_is_read_back(tmp_path: Path) -> None:
    written(tmp_path)
    check(tmp_path, 3)
    found = History.load(tmp_path)
    assert np.array_equal(found.images, IMAGES.permute(0, 2, 3, 1).numpy())
    assert found.configuration == {"method": 'a "quoted" one'}
    assert found.class_names == {3: "Käse"}
    assert list(found.masks) == [(0, 3), (1, 2)]
    assert np.array_equal(np.stack(list(found.masks.values())), MASKS.numpy())
    # The two lines of the documentation.
    plain = np.load(tmp_path / "maps.npy") / 255
    assert plain.shape == (6, 10, 15)
    assert 0 <= plain.min() < plain.max() <= 1
    for line in (tmp_path / "history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN, which JSON does not have


def test_many_records_fit_the_header(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    for step in range(120):
        writer.add(record(step, [(0, 3)] * 9), maps(step, 9))
    assert np.load(tmp_path / "maps.npy").shape == (1080, 10, 15)
    assert np.array_equal(np.load(tmp_path / "maps.npy")[-9:], maps(119, 9).numpy())


@pytest.mark.parametrize("lost", [1, 10, 60])
def test_a_half_written_record_does_not_count(tmp_path: Path, lost: int) -> None:
    written(tmp_path)
    path = tmp_path / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-lost])
    check(tmp_path, 2)
    # The resumed run writes the third again.
    writer = begin(tmp_path)
    writer.keep(readable(tmp_path, 2, 2))
    check(tmp_path, 2)
    writer.add(record(2, PAIRS[2]), maps(2, 2))
    check(tmp_path, 3)


def test_maps_without_their_record_do_not_count(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    writer.add(record(0, PAIRS[0]), maps(0, 1))
    lines = (tmp_path / "history.jsonl").read_bytes()
    writer.add(record(1, PAIRS[1]), maps(1, 3))
    (tmp_path / "history.jsonl").write_bytes(lines)
    check(tmp_path, 1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_run_goes_on_in_another_folder(tmp_path: Path, count: int) -> None:
    written(tmp_path / "old")
    writer = begin(tmp_path / "new")
    writer.keep(readable(tmp_path / "old", 2, count))
    check(tmp_path / "new", count)
    check(tmp_path / "old", 3)
    for step in range(count, 3):
        writer.add(record(step, PAIRS[step]), maps(step, len(PAIRS[step])))
    check(tmp_path / "new", 3)
    assert readable(tmp_path / "old", 2, 3).lost == []
    assert readable(tmp_path / "old", 2, 4).lost == ["history.jsonl has 3 records, not 4"]


def test_the_first_and_the_last_maps_by_picture_and_class(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    assert writer.earlier_maps() == []
    for step in range(3):
        made = record(step, [(0, 3), (1, 2)])
        made.blank[1] = step == 0
        writer.add(made, maps(step, 2))
        found = writer.earlier_maps()
        assert [title for title, _ in found] == ["epoch 0", f"epoch {step}"][step == 0 :]
        assert list(found[0][1]) == [(0, 3), (1, 2)]
        assert np.array_equal(found[0][1][0, 3], maps(0, 2)[0].numpy())
        assert np.array_equal(found[-1][1][0, 3], maps(step, 2)[0].numpy())
    writer = begin(tmp_path)
    writer.keep(readable(tmp_path, 2, 2))
    assert [title for title, _ in writer.earlier_maps()] == ["epoch 0", "epoch 1"]


def test_what_is_stored_of_a_map() -> None:
    x = torch.rand(2, 224, 448)
    small = stored(x)
    assert small.shape == (2, 56, 112)
    means = x.reshape(2, 56, 4, 112, 4).mean(dim=(2, 4))
    assert (small / 255 - means).abs().max() <= 0.5 / 255 + 1e-6
    tiny = torch.tensor([[[0.0, 1.0], [torch.nan, 0.5]]])
    assert stored(tiny).tolist() == [[[0, 255], [0, 128]]]


def test_errors_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="explanations"):
        History.load(tmp_path)
    written(tmp_path)
    (tmp_path / "images.npy").write_bytes(b"broken")
    with pytest.raises(ValueError, match=str(tmp_path)):
        History.load(tmp_path)


# --------------------------------------------------------------------------------------------------
# in training


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, index: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class Data(TensorDataset):
    classes = ("zero", "one", "two", "three", "four")


def fit(folder: Path, *, epochs: int = 3, ckpt_path: Path | None = None, **options: Any) -> Any:
    """Return the trainer, and the figures that it had after each epoch."""
    generator = torch.Generator().manual_seed(0)
    data = Data(torch.rand(6, 3, 24, 24, generator=generator), torch.arange(6) % 5)
    logged: list[dict[str, float]] = []

    class Log(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            logged.append({name: float(v) for name, v in trainer.callback_metrics.items()})

    monitor, others = options.pop("monitor", {}), options.pop("others", [])
    monitor = ExplanationMonitor(**({"method": GradCAM(), "probe": 3} | monitor))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*others, monitor, Log()],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **({"logger": False} | options),
    )
    loaders = [DataLoader(data, batch_size=3) for _ in range(2)]
    trainer.fit(Module(), *loaders, ckpt_path=ckpt_path)
    return trainer, logged


def test_the_monitor_stores_what_it_logs(tmp_path: Path) -> None:
    _, logged = fit(tmp_path)
    found = History.load(tmp_path / "explanations")
    assert [r.title for r in found.records] == ["before training"] + [
        f"epoch {n} · step {2 * n + 1}" for n in range(3)
    ]
    assert found.class_names == dict(enumerate(Data.classes))
    assert found.images.shape == (3, 24, 24, 3)
    assert found.configuration["method"].startswith("GradCAM(")
    for record, values in zip(found.records[1:], logged, strict=True):
        shown = {f"explain/{name}": value for name, value in record.values.items()}
        # What could not be measured is NaN in the record, and the last value where it is logged.
        known = {name: value for name, value in shown.items() if np.isfinite(value)}
        assert known == pytest.approx({n: v for n, v in values.items() if n in known})
        assert shown.keys() - known.keys() <= {"explain/overall_auc_normalised"}
        lines = {f"explain/overall_auc_{name}" for name in ("random_map", "centre_gaussian")}
        assert shown.keys() | lines == {name for name in values if name.startswith("explain/")}


def test_what_is_stored_of_each_map_is_that_of_its_pixels(tmp_path: Path) -> None:
    """The curves, where it is hottest, and how that and its heat lie to the object."""
    size = 24

    class Masked(Data):
        def input_masks(self, index: int, classes: list[int]) -> Tensor:
            mask = torch.zeros(len(classes), size, size, dtype=torch.bool)
            mask[:, 3 + index : 12, 5:15] = index != 2  # the third has no object
            return mask

    maps = torch.rand(3, size, size, generator=torch.Generator().manual_seed(1))

    class Given:
        def explain(self, model: Any, images: Tensor, targets: Tensor) -> Tensor:
            return maps.clone()

    data = Masked(torch.rand(3, 3, size, size), torch.arange(3))
    before = time.time()
    fit(tmp_path, epochs=1, monitor={"method": Given(), "probe": data})
    found = History.load(tmp_path / "explanations")
    assert found.epochs == 1
    assert found.finished
    assert found.configuration["data"] == "Masked"
    record = found.records[-1]
    assert record.time is not None
    assert before - 1 <= record.time <= time.time() + 1
    for n in range(3):
        for curve, area in (
            (record.deletion, record.deletion_auc),
            (record.insertion, record.insertion_auc),
        ):
            points = curve[n]
            assert points is not None
            assert area[n] == pytest.approx(np.trapezoid(points) / (len(points) - 1), abs=1e-4)
        values = maps[n].numpy().astype(float)
        y, x = np.unravel_index(values.argmax(), values.shape)
        assert record.peaks[n] == pytest.approx([(y + 0.5) / size, (x + 0.5) / size], abs=1e-4)
        mask = np.zeros((size, size), bool)
        mask[3 + n : 12, 5:15] = n != 2
        if not mask.any():
            assert record.energy[n] is record.hits[n] is record.away[n] is None
            continue
        assert record.energy[n] == pytest.approx(values[mask].sum() / values.sum())
        assert record.hits[n] == mask[y, x]
        rows, columns = np.nonzero(mask)
        assert record.away[n] == pytest.approx(np.hypot(rows - y, columns - x).min() / size)


def test_the_configuration_names_functions(tmp_path: Path) -> None:
    fit(tmp_path, epochs=1, monitor={"method": None, "metrics": False})
    method = History.load(tmp_path / "explanations").configuration["method"]
    assert "score=softmax," in method
    assert "0x" not in method


def test_drift_against_scipy(tmp_path: Path) -> None:
    fit(tmp_path)
    found = History.load(tmp_path / "explanations")
    assert found.records[0].drift == [None] * 3
    assert "drift" not in found.records[0].values
    compared = 0
    for before, now in pairwise(found.records):
        expected = []
        for place, drift in enumerate(now.drift):
            if before.blank[place] or now.blank[place]:
                assert drift is None
                continue
            one, other = (
                found.maps[record.first + place].ravel().astype(float) for record in (before, now)
            )
            expected.append(1 - scipy.stats.spearmanr(one, other).statistic)
            assert drift == pytest.approx(expected[-1])
            compared += 1
        if expected:
            assert now.values["drift"] == pytest.approx(np.mean(expected))
    assert compared >= 3


@pytest.mark.wide
def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        fit(tmp_path, epochs=1)
    assert {p.name for p in tmp_path.glob("expl*")} == {"explanations", "explanations-2"}
    for name in ("a", "b"):
        trainer, _ = fit(tmp_path, epochs=1, logger=CSVLogger(tmp_path, name=name))
        assert (Path(trainer.logger.log_dir) / "explanations" / "maps.npy").exists()


def test_a_resumed_run_takes_its_history_along(tmp_path: Path) -> None:
    def logger() -> CSVLogger:
        return CSVLogger(tmp_path)  # a new version, and folder, each time

    fit(tmp_path / "whole", epochs=4)
    trainer, _ = fit(tmp_path, epochs=2, logger=logger())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    fit(tmp_path, epochs=4, logger=logger(), ckpt_path=tmp_path / "two.ckpt")
    folders = sorted(tmp_path.rglob("version_*/explanations"))
    assert [len(History.load(folder).records) for folder in folders] == [3, 5]
    whole = History.load(tmp_path / "whole" / "explanations")
    resumed = History.load(folders[1])
    assert [r.title for r in resumed.records] == [r.title for r in whole.records]
    end = whole.records[3].first
    assert np.array_equal(resumed.maps[:end], whole.maps[:end])
    assert resumed.records[3].drift != [None] * 3  # the first of its own knows the one before


def test_a_lost_history_ends_no_training(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "one", epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    shutil.rmtree(tmp_path / "one")
    with pytest.warns(UserWarning, match="history.jsonl has 0 records, not 2"):
        trainer, logged = fit(tmp_path / "two", epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert len(logged) == 1
    assert len(History.load(tmp_path / "two" / "explanations").records) == 1


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "explanations").write_text("a file, not a folder")
    (tmp_path / "explanations-2").symlink_to(tmp_path / "nowhere" / "at" / "all")
    fit(tmp_path)
    assert (tmp_path / "explanations").read_text() == "a file, not a folder"
    assert len(History.load(tmp_path / "explanations-3").records) == 4


@pytest.mark.filterwarnings("ignore:ExplanationMonitor. no picture was written")
def test_an_unwritable_folder_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.warns(UserWarning, match="history can't be read or written") as caught:
        _, logged = fit(tmp_path / "file" / "run")  # not even root can make a folder there
    assert len([w for w in caught if "history" in str(w.message)]) == 1
    assert "explain/overall_auc" in logged[0]


def test_nothing_is_stored_where_nothing_was_asked_for(tmp_path: Path) -> None:
    fit(tmp_path, epochs=1, monitor={"store": False})
    fit(tmp_path, fast_dev_run=True)
    assert not list(tmp_path.rglob("maps.npy"))


def test_the_rows_of_the_table(tmp_path: Path) -> None:
    writer = written(tmp_path)
    last = record(3, [(1, 2)])
    last.blank[0] = True
    writer.add(last, maps(3, 1))
    rows = evolution_rows(History.load(tmp_path))
    assert len(rows) == sum(map(len, PAIRS)) + 1
    found = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    assert [row["epoch"] for row in found] == [0, 1, 1, 1, 2, 2, 3]
    assert [row["class"] for row in found][:3] == ["Käse", "Käse", "class 2"]
    assert found[-1]["map"] is None
    assert found[0]["deletion AUC"] is found[0]["overall AUC"] is None
    assert [found[2][f"{name} AUC"] for name in ("deletion", "insertion", "overall")] == [
        0.125,
        0.25,
        0.125,
    ]
    # A cell of the second map of step 1, by the formula of the overlay.
    picture = IMAGES[1].float().reshape(3, 10, 2, 15, 2).mean(dim=(2, 4))[:, 4, 7] / 255
    value = float(maps(1, 3)[1, 4, 7]) / 255
    base = 0.75 * (0.2 * picture + 0.8 * (picture * torch.tensor([0.299, 0.587, 0.114])).sum())
    heat = torch.tensor(matplotlib.colormaps["inferno"](round(value * 255))[:3])
    share = 0.85 * value**0.75
    expected = 255 * ((1 - share) * base + share * heat)
    seen = torch.from_numpy(found[2]["map"][4, 7].astype(float))
    assert (seen - expected).abs().max() < 3
    assert len(evolution_rows(History.load(tmp_path), records=2)) == 3


def test_wandb_gets_the_table(tmp_path: Path) -> None:
    wandb_logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(tmp_path, epochs=1, logger=wandb_logger)
    wandb_logger.experiment.finish()
    (path,) = tmp_path.rglob("files/media/table/explain/evolution*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == list(COLUMNS)
    assert [row[0] for row in table["data"]] == [0] * 6
    assert {row[COLUMNS.index("verdict")] for row in table["data"]} <= {"right", "wrong"}
    (path,) = tmp_path.rglob("files/media/table/explain/overall_auc_and_controls*.json")
    table = json.loads(path.read_text())
    found = History.load(next(tmp_path.rglob("maps.npy")).parent)
    lines = {"overall AUC": [], "random map": [], "centre gaussian": []}
    for record in found.records:
        lines["overall AUC"].append([record.step, record.values["overall_auc"]])
        for name, values in record.controls.items():
            lines[name].append([record.step, values["overall_auc"]])
    for name, line in lines.items():
        drawn = [[row[0], row[2]] for row in table["data"] if row[1] == name]
        assert drawn == [pytest.approx(point) for point in line]
        assert drawn
