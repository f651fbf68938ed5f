"""Images, videos and sounds for tiny models, as processors hand them to models.

Each function makes one `Medium`, or returns what makes it; the content is random, the
layout that of a family's processor.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

VOCAB, IMAGE, VIDEO, VISION_START, SOUND = 160, 150, 151, 152, 153
WORDS = 140  # ids below are text
START = 21  # of the image or the sound in a prompt: in a page that is packed
#: Pixels on a side of an image and of a patch, patches on a side.
SIDE, PATCH, GRID = 16, 4, 4


@dataclass(frozen=True)
class Medium:
    """One image or sound as a processor hands it to a model.

    Attributes:
        tokens: Tokens that stand for it in the prompt.
        pixels: ``pixel_values``, if it is an image.
        given: What else the processor returns.
        token: Id of these tokens.
        at: Where in the prompt they are.
    """

    tokens: int
    pixels: mx.array | None = None
    given: dict[str, Any] = field(default_factory=dict)
    token: int = IMAGE
    at: int = START

    def other(self) -> "Medium":
        """The same with another content: its negative."""
        given = {
            name: -value if name in ("input_features", "pixel_values_videos") else value
            for name, value in self.given.items()
        }
        pixels = None if self.pixels is None else -self.pixels
        return replace(self, pixels=pixels, given=given)


def _random(*shape):
    return mx.random.normal(shape, key=mx.random.key(9))


def image(tokens, *axes, at=START, **given):
    """An image of whole pixels, behind ``axes``."""
    return lambda: Medium(tokens, _random(*axes, 3, SIDE, SIDE), given, at=at)


def patches(frames=2, tokens=GRID * GRID // 2):
    """Qwen's layout: 4 by 8 patches of ``frames``, 2 by 2 of which are a token."""
    grid = (1, GRID, 2 * GRID)
    return lambda: Medium(
        tokens,
        _random(2 * GRID * GRID, 3 * frames * PATCH * PATCH),
        {"image_grid_thw": mx.array([grid])},
    )


def video():
    """As `patches`, of a video."""
    grid = mx.array([[1, GRID, 2 * GRID]])
    pixels = _random(2 * GRID * GRID, 6 * PATCH * PATCH)
    given = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    return Medium(GRID * GRID // 2, given=given, token=VIDEO)


def sound(tokens, features, **given):
    """A spectrogram, of the shape ``features``."""
    return lambda: Medium(
        tokens, given={"input_features": _random(*features), **given}, token=SOUND
    )


def text_alone():
    """No image: the tower comes in one size, too large to draw."""
    return Medium(0)


def kimi():
    """Kimi's layout: patches of pixels."""
    grid = {"image_grid_hws": mx.array([[GRID, GRID]])}
    return Medium(4, _random(GRID * GRID, 3, PATCH, PATCH), grid)


def lfm2():
    """LFM2's layout: rows of patches, and which of them are real."""
    shapes, mask = mx.array([[GRID, GRID]]), mx.ones((1, GRID * GRID), mx.int32)
    given = {"spatial_shapes": shapes, "pixel_attention_mask": mask}
    return Medium(4, _random(1, GRID * GRID, 3 * PATCH * PATCH), given)


def prompt(medium, count):
    """Ids (1, count): text, what stands for the medium, text."""
    ids = mx.random.randint(1, WORDS, (count,), key=mx.random.key(5)).tolist()
    ids[START - 1] = VISION_START
    ids[medium.at : medium.at + medium.tokens] = [medium.token] * medium.tokens
    return mx.array([ids])
