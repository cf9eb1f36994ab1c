"""A history that is damaged, of a later version, or gone: what is whole of it is kept, and goes on."""

import errno
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from test_store import PAIRS, begin, fit, maps, record, written

from lightning_aop.cli.main import main
from lightning_aop.history import History
from lightning_aop.history.rows import evolution_rows
from lightning_aop.history.store import readable
from lightning_aop.monitor.run_folder import RunFolder

Damage = Callable[[Path], None]


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "history.jsonl").read_bytes().splitlines(keepends=True)


def line(number: int, content: bytes) -> Damage:
    """Put something in the place of a line."""

    def damage(folder: Path) -> None:
        lines = lines_of(folder)
        lines[number] = content
        (folder / "history.jsonl").write_bytes(b"".join(lines))

    return damage


def fields(number: int, **changes: Any) -> Damage:
    """Give fields of a record other values, or, of None, none at all."""

    def damage(folder: Path) -> None:
        found = json.loads(lines_of(folder)[number]) | changes
        found = {name: value for name, value in found.items() if value is not None}
        line(number, json.dumps(found).encode() + b"\n")(folder)

    return damage


def content(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def array(name: str, values: np.ndarray) -> Damage:
    return lambda folder: np.save(folder / name, values)


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


# The damage done to three records of 1, 3 and 2 maps, and which of them are whole then.
DAMAGES: dict[str, tuple[Damage, list[int]]] = {
    "the last line is cut": (content("history.jsonl", lambda b: b[:-40]), [0, 1]),
    "a line in the middle is no JSON": (line(1, b'{"step": 1, \n'), [0, 2]),
    "a line is not even text": (line(0, b"\x00\xff\xfe\n"), [1, 2]),
    "a line is a list": (line(1, b"[1, 2]\n"), [0, 2]),
    "a line is nested too deeply": (line(1, b"[" * 100_000 + b"\n"), [0, 2]),
    "a step is a text": (fields(1, step="1"), [0, 2]),
    "a title is a number": (fields(2, title=3), [0, 1]),
    "a value is a list": (fields(0, values={"overall_auc": [1]}), [1, 2]),
    "the values are a list": (fields(0, values=[1]), [1, 2]),
    "the controls are numbers": (fields(1, controls={"random map": 1}), [0, 2]),
    "a control has too few values": (fields(1, control_aucs={"random map": [0.5]}), [0, 2]),
    "a control has a text": (fields(1, control_aucs={"random map": ["a", "b", "c"]}), [0, 2]),
    "the values of the controls have no names": (fields(1, control_aucs=[0.1, 0.2, 0.3]), [0, 2]),
    "a list is too short": (fields(1, scores=[0.5]), [0, 2]),
    "images are no list": (fields(1, images=3), [0, 2]),
    "an image that is not there": (fields(2, images=[0, 7]), [0, 1]),
    "a verdict is a number": (fields(2, verdicts=[1, 2]), [0, 1]),
    "a place below 0": (fields(1, first=-5), [0, 2]),
    "a place beyond the end": (fields(2, first=5), [0, 1]),
    "a number beyond all numbers": (fields(1, step=10**400), [0, 2]),
    "a field is missing": (fields(1, targets=None), [0, 2]),
    "history.jsonl is empty": (content("history.jsonl", lambda b: b""), []),
    "history.jsonl is gone": (removed("history.jsonl"), []),
    "maps.npy is empty": (content("maps.npy", lambda b: b""), []),
    "maps.npy is cut": (content("maps.npy", lambda b: b[:-100]), [0, 1]),
    "maps.npy is text": (content("maps.npy", lambda b: b"broken" * 100), []),
    "maps.npy is gone": (removed("maps.npy"), []),
    "maps.npy holds floats": (array("maps.npy", np.zeros((6, 10, 15))), []),
    "maps.npy has two dimensions": (array("maps.npy", np.zeros((6, 150), np.uint8)), []),
    "maps.npy has maps of no size": (array("maps.npy", np.zeros((6, 0, 15), np.uint8)), []),
}
AROUND: dict[str, Damage] = {
    "run.json is empty": content("run.json", lambda b: b""),
    "run.json is a list": content("run.json", lambda b: b"[]"),
    "masks.npy is empty": content("masks.npy", lambda b: b""),
    "masks.npy is gone": removed("masks.npy"),
    "masks of another size": array("masks.npy", np.zeros((2, 3, 3), bool)),
}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_records(folder: Path, steps: list[int]) -> History:
    """Expect these records, each with its own maps."""
    found = History.load(folder)
    assert [each.step for each in found.records] == steps
    for each in found.records:
        expected = maps(each.step, len(PAIRS[each.step])).numpy()
        assert np.array_equal(found.maps[each.first : each.end], expected)
    return found


@pytest.mark.parametrize("kind", DAMAGES)
def test_whole_records_are_read_and_go_on_beside(kind: str, tmp_path: Path) -> None:
    damage, whole = DAMAGES[kind]
    source = tmp_path / "explanations"
    written(source)
    damage(source)
    found = check_records(source, whole)
    evolution_rows(found)
    said: list[str] = []
    run = RunFolder(said.append)
    run.take_up({"folder": str(source), "records": 3})
    before = bytes_of(source)
    run.open(source, 2, begin)
    assert bytes_of(source) == before
    beside = tmp_path / "explanations-2"
    assert not check_records(beside, whole).lost
    (warning,) = said
    assert f"{len(whole)} of its 3 records go on in {beside}" in warning
    writer = run._writer
    assert writer is not None
    writer.add(record(2, PAIRS[2]), maps(2, 2))
    check_records(beside, [*whole, 2])


@pytest.mark.sample(12)
@pytest.mark.parametrize("kind", [*DAMAGES, *AROUND])
def test_the_command_shows_what_is_left_and_says_what_is_not(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path)
    damage, whole = DAMAGES.get(kind) or (AROUND[kind], [0, 1, 2])
    damage(tmp_path)
    half = kind in ("the last line is cut", "history.jsonl is empty", "history.jsonl is gone")
    # A run that goes on, or has hardly begun, looks like that.
    assert main(["report", str(tmp_path)]) == (0 if half else 1)
    said = capsys.readouterr().err
    assert ("can't be read" in said) != half
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="record"') == len(whole)
    assert (tmp_path / "evolution.gif").exists() == bool(whole)


@pytest.mark.parametrize("gone", [removed("images.npy"), array("images.npy", np.zeros(3))])
def test_without_images_there_is_no_page_but_the_records_go_on(
    gone: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "explanations"
    written(source)
    gone(source)
    assert main(["report", str(source)]) == 1
    assert "images.npy" in capsys.readouterr().err
    run = RunFolder(pytest.fail)
    run.take_up({"folder": str(source), "records": 3})
    run.open(source, 2, begin)  # has the images, and stores them again
    check_records(source, [0, 1, 2])


def test_a_later_version_is_read_and_left_alone(tmp_path: Path) -> None:
    source = tmp_path / "explanations"
    written(source)
    for number in range(3):
        fields(number, mood="good")(source)
    before = bytes_of(source)
    assert not check_records(source, [0, 1, 2]).lost
    said: list[str] = []
    run = RunFolder(said.append)
    run.take_up({"folder": str(source), "records": 3})
    run.open(source, 2, begin)
    assert bytes_of(source) == before
    check_records(tmp_path / "explanations-2", [0, 1, 2])
    assert "a later version has written mood" in said[0]


def test_a_folder_that_cannot_be_written_is_left_for_another(tmp_path: Path) -> None:
    source = tmp_path / "explanations"
    written(source)
    (source / "run.json").unlink()
    (source / "run.json").mkdir()  # not even root can write a file there
    said: list[str] = []
    run = RunFolder(said.append)
    run.take_up({"folder": str(source), "records": 3})
    run.open(source, 2, begin)
    check_records(tmp_path / "explanations-2", [0, 1, 2])
    assert "3 of its 3 records" in said[0]


def test_a_record_that_the_disk_has_no_room_for_costs_no_other(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    run = RunFolder(pytest.fail)
    run.open(tmp_path / "explanations", 2, begin)
    writer = run._writer
    assert writer is not None
    for step in (0, 1):
        writer.add(record(step, PAIRS[step]), maps(step, len(PAIRS[step])))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (writer.folder / "maps.npy").stat().st_size + 100  # for less than a map
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            writer.add(record(2, PAIRS[2]), maps(2, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not check_records(writer.folder, [0, 1]).lost
    run.open(tmp_path / "explanations", 2, begin)  # which is as good as before
    assert run._writer is writer
    writer.add(record(2, PAIRS[2]), maps(2, 2))
    check_records(writer.folder, [0, 1, 2])


def test_attempts_that_fail_leave_no_folders(tmp_path: Path) -> None:
    def full(folder: Path) -> Any:
        begin(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunFolder(pytest.fail)
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            run.open(tmp_path / "explanations", 2, full)
    assert not list(tmp_path.iterdir())


def test_no_two_runs_write_one_folder(tmp_path: Path) -> None:
    """Two runs are resumed from one checkpoint: the first one leaves the folder to the second."""
    source = tmp_path / "explanations"
    written(source)
    said: list[list[str]] = [[], []]
    runs = [RunFolder(each.append) for each in said]
    for run in runs:
        run.take_up({"folder": str(source), "records": 2})
        run.open(source, 2, begin)
    for run in runs[::-1]:
        run.open(source, 2, begin)
        assert run._writer is not None
        run._writer.add(record(2, PAIRS[2]), maps(2, 2))
    assert [run.folder for run in runs] == [tmp_path / "explanations-2", source]
    for run in runs:
        assert run.folder is not None
        check_records(run.folder, [0, 1, 2])
    assert "someone else has changed it" in said[0][0]
    assert said[1] == []


# --------------------------------------------------------------------------------------------------
# in training


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file, not a folder")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("damage", "epochs"),
    [
        (delete, [1, 2]),
        (replace_by_a_file, [1, 2]),
        (removed("images.npy"), [0, 0, 1, 2]),
        (removed("history.jsonl"), [1, 2]),
        (content("maps.npy", lambda b: b[:-3]), [0, 1, 2]),
    ],
    ids=["deleted", "a file", "images", "records", "maps"],
)
def test_a_history_lost_in_the_middle_is_begun_again(
    damage: Damage, epochs: list[int], tmp_path: Path
) -> None:
    """Before training and after the first of three epochs it was whole."""

    class Accident(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                damage(tmp_path / "explanations")

    weights = []
    for folder, accidents in ((tmp_path / "plain", []), (tmp_path, [Accident()])):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ExplanationMonitor: the history in")
            trainer, logged = fit(folder, others=accidents)
        assert len(logged) == 3
        weights.append(trainer.lightning_module.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
    folders = [path.parent for path in tmp_path.glob("expl*/images.npy")]
    found = [[each.epoch for each in History.load(path).records] for path in folders]
    assert epochs in found


@pytest.mark.wide
def test_a_checkpoint_of_another_version_ends_no_training(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "one", epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=False)
    (key,) = (name for name in saved["callbacks"] if name.startswith("ExplanationMonitor"))
    saved["callbacks"][key] = {"images": "elsewhere", "folder": 3, "records": None}
    torch.save(saved, tmp_path / "one.ckpt")
    with pytest.warns(UserWarning, match="what the checkpoint says of the monitor can't be read"):
        trainer, logged = fit(tmp_path / "two", epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert "explain/overall_auc" in logged[0]
    assert len(History.load(tmp_path / "two" / "explanations").records) == 1


def test_readable_needs_no_folder(tmp_path: Path) -> None:
    assert readable(tmp_path / "nowhere", 2).lost == []
    assert readable(tmp_path / "nowhere", 2, 1).lost == ["history.jsonl has 0 records, not 1"]
    (tmp_path / "file").write_text("")
    assert "NotADirectoryError" in readable(tmp_path / "file", 2, 1).lost[0]
