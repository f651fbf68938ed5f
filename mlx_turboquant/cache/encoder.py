"""`PageEncoder`: how one layer's tokens become codes, and what decoding them takes.

Owns the codecs, the bases with their gains, and the key means. Which tokens are encoded
when is `linear`'s; the arithmetic is the backend's.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..backends import select
from ..codecs import Codec, codec_for
from ..spec import CacheSpec
from ..tokens import TokenArrays
from ..transform import ChannelTransform, PageMeans
from .bit_allocation import LayerSlot
from .calibration import Calibration, by_power

_MEANS_STEP = 8
_ALL_TOKENS = 1 << 30
Arrays = dict[str, mx.array]


class PageEncoder:
    """Encodes pages of one layer; calibrated by the first of them, then frozen."""

    def __init__(self, spec: CacheSpec, seat: LayerSlot | None = None) -> None:
        self.spec = spec
        self._seat = seat
        self._waited = False
        self.calibrated = False
        self.calibration = Calibration(spec.sink, spec.page)
        self.means: PageMeans | None = None  # what was taken off the keys so far
        self._means = TokenArrays(growth=_MEANS_STEP)
        self._gains: Arrays = {}
        self._dims: tuple[int, int] | None = None
        self._built: (
            tuple[tuple[Codec, Codec], tuple[ChannelTransform, ChannelTransform]] | None
        ) = None

    def prepare(self, k_dim: int, v_dim: int) -> None:
        """Make sure vectors of these dims can be encoded.

        Raises:
            UnsupportedError: if a rotation cannot do its dim.
        """
        if self._dims is None:
            self._dims = (k_dim, v_dim)
            self._build()

    def _build(
        self,
    ) -> tuple[tuple[Codec, Codec], tuple[ChannelTransform, ChannelTransform]]:
        if self._built is None:
            assert self._dims is not None, "prepare comes first"
            spec = self.spec
            codecs = (
                codec_for(spec.keys, self._dims[0], "keys", spec.seed),
                codec_for(spec.values, self._dims[1], "values", spec.seed),
            )
            gains = self._gains
            bases = (
                ChannelTransform(
                    codecs[0].rotation, gains.get("keys"), gains.get("keys_order")
                ),
                ChannelTransform(
                    codecs[1].rotation, gains.get("values"), gains.get("values_order")
                ),
            )
            self._built = codecs, bases
        return self._built

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """Of keys and values."""
        return self._build()[0]

    @property
    def bases(self) -> tuple[ChannelTransform, ChannelTransform]:
        """Of keys and values."""
        return self._build()[1]

    def settle(self, keys: mx.array, values: mx.array) -> bool:
        """Fix gains and bits by all tokens so far (B, H, T, D); whether that is done.

        Bits that are chosen for all layers together are known when all were asked:
        one that is asked again waits no longer.
        """
        if not self.calibrated:
            self._calibrate(keys, values)
        if self._seat is None or not self.spec.adaptive:
            return True
        if self._waited or self._seat.allocation.ready:
            assert self._dims is not None, "prepare comes first"
            self.spec = self._seat.allocation.spec_of(self._seat.layer, self._dims)
            self._built = None
            return True
        self._waited = True
        return False

    def encode(self, keys: mx.array, values: mx.array, first: int) -> Arrays:
        """Codes of tokens (B, H, N, D) that follow ``first`` encoded ones.

        They must end where a page does. `settle` comes first.
        """
        self._add_means(keys, first)
        backend, _ = select.machine_backend()
        encoded = backend.encode(
            keys, values, self.means, first, self.bases, self.codecs
        )
        return {
            f"{side}_{name}": array
            for side, packed in zip(("keys", "values"), encoded, strict=True)
            for name, array in packed.arrays.items()
        }

    def _calibrate(self, keys: mx.array, values: mx.array) -> None:
        spec = self.spec
        page = slice(spec.sink, spec.sink + spec.page)
        centered = keys[:, :, page].astype(mx.float32)
        if spec.center != "off":
            centered = centered - mx.mean(centered, axis=2, keepdims=True)
        if spec.equalize and self.codecs[0].wants_equalizing:
            self._gains["keys"] = self.calibration.key_gains(centered)
        if spec.equalize and self.codecs[1].wants_equalizing:
            self._gains["values"] = self.calibration.value_gains(values[:, :, page])
        for side, codec, x in zip(
            ("keys", "values"), self.codecs, (centered, values[:, :, page]), strict=True
        ):
            if codec.wants_ordering:
                self._gains[f"{side}_order"] = by_power(x)
        self.calibrated = True
        self._built = None
        if self._seat is not None and spec.adaptive:
            near = spec.window + spec.page // 2
            self._seat.allocation.report(
                self._seat.layer,
                _number(self.calibration.reach(keys, values, near)),
                _number(
                    self.calibration.logit_variance(centered, self._gains.get("keys"))
                ),
            )
        # Its queries have done their work; a long text need not hold them.
        self.calibration = Calibration(spec.sink, spec.page)

    def _add_means(self, keys: mx.array, first: int) -> None:
        """Means of the pages that begin within ``keys``."""
        spec = self.spec
        if spec.center == "off" or not self.codecs[0].wants_centering:
            return
        if spec.center == "first":
            if self._means.length:
                return
            keys = keys[:, :, : spec.page]
        # After a trim, tokens that complete a page keep the mean it had.
        keys = keys[:, :, -first % spec.page :]
        batch, heads, count, dim = keys.shape
        if count:
            pages = keys.astype(mx.float32).reshape(batch, heads, -1, spec.page, dim)
            means = self.bases[0].encode(mx.mean(pages, axis=3))
            self._means.append({"keys": means.astype(mx.float16)})
            self._means_changed()

    def _means_changed(self) -> None:
        held, page = self._means, self.spec.page
        if self.spec.center != "page":
            page = _ALL_TOKENS
        self.means = None
        if held.length:
            self.means = PageMeans(held.arrays["keys"], page, held.length)

    def trim(self, encoded: int) -> None:
        """Keep what the first ``encoded`` encoded tokens need; the gains stay."""
        if self.spec.center == "page":
            pages = -(-encoded // self.spec.page)
            self._means.drop_last(max(0, self._means.length - pages))
        elif not encoded:
            self._means.drop_last(self._means.length)
        self._means_changed()

    def drop(self, encoded: int) -> None:
        """Forget the first ``encoded`` encoded tokens, whole pages."""
        if self.spec.center == "page":
            self._means.drop_first(encoded // self.spec.page)
            self._means_changed()

    @property
    def nbytes(self) -> int:
        """Bytes of means and gains."""
        return self._means.nbytes + sum(a.nbytes for a in self._gains.values())

    @property
    def state(self) -> dict[str, Arrays]:
        """Groups of arrays to save."""
        return {
            "means": self._means.views(),
            "gains": self._gains,
            "queries": {} if self.calibrated else self.calibration.state,
        }

    def load(self, groups: Mapping[str, Arrays], calibrated: bool) -> None:
        """Take over what `state` gave."""
        self._means.replace(groups["means"])
        self._means_changed()
        self._gains = dict(groups["gains"])
        self.calibration.state = groups["queries"]
        self.calibrated = calibrated
        self._built = None


def _number(scalar: mx.array | None) -> float | None:
    return None if scalar is None else float(np.array(scalar))
