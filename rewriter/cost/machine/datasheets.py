"""Devices by datasheet. Their times are predictions: nothing here was measured by this project.

Peaks are dense (no 2:4 sparsity), at boost clock, with float32 accumulation where that is slower;
"float32" of a GPU is the rate outside the matrix units, which is what PyTorch uses by default.
Bandwidths of caches are not in the datasheets: they are what the microbenchmarks named below found,
rounded. Launches of eager PyTorch take 4 to 6 µs apiece on these hosts, an assumption.

Sources:
    A100         NVIDIA A100 Tensor Core GPU datasheet (40 GB and 80 GB SXM) and architecture
                 whitepaper, 2020 (108 SMs, 40 MB L2, 5120 B per clock)
    H100, H200   NVIDIA H100 and H200 Tensor Core GPU datasheets (SXM); Hopper whitepaper, 2022
                 (132 SMs, 50 MB L2)
    B200         NVIDIA Blackwell datasheet, 2024: HGX B200, an eighth of the board (148 SMs)
    L4           NVIDIA L4 Tensor Core GPU datasheet, 2023 (58 SMs, 48 MB L2)
    RTX 4090     NVIDIA Ada GPU architecture whitepaper, 2022, appendix A (128 SMs, 72 MB L2)
    MI300X       AMD Instinct MI300X datasheet, 2023 (304 CUs, 256 MB Infinity Cache at 17.2 TB/s)
    laptop CPU   AMD Ryzen 7 7840U class: 8 Zen 4 cores at 4 GHz, 32 float32 FLOP a clock and core
                 (VDPBF16PS: twice, VPDPBUSD: four times that), 16 MB L3, DDR5-5600 on 128 bits
    phone CPU    Snapdragon 8 Gen 2 class: one Cortex-X3 at 3.2 GHz, four A71x at 2.8, three A510
                 at 2.0, NEON on 4, 2 and 1 pipes, 8 MB L3, LPDDR5X-8400 on 64 bits
    L2 rates     Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking",
                 2018, and Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
                 Architecture via Microbenchmarking", 2024, scaled by SMs and clock
    pJ per byte  Jouppi et al., ISCA 2021, Table 2 (7 nm, per 64 bits: SRAM 14 pJ a MB bank, HBM2
                 250 to 450, GDDR6 350 to 480, DDR4 1300); LPDDR5 a third of DDR
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from rewriter.cost.machine.device import Device, Level, add_datasheets

__all__ = ["ALIASES", "DATASHEETS", "DDR", "SRAM"]

T, G, M = 1e12, 1e9, 1e6
SRAM, HBM, GDDR, DDR, LPDDR = 1.75, 44.0, 52.0, 162.0, 54.0  # pJ per byte


def _rates(unit: float, **rates: float) -> dict[str, float]:
    found = {name: rate * unit for name, rate in rates.items()}
    if "fp8" in found:
        fp8 = found.pop("fp8")
        found |= {"float8_e4m3fn": fp8, "float8_e5m2": fp8}
    return found


def _gpu(
    name: str,
    matrix: Mapping[str, float],
    vector: Mapping[str, float],
    cache: tuple[str, float, float],
    memory: tuple[str, float, float],
    units: int,
    power_w: float,
    source: str,
) -> Device:
    levels = (
        Level(cache[0], cache[1], cache[2], SRAM),
        Level(memory[0], math.inf, memory[1], memory[2]),
    )
    return Device(name, "gpu", matrix, vector, levels, 5e-6, units, power_w, source)


_A100 = _rates(T, float64=19.5, float32=19.5, tf32=156, bfloat16=312, float16=312, int8=624)
_A100_VECTOR = _rates(T, float64=9.7, float32=19.5, float16=78, bfloat16=39, int8=19.5)
_H100 = _rates(
    T, float64=67, float32=67, tf32=494.7, bfloat16=989.4, float16=989.4, fp8=1978.9, int8=1978.9
)
_H100_VECTOR = _rates(T, float64=34, float32=67, float16=134, bfloat16=134, int8=67)
_A100_SOURCE, _H100_SOURCE = "NVIDIA A100 datasheet", "NVIDIA H100 and H200 datasheets"

_ALL = (
    _gpu(
        "A100-40GB",
        _A100,
        _A100_VECTOR,
        ("L2", 40 * M, 4.5 * T),
        ("HBM2", 1.555 * T, HBM),
        108,
        400,
        _A100_SOURCE,
    ),
    _gpu(
        "A100-80GB",
        _A100,
        _A100_VECTOR,
        ("L2", 40 * M, 4.5 * T),
        ("HBM2e", 2.039 * T, HBM),
        108,
        400,
        _A100_SOURCE,
    ),
    _gpu(
        "H100-SXM",
        _H100,
        _H100_VECTOR,
        ("L2", 50 * M, 5.7 * T),
        ("HBM3", 3.35 * T, HBM),
        132,
        700,
        _H100_SOURCE,
    ),
    _gpu(
        "H200",
        _H100,
        _H100_VECTOR,
        ("L2", 50 * M, 5.7 * T),
        ("HBM3e", 4.8 * T, HBM),
        132,
        700,
        _H100_SOURCE,
    ),
    _gpu(
        "B200",
        _rates(
            T, float64=37, float32=75, tf32=1125, bfloat16=2250, float16=2250, fp8=4500, int8=4500
        ),
        _rates(T, float64=37, float32=75, float16=150, bfloat16=150, int8=75),
        ("L2", 126 * M, 10 * T),
        ("HBM3e", 8 * T, HBM),
        148,
        1000,
        "NVIDIA Blackwell datasheet",
    ),
    _gpu(
        "L4",
        _rates(T, float64=0.47, float32=30.3, tf32=60, bfloat16=121, float16=121, fp8=242.5)
        | {"int8": 242.5 * T},
        _rates(T, float64=0.47, float32=30.3, float16=30.3, bfloat16=30.3, int8=30.3),
        ("L2", 48 * M, 2 * T),
        ("GDDR6", 0.3 * T, GDDR),
        58,
        72,
        "NVIDIA L4 datasheet",
    ),
    _gpu(
        "RTX-4090",
        _rates(T, float64=1.29, float32=82.6, tf32=82.6, bfloat16=165.2, float16=165.2, fp8=330.3)
        | {"int8": 660.6 * T},
        _rates(T, float64=1.29, float32=82.6, float16=82.6, bfloat16=82.6, int8=41.3),
        ("L2", 72 * M, 5 * T),
        ("GDDR6X", 1.008 * T, GDDR),
        128,
        450,
        "NVIDIA Ada whitepaper",
    ),
    _gpu(
        "MI300X",
        _rates(
            T, float64=163.4, float32=163.4, tf32=653.7, bfloat16=1307.4, float16=1307.4, fp8=2614.9
        )
        | {"int8": 2614.9 * T},
        _rates(T, float64=81.7, float32=163.4, float16=163.4, bfloat16=163.4, int8=163.4),
        ("Infinity Cache", 256 * M, 17.2 * T),
        ("HBM3", 5.3 * T, HBM),
        304,
        750,
        "AMD MI300X datasheet",
    ),
    Device(
        "laptop-CPU",
        "cpu",
        _rates(G, float64=512, float32=1024, bfloat16=2048, int8=4096),
        _rates(G, float64=512, float32=1024),
        (
            Level("L2", 8 * M, 1.5 * T, SRAM),
            Level("L3", 16 * M, 0.6 * T, SRAM),
            Level("DDR5", math.inf, 0.0896 * T, DDR),
        ),
        3e-6,
        8,
        28,
        "AMD Ryzen 7 7840U class",
    ),
    Device(
        "phone-CPU",
        "cpu",
        _rates(G, float64=165, float32=330, float16=660, bfloat16=660, int8=1320),
        _rates(G, float64=165, float32=330, float16=660),
        (
            Level("L2", 3.5 * M, 0.4 * T, SRAM),
            Level("L3", 8 * M, 0.15 * T, SRAM),
            Level("LPDDR5X", math.inf, 0.0672 * T, LPDDR),
        ),
        5e-6,
        8,
        6,
        "Snapdragon 8 Gen 2 class",
    ),
)

DATASHEETS: Mapping[str, Device] = {device.name: device for device in _ALL}
ALIASES: Mapping[str, str] = {
    "A100": "A100-80GB",
    "A100-40": "A100-40GB",
    "A100-80": "A100-80GB",
    "H100": "H100-SXM",
    "4090": "RTX-4090",
    "laptop": "laptop-CPU",
    "phone": "phone-CPU",
}
"""Other names of the same."""
add_datasheets(DATASHEETS, ALIASES)
