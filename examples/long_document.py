"""Questions about a long document: it is read once, and every question goes on from it.

python long_document.py [FILE QUESTION ...]
"""

import sys
from pathlib import Path

import mlx_turboquant as tq
import mlx.core as mx
from mlx_lm import generate
from mlx_lm.generate import generate_step

HERE = Path(__file__).parent
MODEL = str(HERE / "books-20m")  # or "mlx-community/Llama-3.2-3B-Instruct-4bit"
QUESTIONS = ("What is the secret code of the silver lantern?",)

file, *questions = sys.argv[1:] or (HERE / "needle.txt", *QUESTIONS)
model, tokenizer = tq.load(MODEL)
document = Path(file).read_text().partition("\n\nQuestion")[0]

cache = tq.make_prompt_cache(model, "auto")
tokens = mx.array(tokenizer.encode(document))
for _ in generate_step(tokens, model, max_tokens=0, prompt_cache=cache):
    pass
print(f"{len(tokens)} tokens read: {tq.explain(cache).summary()}")

for question in questions:
    # A fork holds the document's pages together with the cache it is of, and no copy.
    prompt = f"\n\nQuestion: {question}\nAnswer:"
    answer = generate(model, tokenizer, prompt, max_tokens=8, prompt_cache=cache.fork())
    print(f"{question}{answer}")
