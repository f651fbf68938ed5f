"""What decode attention would cost on Apple GPUs: counted operations, modelled times.

**Nothing here was measured on a Mac.** A *slot* is one instruction of a simdgroup on
one of a core's four schedulers. Costs of instructions are
philipturner/metal-benchmarks' (M1, M2): a half2 operation 2 slots, a shift 1, and
with 4 cycles in a pipe of its own beside, an 8x8x8 matrix product of halves 17, a
float multiply-add 1 (assumed: also of two halves, which that instruction takes as they
are), a shuffle 2. The inner loop of ``metal/decode_attention.metal`` is counted below,
by hand, of one lane and tile of 32 tokens, keys and values: 2 * head_dim elements, by
matrix products (``matrix_rows.h``) and by multiply-adds (``fma_rows.h``). Times are
slots over cores, clock and the share of slots that such kernels were seen to use, plus
a fixed part for two launches; fp16's are bytes over 0.855 of the bandwidth, or its 5.3
slots an element and query head.

`trellis` computes its levels by other code, not counted by hand: its slots, and
`turboquant`'s beside them, are LLVM's operations of a round in
``tests/metaltext/budgets.json`` at the costs above. That counts what a round seldom
does, too, so `turboquant` has some 10% more by it than by hand.

    python benchmarks/model_apple.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

_BUDGETS = Path(__file__).parent.parent / "tests" / "metaltext" / "budgets.json"
#: Of one operation of a class in that file; all others take one.
_COSTS = {"half pairs": 2, "matrix products": 17}
#: Entries of that file which are no class of operations.
_SUMS = ("registers", "spilled", "operations", "an element", "barriers")
#: What it calls keys and values of 2, 3 and 4 bits.
_COUNTED = {
    "turboquant": ("scalar2.2", "scalar3.2", "scalar4.3"),
    "trellis": ("trellis4.2", "trellis6.3", "trellis8.4"),
}

#: Terms of the levels' polynomial by bits (docs/format.md).
TERMS = {1: 1, 2: 2, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 6}
TOKENS = (4096, 32768, 131072)
KV_HEADS, GROUP = 8, 4
#: Softmax, scales, addresses, loads and the barrier of a tile, for up to 8 query rows
#: by matrix products.
_TILE_SLOTS = 150
#: The same by multiply-adds: what does not depend on rows (the 150 without the zeros, 8
#: exponentials, weights and loads of the like), and for each row 4 zeros, 3 shuffles, 6
#: selects and 3 adds that share logits, 2 for scale and mean, 2 for the bound, 4 for
#: the weight, 2 to convert and store it, 1 for the denominator, 4 loads of weights and
#: 4 of queries.
_FMA_TILE_SLOTS, _FMA_ROW_SLOTS = 70, 38
_FIXED_US = 12


class Chip(NamedTuple):
    """A GPU: cores, GHz, GB/s, and the share of its slots that kernels use."""

    name: str
    cores: int
    ghz: float
    bandwidth: float
    used: float


CHIPS = (
    Chip("M1 Pro, 16 cores", 16, 1.296, 200, 0.77),
    Chip("M2 Ultra, 76 cores", 76, 1.398, 800, 0.75),
    Chip("M3 Max, 40 cores", 40, 1.4, 400, 0.86),
    Chip("M4, 10 cores", 10, 1.47, 120, 0.86),
    Chip("M4 Max, 40 cores", 40, 1.6, 546, 0.86),
)


def slots_of_unit(bits: int, fma_rows: int = 0) -> dict[str, float]:
    """Slots of a lane for one unit: 16 couples, 32 elements; no rows: by matrices."""
    per_half, spare = divmod(16, bits)
    direct = min(16, per_half * bits)
    # Couples that a shift serves; the first needs none if codes begin at bit 1.
    shifts_of_word = -(-per_half // (9 // bits)) - (1 if spare else 0)
    spelled = (16 - direct) * bits
    terms = TERMS[bits]
    # Centre, then u * P(u^2): nothing at one term, one fused operation fewer at two.
    level = 1 + (0 if terms == 1 else terms if terms <= 3 else terms + 1)
    return {
        "products": 32 * fma_rows if fma_rows else 16 * 17,
        "levels": 16 * 2 * level,
        "and, or": 2 * (16 + spelled),
        "shifts": bits * shifts_of_word + spelled,
    }


def slots_per_element(bits: int, dim: int, fma_rows: int = 0) -> float:
    """Slots an element of a tile, of keys and values of the same bits."""
    units = 2 * dim / 32
    of_tile = _FMA_TILE_SLOTS + _FMA_ROW_SLOTS * fma_rows if fma_rows else _TILE_SLOTS
    return (units * sum(slots_of_unit(bits, fma_rows).values()) + of_tile) / (2 * dim)


def counted_slots(kind: str, form: str) -> float:
    """Slots an element at head_dim 128, of operations that LLVM counts.

    Args:
        kind: Of keys and of values, as in ``budgets.json``.
        form: ``4 rows`` (multiply-adds) or ``matrices of 8 rows``.
    """
    row = json.loads(_BUDGETS.read_text())[f"{kind}/{kind} 128x128 {form}"]
    slots = sum(_COSTS.get(n, 1) * row[n] for n in row if n not in _SUMS)
    return float(slots * row["an element"] / row["operations"])


def modelled_us(
    chip: Chip,
    tokens: int,
    bits: int,
    fma_rows: int = 0,
    dim: int = 128,
    slots: float | None = None,
) -> float:
    """Microseconds of one attention, both launches; ``slots`` an element if counted."""
    elements = 2 * KV_HEADS * tokens * dim
    per_us = chip.cores * 128 * chip.ghz * 1e3 * chip.used
    read = elements * (bits + 16 / dim) / 8 / (0.855 * chip.bandwidth * 1e3)
    slots = slots_per_element(bits, dim, fma_rows) if slots is None else slots
    return max(elements * slots / per_us, read) + _FIXED_US


def modelled_fp16_us(
    chip: Chip, tokens: int, group: int = GROUP, dim: int = 128
) -> float:
    """Microseconds of MLX's attention."""
    elements = 2 * KV_HEADS * tokens * dim
    read = elements * 2 / (0.855 * chip.bandwidth * 1e3)
    computed = elements * 5.3 * group / (chip.cores * 128 * chip.ghz * 1e3 * chip.used)
    return max(read, computed)


