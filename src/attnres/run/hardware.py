"""The machine under a run: device, fast precision, peak arithmetic rate, peak memory."""

from __future__ import annotations

import platform
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Literal

import torch

from ..errors import UsageError

# Dense bf16 FLOP/s without sparsity, from the makers' data sheets.
PEAK_BF16 = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, else cpu. Raises UsageError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"device {name!r} cannot be used here; try auto or cpu") from error
    return device


def find_precision(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; "auto" is bfloat16 where the device multiplies it in hardware."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_has_bf16() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def name_of(precision: torch.dtype) -> Literal["float32", "bfloat16"]:
    """What `find_precision` finds it by."""
    return "bfloat16" if precision == torch.bfloat16 else "float32"


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def peak_flops(device: torch.device, precision: torch.dtype) -> float:
    """Arithmetic rate that utilisation is measured against, in FLOP/s: the data sheet's for known GPUs in bf16, else
    the best of five products of two 1024 x 1024 matrices."""
    if device.type == "cuda" and precision == torch.bfloat16:
        for name, rate in PEAK_BF16.items():
            if name in torch.cuda.get_device_name(device):
                return rate
    a = torch.ones(1024, 1024, device=device, dtype=precision)
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that CUDA tensors took, or the most resident memory that this process had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, IndexError):  # Linux; getrusage would count what the process that started this one had
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory(device: torch.device) -> int | None:
    """Bytes that the device has, swap included for a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("MemTotal:", "SwapTotal:")))
    return None


def describe(device: torch.device) -> str:
    """The device in words, with its cores for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"
