"""A model's public face: images and texts in, arrays out."""

import functools
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unicl.config import find_medium
from unicl.data.augment import UndecodableImage, open_image, upright
from unicl.data.prompts import TEMPLATES
from unicl.data.reader import samples_at_once
from unicl.data.shards import SampleError
from unicl.errors import UniclError, UsageError
from unicl.evaluation.cache import decoder_of
from unicl.evaluation.embeddings import (
    autocast_of,
    computing_in,
    device_of,
    embed_texts,
    evaluating,
)
from unicl.evaluation.zero_shot import class_embeddings, rank_classes, require_unique
from unicl.towers.pretrained import Pretrained

ImageInput = str | Path | Image.Image | NDArray[np.uint8]
"""A path or a URL (http, https, file), a PIL image, or an array [height, width] or
[height, width, 3 or 4] of bytes. A model of videos takes paths and URLs of videos, too."""

Images = Sequence[ImageInput] | NDArray[np.uint8]
"""A list of them, or an array of bytes with one more axis in front."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""

_IMAGES = (str, Path, Image.Image, np.ndarray)
_URL = re.compile(r"(https?|file)://")
_MAX_BYTES = 1 << 28
_SECONDS_TO_FETCH = 30


class Detection(NamedTuple):
    """An object that was found in an image."""

    name: str
    """Its class."""
    score: float
    """How sure the model is of it, in 0..1."""
    box: Box
    """Where it is, in the image's own pixels."""


