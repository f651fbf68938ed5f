"""Levels of the trellis: what a window of 8 bits stands for, by one short formula.

With m the multiplier of an element's turn (1024 to 1639), c the bend and b the slope:

    u = twice what (1024 + window) * m / 1024 is off the nearest whole number, -1 to 1,
        ties to even: it scatters windows evenly over the line
    level = u * ((u * u - c)^2 + b), rounded to a 4096th: nearly even, with tails

In halves 1024 + window is a window's 8 bits under another exponent, and u what its
product loses by rounding, which one multiply-add finds. So a decode kernel makes two
levels by 6 operations on pairs of halves and looks nothing up. A 4096th is less than a
half tells apart; rounding to it makes the levels one set of numbers on all machines.

Multipliers, bends, slopes and gains are chosen by ``benchmarks/choose_trellis.py``. Not
here: the stream of windows and its codec (`trellis`), the search (`viterbi`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Bits of a window.
WINDOW = 8
#: Levels are whole numbers over this.
RESOLUTION = 4096

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Formula:
    """The levels of one rate.

    Attributes:
        widths: Own bits of an element, in turns: even ones first.
        multipliers: m of even and of odd elements.
        bend: c, a multiple of 1/128, as halves have it exactly.
        slope: b, likewise.
        gain: What levels are multiplied with, for vectors of mean square 1.
        mse: Relative squared error of rotated vectors, measured at d=128.
    """

    widths: tuple[int, ...]
    multipliers: tuple[int, int]
    bend: float
    slope: float
    gain: float
    mse: float

    @property
    def levels(self) -> Floats:
        """Of even and of odd elements by window: (2, 256), in `steps`."""
        return np.stack(
            [window_levels(m, self.bend, self.slope) for m in self.multipliers]
        )

    @property
    def step(self) -> float:
        """What `levels` are multiples of."""
        return self.gain / RESOLUTION

    @property
    def params(self) -> tuple[float, ...]:
        """For kernels: the gain, twice the multipliers over 1024, bend and slope."""
        even, odd = self.multipliers
        return self.gain, even / 512, odd / 512, self.bend, self.slope


def window_levels(multiplier: int, bend: float, slope: float) -> Floats:
    """Levels by window, (256,), in 4096ths: whole numbers."""
    product = (1024 + np.arange(1 << WINDOW)) * multiplier / 1024
    u = 2 * (product - np.round(product))
    level = u * ((u * u - bend) ** 2 + slope)
    levels: Floats = np.round(level * RESOLUTION).astype(np.float32)
    return levels


#: By bits of an element.
FORMULAS = {
    1: Formula((1, 1), (1572, 1612), 29 / 128, 140 / 128, 1.146, 0.2813),
    1.5: Formula((2, 1), (1220, 1420), 31 / 128, 104 / 128, 1.65, 0.1457),
    2: Formula((2, 2), (1300, 1268), 31 / 128, 108 / 128, 1.745, 0.0745),
    2.5: Formula((3, 2), (1156, 1300), 28 / 128, 95 / 128, 1.951, 0.039),
    3: Formula((3, 3), (1156, 1164), 28 / 128, 95 / 128, 2.033, 0.0201),
    3.5: Formula((4, 3), (1148, 1124), 24 / 128, 94 / 128, 2.13, 0.0107),
    4: Formula((4, 4), (1308, 1084), 24 / 128, 86 / 128, 2.361, 0.00555),
}
