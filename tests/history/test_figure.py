"""The figure and the tables that are made of a run."""

import csv
import json
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pages import overall, save, synthetic
from PIL import Image

from lightning_aop.cli.main import main
from lightning_aop.errors import InvalidValueError
from lightning_aop.history import write_figure, write_numbers


def texts(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_figure_has_a_row_an_explanation_and_a_column_an_epoch(tmp_path: Path) -> None:
    history = synthetic()
    save(history, tmp_path)
    made = write_figure(tmp_path, tmp_path / "out" / "f.svg", explanations=[1, 3, 5], epochs=[4, 2])
    drawn = texts(made)
    words = re.findall(r"<text[^>]*>([^<]*)<", drawn)
    assert [word for word in words if word.startswith("epoch")] == ["epoch 4", "epoch 2"]
    names = [history.class_name(target) for target in (1, 3, 5)]
    assert [word for word in words if word in names] == names
    scores = [
        "blank" if history.records[r].blank[k] else f"{history.records[r].scores[k]:.2f}"
        for k in (1, 3, 5)
        for r in (4, 2)
    ]
    assert [word for word in words if re.fullmatch(r"blank|0\.\d\d", word)] == scores
    assert drawn.count("<image") >= 9


def test_dollars_in_names_are_drawn(tmp_path: Path) -> None:
    history = replace(synthetic(), class_names={k: f"$class_{k}_$" for k in range(7)})
    save(history, tmp_path)
    assert ">$class_0_$<" in texts(write_figure(tmp_path, tmp_path / "f.svg"))


@pytest.mark.wide
def test_a_figure_is_as_wide_as_its_columns_with_text_as_text(tmp_path: Path) -> None:
    save(synthetic(), tmp_path)
    for columns, inches in ((1, 3.3), (2, 6.9)):
        path = write_figure(tmp_path, tmp_path / "f.pdf", columns=columns)
        content = path.read_bytes()
        box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", content)
        assert box is not None
        assert float(box[1]) == pytest.approx(72 * inches)
        assert b"/FontFile2" in content  # TrueType
        assert b"/Type3" not in content
        streams = [
            zlib.decompress(part)
            for part in re.findall(rb"/FlateDecode.*?stream\r?\n(.*?)\r?\nendstream", content, re.S)
        ]
        assert any(b" Tj" in stream or b" TJ" in stream for stream in streams)


def test_a_figure_is_light(tmp_path: Path) -> None:
    save(synthetic(), tmp_path)
    pixels = np.asarray(Image.open(write_figure(tmp_path, tmp_path / "f.png")).convert("RGB"))
    assert (pixels[0] == 255).all()
    assert (pixels[:, 0] == 255).mean() > 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "f.jpg"}, "must end in one of .pdf"),
        ({"explanations": [0, 6]}, "must be some of 0 to 5"),
        ({"explanations": 0}, "must be some of 0 to 5"),
        ({"epochs": [9]}, "epoch 9 was not explained: choose from -1, 1, 2, 3, 4"),
        ({"columns": 3}, "must be 1 or 2"),
    ],
)
def test_what_a_figure_cannot_show_is_said(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    save(synthetic(), tmp_path)
    path = tmp_path / str(settings.pop("path", "f.pdf"))
    with pytest.raises(InvalidValueError, match=re.escape(message)):
        write_figure(tmp_path, path, **settings)  # type: ignore[arg-type]
    assert not path.exists()


def test_the_numbers_of_a_run_go_to_other_programs(tmp_path: Path) -> None:
    history = synthetic()
    save(history, tmp_path)
    with write_numbers(tmp_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = json.loads(write_numbers(tmp_path, "json").read_text(), parse_constant=pytest.fail)[
        "times"
    ]
    assert len(rows) == sum(len(record.images) for record in history.records)
    assert len(times) == len(history.records)
    number = 0
    for time, record in zip(times, history.records, strict=True):
        assert time["values"] == {n: None if math.isnan(v) else v for n, v in record.values.items()}
        assert time["controls"] == record.controls
        for k, each in enumerate(time["explanations"]):
            row = rows[number]
            number += 1
            assert each["deletion"] == record.deletion[k]
            assert each["control_aucs"] == {n: v[k] for n, v in record.control_aucs.items()}
            expected = {
                "epoch": record.epoch,
                "step": record.step,
                "image": record.images[k],
                "target": record.targets[k],
                "verdict": record.verdicts[k],
                "score": record.scores[k],
                "predicted_class": history.class_name(record.predicted[k]),
                "overall_auc": overall(record, k),
                "energy_in_mask": record.energy[k],
                "drift": record.drift[k],
                "blank": record.blank[k],
            }
            assert {name: each[name] for name in expected} == expected
            assert {name: row[name] for name in expected} == {
                name: "" if value is None else str(value) for name, value in expected.items()
            }
    with pytest.raises(InvalidValueError, match="must be 'csv' or 'json'"):
        write_numbers(tmp_path, "xml")


def test_the_command_makes_figures_tables_and_comparisons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "version_0" / "explanations", tmp_path / "version_0" / "explanations-other"
    c = tmp_path / "version_1" / "explanations"
    for folder in (a, b, c):
        save(synthetic(records=2), folder)
    assert main(["report", str(tmp_path / "version_0")]) == 0
    made = capsys.readouterr().out.splitlines()
    assert made[-1] == str(tmp_path / "version_0" / "comparison.html")  # of the monitors of a run
    assert main(["report", str(a), str(c)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(a / "comparison.html")]
    figure = tmp_path / "figure.pdf"
    words = ["--figure", str(figure), "--rows", "0", "2", "--epochs", "-1", "1"]
    assert main(["report", str(c), *words]) == 0
    assert figure.stat().st_size > 1000
    assert main(["report", str(tmp_path), "--export", "csv"]) == 0
    assert all((folder / "explanations.csv").exists() for folder in (a, b, c))
    capsys.readouterr()
    for wrong, message in (
        ([str(tmp_path), str(c)], "holds 3 histories: name one"),
        ([str(tmp_path / "version_0"), "--figure", "f.pdf"], "holds 2 histories: name one"),
        ([str(a), str(c), "--figure", "f.pdf"], "--figure is of one run, not of 2"),
        ([str(a), "--export", "xml"], "--export xml: must be csv or json"),
    ):
        assert main(["report", *wrong]) == 1
        assert message in capsys.readouterr().err
    assert main(["report", str(c), "--figure", "f.pdf", "--epochs", "7"]) == 1
    assert "epoch 7 was not explained" in capsys.readouterr().err
