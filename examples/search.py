"""Nearest neighbours from codes: the other half of what TurboQuant is for.

python search.py [PASSAGES [QUESTIONS]]

Passages of the bundled books are embedded by the bundled model (its hidden states,
averaged), stored as codes, and searched by inner products with the codes. Shown are the
bytes of a vector and recall@10: how many of the exact ten nearest are among the ten
found. Beside them, if `pip install faiss-cpu` has been, RaBitQ at one bit, and product
quantization, which has to be trained: on the passages, if there are 9,984 of them.
"""

import sys
from pathlib import Path

import mlx_turboquant as tq
import mlx.core as mx
import numpy as np

from mlx_turboquant.evals.text import books

TOKENS, NEAREST, BATCH = 16, 10, 64
count = int(sys.argv[1]) if len(sys.argv) > 1 else 256
asked = int(sys.argv[2]) if len(sys.argv) > 2 else 32

model, tokenizer = tq.load(str(Path(__file__).parent / "books-20m"))
each = 2 * (count + asked) * TOKENS // len(books()) + TOKENS
ids = [tokenizer.encode(book[20_000:][: 8 * each])[:each] for book in books()]
passages = [
    part[at : at + TOKENS]
    for part in ids
    for at in range(0, len(part) - TOKENS + 1, TOKENS)
]
if len(passages) < count + asked:
    sys.exit(
        f"the books have {len(passages)} passages, not {count + asked}; ask for less"
    )
order = np.random.default_rng(0).permutation(len(passages))[: count + asked]
vectors = []
for at in range(0, len(order), BATCH):
    hidden = model.model(mx.array([passages[i] for i in order[at : at + BATCH]]))
    vectors.append(mx.mean(hidden.astype(mx.float32), axis=1))
    mx.eval(vectors[-1])
x = mx.concatenate(vectors)
x = x - mx.mean(x[:count], axis=0)  # what all share says nothing about any
x = x / mx.linalg.norm(x, axis=-1, keepdims=True)
corpus, questions = x[:count], x[count:]
dim = corpus.shape[1]


def ten(scores):
    return np.array(mx.argpartition(-scores, NEAREST - 1, axis=-1)[:, :NEAREST])


def recall(found):
    hits = [len({*a} & {*b}) for a, b in zip(found.tolist(), exact, strict=True)]
    return np.mean(hits) / NEAREST


def show(name, size, found):
    print(f"{name:24}{size:8.0f}{32 * dim / 8 / size:8.1f}x{recall(found):10.3f}")


exact = ten(questions @ corpus.T).tolist()
print(f"{count} passages of {TOKENS} tokens, {asked} questions, {dim} dimensions")
print(f"{'':24}{'bytes':>8}{'smaller':>9}{'recall@10':>10}")
show("fp16", 2 * dim, ten(questions @ corpus.astype(mx.float16).T.astype(mx.float32)))
for codec_name, widths in {"turboquant": (1, 2, 3, 4), "trellis": (2, 3, 4)}.items():
    for bits in widths:
        codec = tq.codec_for(tq.CodecSpec.of(codec_name, bits), dim, "keys")
        codes = codec.encode(codec.rotation.forward(corpus)[None, None])
        # The products are the same in the codes' basis: only questions are rotated.
        decoded = codec.decode(codes, mx.float32)[0, 0]
        found = ten(codec.rotation.forward(questions) @ decoded.T)
        show(f"{codec_name} {bits} bits", codec.bits_per_vector / 8, found)
try:
    import faiss
except ImportError:
    print("faiss is not installed, so nothing is compared with it")
    sys.exit()
data, asks = (np.array(part, np.float32) for part in (corpus, questions))
indexes = {}
if count < 39 * 256:  # what faiss wants for 256 centroids
    print(f"{count} passages are too few to train faiss's PQ, which needs 9984")
else:
    indexes = {
        f"faiss PQ, {8 * size / dim:g} bits": (
            size,
            faiss.IndexPQ(dim, size, 8, faiss.METRIC_INNER_PRODUCT),
        )
        for size in (dim // 8, dim // 4, dim // 2)
    }
rabitq = faiss.IndexRaBitQ(dim, faiss.METRIC_INNER_PRODUCT)
indexes["faiss RaBitQ, 1 bit"] = rabitq.code_size, rabitq
for name, (size, index) in indexes.items():
    index.train(data)
    index.add(data)
    show(name, size, index.search(asks, NEAREST)[1])
