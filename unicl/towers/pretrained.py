"""A model and all that its use takes, wherever it comes from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unicl.towers.two_tower import TwoTower


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Two towers with their own way of reading images and texts."""

    name: str
    """What a person calls it: the path of a run or of a folder in open_clip's format,
    `open_clip:NAME/weights`."""
    model: TwoTower
    """The towers, in eval mode."""
    tokenize: Callable[[Sequence[str]], Tensor]
    """Texts to token numbers [texts, context_length]."""
    transform: Callable[[Image.Image, int], Tensor]
    """An opened image and a seed, which has no effect, to bytes [3, image_size, image_size], or to
    a still clip."""
    decode: Any = None
    """What makes the image tower's input of an encoded file, a `unicl.data.reader.Decode`; unset
    decodes images and applies `transform`."""
    image_size: int
    """Side of the images in pixels."""
    context_length: int
    """Longest text in tokens."""
    identity: str
    """What tells its embeddings from those of other models, besides the values of the weights:
    architecture, activation, transform."""
    classes: tuple[str, ...] = ()
    """Names of the outputs, where these are a head's probabilities of classes."""
    medium: str = ""
    """The plug-in whose medium it sees; empty of a model of images."""
    mark: str = ""
    """What of its own way of reading was changed for an evaluation, as results are told apart."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """How the model reads its samples, such as the frames of a clip; told with each result. The
    space of the embeddings does not depend on it."""

    skills: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """What it can do besides, by the names of `unicl.Predictor`'s methods, such as `detect`."""

    @cached_property
    def fingerprint(self) -> str:
        """Digest of identity and weights: models that differ in it embed differently."""
        digest = blake2b(self.identity.encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()
