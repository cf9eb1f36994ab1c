"""Files of weights with bytes changed at random: an error that helps or a network."""

import argparse
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import bounded, mutated
from torch import nn

from lightning_aop.data.networks import fill
from lightning_aop.data.weights import read_weights
from lightning_aop.errors import UserError


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def zipped(state: Any) -> bytes:
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def old(state: Any) -> bytes:
    torch.save(state, file := io.BytesIO(), _use_new_zipfile_serialization=False)
    return file.getvalue()


def checkpoint(state: Any) -> bytes:
    about = {"args": argparse.Namespace(lr=1), "lr": 0.1}
    return zipped({"state_dict": state, "hyper_parameters": about, "optimizer_states": [{}]})


def safetensors(state: Any) -> bytes:
    saved: bytes = pytest.importorskip("safetensors.torch").save(state)
    return saved


FORMS = [zipped, old, checkpoint, safetensors]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_changed_bytes_are_survived(
    form: Callable[[Any], bytes], count: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    content = form(network().state_dict())
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    fill(network(), "the network", read_weights(file))
    refused = 0
    for seed in range(count):
        file.write_bytes(mutated(content, random.Random(seed)))
        model, message = network(), f"weights {file}"
        shapes = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
        try:
            with bounded():
                fill(model, "the network", read_weights(file))
        except UserError as error:
            message, refused = str(error), refused + 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        assert f"weights {file}" in message, seed
        assert len(message) < 1000, seed
        assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == shapes
    assert refused > count / 10
