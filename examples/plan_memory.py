"""How long a text fits, from a model's config alone: nothing is loaded.

python plan_memory.py [MODEL [GB]]
"""

import sys
from pathlib import Path

import mlx_turboquant as tq

model = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "books-20m")
memory = int(1e9 * float(sys.argv[2] if len(sys.argv) > 2 else 0.1))

footprint = tq.footprint(model)
print(f"weights {footprint.weights / 1e9:.2f} GB, context {footprint.context}")
for spec in (None, *map(tq.CacheSpec.parse, ("4", "3", "2"))):
    tokens = footprint.tokens_in(memory, spec)
    cache = footprint.cache_bytes(tokens, spec) / 1e9
    print(
        f"{spec or 'uncompressed'!s:14} {tokens:>7} tokens, a cache of {cache:.3f} GB"
    )
