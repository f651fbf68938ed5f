"""The matrix: a new codec gets the whole suite from one row here."""

import pytest

#: Specs whose caches every cache and attention test runs over.
SPECS = ("k3v3", "k4v2", "k16v3", "k8v16", "k5v5,center=off", "k1v7,sink=0,window=0")
DIMS = (8, 33, 64, 72, 80, 96, 128, 256)
BITS = tuple(range(1, 9))

each_spec = pytest.mark.parametrize("spec", SPECS)
each_dim = pytest.mark.parametrize("dim", DIMS)
each_bits = pytest.mark.parametrize("bits", BITS)
