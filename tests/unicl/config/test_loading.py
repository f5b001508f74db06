"""Recipes load strictly: a mistake names its key and the way out."""

import ast
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unicl.config import Recipe, load_recipe, parse_recipe, recipe_names, recipe_to_toml, schema
from unicl.errors import UsageError


def test_defaults_then_recipe_then_overrides():
    assert parse_recipe("").trainer.steps == Recipe().trainer.steps
    assert parse_recipe("[trainer]\nsteps = 7").trainer.steps == 7
    assert parse_recipe("[trainer]\nsteps = 7", {"trainer.steps": "9"}).trainer.steps == 9


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[trainer]\nstep = 7", {}, "unknown key trainer.step .did you mean trainer.steps?"),
        ("", {"lr": "1"}, "unknown key lr"),
        ("", {"optimizer.learningrate": "1"}, "did you mean optimizer.learning_rate?"),
        ("", {"learning_rate": "1"}, "did you mean optimizer.learning_rate?"),
        ("[trainer]\nsteps = '7'", {}, "trainer.steps must be a whole number, got '7'"),
        ("[trainer]\nsteps = true", {}, "trainer.steps must be a whole number"),
        ("", {"trainer.steps": "many"}, "trainer.steps must be a whole number, got 'many'"),
        ("", {"data.flip": "maybe"}, "data.flip must be true or false"),
        ("", {"engine.zero_stage": "4"}, "engine.zero_stage must be one of 0, 1, 2, 3; got '4'"),
        ("[engine]\nzero_stage = true", {}, "engine.zero_stage must be one of 0, 1, 2, 3"),
        ("[engine]\nzero_stage = '1'", {}, "engine.zero_stage must be one of 0, 1, 2, 3"),
        ("", {"engine.offload_optimizer": "true"}, "needs engine.backend deepspeed"),
        ("", {"engine.timeout_seconds": "0"}, "engine.timeout_seconds must be positive"),
        ("", {"loss.targets": "siglip"}, "loss.targets must be one of unicl, clip"),
        ("", {"data.crop_scale": "0.5"}, "data.crop_scale must be 2 values"),
        ("", {"trainer": "7"}, "trainer is a section"),
        ("", {"trainer.steps.more": "7"}, "trainer.steps must be a whole number"),
        ("name = ", {}, "is not valid TOML"),
        ("", {"trainer.steps": "0"}, "trainer.steps must be positive, got 0"),
        ("", {"text_tower.num_heads": "7"}, "must divide the width"),
        ("", {"text_tower.num_heads": "0"}, "text_tower.num_heads must be positive"),
        ("", {"image_tower.image_size": "-1"}, "image_tower.image_size must be at least 3"),
        ("", {"image_tower.window_size": "0"}, "image_tower.window_size must be positive"),
        ("", {"optimizer.learning_rate": "-1"}, "optimizer.learning_rate must be positive"),
        ("", {"optimizer.learning_rate": "nan"}, "optimizer.learning_rate must be positive"),
        ("", {"optimizer.learning_rate": "inf"}, "optimizer.learning_rate must be finite"),
        ("", {"image_tower.layer_scale": "-1"}, "image_tower.layer_scale must be positive"),
        ("", {"loss.max_scale": "inf"}, "loss.max_scale must be finite"),
        ("", {"trainer.keep_best": "zero_shot/top1"}, "trainer.keep_best needs evaluation.data"),
        ("", {"evaluation.names": "data/train"}, "evaluation.names needs evaluation.data"),
        ("", {"optimizer.betas": "0.9,1.0"}, "optimizer.betas must lie in"),
        ("", {"optimizer.weight_decay": "-1"}, "weight_decay must not be negative"),
        ("", {"optimizer.layer_decay": "0"}, r"optimizer.layer_decay must lie in \(0, 1\], got 0"),
        ("", {"optimizer.ema_decay": "1"}, r"optimizer.ema_decay must lie in \(0, 1\), got 1"),
        ("", {"optimizer.text_rate": "0"}, "optimizer.text_rate must be positive"),
        (
            "[image_tower]\nlocked = true",
            {"optimizer.image_rate": "0.5"},
            "optimizer.image_rate has no effect on a locked tower",
        ),
        ("", {"schedule.warmup_steps": "-1"}, "schedule.warmup_steps must not be negative"),
        ("", {"data.crop_scale": "0.9,0.5"}, "data.crop_scale must rise"),
        ("", {"data.crop_ratio": "0,1"}, "data.crop_ratio must rise"),
        ("", {"data.num_workers": "-1"}, "data.num_workers must not be negative, got -1"),
        ("", {"data.max_skipped_share": "2"}, "data.max_skipped_share must lie in"),
        ("", {"evaluation.batch_size": "0"}, "evaluation.batch_size must be positive"),
        (
            "",
            {"trainer.compile": "true", "trainer.chunk": "1"},
            "compile needs a trainer.chunk of at",
        ),
        ("", {"trainer.chunk": "0"}, "trainer.chunk must be positive"),
        (
            "[engine]\nbackend = 'deepspeed'\nzero_stage = 3",
            {"trainer.compile": "true"},
            "trainer.compile needs engine.zero_stage 0 to 2",
        ),
        ("", {"trainer.seed": "99999999999999999999"}, "trainer.seed must lie in"),
        ("", {"embed_dim": "0"}, "embed_dim must be positive"),
        (
            "[image_tower]\nlocked = true",
            {"image_tower.drop_path_rate": "0.1"},
            "image_tower.drop_path_rate has no effect on a locked tower",
        ),
        (
            "[text_tower]\nlocked = true",
            {"text_tower.checkpointing": "true"},
            "text_tower.checkpointing has no effect on a locked tower",
        ),
        ("", {"text_tower.locked": "true"}, "text_tower.locked needs `weights`: "),
        ("", {"image_tower.locked": "true"}, "locked needs `weights` or image_tower.weights: "),
        (
            "weights = 'runs/first'",
            {"image_tower.weights": "a.safetensors"},
            "image_tower.weights has no effect on a run with `weights`",
        ),
        (
            "[text_tower]\nlocked = true",
            {"image_tower.locked": "true"},
            "image_tower.locked and text_tower.locked leave nothing to train",
        ),
        ("", {"trainer.max_nonfinite": "-1"}, "trainer.max_nonfinite must not be negative"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(text, overrides, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_recipe(text, overrides)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_and_missing_file_name_the_way_out(tmp_path):
    with pytest.raises(UsageError, match=r"no recipe 'dmo' \(did you mean demo\?\)"):
        load_recipe("dmo")
    with pytest.raises(UsageError, match=r"cannot read recipe .*none\.toml: No such file"):
        load_recipe(tmp_path / "none.toml")


def test_overrides_read_every_type():
    recipe = parse_recipe(
        "",
        {
            "trainer.chunk": "32",
            "data.flip": "true",
            "optimizer.learning_rate": "1e-3",
            "data.crop_scale": "0.5,1.0",
            "optimizer.clip_grad_norm": "none",
            "trainer.steps": "1_000",
        },
    )
    assert recipe.trainer.chunk == 32
    assert recipe.data.flip is True
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.data.crop_scale == (0.5, 1.0)
    assert recipe.optimizer.clip_grad_norm is None
    assert recipe.trainer.steps == 1000


@example('\r\n\t\x00\x01\x1f\x7f\x85"\\\u2028', 1.0, None)
@given(st.text(), st.floats(1e-6, 1.0), st.one_of(st.none(), st.integers(1, 99)))
def test_a_saved_recipe_reads_back_unchanged(description, rate, chunk):
    recipe = Recipe(
        description=description,
        optimizer=schema.OptimizerConfig(learning_rate=rate, clip_grad_norm=None),
        trainer=schema.TrainerConfig(chunk=chunk),
    )
    assert parse_recipe(recipe_to_toml(recipe)) == recipe


def test_every_field_has_a_docstring():
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for item, after in pairwise(cls.body):
            if isinstance(item, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.name}.{ast.unparse(item.target)} has no docstring"


def test_configuration_imports_no_torch():
    code = "import sys, unicl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
