"""Does compressing the draft's or the target's cache lower the acceptance rate?

``python benchmarks/bench_speculation.py`` prints, for each pair of caches, the share of
drafted tokens that the target accepts, and checks that the text is that of plain
greedy decoding. The target is the bundled model; the drafts are the same model (all
that parts them is their caches) and its first six layers of eight (a draft that errs).
"""

import argparse
import json

from mlx_turboquant.blas import prefer_openblas

prefer_openblas()

import mlx.core as mx  # noqa: E402
from mlx_lm import stream_generate  # noqa: E402

import mlx_turboquant as tq  # noqa: E402
from mlx_turboquant.evals import text as books  # noqa: E402
from mlx_turboquant.integrations.factory import caches_for  # noqa: E402
from mlx_turboquant.integrations.speculation import PairedCaches  # noqa: E402

MODEL = "examples/books-20m"
CACHES = ("fp", "4", "3", "2")


def cut(model, layers):
    """The same embedding, head and first layers."""
    draft, _ = tq.load(MODEL)
    draft.update(model.parameters())
    draft.model.layers = draft.model.layers[:layers]
    return draft


def caches_of(model, name):
    """Caches of a spec, or mlx-lm's for ``fp``."""
    return caches_for(model, None if name == "fp" else name)


def accepted(model, draft, tokenizer, prompt, target_spec, draft_spec, tokens, drafts):
    """(tokens written, of them drafted)."""
    pair = PairedCaches(caches_of(model, target_spec), caches_of(draft, draft_spec))
    found = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=tokens,
        prompt_cache=pair,
        draft_model=draft,
        num_draft_tokens=drafts,
    )
    steps = [(step.token, step.from_draft) for step in found]
    return [token for token, _ in steps], sum(flag for _, flag in steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=CACHES)
    parser.add_argument("--draft-caches", nargs="+", default=CACHES)
    args = parser.parse_args()
    model, tokenizer = tq.load(MODEL)
    ids = tokenizer.encode(books.books()[0])
    starts = [i * (len(ids) // args.texts) for i in range(args.texts)]
    prompts = [ids[start : start + args.prompt_tokens] for start in starts]
    plain = {
        spec: [
            [
                step.token
                for step in stream_generate(
                    model,
                    tokenizer,
                    prompt,
                    max_tokens=args.tokens,
                    prompt_cache=caches_of(model, spec),
                )
            ]
            for prompt in prompts
        ]
        for spec in args.targets
    }
    print(f"mlx on {mx.default_device()}; {vars(args)}")
    for name, draft in (("same model", model), ("6 of 8 layers", cut(model, 6))):
        print(
            f"\ndraft: {name}\ntarget \\ draft  "
            + "".join(f"{s:>8}" for s in args.draft_caches)
        )
        for target_spec in args.targets:
            row = []
            for draft_spec in args.draft_caches:
                written, drafted = 0, 0
                for prompt, want in zip(prompts, plain[target_spec], strict=True):
                    got, count = accepted(
                        model, draft, tokenizer, prompt, target_spec, draft_spec,
                        args.tokens, args.drafts,
                    )  # fmt: skip
                    assert got == want, (target_spec, draft_spec)
                    written, drafted = written + len(got), drafted + count
                # Of every step's drafts; each step writes one token more itself.
                row.append(drafted / (args.drafts * (written - drafted)))
            print(f"{target_spec:15s}" + "".join(f"{r:8.3f}" for r in row))
            print(json.dumps({"draft": name, "target": target_spec, "accepted": row}))


if __name__ == "__main__":
    main()
