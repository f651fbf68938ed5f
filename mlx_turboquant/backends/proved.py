"""Whether kernels are proved on this machine for what a cache's quantizers encode.

And how they are launched best. Owns what a proof and a tuner are asked for, and that
what was proved is compared once more on a user's tokens; how proofs are made and kept
is ``proof/``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from ..kernels.tuning import UNTUNED, Heads, Tuning
from ..proof import ledger
from ..proof.key import Key, Subject, machine, text_hash
from ..proof.ledger import Ledger
from ..proof.runner import Job
from ..proof.store import Store, Verdict
from ..proof.tuned import Tuned
from ..quantizer import Quantizer
from . import specialize
from .gpu import Gpu
from .shadow import Shadow

#: What a child checks in place of this machine's kernels, for tests: see `Job.backend`.
STAND_IN = ""
_PACKAGE = __name__.split(".")[0]


class Proved(NamedTuple):
    """A backend whose kernels are proved for a cache.

    Attributes:
        backend: Launched as a tuner found it fastest.
        digest: The verdict's.
        tuned: What that changes, in words; "" for nothing.
    """

    backend: Gpu
    digest: str
    tuned: str


@functools.cache
def this_ledger() -> Ledger:
    """The verdicts of this process, kept in the user's cache folder."""
    return Ledger(Store())


def ask(
    backend: Gpu, keys: Quantizer, values: Quantizer, dtype: mx.Dtype
) -> Proved | str:
    """These kernels to be used, if they are proved; else why they are not, for now.

    Begins the proof in the background where nothing is known.

    Args:
        backend: Whose kernels; it takes these quantizers.
        keys: Of a layer's keys.
        values: Of its values.
        dtype: The model's.
    """
    for quantizer in (keys, values):
        if not _is_ours(quantizer):
            spec = quantizer.codec.spec
            return f"a check of its kernels would not know codec {spec}"
    key = key_of(backend, keys, values, dtype)
    verdict = this_ledger().standing(key)
    if verdict is None:
        job = Job(key.subject, backend.name, backend.simdgroups, STAND_IN)
        this_ledger().start(key, job)
        return ledger.UNDER_WAY
    if not verdict.is_ok:
        return ledger.words(verdict)
    best, words = _as_tuned(backend, verdict.tuned)
    return Proved(shadow_of(best, key.digest).backend, key.digest, words)


@functools.cache
def shadow_of(backend: Gpu, digest: str) -> Shadow:
    """What watches the first step of kernels with a verdict, in this process."""
    return Shadow(backend, lambda reason: this_ledger().overturn(digest, reason))


def verdict_of(digest: str) -> Verdict | None:
    """What this process goes by now for kernels that it has asked about."""
    return this_ledger().found(digest)


def tuned(
    backend: Gpu, keys: Quantizer, values: Quantizer, dtype: mx.Dtype
) -> tuple[Gpu, str]:
    """The backend as a tuner found it fastest here, and what that changes.

    The same backend and "" where none ran, or found nothing that was proved.
    """
    ledger = this_ledger()
    if not _is_ours(keys, values) or not ledger.store.folder.is_dir():
        return backend, ""
    verdict = ledger.look(key_of(backend, keys, values, dtype))
    if verdict is None or not verdict.is_ok:
        return backend, ""
    return _as_tuned(backend, verdict.tuned)


def tune(
    backend: Gpu,
    keys: Quantizer,
    values: Quantizer,
    dtype: mx.Dtype,
    heads: Heads,
) -> Verdict | None:
    """Find the fastest launches here, for later processes too, and wait for it.

    Kernels that no check has found right are checked first, and not tuned if they are
    not.

    Args:
        backend: Whose kernels; it takes these quantizers.
        keys: Of a layer's keys.
        values: Of its values.
        dtype: The model's.
        heads: Of a model's step of one token.
    """
    ledger, key = this_ledger(), key_of(backend, keys, values, dtype)
    job = Job(key.subject, backend.name, backend.simdgroups, STAND_IN)
    if ledger.look(key) is None:
        ledger.start(key, job)
        ledger.wait()
    return ledger.tune(key, replace(job, heads=heads))


def _as_tuned(backend: Gpu, found: Sequence[Tuned]) -> tuple[Gpu, str]:
    """A backend with what tuners found, and that in words."""
    changed = [one for one in found if one.tuning != UNTUNED]
    if not changed:
        return backend, ""
    tunings = tuple((one.heads, one.tuning) for one in changed)
    words = "; ".join(f"{one.heads}: {one}" for one in changed)
    return _with_tunings(backend, tunings), words


@functools.cache
def _with_tunings(backend: Gpu, tunings: tuple[tuple[Heads, Tuning], ...]) -> Gpu:
    return backend.tuned(UNTUNED, dict(tunings))


def _is_ours(*quantizers: Quantizer) -> bool:
    """Whether a check knows all codecs, so that there can be a verdict."""
    return all(
        type(quantizer.codec).__module__.startswith(f"{_PACKAGE}.")
        for quantizer in quantizers
    )


def key_of(backend: Gpu, keys: Quantizer, values: Quantizer, dtype: mx.Dtype) -> Key:
    """What a verdict on these kernels is about.

    Layers ask for the same; templates of all are written out once.
    """
    subject = Subject.of(keys, values, dtype, "")
    known = _keys.get((backend.name, backend.simdgroups, subject))
    if known is None:
        templates = [
            specialize.split_template(keys, values, dtype, 1, False),
            specialize.merge_template(values, dtype, False),
            *(
                None if form is None else (form.kernel, sorted(form.template.items()))
                for form in (q.codec.encode_format for q in (keys, values))
            ),
        ]
        whole = replace(subject, templates=repr(templates))
        known = Key(whole, machine(backend.name, backend.simdgroups), text_hash())
        _keys[backend.name, backend.simdgroups, subject] = known
    return known


_keys: dict[tuple[str, int, Subject], Key] = {}
