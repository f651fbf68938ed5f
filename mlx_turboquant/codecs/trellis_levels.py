"""Levels of the trellis: what a window of 8 bits stands for, by one short formula.

With m the multiplier of an element's turn (1024 to 1638) and b the slope:

    u = twice what (1024 + window) * m / 1024 is off the nearest whole number, -1 to 1,
        ties to even: it scatters windows evenly, as trained tables did
    level = u * (b + u^8), rounded to a 4096th: nearly even, with a tail

In halves 1024 + window is a window's 8 bits under another exponent, and u what its
product loses by rounding, which one multiply-add finds. So a decode kernel makes two
levels by 7 operations on pairs of halves and looks nothing up. A 4096th is less than a
half tells apart; rounding to it makes the levels one set of numbers on all machines.

Multipliers, slopes and gains are chosen by ``benchmarks/choose_trellis.py``. Not here:
the stream of windows and its codec (`trellis`), the search (`viterbi`).
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
        multipliers: m of even and of odd elements, in 1024ths.
        slope: b; a half has it exactly, as it is a multiple of 1/256.
        gain: What levels are multiplied with, for vectors of mean square 1.
        mse: Relative squared error of rotated vectors, measured at d=128.
    """

    widths: tuple[int, ...]
    multipliers: tuple[int, int]
    slope: float
    gain: float
    mse: float

    @property
    def levels(self) -> Floats:
        """Of even and of odd elements by window: (2, 256), in `steps`."""
        return np.stack([window_levels(m, self.slope) for m in self.multipliers])

    @property
    def step(self) -> float:
        """What `levels` are multiples of."""
        return self.gain / RESOLUTION

    @property
    def params(self) -> tuple[float, ...]:
        """For kernels: the gain, twice the multipliers, the slope."""
        even, odd = self.multipliers
        return self.gain, even / 512, odd / 512, self.slope


def window_levels(multiplier: int, slope: float) -> Floats:
    """Levels by window, (256,), in 4096ths: whole numbers."""
    product = (1024 + np.arange(1 << WINDOW)) * multiplier / 1024
    u = 2 * (product - np.round(product))
    levels: Floats = np.round(u * (slope + u**8) * RESOLUTION).astype(np.float32)
    return levels


#: By bits of an element.
FORMULAS = {
    1: Formula((1, 1), (1588, 1572), 1.78125, 0.731, 0.281),
    1.5: Formula((2, 1), (1404, 1476), 1.375, 1.045, 0.1452),
    2: Formula((2, 2), (1268, 1260), 1.28125, 1.158, 0.0739),
    2.5: Formula((3, 2), (1156, 1300), 1.25, 1.23, 0.03867),
    3: Formula((3, 3), (1140, 1148), 1.15625, 1.363, 0.01963),
    3.5: Formula((4, 3), (1308, 1404), 1.0625, 1.49, 0.01034),
    4: Formula((4, 4), (1508, 1084), 1.0625, 1.561, 0.00537),
}
