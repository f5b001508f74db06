"""From a recipe of question answering to what it trains."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from adapters.vqa.answers import build_vocabulary
from adapters.vqa.config import OF_MODEL, VqaRecipe
from adapters.vqa.data import (
    AS_THEY_ARE,
    captions_of,
    held_out_loader,
    open_captions,
    open_pairs,
    open_questions,
    prompts_of,
    train_loader,
)
from adapters.vqa.meter import Meter
from adapters.vqa.negatives import DrawnNegatives, Embeddings, embed_all
from adapters.vqa.objectives import VisionLanguagePretraining
from adapters.vqa.question_samples import AnswerTargets, QuestionSamples, trainable
from adapters.vqa.speaking import build_speaker
from adapters.vqa.text_encoder import TowerEncoder, load_roberta
from adapters.vqa.tokens import ClipTokens, RobertaTokens, Tokens
from adapters.vqa.training import Answering, Captioning
from adapters.vqa.watching import AnswerAccuracy, CaptionQuality, PretrainingAccuracy
from unicl.build import Parts, TextSamples
from unicl.config import PRETRAINING
from unicl.data.image_sets.samples import Numbered
from unicl.distributed import Ranks
from unicl.engine.checkpoint import set_weights
from unicl.engine.trainer import Evaluator
from unicl.errors import UsageError
from unicl.evaluation.cache import Setting
from unicl.models import (
    build_image_tower,
    choose_device,
    like,
    load,
    read_weights,
    recipe_of_run,
    text_settings,
    with_locks,
    with_towers_of,
)
from unicl.towers.image import (
    backbone_weights,
    carry_backbone,
    check_image_size,
    lock_tokenless,
)
from unicl.towers.two_tower import TwoTower, carry_model

_MASK_EMBEDDING = "text.mask_embedding"
_OF_TOWERS = ("image.", "text.", "logit_scale")
_OWN = ("fusion.", "heads.")
_SHAPE_OF_FUSION = tuple(name for name in OF_MODEL if name not in ("objective", "answers"))


def complete(recipe: VqaRecipe) -> VqaRecipe:
    """Take the sizes of the run to start from, and the answers of the data.

    What the recipe leaves at its default is the run's: its towers, and of a run of question
    answering the co-attention.
    """
    open_questions.cache_clear()  # files may have changed since an earlier run of this process
    recipe = _following(recipe)
    vqa = recipe.vqa
    if vqa.objective != "answers" or vqa.answers or not recipe.data.train:
        return recipe
    questions = open_questions(recipe.data.train, vqa.split)
    answers = build_vocabulary([questions], min_count=vqa.min_answer_count)
    return replace(recipe, vqa=replace(vqa, answers=answers))


def _following(recipe: VqaRecipe) -> VqaRecipe:
    path = Path(recipe.weights or "")
    is_hard = recipe.vqa.objective == "pretraining" and recipe.vqa.negatives == "hard"
    if is_hard and recipe.weights is None:
        _refuse_hard("none is named")
    if is_hard and path.suffix == ".safetensors":
        _refuse_hard(f"{path} is but a file of weights")
    if recipe.weights is None or not path.is_dir():
        return recipe
    run = recipe_of_run(path)
    if run.task not in (PRETRAINING, recipe.task):
        raise UsageError(f"{path} is a run of {run.task}; start from two towers or a run of vqa")
    vqa = recipe.vqa
    if isinstance(run, VqaRecipe):
        if is_hard and run.vqa.roberta is not None:
            _refuse_hard(f"{path} reads texts by RoBERTa")
        vqa = like(vqa, run.vqa, _SHAPE_OF_FUSION)
    elif not vqa.roberta:
        longest = min(vqa.max_text_length, run.text_tower.context_length)
        vqa = replace(vqa, max_text_length=longest)
    return with_towers_of(replace(recipe, vqa=vqa), run)


def _refuse_hard(why: str) -> NoReturn:
    raise UsageError(
        f"vqa.negatives hard needs a run with a text tower, and {why}; name one by `weights`, or "
        "set vqa.negatives to random"
    )


def build(recipe: VqaRecipe, ranks: Ranks, *, start: bool) -> Parts:
    """Build a run of pretraining, of answers or of captions.

    Raises:
        UsageError: data are missing, or a setting does not fit them.
        UniclError: the weights to start from are missing or do not fit.
    """
    tokens = build_tokens(recipe)
    model = build_model(recipe, tokens, start=start)
    tower: Any = model.image
    check_image_size(tower, recipe.image_tower.image_size)
    if not recipe.image_tower.locked:
        lock_tokenless(tower, recipe.image_tower.image_size)
    build_parts = {
        "pretraining": _pretraining,
        "answers": _answering,
        "captions": _captioning,
    }[recipe.vqa.objective]
    return build_parts(recipe, model, tokens, ranks)


def build_tokens(recipe: VqaRecipe) -> Tokens:
    """Build the vocabulary of the text encoder."""
    vqa = recipe.vqa
    if vqa.roberta is not None:
        return RobertaTokens(vqa.roberta, vqa.max_text_length)
    return ClipTokens(vqa.max_text_length)


def build_model(recipe: VqaRecipe, tokens: Tokens, *, start: bool) -> Meter:
    """Build the model of a recipe; `start` loads the weights to start from.

    Those may be of two towers, or of a run of question answering, of which the co-attention and the
    heads are taken as far as they fit.

    Raises:
        UsageError: weights do not fit.
        UniclError: there are no such weights.
    """
    model = Meter(
        build_image_tower(recipe, start=start),
        _build_text_encoder(recipe, start=start),
        recipe.vqa,
        num_tokens=tokens.size,
        initial_scale=recipe.loss.initial_scale,
        max_scale=recipe.loss.max_scale,
    )
    if start and recipe.weights is not None:
        _start_from(Path(recipe.weights), model)
    with_locks(recipe, model)
    return model


def _build_text_encoder(recipe: VqaRecipe, *, start: bool) -> nn.Module:
    if recipe.vqa.roberta is not None:
        encoder = load_roberta(recipe.vqa.roberta, weights=start)
        if recipe.vqa.max_text_length > encoder.longest:
            raise UsageError(
                f"vqa.max_text_length must be at most {encoder.longest}, which "
                f"{recipe.vqa.roberta} can take, got {recipe.vqa.max_text_length}"
            )
        encoder.set_grad_checkpointing(recipe.text_tower.checkpointing)
        return encoder
    return TowerEncoder(**text_settings(recipe))


def _start_from(path: Path, model: Meter) -> None:
    """Load the towers, and what fits of co-attention and heads."""
    file, weights = read_weights(path)
    two = TwoTower(model.image, model.text, initial_scale=1.0, max_scale=model.max_scale)
    two.logit_scale = model.logit_scale
    own = model.state_dict()
    of_towers = {k: w for k, w in weights.items() if k.startswith(_OF_TOWERS)}
    if isinstance(model.text, TowerEncoder):
        of_towers.setdefault(_MASK_EMBEDDING, own[_MASK_EMBEDDING])
        set_weights(carry_model(of_towers, two, source=file), two, source=file)
    else:
        # RoBERTa's are its own, unless they were trained in such a run.
        _load_fitting(of_towers, model)
        backbone: Any = model.image.backbone
        backbone.load_state_dict(carry_backbone(backbone_weights(weights), backbone, source=file))
    _load_fitting({k: w for k, w in weights.items() if k.startswith(_OWN)}, model)


def _load_fitting(weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    fitting = {k: w for k, w in weights.items() if k in own and own[k].shape == w.shape}
    model.load_state_dict(fitting, strict=False)


def _pretraining(recipe: VqaRecipe, model: Meter, tokens: Tokens, ranks: Ranks) -> Parts:
    vqa, seed = recipe.vqa, recipe.trainer.seed
    samples = open_pairs(recipe.data.train)
    negatives = DrawnNegatives(
        samples.table().texts,
        own=functools.partial(captions_of, samples),
        prompts=prompts_of(recipe),
        pool=vqa.negative_pool,
        seed=seed,
        embed=_embedding(recipe, samples, ranks) if vqa.negatives == "hard" else None,
    )
    task = VisionLanguagePretraining(
        model,
        tokens,
        negatives,
        mask_share=vqa.mask_share,
        matching_weight=vqa.matching_weight,
        words_weight=vqa.words_weight,
        seed=seed,
        ranks=ranks,
    )
    loader = train_loader(recipe, Numbered(samples), tokens, ranks)
    evaluators: list[Evaluator] = []
    if recipe.evaluation.data is not None:
        held_out = open_pairs(recipe.evaluation.data, split="val")
        evaluators.append(_pretraining_accuracy(recipe, held_out, model, tokens, ranks))
    return Parts(task, loader, evaluators, prepare=negatives.prepare)


def _pretraining_accuracy(
    recipe: VqaRecipe, samples: TextSamples, model: Meter, tokens: Tokens, ranks: Ranks
) -> PretrainingAccuracy:
    """Measure with texts drawn at random, whatever is trained with: figures must be comparable."""
    negatives = DrawnNegatives(
        samples.table().texts,
        own=functools.partial(captions_of, samples),
        prompts=AS_THEY_ARE,
        pool=1,
        seed=0,
    )
    task = VisionLanguagePretraining(model, tokens, negatives, mask_share=recipe.vqa.mask_share)
    loader = held_out_loader(recipe, Numbered(samples), tokens, ranks)
    return PretrainingAccuracy(loader, task)


def _embedding(
    recipe: VqaRecipe, samples: TextSamples, ranks: Ranks
) -> Callable[[Path], Embeddings]:
    def embed(folder: Path) -> Embeddings:
        return embed_all(
            folder,
            samples,
            samples.table().texts,
            load=lambda: load(
                str(recipe.weights), device=str(choose_device(recipe.trainer.device))
            ),
            setting=Setting(
                batch_size=recipe.evaluation.batch_size,
                num_workers=recipe.data.num_workers,
                ranks=ranks,
            ),
            digest=samples.digest(),
        )

    return embed


def _answering(recipe: VqaRecipe, model: Meter, tokens: Tokens, ranks: Ranks) -> Parts:
    vqa = recipe.vqa
    questions = open_questions(recipe.data.train, vqa.split)
    targets = AnswerTargets(questions, vqa.answers)
    loader = train_loader(recipe, trainable(questions, targets, tokens), tokens, ranks)
    evaluators: list[Evaluator] = []
    if recipe.evaluation.data is not None:
        # What was trained on must not be measured on.
        split = "minival" if vqa.split == "trainval" else "val"
        held_out = open_questions(recipe.evaluation.data, split)
        evaluators.append(
            AnswerAccuracy(
                held_out,
                held_out_loader(recipe, QuestionSamples(held_out), tokens, ranks),
                vqa.answers,
            )
        )
    return Parts(Answering(model, targets, ranks=ranks), loader, evaluators)


def _captioning(recipe: VqaRecipe, model: Meter, tokens: Tokens, ranks: Ranks) -> Parts:
    loader = train_loader(recipe, open_pairs(recipe.data.train), tokens, ranks)
    evaluators: list[Evaluator] = []
    if recipe.evaluation.data is not None:
        held_out = open_captions(recipe.evaluation.data, split="val")
        evaluators.append(
            CaptionQuality(
                held_out,
                held_out_loader(recipe, Numbered(held_out, texts=False), tokens, ranks),
                functools.partial(build_speaker, tokens=tokens, config=recipe.vqa),
            )
        )
    return Parts(Captioning(model, ranks=ranks), loader, evaluators)
