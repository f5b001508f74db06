"""Images and texts into what a model of open_clip takes."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from unicl.errors import UniclError
from unicl.towers.open_clip.messages import first_line, hub, hub_cache, quiet


class PixelTransform:
    """An image into bytes, by steps that take and return PIL images; can be pickled.

    Args:
        steps: What is done to the image; the last step's result is square and RGB.
    """

    def __init__(self, steps: Sequence[Callable[[Image.Image], Image.Image]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, image: Image.Image, seed: int = 0) -> UInt8[Tensor, "3 size size"]:
        """Carry out the steps; the seed has no effect.

        Raises:
            OSError: Pillow cannot decode the image.
        """
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # bad files make Pillow raise all sorts
            raise OSError(str(error) or type(error).__name__) from error
        for step in self.steps:
            image = step(image)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class OpenClipTokenizer:
    """A model's own tokenizer, which may have to be downloaded, once texts are there.

    Args:
        name: The model in open_clip's words.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "texts context"]:
        """Turn texts into padded token numbers.

        Raises:
            UniclError: The tokenizer cannot be loaded or downloaded.
        """
        return self._tokenizer(list(texts))

    def __getstate__(self) -> dict[str, str]:
        """Leave the tokenizer out: each process loads its own."""
        return {"name": self.name}

    @functools.cached_property
    def _tokenizer(self) -> Callable[[list[str]], Tensor]:
        import open_clip

        try:
            with quiet():
                return open_clip.get_tokenizer(self.name)
        except Exception as error:  # transformers and its downloads raise all sorts
            raise UniclError(
                f"cannot load the tokenizer of {self.name}: {first_line(error)}; it comes from "
                f"{hub()} and is kept in {hub_cache()}"
            ) from error
