"""The GPUs of the report: published peaks and limits, from the makers' documents.

- A100: NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4), column 80GB SXM.
- H100: NVIDIA H100 data sheet, column H100 SXM; its figures with sparsity are halved.
- MI300X: AMD Instinct MI300X data sheet.
- Limits of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute
  Capability"; "AMD Instinct MI300" CDNA3 ISA guide and LLVM's AMDGPU usage (512 registers a lane,
  taken by eights, at most 8 waves a SIMD of four, 64 KiB of LDS).
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Device:
    """A GPU: its published peaks, in bytes and FLOP a second, and the limits of a multiprocessor.

    ``peaks`` are of the ordinary units, and ``products`` of the units that multiply matrices (of
    float32 where there are none: the ordinary ones), by type, without sparsity.
    """

    name: str
    target: GPUTarget
    bandwidth: float
    peaks: dict[str, float]
    products: dict[str, float]
    warps: int
    blocks: int
    registers: int  # 32-bit ones; of an AMD SIMD: a lane's
    shared: int
    reserved: int = 0  # shared memory taken of every block


DEVICES = {
    "sm_80": Device(
        "A100 80GB SXM", GPUTarget("cuda", 80, 32), 2.039e12,
        {"f32": 19.5e12, "f64": 9.7e12},
        {"f32": 19.5e12, "tf32": 156e12, "f16": 312e12, "bf16": 312e12, "f64": 19.5e12},
        64, 32, 65536, 164 << 10, 1 << 10,
    ),
    "sm_90": Device(
        "H100 SXM", GPUTarget("cuda", 90, 32), 3.35e12,
        {"f32": 67e12, "f64": 34e12},
        {"f32": 67e12, "tf32": 494.7e12, "f16": 989.4e12, "bf16": 989.4e12, "f64": 67e12},
        64, 32, 65536, 228 << 10, 1 << 10,
    ),
    "gfx942": Device(
        "MI300X", GPUTarget("hip", "gfx942", 64), 5.3e12,
        {"f32": 163.4e12, "f64": 81.7e12},
        {"f32": 163.4e12, "tf32": 653.7e12, "f16": 1307.4e12, "bf16": 1307.4e12, "f64": 163.4e12},
        32, 32, 512, 64 << 10,
    ),
}  # fmt: skip
