"""Solve the shipped codebooks and write ``mlx_turboquant/data/lloyd_max.json``.

    python benchmarks/solve_codebooks.py

Dims that are not among these are solved by the package at first use.
"""

import json
from pathlib import Path

from mlx_turboquant.codebook import solve_sphere

PATH = Path(__file__).parent.parent / "mlx_turboquant" / "data" / "lloyd_max.json"
DIMS = (32, 48, 64, 72, 80, 96, 112, 128, 144, 160, 192, 256, 384, 512, 576)
BITS = range(1, 9)


def main():
    about = "Positive Lloyd-Max levels, key dim/bits; benchmarks/solve_codebooks.py"
    rows = ",\n".join(
        f'  "{dim}/{bits}": {json.dumps(solve_sphere(dim, bits).tolist())}'
        for dim in DIMS
        for bits in BITS
    )
    PATH.write_text(f'{{"about": {json.dumps(about)},\n "levels": {{\n{rows}\n}}}}\n')


if __name__ == "__main__":
    main()
