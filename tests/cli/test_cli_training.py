"""fit, validate, test and predict from the shell, with configurations by name."""

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import finish

from lightning_aop.cli.configs import shipped_configs
from lightning_aop.cli.main import main
from lightning_aop.data.shapes import CLASSES, write_shapes

pytest.importorskip("pycocotools")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=24, val=11, size=64)


def options(root: Path, weights: Path, *more: str) -> list[str]:
    return [
        f"--data.root={root}",
        "--data.size=64",
        "--data.batch_size=4",
        "--data.num_workers=0",
        "--data.cache_dir=cache",
        "--model.backbone=squeezenet1_1",
        f"--model.weights={weights}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        *more,
    ]


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["coco_resnet50", "coco_resnet50_cached", "shapes_demo"])
@pytest.mark.parametrize("form", ["{}", "configs/{}.yaml"])
def test_configurations_are_found_by_name(
    name: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in shipped_configs()
    for words in (["--config", form.format(name)], [f"--config={form.format(name)}"]):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *words, "--data.root=somewhere", "--print_config"])
        assert stopped.value.code == 0
        config: Any = yaml.safe_load(capsys.readouterr().out)
        assert config["data"]["root"] == "somewhere"
        classes = [c["class_path"] for c in config["trainer"]["callbacks"]]
        assert "lightning_aop.ExplanationMonitor" in classes


def test_the_paper_s_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=coco_resnet50", "--data.root=x", "--print_config"])
    config: Any = yaml.safe_load(capsys.readouterr().out)
    method = config["trainer"]["callbacks"][1]["init_args"]["method"]
    assert method["class_path"] == "lightning_aop.sigcam"
    assert (method["init_args"]["threshold"], method["init_args"]["scale"]) == (0.6, 0.25)
    assert method["init_args"]["score"] == "lightning_aop.scores.sigmoid"
    assert config["data"]["resize"] == "squash"
    assert config["data"]["size"] == 224


def test_a_file_of_the_user_goes_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("shapes_demo").write_text(f"data: {{root: {root}, batch_size: 7}}")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "shapes_demo", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["batch_size"] == 7


