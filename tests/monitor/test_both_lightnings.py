"""`pytorch_lightning` and `lightning.pytorch`: each without the other, and both together."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[1] / "scripts" / "lightnings.py"
BOTH = ["pytorch_lightning", "lightning.pytorch"]


def run(out: Path, used: str, order: str, *checkpoint: str) -> dict[str, Any]:
    """Return what was found in a process of its own, in which nothing has been imported yet."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), used, order, *checkpoint],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
        cwd=out,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found | {"out": out}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return {used: run(folder / used, used, "alone") for used in BOTH}


def belongs(found: dict[str, Any]) -> None:
    """The trainer takes the monitor for one of its own callbacks, however it is given."""
    assert found["is a callback"]
    assert found["given alone"] == [0, 2]
    assert found["given by the module"] == [[0, 2]]
    assert found["misconfiguration"] == "ExplanationMonitor: probe=0 must be at least 1 sample"
    assert found["by the command line"] == [[7], [7]]


@pytest.mark.parametrize("used", BOTH)
def test_one_alone_is_enough(used: str, alone: dict[str, Any]) -> None:
    found = alone[used]
    assert not found["other imported"]
    belongs(found)
    fit = found["fit"]
    assert fit["said"] == []
    assert fit["steps"] == [0, 2, 5]
    assert len(set(fit["probes"])) == 1
    path, score, count = fit["best"]
    assert Path(path).is_file()
    assert count == 2
    events = EventAccumulator(fit["logs"], {"images": 0, "scalars": 0}).Reload()
    assert [image.step for image in events.Images("explain/heatmaps")] == [0, 2, 5]
    logged = events.Scalars("explain/overall_auc")
    assert [value.step for value in logged] == [0, 2, 5]
    assert score == pytest.approx(max(value.value for value in logged[1:]))
    assert score > 0.01
    # The last model, validated, is what the last validation of the fit saw.
    assert found["validate"] == pytest.approx(fit["figures"], abs=1e-6)
    assert found["by step"] == {"steps": [0, 1], "saved": 1, "said": []}


@pytest.mark.parametrize("used", BOTH)
def test_training_is_left_alone(used: str, alone: dict[str, Any]) -> None:
    weights = torch.load(alone[used]["out"] / "weights.pt")
    assert_same(weights["with"], weights["without"])
    assert alone[used]["failing"] == {
        "said": [
            "ExplanationMonitor: no explanation at step 0, training goes on. "
            "RuntimeError: not today"
        ],
        "kinds": ["UserWarning"],
    }


def test_both_find_the_same(alone: dict[str, Any]) -> None:
    first, second = (alone[used] for used in BOTH)
    for what in ("fit", "resumed"):
        assert first[what]["probes"] == second[what]["probes"]
        assert first[what]["figures"] == pytest.approx(second[what]["figures"], abs=1e-6)


def goes_on(found: dict[str, Any], fit: dict[str, Any]) -> None:
    """A third epoch, with the pictures of the first two, and nothing explained a second time."""
    resumed = found["resumed"]
    assert resumed["said"] == []
    assert resumed["steps"] == [8]
    assert set(resumed["probes"]) == set(fit["probes"])
    assert math.isfinite(resumed["figures"]["explain/overall_auc"])


@pytest.mark.parametrize("used", BOTH)
def test_a_run_is_resumed(used: str, alone: dict[str, Any]) -> None:
    goes_on(alone[used], alone[used]["fit"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("used", "order"),
    [
        ("lightning.pytorch", "package"),
        ("lightning.pytorch", "used"),
        ("lightning.pytorch", "other"),
        ("pytorch_lightning", "other"),
    ],
)
def test_the_one_in_use_is_served_where_both_are_installed(
    used: str, order: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    """Also with a checkpoint that was written with the other one."""
    (other,) = set(BOTH) - {used}
    fit = alone[other]["fit"]
    found = run(tmp_path / "out", used, order, fit["best"][0])
    belongs(found)
    goes_on(found, fit)
    assert found["resumed"]["figures"] == pytest.approx(alone[used]["resumed"]["figures"], abs=1e-6)
    # Importing the other one too would send this one's messages through the other's logger.
    assert found["said by"].startswith(used)
    expected = order == "other" or (order, used) == ("package", "lightning.pytorch")
    assert found["other imported"] == expected
