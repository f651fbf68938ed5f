"""Read a long text once, save its compressed cache, and ask about it later."""

import tempfile
from pathlib import Path

import mlx_turboquant as tq
import mlx.core as mx
from mlx_lm import generate

HERE = Path(__file__).parent
model, tokenizer = tq.load(str(HERE / "books-20m"))
text, question = (HERE / "needle.txt").read_text().split("\n\nQuestion")

cache = tq.make_prompt_cache(model, "k4v3")
model(mx.array([tokenizer.encode(text)]), cache=cache)
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "book.safetensors"
    tq.save_prompt_cache(file, cache)
    print(f"{cache[0].offset} tokens saved in {file.stat().st_size / 1e6:.1f} MB")
    later = tq.load_prompt_cache(file, model)

rest = "\n\nQuestion" + question
answer = generate(model, tokenizer, rest, max_tokens=8, prompt_cache=later)
print(answer)
