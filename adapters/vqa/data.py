"""What a recipe of question answering reads: pairs, captions, questions, and their loaders."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters.vqa.config import VqaRecipe
from adapters.vqa.questions import QuestionSet, open_question_set
from adapters.vqa.tokens import Tokens
from unicl.build import TextSamples, build_train_decoder, open_shards
from unicl.data.augment import WholeTransform
from unicl.data.image_sets import CaptionSet, open_image_set
from unicl.data.image_sets.samples import SetSamples
from unicl.data.loader import Loader
from unicl.data.order import SampleOrder
from unicl.data.prompts import PromptSampler
from unicl.data.reader import Decode, ImageDecoder, SampleSet
from unicl.data.shard_index import DATASET_FILE
from unicl.distributed import Ranks
from unicl.errors import UsageError

ROOT = Path("data")
"""Where known sets lie."""

AS_THEY_ARE = PromptSampler("none", short_text_words=0, seed=0)
"""Puts no text into a template."""


def open_pairs(spec: str, *, split: str = "train") -> TextSamples:
    """Open images with texts: prepared shards, or a set with captions.

    Raises:
        UsageError: There is no such folder or set, or it has no captions.
    """
    if (Path(spec) / DATASET_FILE).is_file():
        return open_shards(Path(spec))
    return SetSamples(open_captions(spec, split=split))


def open_captions(spec: str, *, split: str) -> CaptionSet:
    """Open a set of images with captions.

    Raises:
        UsageError: There is no such set, or it has no captions.
    """
    folder = Path(spec)
    if any(folder.glob("*questions.json")):
        raise UsageError(
            f"{spec} has questions, which vqa.objective answers is for; give prepared shards, or a "
            "set with captions"
        )
    if (folder / DATASET_FILE).is_file():
        split = "test"  # shards without parts are what a person keeps apart
    opened = open_image_set(spec, split=split, root=ROOT, kind="captions")
    assert isinstance(opened, CaptionSet)
    return opened


@functools.lru_cache(maxsize=4)  # answers are asked for before the run is built
def open_questions(spec: str, split: str) -> QuestionSet:
    """Open a set of questions.

    Raises:
        UsageError: There is no such set or part.
    """
    return open_question_set(spec, split=split, root=ROOT)


def captions_of(samples: TextSamples, index: int) -> Sequence[str]:
    """Return the other captions of a sample's image, as far as they are known."""
    return samples.texts_of(index) if isinstance(samples, SetSamples) else ()


def train_loader(recipe: VqaRecipe, samples: Any, tokens: Tokens, ranks: Ranks) -> Loader:
    """Build the endless, reproducible stream of training batches."""
    data, seed = recipe.data, recipe.trainer.seed
    return Loader(
        samples,
        SampleOrder(samples.shard_sizes, seed=seed, window=data.shuffle_window),
        decode=_train_decoder(recipe),
        tokenize=tokens,
        prompts=prompts_of(recipe),
        batch_size=recipe.trainer.batch_size,
        seed=seed,
        num_workers=data.num_workers,
        max_skipped_share=data.max_skipped_share,
        ranks=ranks,
    )


def _train_decoder(recipe: VqaRecipe) -> Decode:
    """Return what crops an image; without a crop what sees it as it is answered about: whole."""
    return whole_decoder(recipe) if recipe.data.crop_scale[0] == 1 else build_train_decoder(recipe)


def whole_decoder(recipe: VqaRecipe) -> Decode:
    """Return what decodes whole images."""
    return ImageDecoder(WholeTransform(recipe.image_tower.image_size), recipe.data.max_image_pixels)


def prompts_of(recipe: VqaRecipe) -> PromptSampler:
    """Return what puts short texts into templates, in training."""
    data = recipe.data
    return PromptSampler(
        data.templates, short_text_words=data.short_text_words, seed=recipe.trainer.seed
    )


def held_out_loader(recipe: VqaRecipe, samples: SampleSet, tokens: Tokens, ranks: Ranks) -> Loader:
    """Build one pass over what a recipe measures on."""
    return eval_loader(
        samples,
        tokens,
        decode=whole_decoder(recipe),
        batch_size=recipe.evaluation.batch_size,
        num_workers=recipe.data.num_workers,
        max_skipped_share=recipe.data.max_skipped_share,
        ranks=ranks,
    )


def eval_loader(samples: SampleSet, tokens: Tokens, *, decode: Decode, **how: Any) -> Loader:
    """Build one ordered, unaugmented pass over samples.

    Args:
        samples: What is evaluated on.
        tokens: The vocabulary.
        decode: Makes the image tower's input.
        how: Batch size, workers, ranks and so on, as `unicl.data.loader.BatchLoader` takes them.
    """
    return Loader(
        samples,
        SampleOrder(np.array([samples.num_samples]), seed=0, window=1, shuffle=False),
        decode=decode,
        tokenize=tokens,
        prompts=AS_THEY_ARE,
        seed=0,
        **how,
    )