class Predictor:
    """Embeds images and texts with a model, and names images; threads may share one.

    Args:
        model: the towers with their tokenizer and transform; they are put into eval mode.
        batch_size: images (of videos: frames) or texts per forward pass.
        precision: type of the towers' arithmetic: fp32, bf16 or fp16.
    """

    def __init__(self, model: Pretrained, *, batch_size: int = 64, precision: str = "fp32") -> None:
        _require_count(batch_size, "batch_size")
        self._autocast = autocast_of(precision)
        model.model.eval()
        self.name = model.name
        self.model = model.model
        self.tokenize = model.tokenize
        self.transform = model.transform
        self.decode = model.decode
        self.classes = model.classes
        self.skills = model.skills
        self.batch_size = batch_size
        self._shape = decoder_of(model).empty().shape[1:]
        self._at_once = samples_at_once(decoder_of(model), batch_size)
        # The same names are asked for again and again; safe for threads, unlike a dict of ours.
        self._classifier = functools.lru_cache(maxsize=8)(self._build_classifier)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        medium: str | None = None,
        device: str = "auto",
        batch_size: int = 64,
        precision: str = "fp32",
    ) -> "Predictor":
        """Load a model by its name; nothing is unpickled.

        Example: `Predictor.load("runs/demo", medium="video").embed_images(["clip.mp4"])`.

        Args:
            name: a run's folder or one of its checkpoints, a folder that `unicl export` or
                open_clip wrote, `open_clip:NAME[/WEIGHTS]`, or a `.pth` file of UniCL's release.
            medium: what a model of images shall see besides, such as `video`; a run on videos sees
                them anyway.
            device: auto, cpu, cuda or cuda:N.
            batch_size: images (of videos: frames) or texts per forward pass.
            precision: type of the towers' arithmetic: fp32, bf16 or fp16.

        Raises:
            UniclError: there is no such model, or it is damaged.
            UsageError: `device` is none of the above, or is not there; or no plug-in has `medium`.
        """
        plugin = None if medium is None else find_medium(medium)
        # Late: loading knows every kind of model, using one needs only a few of them.
        from unicl.models import load_for

        model = load_for(plugin, name, device=device)
        return cls(model, batch_size=batch_size, precision=precision)

    def __repr__(self) -> str:
        return f"<Predictor of {self.name} on {device_of(self.model)}>"

    def embed_images(self, images: Images) -> Float[np.ndarray, "num_images dim"]:
        """Unit-length embeddings of images.

        Raises:
            UsageError: there are no images, a file is missing, or an array is no image.
            UniclError: a file cannot be decoded.
        """
        return self._image_embeddings(images).numpy()

    def image_features(self, images: Images) -> Float[np.ndarray, "num_images width"]:
        """What the embeddings of images are projected from: the input of a linear probe.

        Example: `LinearProbe.load(path).predict(torch.from_numpy(predictor.image_features(paths)))`
        gives class numbers.

        Raises:
            UsageError: there are no images, a file is missing, or an array is no image.
            UniclError: a file cannot be decoded.
        """
        return self._encode(images, lambda pixels: self.model.encode_image_twice(pixels)[1]).numpy()

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "num_texts dim"]:
        """Unit-length embeddings of texts, as they are: no template is added.

        Raises:
            UsageError: there are no texts, or something among them is none.
        """
        texts = _listed(texts, "texts", (str,), "a text")
        return embed_texts(
            self.model, texts, self.tokenize, self.batch_size, autocast=self._autocast
        ).numpy()

    def classify(
        self,
        images: Images,
        names: Sequence[str] | None = None,
        *,
        templates: str | Sequence[str] = "simple",
        top_k: int = 5,
    ) -> list[list[tuple[str, float]]]:
        """The best names of each image with their probabilities among all names, best first.

        Args:
            images: paths, URLs, PIL images or arrays.
            names: what an image can be, each once; a model with a classification head knows its
                own names, and takes none.
            templates: name of a set of prompt templates, or templates with one `{}` each.
            top_k: names to return for each image; all of them where there are fewer.

        Example: `predictor.classify(["cat.jpg"], ["cat", "dog"])` is
        `[[("cat", 0.97), ("dog", 0.03)]]`.

        Raises:
            UsageError: something that was asked for is wrong: a missing file, a name given twice.
            UniclError: a file cannot be decoded.
        """
        _require_count(top_k, "top_k")
        if self.classes:
            if names is not None:
                raise UsageError(
                    f"{self.name} has a head with {len(self.classes)} names of its own; give none"
                )
            shares, best = self._encode(images, self.model.encode_image).sort(descending=True)
            return _guesses(self.classes, best=best[:, :top_k], shares=shares[:, :top_k])
        if names is None:
            raise UsageError("names: give a list of what an image can be")
        names = _listed(names, "names", (str,), "a text")
        require_unique(names)
        classifier = self._classifier(tuple(names), tuple(_templates(templates)))
        embeddings = self._image_embeddings(images)
        best, probabilities, _ = rank_classes(
            embeddings,
            classifier,
            torch.zeros(len(embeddings), dtype=torch.int64),
            scale=self.model.scale().item(),
            num_guesses=top_k,
        )
        return _guesses(names, best=best, shares=probabilities)

    def detect(
        self, images: Images, names: Sequence[str] | None = None, *, threshold: float = 0.3
    ) -> list[list[Detection]]:
        """Objects in each image, the surest first.

        Args:
            images: paths, URLs, PIL images or arrays.
            names: what to look for, each once; None looks for the classes of the training data.
            threshold: detections of lower scores are left out.

        Example: `Predictor.load("runs/detection").detect(["park.jpg"], ["dog", "ball"])` is
        `[[Detection("dog", 0.91, (12.0, 40.5, 180.2, 230.0))]]`.

        Raises:
            UsageError: the model is no detector, or something that was asked for is wrong.
            UniclError: a file cannot be decoded.
        """
        detect = self._skill("detect", "is no detector", "detection")
        if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
            raise UsageError(f"threshold must be a number in [0, 1], got {threshold!r}")
        if names is not None:
            names = _listed(names, "names", (str,), "a text")
            require_unique(names)
        images = _listed(images, "images", _IMAGES, "a path, a PIL image or an array")
        opened = (self._open(image, number) for number, image in enumerate(images))
        with computing_in(device_of(self.model), self._autocast):
            return [detect(each, names, threshold) for each in opened]

    def answer(
        self, image: ImageInput, question: str, *, top_k: int = 5
    ) -> list[tuple[str, float]]:
        """The best answers to a question about an image, with how sure the model is of each.

        Args:
            image: a path, a URL, a PIL image or an array.
            question: what is asked.
            top_k: answers to return.

        Example: `Predictor.load("runs/vqa").answer("park.jpg", "what is left of the bench?")` is
        `[("dog", 0.91), ("bicycle", 0.07), ...]`; each answer is judged by itself, so that their
        shares need not sum to one.

        Raises:
            UsageError: the model was not trained on questions, or the question is too long.
            UniclError: the file cannot be decoded.
        """
        answer = self._skill("answer", "does not answer questions", "vqa")
        _require_count(top_k, "top_k")
        (question,) = _listed([question], "question", (str,), "a text")
        if not question.strip():
            raise UsageError("the question is empty; ask something")
        (found,) = self._seen(image, lambda opened: answer(opened, [question], top_k))
        return found

    def caption(self, image: ImageInput) -> str:
        """A caption of an image.

        Args:
            image: a path, a URL, a PIL image or an array.

        Example: `Predictor.load("runs/captioning").caption("park.jpg")` is
        `"a dog sits beside a bench"`.

        Raises:
            UsageError: the model was not trained on captions.
            UniclError: the file cannot be decoded.
        """
        caption = self._skill("caption", "does not write captions", "captioning")
        return self._seen(image, caption)

    def _skill(self, name: str, lacks: str, recipe: str) -> Callable[..., Any]:
        if name not in self.skills:
            raise UsageError(
                f"{self.name} {lacks}; train one on it: unicl train {recipe} --weights MODEL "
                "--data.train FOLDER"
            )
        return self.skills[name]

    def _seen(self, image: ImageInput, see: Callable[[Image.Image], Any]) -> Any:
        """Return what a skill makes of one image."""
        (image,) = _listed([image], "image", _IMAGES, "a path, a PIL image or an array")
        with computing_in(device_of(self.model), self._autocast):
            return see(self._open(image, 0))

    def _build_classifier(
        self, names: tuple[str, ...], templates: tuple[str, ...]
    ) -> Float[Tensor, "num_classes dim"]:
        return class_embeddings(
            self.model,
            names,
            templates,
            self.tokenize,
            batch_size=self.batch_size,
            autocast=self._autocast,
        )

    def _image_embeddings(self, images: Images) -> Float[Tensor, "num_images dim"]:
        if self.classes:
            raise UsageError(
                f"{self.name} has a classification head, so it gives probabilities and no "
                "embeddings; ask `classify`, or `image_features`"
            )
        return self._encode(images, self.model.encode_image)

    def _encode(self, images: Images, encode: Callable[[Tensor], Tensor]) -> Tensor:
        images = _listed(images, "images", _IMAGES, "a path, a PIL image or an array")
        device = device_of(self.model)
        embeddings = []
        with evaluating(self.model), computing_in(device, self._autocast):
            for start in range(0, len(images), self._at_once):
                pixels = [
                    self._pixels(image, number)
                    for number, image in enumerate(images[start : start + self._at_once], start)
                ]
                embeddings.append(encode(torch.stack(pixels).to(device)).float().cpu())
        return torch.cat(embeddings)

    def _pixels(self, image: ImageInput, number: int) -> UInt8[Tensor, "*view size size"]:
        with naming(_name(image, number)):
            if isinstance(image, str | Path) and self.decode is not None:
                return self.decode(read_image(str(image)), 0)
            pixels = self.transform(_opened(image), 0)
            # All views of a picture are alike.
            return pixels if isinstance(image, str | Path) else pixels.expand(self._shape)

    def _open(self, image: ImageInput, number: int) -> Image.Image:
        with naming(_name(image, number)):
            return upright(_opened(image))