def test_from_fitting_to_predicting(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--data.shapes=80",
        "--data.horizontal_flip=false",
        "--data.features=cached",
        "--model.train_backbone=false",
        "--trainer.max_epochs=1",
    ]
    root = tmp_path / "made"
    assert main(["fit", "--config=shapes_demo", *options(root, weights, *more)]) == 0
    printed = capsys.readouterr().out
    (checkpoint,) = tmp_path.glob("runs/shapes_demo/version_0/checkpoints/epoch*.ckpt")
    assert str(checkpoint.relative_to(tmp_path)) in printed
    assert "tensorboard --logdir" in printed
    assert len(list(tmp_path.glob("runs/**/heatmaps/step-*.png"))) == 2
    made = torch.load(checkpoint, weights_only=True)["preprocess"]
    assert (made["size"], made["resize"]) == (64, "squash")

    weights.rename(tmp_path / "moved.pth")  # the checkpoint has all that is needed
    try:
        for command in ("validate", "test", "predict"):
            words = options(root, weights, f"--ckpt_path={checkpoint}", "--data.shapes=80")
            words = ["--config=shapes_demo", "--trainer.logger=false", *words]
            assert main([command, *words]) == 0
    finally:
        (tmp_path / "moved.pth").rename(weights)
    printed = capsys.readouterr().out
    assert "val/mAP" in printed
    assert "test/mAP" in printed
    with (tmp_path / "predictions.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["file", *CLASSES]
    annotations = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    assert [row[0] for row in rows] == [i["file_name"] for i in annotations["images"]]
    assert all(0 <= float(value) <= 1 for row in rows for value in row[1:])


@pytest.mark.wide
def test_methods_nest_in_the_monitor(root: Path, weights: Path, tmp_path: Path) -> None:
    method = "{class_path: lightning_aop.AOP, init_args: {activation: lightning_aop.GradCAM, "
    method += "perturbation: {class_path: lightning_aop.RankedMask, init_args: "
    method += "{iterations: 2, score: lightning_aop.scores.sigmoid, baseline: {kernel: 11}}}}}"
    monitor = f"{{class_path: lightning_aop.ExplanationMonitor, init_args: {{method: {method}}}}}"
    words = options(root, weights, f"--trainer.callbacks=[{monitor}]", "--trainer.logger=false")
    assert main(["validate", *words]) == 0
    assert list(tmp_path.glob("images/explain/heatmaps/*.png"))


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.root=nowhere"], "--data.root nowhere: no such folder"),
        # Before the network's weights are read, or downloaded.
        (
            ["--data.root=nowhere", "--model.weights=gone.pth"],
            "--data.root nowhere: no such folder",
        ),
        (
            ["--config=coco_resnet5"],
            "did you mean coco_resnet50 or",
        ),
        (["--model.backbone=resnet19"], "'resnet19' is no classifier of torchvision"),
        (["--model.backbone=resnet18"], "are no weights of resnet18"),
        (["--model.weights=gone.pth"], "gone.pth: no such file"),
        (["--model.num_classes=9"], "the head has 9 classes, the data has 6"),
        (["--data.features=cached", "--model.train_backbone=true"], "needs a frozen backbone"),
        (["--config=nothing"], "nothing"),
        (["--ckpt_path=gone.ckpt"], "--ckpt_path gone.ckpt: no such file"),
        (["--ckpt_path=WEIGHTS"], "it is no checkpoint of fit; of weights alone begin anew, with"),
        (["--config=WEIGHTS"], "it is no text in UTF-8"),
        (["--trainer.devices=0"], "--trainer: `Trainer(devices='0')` value is not a valid input"),
        (["--trainer.strategy=nosuch"], "--trainer: You selected an invalid strategy name"),
    ],
)
def test_what_a_user_can_mend_is_said_without_a_traceback(
    arguments: list[str],
    message: str,
    root: Path,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [word.replace("WEIGHTS", str(weights)) for word in arguments]
    try:
        status: Any = main(["fit", *options(root, weights, "--trainer.logger=false"), *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status != 0
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_bad_picture_that_a_worker_meets_is_named(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_shapes(tmp_path / "bad", train=4, val=4, size=64)
    picture = sorted((root / "val2017").iterdir())[1]
    picture.write_bytes(b"")
    words = options(root, weights, "--data.num_workers=1", "--trainer.logger=false")
    assert main(["validate", *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("lightning-aop: ")
    assert picture.name in line
    assert "the file is empty" in line
    assert main(["validate", *words, "--data.on_error=skip"]) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_two_processes_give_the_metrics_of_one(root: Path, weights: Path, tmp_path: Path) -> None:
    """11 pictures to validate: one process gets a blank one, which must not count."""
    fit = options(
        root,
        weights,
        "--data.features=cached",
        "--trainer.max_epochs=2",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.logger={class_path: pytorch_lightning.loggers.CSVLogger, "
        "init_args: {save_dir: two}}",
    )
    monitor = "{class_path: lightning_aop.ExplanationMonitor, init_args: {probe: 2, method: "
    monitor += "lightning_aop.GradCAM}}"
    command = [sys.executable, "-m", "lightning_aop"]
    finish([*command, "fit", *fit, f"--trainer.callbacks=[{monitor}]"], env=ENVIRONMENT)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (table,) = tmp_path.glob("two/**/metrics.csv")
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/mAP"]]
    assert len(rows) == 2

    results = []
    for devices in ("1", "2"):
        words = options(
            root,
            weights,
            f"--ckpt_path={checkpoint}",
            f"--trainer.devices={devices}",
            f"--trainer.strategy={'auto' if devices == '1' else 'ddp'}",
            "--trainer.logger={class_path: pytorch_lightning.loggers.CSVLogger, "
            f"init_args: {{save_dir: validated{devices}}}}}",
        )
        if devices == "1":
            assert main(["validate", *words]) == 0
        else:
            finish([*command, "validate", *words], env=ENVIRONMENT)
        (path,) = tmp_path.glob(f"validated{devices}/**/metrics.csv")
        with path.open(newline="") as file:
            (row,) = csv.DictReader(file)
        results.append({k: float(v) for k, v in row.items() if k.startswith("val/")})
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    # And they are what two processes saw while they trained.
    assert results[0]["val/mAP"] == pytest.approx(float(rows[-1]["val/mAP"]), abs=1e-5)


def test_the_processes_part_before_the_interpreter_ends(root: Path, weights: Path) -> None:
    words = options(root, weights, "--trainer.strategy=ddp", "--trainer.devices=1")
    words += ["--trainer.logger=false", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    assert main(["fit", *words, "--data.features=cached"]) == 0
    assert not torch.distributed.is_initialized()


def test_predicting_needs_a_checkpoint(
    root: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *options(root, weights)]) == 1
    assert "the head is untrained; name a checkpoint" in capsys.readouterr().err


def test_nothing_of_the_user_is_overwritten(root: Path, weights: Path, tmp_path: Path) -> None:
    own = tmp_path / "config.yaml"
    own.write_text("# mine\ndata: {batch_size: 2}\n")
    (tmp_path / "shapes_demo").mkdir()  # a folder is no configuration
    words = ["--config=shapes_demo", *options(root, weights, f"--config={own}")]
    words += ["--data.shapes=null", "--trainer.callbacks=null", "--trainer.logger=false"]
    assert main(["validate", *words]) == 0
    assert own.read_text() == "# mine\ndata: {batch_size: 2}\n"


@pytest.mark.wide
def test_the_command_line_goes_before_the_checkpoint(
    root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = options(root, weights, "--trainer.max_epochs=1")
    assert main(["fit", *fit]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    more = [f"--ckpt_path={checkpoint}", "--model.per_class=true", "--trainer.logger=false"]
    assert main(["test", *options(root, weights, *more)]) == 0
    assert "test/AP/" in capsys.readouterr().out
    # Going on from a checkpoint leaves the weights of the configuration in the new one.
    assert main(["fit", *fit[:-1], "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"]) == 0
    config: Any = yaml.safe_load(Path("lightning_logs/version_1/config.yaml").read_text())
    assert config["model"]["weights"] == str(weights)
