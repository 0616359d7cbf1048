"""What devices can do at best: the peak that a plan assumes a share of, and that a run's log compares with."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from granvit.errors import UserError


@dataclass(frozen=True)
class Device:
    """What a stage runs on.

    Attributes:
        name: for the report.
        kind: ``"cuda"`` or ``"cpu"``.
        flops: a second, dense, in bfloat16, at the best.
        memory: bytes; None where nobody asked.
        utilisation: share of `flops` that a step reaches; assumed.
    """

    name: str
    kind: str
    flops: float
    memory: float | None
    utilisation: float


@dataclass(frozen=True)
class Peak:
    """Dense FLOP/s, sums in float32, as the maker's data sheet has them.

    Attributes:
        bfloat16: on tensor cores.
        tf32: on tensor cores: float32 where torch may round its inputs.
        float32: without tensor cores.
    """

    bfloat16: float
    tf32: float
    float32: float


_H100_SXM, _H100_NVL = Peak(989e12, 495e12, 67e12), Peak(835e12, 418e12, 60e12)
_A100 = Peak(312e12, 156e12, 19.5e12)
# By the name that CUDA gives them, less the maker's. NVIDIA's data sheets of each product, half of the figures that are
# given "with sparsity"; for GeForce the architecture white papers (Ada, Blackwell), with FP32 accumulation.
PEAKS = {
    "A100-SXM4-40GB": _A100,
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100 80GB PCIe": _A100,
    "L4": Peak(121e12, 60e12, 30.3e12),
    "L40S": Peak(362e12, 183e12, 91.6e12),
    "GeForce RTX 4090": Peak(165.2e12, 82.6e12, 82.6e12),
    "GeForce RTX 5090": Peak(209.5e12, 104.8e12, 104.8e12),
    "H100 80GB HBM3": _H100_SXM,
    "H100 PCIe": Peak(756e12, 378e12, 51e12),
    "H100 NVL": _H100_NVL,
    "H200": _H100_SXM,
    "H200 NVL": _H100_NVL,
    "B200": Peak(2250e12, 1125e12, 75e12),
}

DEVICES = {
    "h100": Device("H100 SXM", "cuda", _H100_SXM.bfloat16, 80e9, 0.4),
    "h200": Device("H200 SXM", "cuda", _H100_SXM.bfloat16, 141e9, 0.4),
    "a100": Device("A100 80 GB", "cuda", _A100.bfloat16, 80e9, 0.4),
}


def measured_cpu(dtype: str = "bfloat16", size: int = 1024) -> Device:
    """This machine's processor, by the best of ten products of square matrices in about a second."""
    a = torch.randn(size, size).to(getattr(torch, dtype))
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return Device(f"this processor, {torch.get_num_threads()} threads", "cpu", 2 * size**3 / best, None, 0.35)


def device(name: str) -> Device:
    """One of :data:`DEVICES` by its name, or ``"cpu"`` for this machine's processor, measured.

    Raises:
        UserError: none of these.
    """
    if name != "cpu" and name not in DEVICES:
        raise UserError(f"plan: device: expected cpu or one of {', '.join(DEVICES)}, got {name!r}")
    return measured_cpu() if name == "cpu" else DEVICES[name]


def peak_flops(name: str, dtype: str, *, tf32: bool = False) -> float | None:
    """FLOP/s of a GPU at the best; None for one whose data sheet is not among :data:`PEAKS`, such as a part of one.

    Args:
        name: as ``torch.cuda.get_device_name`` has it.
        dtype: of the arithmetic: ``"bfloat16"`` or ``"float32"``.
        tf32: whether float32 products may run on tensor cores.
    """
    peak = PEAKS.get(name.removeprefix("NVIDIA "))
    if peak is None:
        return None
    return peak.bfloat16 if dtype == "bfloat16" else peak.tf32 if tf32 else peak.float32
