"""Prompt templates for short texts (Florence 2.2), drawn by a pure function of the position.

"clip" is the set of the public UniCL release: the bare name and CLIP's 80 ImageNet templates.
"""

from unicl.data.order import mix
from unicl.errors import UsageError

_PURPOSE = int.from_bytes(b"prompts")

_CLIP = """
{}.
a bad photo of a {}.
a photo of many {}.
a sculpture of a {}.
a photo of the hard to see {}.
a low resolution photo of the {}.
a rendering of a {}.
graffiti of a {}.
a bad photo of the {}.
a cropped photo of the {}.
a tattoo of a {}.
the embroidered {}.
a photo of a hard to see {}.
a bright photo of a {}.
a photo of a clean {}.
a photo of a dirty {}.
a dark photo of the {}.
a drawing of a {}.
a photo of my {}.
the plastic {}.
a photo of the cool {}.
a close-up photo of a {}.
a black and white photo of the {}.
a painting of the {}.
a painting of a {}.
a pixelated photo of the {}.
a sculpture of the {}.
a bright photo of the {}.
a cropped photo of a {}.
a plastic {}.
a photo of the dirty {}.
a jpeg corrupted photo of a {}.
a blurry photo of the {}.
a photo of the {}.
a good photo of the {}.
a rendering of the {}.
a {} in a video game.
a photo of one {}.
a doodle of a {}.
a close-up photo of the {}.
a photo of a {}.
the origami {}.
the {} in a video game.
a sketch of a {}.
a doodle of the {}.
a origami {}.
a low resolution photo of a {}.
the toy {}.
a rendition of the {}.
a photo of the clean {}.
a photo of a large {}.
a rendition of a {}.
a photo of a nice {}.
a photo of a weird {}.
a blurry photo of a {}.
a cartoon {}.
art of a {}.
a sketch of the {}.
a embroidered {}.
a pixelated photo of a {}.
itap of the {}.
a jpeg corrupted photo of the {}.
a good photo of a {}.
a plushie {}.
a photo of the nice {}.
a photo of the small {}.
a photo of the weird {}.
the cartoon {}.
art of the {}.
a drawing of the {}.
a photo of the large {}.
a black and white photo of a {}.
the plushie {}.
a dark photo of a {}.
itap of a {}.
graffiti of the {}.
a toy {}.
itap of my {}.
a photo of a cool {}.
a photo of a small {}.
a tattoo of the {}.
"""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": ("{}",),
    # The seven that CLIP's authors found to do as well as all 80 together.
    "simple": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "clip": tuple(_CLIP.strip().splitlines()),
}


def fill(template: str, text: str) -> str:
    """Put a text into the braces of a template; braces in the text itself stay as they are."""
    return template.replace("{}", text)


class PromptSampler:
    """Puts short texts into a template drawn at random, longer ones it leaves alone.

    Args:
        name: A set in `TEMPLATES`; "none" leaves every text alone (the paper's second stage).
        short_text_words: A text of at most this many words is short.

    Raises:
        UsageError: There is no template set of this name.
    """

    def __init__(self, name: str, *, short_text_words: int, seed: int) -> None:
        if name not in TEMPLATES:
            raise UsageError(f"no templates named {name!r}: choose from {', '.join(TEMPLATES)}")
        self._templates = TEMPLATES[name]
        self._short_text_words = short_text_words
        self._seed = seed

    def __call__(self, text: str, position: int) -> str:
        """Return the text as the text tower shall see it at this position of the stream.

        An empty text stays empty: a template around nothing would describe nothing.
        """
        if not 0 < len(text.split()) <= self._short_text_words:
            return text
        choice = mix(self._seed, _PURPOSE, position) % len(self._templates)
        return fill(self._templates[choice], text)
