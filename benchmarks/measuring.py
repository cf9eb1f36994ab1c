"""What the benchmarks of time and memory share: the clock, the peak of memory, the machine."""

import ctypes
import datetime
import gc
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "captum", "grad-cam", "torchcam", "quantus", "saliency")


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time that some work takes, on the device too."""
    finish(device)
    started = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - started


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out what other packages warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    """Return how far memory rises above where it was, in MiB.

    On CUDA that is what torch has handed out; elsewhere resident memory, and None but on Linux with
    glibc.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        finish(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed stays resident, and hides a rise
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = _status_kib("VmRSS")
        work()
        return max(0, _status_kib("VmHWM") - before) / 1024
    except (OSError, AttributeError):  # no such file, or no glibc
        return None


def _status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": platform.platform(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "torch_build": torch.__config__.show(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        }
    return found


def in_words(machine: dict[str, Any]) -> str:
    """Return the machine in one line."""
    gpu = ""
    if "gpu" in machine:
        gpu = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}; "
    versions = [f"{name} {number}" for name, number in machine["versions"].items() if number]
    return (
        f"{gpu}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, "
        f"{machine['system']}; {', '.join(versions)}"
    )


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.partition("\n")[0].strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
