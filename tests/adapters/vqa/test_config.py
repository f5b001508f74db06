"""Which recipes of question answering there are, and which make no sense."""

import pytest

from adapters.vqa.config import VqaRecipe
from tests.adapters.vqa.runs import FUSION, TOWERS
from unicl.config import load_recipe, parse_recipe
from unicl.errors import UsageError

OF_PRETRAINING = {
    "mask_share": "0.3",
    "negatives": "random",
    "negative_pool": "4",
    "matching_weight": "2",
    "words_weight": "2",
}
OF_ANSWERS = {"answers": "yes,no", "min_answer_count": "3", "split": "trainval"}
FREE = {"vqa.negatives": "random", "vqa.objective": "pretraining"}


def parse(**given):
    overrides = {key.replace("__", "."): value for key, value in given.items()}
    return parse_recipe("", {**TOWERS, **FUSION, **overrides})


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        *((key, "0", "must be positive, got 0") for key in ("width", "num_layers", "num_heads")),
        *((key, "-1", "must be positive, got -1") for key in ("fusion_rate", "head_rate")),
        *((key, "0", "must be positive, got 0") for key in ("mlp_ratio", "negative_pool")),
        *((key, "0", "must be positive, got 0") for key in ("min_answer_count", "candidates")),
        *((key, "0", "must be positive, got 0") for key in ("num_beams", "max_words")),
        ("num_heads", "3", "must divide the width 16, got 3"),
        ("max_text_length", "2", "must be at least 3, got 2"),
        ("max_text_length", "25", "must be at most text_tower.context_length 24, got 25"),
        ("dropout", "1", r"must lie in \[0, 1\), got 1.0"),
        ("dropout", "-0.1", r"must lie in \[0, 1\), got -0.1"),
        ("top_p", "1", r"must lie in \[0, 1\), got 1.0"),
        ("mask_share", "0", r"must lie in \(0, 1\), got 0.0"),
        ("mask_share", "1", r"must lie in \(0, 1\), got 1.0"),
        ("matching_weight", "-1", "and words_weight must not be negative, nor both 0"),
        ("text_encoder", "bert", "must be tower or roberta:FOLDER, got bert"),
        ("text_encoder", "roberta:", "must be tower or roberta:FOLDER, got roberta:"),
        ("objective", "talk", "pretraining, answers, captions"),
        ("negatives", "soft", "hard, random"),
    ],
)
def test_what_a_key_must_be_is_one_line_that_names_it(key, value, must):
    with pytest.raises(UsageError, match=rf"vqa\.{key}.* {must}") as caught:
        parse(**{f"vqa__{key}": value})
    assert "\n" not in str(caught.value)


def test_something_must_be_learned():
    weights = {"vqa.matching_weight": "0", "vqa.words_weight": "0"}
    with pytest.raises(UsageError, match=r"vqa\.matching_weight and words_weight .* both 0"):
        parse(**FREE, **weights)
    assert parse(**FREE, **{"vqa.matching_weight": "0"}).vqa.words_weight == 1


@pytest.mark.parametrize(
    ("objective", "key", "value"),
    [
        *(("answers", *item) for item in OF_PRETRAINING.items()),
        *(("captions", *item) for item in (OF_PRETRAINING | OF_ANSWERS).items()),
        *(("pretraining", *item) for item in OF_ANSWERS.items()),
    ],
)
def test_what_has_no_effect_on_an_objective_is_refused(objective, key, value):
    where = f"vqa.{key} has no effect on vqa.objective {objective}; leave it out"
    with pytest.raises(UsageError, match=where):
        parse(vqa__objective=objective, **{f"vqa.{key}": value})


def test_what_has_an_effect_is_taken():
    recipe = parse(
        vqa__objective="pretraining", **{f"vqa.{k}": v for k, v in OF_PRETRAINING.items()}
    )
    assert (recipe.vqa.mask_share, recipe.vqa.negatives) == (0.3, "random")
    recipe = parse(vqa__objective="answers", **{f"vqa.{k}": v for k, v in OF_ANSWERS.items()})
    assert recipe.vqa.answers == ("yes", "no")


def test_what_the_task_cannot_do():
    with pytest.raises(UsageError, match="task vqa needs towers with tokens, not open_clip:RN50"):
        parse_recipe("", {"task": "vqa", "model": "open_clip:RN50"})
    with pytest.raises(UsageError, match=r"trainer\.compile has no effect on task vqa"):
        parse(trainer__compile="true")
    with pytest.raises(UsageError, match=r"data\.flip would turn left into right"):
        parse(data__flip="true")


def test_roberta_is_not_bound_to_the_text_tower():
    recipe = parse(vqa__text_encoder="roberta:some/folder", vqa__max_text_length="40")
    assert recipe.vqa.roberta == "some/folder"
    assert parse().vqa.roberta is None


@pytest.mark.parametrize(
    ("name", "objective", "samples", "epochs", "warmup"),
    [
        ("vqa_pretraining", "pretraining", 14_000_000, 43, 0.1),
        ("vqa", "answers", 652_000, 10, 0.1),
        ("captioning", "captions", 566_435, 10, 0.1),
    ],
)
def test_steps_are_the_epochs_that_a_recipe_promises(name, objective, samples, epochs, warmup):
    recipe = load_recipe(name, {"weights": "run"})
    assert isinstance(recipe, VqaRecipe)
    assert recipe.vqa.objective == objective
    assert f"{epochs} epochs" in recipe.description
    steps = recipe.trainer.steps
    assert steps * recipe.trainer.batch_size / samples == pytest.approx(epochs, rel=1e-3)
    assert recipe.schedule.warmup_steps / steps == pytest.approx(warmup, rel=1e-3)
