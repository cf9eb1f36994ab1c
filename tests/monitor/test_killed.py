"""A run that was killed and is resumed goes on as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "killed.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


@pytest.fixture(
    scope="module",
    params=[pytest.param(6, marks=pytest.mark.wide), pytest.param(24, marks=pytest.mark.slow)],
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out), str(request.param)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_sigkill_at_any_moment(runs: Path) -> None:
    """The same probe, figures and pictures as without it, wherever the process was ended."""
    seen: dict[str, Any] = json.loads((runs / "seen.json").read_text())
    names = sorted(seen["whole"])
    assert [name for name in names if name.endswith(".json")] == [
        f"epoch{n}.json" for n in range(3)
    ]
    pictures = [name for name in names if name.endswith(".png")]
    assert len([name for name in pictures if "heatmaps/" in name]) == 4  # one before training
    assert len([name for name in pictures if "change" in name]) == 3
    assert "explain/overall_auc" in seen["whole"]["epoch2.json"]
    assert [record["title"] for record in seen["whole"]["records"]] == [
        "before training",
        *(f"epoch {n} · step {2 * n + 1}" for n in range(3)),
    ]
    assert len(seen["killed"]) >= 6
    for fatal, found in seen["killed"].items():
        assert found == seen["whole"], f"killed at evaluation {fatal} of {seen['moments']}"


def test_the_checkpoint_is_safe_and_small(runs: Path) -> None:
    checkpoint = torch.load(runs / "whole" / "last.ckpt", weights_only=True)
    (state,) = [s for name, s in checkpoint["callbacks"].items() if "ExplanationMonitor" in name]
    size = sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
    assert size <= 2 * 3 * 24 * 24 * 4 + 2 * 8