def _name(image: ImageInput, number: int) -> str:
    if isinstance(image, str | Path):
        return str(image)
    # Pillow's images know the file that they were opened from.
    return getattr(image, "filename", "") or f"image {number}"


def _opened(image: ImageInput) -> Image.Image:
    if isinstance(image, str | Path):
        return open_image(read_image(str(image)))
    if isinstance(image, Image.Image) and 0 in image.size:
        raise ValueError(f"an image needs pixels, got {image.width} x {image.height}")
    return image if isinstance(image, Image.Image) else _picture(image)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say in one line which image could not be read, and why."""
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(f"there is no image file {name}") from error
    except (OSError, UndecodableImage, SampleError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UniclError(f"cannot read {name}: {reason}; convert it or leave it out") from error
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def read_image(place: str) -> bytes:
    """Read an image's file, or fetch it by its URL.

    Raises:
        OSError: it is not there, does not come whole, or is larger than 256 MiB.
    """
    if not _URL.match(place):
        return Path(place).read_bytes()
    try:
        with urllib.request.urlopen(place, timeout=_SECONDS_TO_FETCH) as answer:
            data = answer.read(_MAX_BYTES + 1)
    except urllib.error.URLError as error:  # an OSError whose words are in its reason
        raise OSError(str(error.reason)) from error
    except HTTPException as error:  # no OSError, though a URL with a space in it raises one
        raise OSError(str(error) or type(error).__name__) from error
    if len(data) > _MAX_BYTES:
        raise OSError(f"it has more than {_MAX_BYTES >> 20} MiB")
    return data


def _picture(array: NDArray[np.uint8]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else None
    shaped = array.ndim in (2, 3) and channels in (None, 3, 4) and array.size
    if array.dtype != np.uint8 or not shaped:
        raise ValueError(
            "an array must hold bytes of shape [height, width] or [height, width, 3 or 4], "
            f"got {array.dtype} of shape {list(array.shape)}"
        )
    return Image.fromarray(array)


def _guesses(
    names: Sequence[str],
    *,
    best: Int[Tensor, "num_images num_guesses"],
    shares: Float[Tensor, "num_images num_guesses"],
) -> list[list[tuple[str, float]]]:
    return [
        [(names[number], share) for number, share in zip(*guesses, strict=True)]
        for guesses in zip(best.tolist(), shares.tolist(), strict=True)
    ]


def _require_count(value: object, what: str) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{what} must be a positive whole number, got {value!r}")


def _listed(values: Any, what: str, kinds: tuple[type, ...], kind: str) -> list[Any]:
    """Return values as a list, or say which of them is of the wrong kind.

    An array of texts or of several images is a list, too.
    """
    got = type(values).__name__
    # A single path is a sequence of letters to Python, and would be read as many one-letter paths;
    # an array of one image would be read as many one-line images.
    if isinstance(values, str | bytes | Path | Image.Image) or _is_one_image(values):
        raise UsageError(f"{what} must be a list, got one {got}: put it in brackets")
    if not isinstance(values, Sequence | np.ndarray) or getattr(values, "ndim", 1) == 0:
        raise UsageError(f"{what} must be a list, got {got}")
    if len(values) == 0:
        raise UsageError(f"{what} is empty: give at least one")
    for number, value in enumerate(values):
        if not isinstance(value, kinds):
            raise UsageError(f"{what}[{number}] must be {kind}, got {type(value).__name__}")
    return list(values)


def _is_one_image(values: Any) -> bool:
    if not isinstance(values, np.ndarray):
        return False
    return values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))


def _templates(templates: str | Sequence[str]) -> Sequence[str]:
    if not isinstance(templates, str):
        return _listed(templates, "templates", (str,), "a text")
    if templates not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UsageError(f"there are no templates {templates!r}: choose from {known}")
    return TEMPLATES[templates]
