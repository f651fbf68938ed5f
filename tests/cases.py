"""The matrix: a codec gets the laws by being registered, and caches by a row here."""

import pytest

from mlx_turboquant.codecs import codec_names

#: Specs whose caches every cache and attention test runs over.
SPECS = (
    "k3v3",
    "k4v2",
    "k16v3",
    "k8v16",
    "k5v5,center=off",
    "k1v7,sink=0,window=0",
    "k3v2.5,codec=trellis",
    "k3v3,codec=research.turboquant-prod",
    "k2.25v2.5,codec=research.turboquant-outlier",
    "k3.5v3,codec=research.turboangle",
    "k3v2.5,codec=research.turboangle-fixed",
    "k3.875v3.875,codec=research.polarquant",
    "k4v4,codec=rotated-int4",
    "k3v2,codec=research.hqmq",
    "k4v3,codec=research.residual",
    "k4v3,codec=research.affine",
    "k3v3,codec=research.qjl/research.turboquant-eden",
    "k8v3,codec=research.jl/research.turboquant-drive",
    "k3v3,codec=research.turboquant-plain",
)
DIMS = (8, 33, 64, 72, 80, 96, 128, 256)
BITS = tuple(range(1, 9))

#: Every codec of the package, comparisons included.
CODECS = codec_names(research=True)

each_spec = pytest.mark.parametrize("spec", SPECS)
each_dim = pytest.mark.parametrize("dim", DIMS)
each_bits = pytest.mark.parametrize("bits", BITS)
each_codec = pytest.mark.parametrize("name", CODECS)