def main() -> None:
    """Print slots, then modelled times."""
    print("slots of a unit of 32 elements, counted; products 32 a row by fma")
    for bits in TERMS:
        parts = slots_of_unit(bits)
        text = ", ".join(f"{name} {slots:.0f}" for name, slots in parts.items())
        print(f"  {bits} bits: {text}")
    print("slots an element, with the tile's own, by matrix products")
    for dim in (64, 80, 96, 128, 256, 512):
        row = " ".join(f"{slots_per_element(b, dim):6.1f}" for b in (2, 3, 4, 8))
        print(f"  head_dim {dim:3}, 2, 3, 4, 8 bits: {row}")
    print("the same by multiply-adds")
    for dim in (64, 128, 256):
        for rows in (1, 2, 3, 4):
            slots = [slots_per_element(b, dim, rows) for b in (2, 3, 4, 8)]
            row = " ".join(f"{number:6.1f}" for number in slots)
            print(f"  head_dim {dim:3}, {rows} query rows, 2, 3, 4, 8 bits: {row}")
    for fma_rows, form in ((0, "matrix products"), (GROUP, "multiply-adds")):
        print(
            "MODELLED us of one attention, 32 query heads on 8 KV heads, head_dim 128,"
            f" by {form}"
        )
        for chip in CHIPS:
            for tokens in TOKENS:
                fp16 = modelled_fp16_us(chip, tokens)
                ours = [modelled_us(chip, tokens, bits, fma_rows) for bits in (2, 3, 4)]
                row = ", ".join(f"{us:6.0f} ({fp16 / us:.1f}x)" for us in ours)
                print(
                    f"  {chip.name:18} {tokens:7} fp16 {fp16:6.0f};"
                    f" k2v2, k3v3, k4v4 {row}"
                )
    tokens = TOKENS[1]
    for form in ("4 rows", "matrices of 8 rows"):
        print(
            f"MODELLED us at {tokens} tokens by LLVM's operations, {form}: turboquant,"
            " trellis of 2, 3, 4 bits"
        )
        for codec, kinds in _COUNTED.items():
            counted = [counted_slots(kind, form) for kind in kinds]
            row = " ".join(f"{slots:5.1f}" for slots in counted)
            print(f"  {codec:10} slots an element {row}")
            for chip in CHIPS:
                ours = [
                    modelled_us(chip, tokens, bits, slots=slots)
                    for bits, slots in zip((2, 3, 4), counted, strict=True)
                ]
                fp16 = modelled_fp16_us(chip, tokens)
                row = ", ".join(f"{us:6.0f} ({fp16 / us:.1f}x)" for us in ours)
                print(f"  {codec:10} {chip.name:18} fp16 {fp16:6.0f}; {row}")
    print(f"MODELLED us at {tokens} tokens, 8 KV heads, k3v3: matrices, multiply-adds")
    for chip in CHIPS:
        for group in (1, 2, 4):
            fp16 = modelled_fp16_us(chip, tokens, group)
            ours = [modelled_us(chip, tokens, 3, rows) for rows in (0, group)]
            row = ", ".join(f"{us:6.0f} ({fp16 / us:.1f}x)" for us in ours)
            print(f"  {chip.name:18} group {group}: fp16 {fp16:6.0f}; {row}")


if __name__ == "__main__":
    main()
