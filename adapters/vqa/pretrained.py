"""A model of question answering that a run holds, with all that its use takes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from adapters.vqa.building import build_model, build_tokens
from adapters.vqa.config import OF_MODEL, READING, VqaConfig, VqaRecipe
from adapters.vqa.meter import Meter
from adapters.vqa.speaking import build_speaker
from adapters.vqa.tokens import Tokens
from unicl.config import override_section
from unicl.data.augment import WholeTransform
from unicl.errors import UsageError
from unicl.evaluation.embeddings import device_of, evaluating
from unicl.models import build_tokenizer, identity_of, load_run
from unicl.towers.pretrained import Pretrained

_SKILLS = {"answers": "answer", "captions": "caption", "pretraining": "match"}


def load(path: Path, recipe: VqaRecipe) -> Pretrained:
    """Load a run's model, which answers, captions or matches, and embeds as its towers do.

    Raises:
        UniclError: the run has no checkpoint yet, or what there is is damaged.
    """
    vqa, tokens = recipe.vqa, build_tokens(recipe)
    model = build_model(recipe, tokens, start=False)
    load_run(path, model)
    tokenize: Any = build_tokenizer(recipe)
    if vqa.roberta is not None:
        tokenize = functools.partial(_no_texts, str(path))
    transform = WholeTransform(recipe.image_tower.image_size)
    kept = {name: getattr(vqa, name) for name in OF_MODEL}
    reader = Reader(str(path), model, tokens, vqa, transform)
    return Pretrained(
        name=str(path),
        model=model,
        tokenize=tokenize,
        transform=transform,
        image_size=recipe.image_tower.image_size,
        context_length=recipe.text_tower.context_length,
        identity=identity_of(recipe, whole=True, vqa=kept),
        skills=_skills(reader),
    )


def _skills(reader: "Reader") -> dict[str, Any]:
    """Name what a model can do as `unicl.Predictor` does."""
    skill = _SKILLS[reader.config.objective]
    return {skill: getattr(reader, skill)}


def with_reader(model: Pretrained, reader: "Reader") -> Pretrained:
    """Return a model that is used in another way."""
    return replace(model, skills=_skills(reader))


@dataclass(frozen=True)
class Reader:
    """What `unicl.Predictor.answer` and `caption` call.

    Args:
        name: What a person calls the model.
        model: The model.
        tokens: Its vocabulary.
        config: What it was trained for, and how it is used.
        transform: Makes the image tower's input of an upright image.
    """

    name: str
    model: Meter
    tokens: Tokens
    config: VqaConfig
    transform: Callable[[Image.Image, int], Tensor]

    def answer(
        self, image: Image.Image, questions: Sequence[str], top_k: int
    ) -> list[list[tuple[str, float]]]:
        """Return the best answers to each question with how sure the model is, 0..1, best first.

        Raises:
            UsageError: a question is longer than the text encoder sees.
        """
        tokens = self._tokens(questions, "the question")
        with evaluating(self.model):
            seen = self._look(image).expand(len(questions), -1, -1)
            logits = self.model.answer(seen, tokens)
        scores, best = logits.sigmoid().topk(min(top_k, logits.shape[1]))
        answers = self.config.answers
        return [
            [(answers[number], score) for number, score in zip(*each, strict=True)]
            for each in zip(best.tolist(), scores.tolist(), strict=True)
        ]

    def caption(self, image: Image.Image) -> str:
        """Return a caption."""
        speaker = build_speaker(self.model, self.tokens, self.config)
        with evaluating(self.model):
            (caption,) = speaker.captions(self._look(image), [0])
        return caption

    def match(self, image: Image.Image, texts: Sequence[str]) -> list[float]:
        """Return how likely it is that each text matches, 0..1.

        Raises:
            UsageError: a text is longer than the text encoder sees.
        """
        tokens = self._tokens(texts, "the text")
        with evaluating(self.model):
            seen = self._look(image).expand(len(texts), -1, -1)
            return self.model.match(seen, tokens).sigmoid().tolist()

    def _look(self, image: Image.Image) -> Float[Tensor, "1 places width"]:
        pixels = self.transform(image, 0)[None]
        return self.model.look(pixels.to(device_of(self.model)))

    def _tokens(self, texts: Sequence[str], what: str) -> Tensor:
        for text in texts:
            if not self.tokens.fits(text):
                raise UsageError(
                    f"{what} {text[:60]!r} is longer than the {self.tokens.context_length} tokens "
                    f"that {self.name} sees; shorten it"
                )
        return self.tokens(texts).to(device_of(self.model))


def reader_of(model: Pretrained, objective: str) -> Reader:
    """Return what a model does, if it was trained for it.

    Raises:
        UsageError: It was not.
    """
    # Of other plug-ins' skills none is a method of this class.
    reader = getattr(model.skills.get(_SKILLS[objective]), "__self__", None)
    if not isinstance(reader, Reader):
        raise UsageError(
            f"{model.name} was not trained for {objective}; train it: unicl train "
            f"{RECIPES[objective]} --weights MODEL --data.train DATA"
        )
    return reader


RECIPES = {"pretraining": "vqa_pretraining", "answers": "vqa", "captions": "captioning"}
"""The shipped recipe of each objective."""


def overridden(config: VqaConfig, overrides: Mapping[str, str]) -> VqaConfig:
    """Return another way of using a model.

    Raises:
        UsageError: a key is of the model, or of training, and has no effect here.
    """
    allowed = {f"vqa.{name}" for name in READING}
    known = {f"vqa.{name}" for name in vars(config)}
    if given := sorted((known - allowed).intersection(overrides)):
        raise UsageError(f"{given[0]} has no effect here; there are {', '.join(sorted(allowed))}")
    return override_section(config, overrides, prefix="vqa")


def _no_texts(name: str, texts: Sequence[str]) -> Tensor:
    raise UsageError(f"{name} reads texts by RoBERTa and has no text tower to embed them")
