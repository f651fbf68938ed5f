"""What the judge of proofs lets pass, and what not."""

import mlx.core as mx
import pytest

from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.proof.judge import WrongError, hold, without_ties


def codes_of(vectors=512):
    """(vectors as decoded, what was encoded)."""
    x = mx.random.normal((1, 2, vectors // 2, 64))
    return x + 0.2 * mx.random.normal(x.shape), x


def change(array, count, new):
    """The same with the first ``count`` vectors of a head made new."""
    array = mx.array(array)
    array[:, 0, :count] = new[:, 0, :count]
    return array


def judged(got, want, x):
    hold(
        Reference(),
        lambda b: [without_ties(got, want, x)],
        [want],
        row_tolerance=2e-2,
    )


def test_a_choice_that_is_as_good_is_no_error():
    want, x = codes_of()
    mirrored = 2 * x - want  # as far from x on its other side
    for count in (1, 40):
        got = change(want, count, mirrored)
        assert mx.array_equal(without_ties(got, want, x), want).item()
        judged(got, want, x)


def test_a_choice_that_is_worse_is():
    want, x = codes_of()
    for worse in (x + 1.1 * (want - x), 0 * x, 2 * x - want + 0.1 * x):
        got = change(want, 1, worse)
        with pytest.raises(WrongError, match=r"of a row is over|is over 0\.005"):
            judged(got, want, x)


def test_too_many_choices_are_none():
    want, x = codes_of()
    mirrored = 2 * x - want
    with pytest.raises(WrongError, match=r"is over 0\.005"):
        judged(change(want, 60, mirrored), want, x)
    with pytest.raises(WrongError, match=r"error 0\.01 is over 0\.005"):
        judged(1.01 * want, want, x)
    with pytest.raises(WrongError, match="error nan"):
        judged(change(want, 1, mx.nan * x), want, x)
