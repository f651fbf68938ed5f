"""Answer a question about a long text with a 3-bit cache, and show what it saved."""

from pathlib import Path

import mlx_turboquant as tq
from mlx_lm import stream_generate

HERE = Path(__file__).parent
model, tokenizer = tq.load(str(HERE / "books-20m"))
cache = tq.make_prompt_cache(model, 3)
prompt = (HERE / "needle.txt").read_text()
for step in stream_generate(model, tokenizer, prompt, max_tokens=8, prompt_cache=cache):
    print(step.text, end="", flush=True)
print("\n")
print(tq.explain(cache))
