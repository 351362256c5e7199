"""Launches recorded without a GPU, compiled for one, and what the compiled code says.

A launcher never looks at values, so it is called with tensors that have none. Its launches are
caught where Triton would compile and run them and are specialised as Triton itself would do.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from gpu_devices import Device
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True)
class Launch:
    """A launch that a launcher asked for."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        module = self.kernel.__module__.rpartition(".")[2]
        return f"{module}.{self.kernel.__name__.removesuffix('_kernel')}"

    def data(self) -> set[str]:
        """The arguments that hold data, not what is known of it: all but the small tensors."""
        given = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.kwargs
        sizes = {k: x.nbytes for k, x in given.items() if isinstance(x, torch.Tensor)}
        return {k for k, size in sizes.items() if 32 * size >= max(sizes.values())}

    def source(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """What Triton would compile for these arguments, and its options."""
        fn, backend = self.kernel, make_backend(target)
        bind = create_function_from_signature(fn.signature, fn.params, backend)
        # As launchers do on the machine that has the GPU.
        given = {k: x for k, x in self.kwargs.items() if k != "maxnreg" or target.backend == "cuda"}
        bound, specialization, options = bind(*self.args, **given)
        options, signature, constants, attributes = fn._pack_args(
            backend, given, bound, specialization, options
        )
        return ASTSource(fn, signature, constants, attributes), options.__dict__

    def key(self, target: GPUTarget) -> str:
        """Equal for launches that one compiled kernel serves."""
        source, options = self.source(target)
        return f"{self.name} {source.signature} {source.constants} {source.attrs} {options}"


def record(call: Callable[[], Any]) -> tuple[Any, list[Launch]]:
    """The result of a launcher and its launches, none of which ran."""
    found: list[Launch] = []
    with _replaced_run(
        lambda self, *args, grid, warmup, **kwargs: found.append(Launch(self, grid, args, kwargs))
    ):
        return call(), found


@contextmanager
def _replaced_run(run: Callable[..., Any]) -> Iterator[None]:
    before = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = before


@dataclass
class Code:
    """What a compiled kernel takes of a multiprocessor, and how it reads and writes.

    ``loads`` and ``stores``: for each tensor, by the name of its argument, the bits that a thread
    moves with one instruction, of all the instructions.
    """

    registers: int
    spills: int  # bytes
    shared: int
    warps: int
    loads: dict[str, list[int]]
    stores: dict[str, list[int]]
    unit: str  # whose peak bounds it
    text: str = field(repr=False)

    def occupancy(self, device: Device) -> float:
        """Share of the warps of a multiprocessor that can be resident."""
        blocks = device.blocks
        if self.shared + device.reserved:
            blocks = min(blocks, device.shared // (self.shared + device.reserved))
        if device.target.backend == "hip":
            each = device.registers // (-(-max(self.registers, 1) // 8) * 8)
            resident = 4 * min(each, device.warps // 4)
        else:
            resident = device.registers // (-(-self.registers * 32 // 256) * 256)
        blocks = min(blocks, min(resident, device.warps) // self.warps)
        return blocks * self.warps / device.warps


def build(launch: Launch, device: Device) -> Code:
    """The compiled code of a launch."""
    source, options = launch.source(device.target)
    compiled = triton.compile(source, target=device.target, options=options)
    names = [name for name, kind in source.signature.items() if kind != "constexpr"]
    read = _read_amd if device.target.backend == "hip" else _read_nvidia
    return read(compiled, names, device.target.arch, options)


def _read_nvidia(compiled: Any, names: list[str], arch: int, options: dict[str, Any]) -> Code:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        # As Triton calls it, but for the debugging information.
        command = [
            get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}",
            *([] if options["enable_fp_fusion"] else ["--fmad=false"]), file.name, "-o",
            "/dev/null",
        ]  # fmt: skip
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    pair = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if pair is None or registers is None:
        raise RuntimeError(f"ptxas says nothing of registers and spills:\n{log}")
    product = re.search(r"mma\S*\.(tf32|bf16|f16|f64)", ptx)
    loads, stores = ptx_accesses(ptx, names)
    return Code(
        int(registers[1]), int(pair[1]) + int(pair[2]), compiled.metadata.shared,
        compiled.metadata.num_warps, loads, stores, product[1] if product else "f32", ptx,
    )  # fmt: skip


Accesses = dict[str, list[int]]
# What an address is made of; a loaded value is no address of the tensor it was loaded from.
PTX_ADDRESS = re.compile(r"(?:@!?%p\d+ )?(?:add|sub|mov|selp|mad|cvta)\S*\s+(%rd\d+), (.*)")
PTX_ACCESS = re.compile(
    r"(ld|st)\.(?:volatile\.|relaxed\S*?\.)?global\S*?(?:\.v(\d))?\.[bfus](\d+)\s[^[]*\[ ?(%rd\d+)"
)
PTX_COPY = re.compile(r"cp\.async\.\S+ \[[^]]*\], \[ ?(%rd\d+)[^]]*\], (\w+)")


def ptx_accesses(ptx: str, names: list[str]) -> tuple[Accesses, Accesses]:
    """Widths of loads and stores by argument: addresses are followed back to the parameters."""
    origin: dict[str, set[str]] = {}
    steps: list[tuple[str, list[str]]] = []
    for line in map(str.strip, ptx.splitlines()):
        if given := re.match(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            at = int(given[2])
            origin[given[1]] = {names[at]} if at < len(names) else set()
        elif step := PTX_ADDRESS.match(line):
            steps.append((step[1], re.findall(r"%rd\d+", step[2])))
    _spread(origin, steps)
    loads: Accesses = {}
    stores: Accesses = {}
    for line in ptx.splitlines():
        found = PTX_ACCESS.search(line)
        copy = PTX_COPY.search(line)
        if found:
            bits, address = int(found[2] or 1) * int(found[3]), found[4]
            _note(stores if found[1] == "st" else loads, origin.get(address), bits, line)
        elif copy:
            _note(loads, origin.get(copy[1]), 8 * int(copy[2], 0), line)
    return loads, stores


def _spread(origin: dict[str, set[str]], steps: list[tuple[str, list[str]]]) -> None:
    """Origins of all values that are made of one with an origin, around loops too."""
    changed = True
    while changed:
        changed = False
        for made, of in steps:
            found = set().union(*(origin.get(x, set()) for x in of))
            if not found <= origin.get(made, set()):
                origin[made] = origin.get(made, set()) | found
                changed = True


def _note(into: Accesses, origins: set[str] | None, bits: int, line: str) -> None:
    if not origins:
        raise RuntimeError(f"an address that comes from no argument: {line.strip()}")
    for name in origins:
        into.setdefault(name, []).append(bits)


LL_ADDRESS = re.compile(
    r"(%[\w.]+) = (?:tail call ptr addrspace\(8\) @llvm\.amdgcn\.make\.buffer|getelementptr|select"
    r"|phi|addrspacecast|bitcast)(.*)"
)
LL_KIND = r"(<[^>]+>|i\d+|float|double|half|bfloat)"
LL_LOADS = (
    re.compile(rf"call {LL_KIND} @llvm\.amdgcn\.raw\.ptr\.buffer\.load[^(]*\(.*?(%\d+)"),
    re.compile(rf"= load (?:volatile )?{LL_KIND}, ptr addrspace\(1\) (%[\w.]+)"),
)
LL_STORES = (
    re.compile(rf"raw\.ptr\.buffer\.store[^(]*\({LL_KIND} .*?ptr addrspace\(8\) (%\d+)"),
    re.compile(rf"store {LL_KIND} \S.*?, ptr addrspace\(1\) (%[\w.]+)"),
)
LL_SIZES = {"float": 32, "double": 64, "half": 16, "bfloat": 16}


def _bits(kind: str) -> int:
    vector = re.fullmatch(r"<(\d+) x (\w+)>", kind)
    count, element = (int(vector[1]), vector[2]) if vector else (1, kind)
    return count * (LL_SIZES.get(element) or int(element[1:]))


def llvm_accesses(text: str, names: list[str]) -> tuple[Accesses, Accesses]:
    """As :func:`ptx_accesses`, of the LLVM code that the AMD backend is given."""
    head = re.search(r"define amdgpu_kernel void @\w+\((.*?)\) (?:local|#)", text)
    if head is None:
        raise RuntimeError("no kernel in the LLVM code")
    given = re.findall(r"(%\d+)(?:,|$)", head[1])
    origin = {register: {name} for register, name in zip(given, names, strict=False)}
    lines = text.splitlines()
    made = filter(None, map(LL_ADDRESS.search, lines))
    _spread(origin, [(step[1], re.findall(r"%[\w.]+", step[2])) for step in made])
    loads: Accesses = {}
    stores: Accesses = {}
    for line in lines:
        for into, patterns in ((loads, LL_LOADS), (stores, LL_STORES)):
            for found in filter(None, (pattern.search(line) for pattern in patterns)):
                _note(into, origin.get(found[2]), _bits(found[1]), line)
    return loads, stores


def _read_amd(compiled: Any, names: list[str], arch: int, options: dict[str, Any]) -> Code:
    text = compiled.asm["amdgcn"]

    def said(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the code says nothing of {key}")
        return int(found[1])

    product = re.search(r"v_mfma_f\d+_\S+?(?:x\d+)?_?(xf32|bf16|f16|f64|f32)", text)
    loads, stores = llvm_accesses(compiled.asm["llir"], names)
    unit = product[1].replace("xf32", "tf32") if product else "f32"
    return Code(
        # Scalar registers that are spilled go to lanes of vector registers, not to memory.
        said("vgpr_count"), max(4 * said("vgpr_spill_count"), said("private_segment_fixed_size")),
        compiled.metadata.shared, compiled.metadata.num_warps, loads, stores, unit, text,
    )  # fmt: skip
