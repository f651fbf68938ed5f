"""The kernel that shows what the others take for granted of a GPU.

Owns its buffers and arguments; no arithmetic (``metal/probe.metal``) and no expectation
(`proof.facts`).
"""

from __future__ import annotations

from typing import NamedTuple

from .kernel import Kernel


class ProbeArguments(NamedTuple):
    """What the probe is told besides its template."""

    #: Products to make.
    cases: int
    #: What words of threadgroup memory are made from.
    seed: int


#: Lanes, fragments, sums, halves, threadgroup memory; one threadgroup.
PROBE = Kernel(
    name="probe",
    file="probe.metal",
    inputs=(
        "halves",
        "floats",
        "powers",
        "left",
        "right",
        "weights",
        "starts",
        "arguments",
    ),
    outputs=("lanes", "products"),
    arguments=ProbeArguments,
)
