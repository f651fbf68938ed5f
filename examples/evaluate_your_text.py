"""What a compressed cache costs your model on your text, before you rely on it.

python evaluate_your_text.py [FILE [MODEL]]
"""

import sys
from pathlib import Path

import mlx_turboquant as tq

HERE = Path(__file__).parent
file = sys.argv[1] if len(sys.argv) > 1 else HERE / "needle.txt"
name = sys.argv[2] if len(sys.argv) > 2 else str(HERE / "books-20m")

model, tokenizer = tq.load(name)
plan = tq.EvalPlan(
    lengths=(512,),  # where you will work; a text must have as many tokens
    windows=1,  # stretches of the text: more of them, narrower intervals
    scored=64,
    needles=(),  # lengths at which to hide facts and ask for them
    greedy=0,
)
found = tq.evaluate(
    model,
    tokenizer,
    ["auto", "4", "3", "2"],
    baselines=("affine:4",),  # mlx-lm's kv_bits=4
    plan=plan,
    text_file=file,
)
for row in found.rows():
    print(
        f"{row.name:24} {row.bits:5.2f} bits  KL divergence {row.kld:.5f} "
        f"({row.low:.5f} to {row.high:.5f})  same top-1 {row.top1:.1%}"
    )
