"""What this machine computes with: the kind of device, its memory, its precisions and its speed."""

import os
import time

import torch

from harness.engine.costs import GIB, Hardware
from harness.engine.distributed import Launch, choose_device, device_name
from harness.engine.gpu_peaks import peak_flops_per_second

SIZE, REPETITIONS = 1024, 8  # of the matrix product that is timed where no peak is known: 17 GFLOP
BFLOAT16_CAPABILITY = (8, 0)
"""CUDA compute capability from which tensor cores take bfloat16 (Ampere)."""


def find_hardware(choice: str) -> Hardware:
    """Return the hardware that training with `--device choice` would use; raises ConfigError.

    The speed of a GPU is its peak from the vendor's data sheet; that of any other device is measured, and waited for.
    """
    device = choose_device(choice, Launch())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        has_bfloat16 = torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
        name, count, memory = properties.name, torch.cuda.device_count(), properties.total_memory
    else:
        has_bfloat16, name, count = False, device_name(device), 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = peak_flops_per_second(name, use_amp=True) if device.type == "cuda" else None
    return Hardware(device.type, name, count, memory / GIB, has_bfloat16, peak or measured_flops(device))


def measured_flops(device: torch.device) -> float:
    """Return the FLOP/s of a matrix product, in the type that training would use; waits for the device."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    matrix = torch.ones(SIZE, SIZE, device=device, dtype=dtype)

    def seconds() -> float:
        begin = time.perf_counter()
        for _ in range(REPETITIONS):
            product = matrix @ matrix
        product[0, 0].item()
        return time.perf_counter() - begin

    seconds()
    return 2 * SIZE**3 * REPETITIONS / min(seconds() for _ in range(3))
