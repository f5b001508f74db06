"""A detector that a run holds, with all that its use takes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from adapters.detection.building import build_model
from adapters.detection.config import OF_MODEL, READING, DetectionConfig, DetectionRecipe
from adapters.detection.detector import Detector
from adapters.detection.finding import Finder
from adapters.detection.found import Detections, surest_names
from adapters.detection.vocabulary import Vocabulary
from unicl.data.prompts import TEMPLATES
from unicl.errors import UsageError
from unicl.evaluation.embeddings import embed_texts
from unicl.evaluation.zero_shot import class_embeddings
from unicl.models import build_tokenizer, build_transform, identity_of, load_run
from unicl.predictor import Detection
from unicl.towers.pretrained import Pretrained

# Of proposals, which the towers name as they name images.
_TEMPLATES = TEMPLATES["simple"]


def load(path: Path, recipe: DetectionRecipe) -> Pretrained:
    """Load a run's detector, which finds objects, and embeds images if it has both towers.

    Raises:
        UniclError: the run has no checkpoint yet, or what there is is damaged.
    """
    detection = recipe.detection
    model = build_model(recipe, start=False)
    load_run(path, model)
    tokenize: Any = build_tokenizer(recipe)
    if detection.classes == "numbers":
        tokenize = functools.partial(_no_texts, str(path))
    size = recipe.image_tower.image_size
    kept = {name: getattr(detection, name) for name in OF_MODEL}
    return Pretrained(
        name=str(path),
        model=model,
        tokenize=tokenize,
        transform=build_transform(recipe),
        image_size=size,
        context_length=recipe.text_tower.context_length,
        identity=identity_of(recipe, detection=kept),
        skills={"detect": Detect(str(path), model, detection, tokenize, size)},
        reading={name: getattr(detection, name) for name in READING},
    )


@dataclass(frozen=True)
class Detect:
    """What `unicl.Predictor.detect` calls.

    Args:
        name: What a person calls the model.
        model: The detector.
        config: Its classes, and how it looks at images.
        tokenize: Makes token numbers of names.
        image_size: Side of the images that its towers embed.
    """

    name: str
    model: Detector
    config: DetectionConfig
    tokenize: Callable[[Sequence[str]], Tensor]
    image_size: int

    def __call__(
        self, image: Image.Image, names: Sequence[str] | None, threshold: float
    ) -> list[Detection]:
        """Find objects of these names in an upright RGB image, or of the training's classes.

        Each is returned once, by its surest name.

        Raises:
            UsageError: the detector knows its own classes only, and a name is none of them.
        """
        found = self.finder(names).in_image(image)
        own = self.config.class_names
        called: Sequence[str] = names or own or ("object",)
        if self.config.classes == "numbers":
            called = own
        wanted = called if names is None else self._known(names)
        asked = torch.tensor([name in wanted for name in called])
        kept = (found.scores >= threshold) & asked[found.labels]
        found = surest_names(Detections(*(tensor[kept] for tensor in found)))
        return [
            Detection(called[label], score, (box[0], box[1], box[2], box[3]))
            for box, score, label in zip(*(t.tolist() for t in found), strict=True)
        ]

    def finder(
        self,
        names: Sequence[str] | None,
        *,
        templates: Sequence[str] = _TEMPLATES,
        autocast: Any = None,
        config: DetectionConfig | None = None,
    ) -> Finder:
        """Return what finds objects of these names; the classes of the training if unset.

        Args:
            names: What is looked for.
            templates: Prompts in which the towers name proposals.
            autocast: Type of the arithmetic; unset is fp32.
            config: Another way of looking at images.
        """
        config = self.config if config is None else config
        embeddings = None
        if config.classes == "texts":
            embeddings = self._embedded(tuple(config.class_names if names is None else names), ())
        elif config.classes == "none" and names is not None:
            embeddings = self._embedded(tuple(names), tuple(templates))
        return Finder(self.model, config, embeddings, self.image_size, autocast)

    def _known(self, names: Sequence[str]) -> Sequence[str]:
        """Return names as the detector calls them."""
        if self.config.classes != "numbers":
            return names
        own = self.config.class_names
        numbers = Vocabulary.join([self.config, _Asked(tuple(names))]).numbers[1].tolist()
        if unknown := [n for n, number in zip(names, numbers, strict=True) if number >= len(own)]:
            raise UsageError(
                f"{self.name} knows its own {len(own)} classes only, and {unknown[0]!r} is none; "
                f"they are {', '.join(own[:5])}{', ...' if len(own) > 5 else ''}"
            )
        return [own[number] for number in numbers]

    @functools.cached_property
    def _embedded(self) -> Callable[[tuple[str, ...], tuple[str, ...]], Tensor]:
        # The same names are asked for again and again; not kept beyond the model.
        return functools.lru_cache(maxsize=8)(self._embed)

    def _embed(
        self, names: tuple[str, ...], templates: tuple[str, ...]
    ) -> Float[Tensor, "names dim"]:
        if templates:
            return class_embeddings(self.model, names, templates, self.tokenize)
        return embed_texts(self.model, names, self.tokenize)


@dataclass(frozen=True)
class _Asked:
    class_names: tuple[str, ...]


def overridden(config: DetectionConfig, overrides: Mapping[str, str]) -> DetectionConfig:
    """Return another way of looking at images.

    Raises:
        UsageError: a key is of the model, or of training, and has no effect here.
    """
    from unicl.config import override_section

    known = {f"detection.{name}" for name in asdict(config)}
    allowed = {f"detection.{name}" for name in READING}
    if given := sorted((known - allowed).intersection(overrides)):
        raise UsageError(f"{given[0]} has no effect here; there are {', '.join(sorted(allowed))}")
    return override_section(config, overrides, prefix="detection")


def _no_texts(name: str, texts: Sequence[str]) -> Tensor:
    raise UsageError(f"{name} knows classes by number and has no text tower")
