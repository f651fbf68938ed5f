"""Whether kernels are proved on this machine for what a cache's quantizers encode.

Owns what a proof is asked for, and that what was proved is compared once more on a
user's tokens; how proofs are made and kept is ``proof/``'s.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from ..proof import ledger
from ..proof.key import Key, Subject, machine, text_hash
from ..proof.ledger import Ledger
from ..proof.runner import Job
from ..proof.store import Store, Verdict
from ..quantizer import Quantizer
from . import specialize
from .gpu import Gpu
from .shadow import Shadow

#: What a child checks in place of this machine's kernels, for tests: see `Job.backend`.
STAND_IN = ""
_PACKAGE = __name__.split(".")[0]


class Proved(NamedTuple):
    """A backend whose kernels are proved for a cache, and the verdict's digest."""

    backend: Gpu
    digest: str


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
        codec = quantizer.codec
        if not type(codec).__module__.startswith(f"{_PACKAGE}."):
            return f"a check of its kernels would not know codec {codec.spec}"
    key = key_of(backend, keys, values, dtype)
    verdict = this_ledger().standing(key)
    if verdict is None:
        job = Job(key.subject, backend.name, backend.simdgroups, STAND_IN)
        this_ledger().start(key, job)
        return ledger.UNDER_WAY
    if not verdict.is_ok:
        return ledger.words(verdict)
    return Proved(shadow_of(backend, key.digest).backend, key.digest)


@functools.cache
def shadow_of(backend: Gpu, digest: str) -> Shadow:
    """What watches the first step of kernels with a verdict, in this process."""
    return Shadow(backend, lambda reason: this_ledger().overturn(digest, reason))


def verdict_of(digest: str) -> Verdict | None:
    """What this process goes by now for kernels that it has asked about."""
    return this_ledger().found(digest)


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
