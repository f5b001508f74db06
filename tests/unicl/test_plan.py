from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from unicl.cli import main
from unicl.config import PRETRAINING, EngineConfig, load_recipe, parse_recipe, recipe_names
from unicl.errors import UsageError
from unicl.models import build_model
from unicl.plan import plan
from unicl.plan.memory import BUCKET, LIVE_BUCKETS, Load, peak
from unicl.plan.towers import Towers

GIB = 2**30
NANO = {
    "image_tower.model": "coswin_nano",
    "image_tower.image_size": "48",
    "text_tower.num_layers": "2",
    "text_tower.width": "64",
    "text_tower.num_heads": "2",
    "embed_dim": "64",
}


def nano(**overrides):
    return parse_recipe("", {**NANO, **{k.replace("__", "."): v for k, v in overrides.items()}})


def towers(recipe, *, device="cpu", precision="fp32", text_length=16):
    return Towers(recipe, device=device, precision=precision, text_length=text_length)


@pytest.fixture(scope="module")
def florence():
    return plan(load_recipe("florence_stage1"), gpus=512, gpu_memory=40)


def test_florence_has_the_published_size(florence):
    # CoSwin-H 637.4M and a 256M text tower, projections of 1024, LayerScale, one scale.
    assert florence.parameters == 639_469_104 + 38_400 + 256_552_320 + 1


def test_florence_has_the_published_work(florence):
    assert florence.forward_flops == pytest.approx(2 * (87.51e9 + 15.4e9), rel=0.01)
    assert florence.training_flops == 3 * florence.forward_flops
    assert florence.rows == 48
    assert florence.samples == 24_576_000_000
    stages = [load_recipe(name) for name in ("florence_stage1", "florence_stage2")]
    samples = sum(each.trainer.steps * each.trainer.batch_size for each in stages)
    assert samples == pytest.approx(29.0e9, rel=0.001)
    assert samples * florence.training_flops == pytest.approx(1.8e22, rel=0.02)
    # 1 day has 86,400 seconds, and 15% of the peak is what 10 days would mean.
    assert florence.days(0.5) == pytest.approx(florence.flops / (512 * 312e12 * 0.5) / 86_400)


@pytest.mark.parametrize(
    ("name", "image_size", "window", "gmac", "device"),
    [
        ("coswin_tiny", 224, 7, 4.74, "cuda"),
        ("coswin_tiny", 224, 7, 4.74, "cpu"),
        ("coswin_base", 224, 7, 15.9, "cuda"),
        ("coswin_tiny", 384, 12, 14.7, "cpu"),
    ],
)
def test_flops_are_those_of_the_table(name, image_size, window, gmac, device):
    settings = {"model": name, "image_size": str(image_size), "window_size": str(window)}
    recipe = nano(**{f"image_tower__{key}": value for key, value in settings.items()})
    assert towers(recipe, device=device).flops("image") == pytest.approx(2e9 * gmac, rel=0.02)


def test_florence_fits_its_gpus(florence):
    assert florence.fits, florence.memory
    assert florence.changes == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name in recipe_names()
        if name not in ("demo", "florence_stage1")
        and not name.startswith("finetune")
        and load_recipe(name).task == PRETRAINING
    ),
)
def test_a_shipped_recipe_fits_as_it_is(name):
    recipe = load_recipe(name)
    if name.endswith("_stage2"):  # takes what stage 1 takes: only its length and texts differ
        stage1 = load_recipe(name.replace("stage2", "stage1"))
        assert (recipe.image_tower, recipe.text_tower, recipe.engine, recipe.embed_dim) == (
            stage1.image_tower,
            stage1.text_tower,
            stage1.engine,
            stage1.embed_dim,
        )
        assert replace(recipe.trainer, steps=stage1.trainer.steps) == stage1.trainer
        return
    foretold = plan(recipe, gpus=512 if name.startswith("florence") else 8, gpu_memory=40)
    assert foretold.fits, foretold.memory
    assert foretold.changes == ()
    assert recipe.data.train == ""
    assert "\n" not in recipe.description


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_activations_are_what_a_real_forward_keeps(tower, precision):
    recipe, rows = nano(), 6
    torch.manual_seed(0)
    model = build_model(recipe)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    enabled = precision == "bf16"
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)
    with cast, saved_tensors_hooks(keep, lambda tensor: tensor):
        if tower == "image":
            out = model.encode_image(torch.zeros(rows, 3, 48, 48, dtype=torch.uint8))
        else:
            out = model.encode_text(torch.ones(rows, 16, dtype=torch.int64), economies=False)
    assert out.requires_grad
    memory = towers(recipe, precision=precision).memory(tower, checkpointing=False)
    # Foretold is besides what backward works with: a gradient of the largest activation.
    room = memory.activations(rows) - sum(saved.values())
    assert -0.01 * sum(saved.values()) <= room <= 1.3 * max(saved.values())


def test_activations_grow_with_rows_and_shrink_with_checkpointing():
    recipe = nano(image_tower__model="coswin_tiny", image_tower__image_size="224")
    found = towers(recipe, device="cuda", precision="bf16")
    kept, recomputed = (found.memory("image", checkpointing=on) for on in (False, True))
    assert recomputed.per_row < 0.5 * kept.per_row
    # Half-precision copies of the weights are kept for backward, whatever the rows.
    weights = 2 * sum(p.numel() for p in build_model(recipe).image.parameters() if p.ndim > 1)
    assert kept.fixed == pytest.approx(weights, rel=0.1)
    assert found.memory("image", checkpointing=False) is kept


def test_a_gpu_keeps_no_matrix_of_attention():
    recipe = nano(text_tower__context_length="1024")
    lengths = 256, 1024
    fused, explicit = (
        [
            towers(recipe, device=d, text_length=n).memory("text", checkpointing=False)
            for n in lengths
        ]
        for d in ("cuda", "cpu")
    )
    assert fused[1].per_row < 4.5 * fused[0].per_row
    assert explicit[1].per_row > 8 * explicit[0].per_row


def test_models_that_read_numbers_while_they_are_built_can_be_planned():
    recipe = nano(image_tower__model="vit_tiny_patch16_224", image_tower__image_size="224")
    found = towers(recipe, device="cuda", precision="bf16")
    assert found.flops("image") == pytest.approx(2 * 1.26e9, rel=0.03)


def load(**changes):
    given = {"ranks": 4, "chunks": 1, "moments": 2, "frozen": 0}
    given |= {"activations": GIB, "loss": 0, "inputs": 0}
    return Load(**{"groups": ((3_750_000,) * 40,), **given, **changes})


def zero(stage, **settings):
    return EngineConfig(backend="deepspeed", zero_stage=stage, **settings)


def test_each_stage_shares_out_what_it_says():
    p = 4 * 150_000_000
    ddp, *stages = (peak(load(), engine) for engine in (EngineConfig(), *map(zero, range(4))))
    assert (ddp.parameters, ddp.gradients, ddp.optimizer) == (p, p, 2 * p)
    assert stages[0].optimizer == 2 * p
    assert [stage.optimizer for stage in stages[1:]] == [3 * p // 4] * 3
    assert stages[1].gradients >= p
    assert [stage.gradients for stage in stages[2:]] == [p // 4, p // 4]
    assert [stage.parameters == p for stage in stages] == [True, True, True, False]


def test_the_gradient_cache_holds_the_whole_gradient_unless_chunks_are_reduced():
    p = 4 * 150_000_000
    several = load(chunks=4)
    assert peak(several, EngineConfig()).gradients == 2 * p
    assert peak(several, zero(2)).gradients >= p
    assert peak(several, zero(2, reduce_every="chunk")).gradients == p // 2
    assert peak(several, zero(3)).gradients == p + p // 4
    assert peak(several, zero(3, reduce_every="chunk")).gradients == p // 4


def test_zero_1_and_2_keep_whole_gradients_of_parameters_that_ranks_share():
    groups = ((60, 20), (10, 100, 10))  # of 20 and 30 elements per rank
    assert load(groups=groups).touched == 4 * (60 + 110)
    assert load(groups=groups, ranks=1).touched == load(groups=groups).whole


def test_averages_are_kept_like_moments_and_copied_for_an_evaluation():
    p = 4 * 150_000_000
    averaged = load(moments=3)
    for engine, optimizer in ((EngineConfig(), 3 * p), (zero(1), p), (zero(3), p)):
        assert peak(averaged, engine).optimizer == optimizer
    idle = replace(averaged, activations=0)
    assert peak(idle, zero(3)).name == "evaluation"
    assert peak(idle, zero(3)).buffers >= p


def test_a_locked_tower_has_no_gradient_no_moments_and_no_backward():
    whole, locked = (
        plan(nano(text_tower__locked=on, weights="runs/one"), gpus=2, gpu_memory=40, text_length=16)
        for on in ("false", "true")
    )
    assert locked.memory.optimizer == 2 * locked.memory.gradients < whole.memory.optimizer
    assert locked.memory.parameters == whole.memory.parameters
    assert locked.memory.activations < whole.memory.activations
    assert locked.forward_flops < locked.training_flops < whole.training_flops


def test_what_is_offloaded_leaves_the_device():
    kept, away = (peak(load(), zero(2, offload_optimizer=on)) for on in (False, True))
    assert kept.host == 0
    assert away.optimizer == 0
    assert away.host >= kept.optimizer
    parameters = zero(3, offload_optimizer=True, offload_parameters=True)
    assert peak(load(), parameters).total < peak(load(), zero(3, offload_optimizer=True)).total


def test_buckets_are_those_of_the_engine():
    backend = pytest.importorskip("unicl.engine.deepspeed_backend")
    assert backend.BUCKET * 4 == BUCKET
    assert backend.LIVE_BUCKETS == LIVE_BUCKETS


def test_the_cheapest_change_makes_it_fit_and_is_said_as_flags():
    recipe = nano(image_tower__image_size="448", trainer__batch_size="2048")
    foretold = plan(recipe, gpus=8, gpu_memory=12, text_length=20)
    assert not foretold.fits
    # One more forward: of the image tower alone costs less than of both.
    assert foretold.changes == ("--image_tower.checkpointing true",)
    assert 1.3 < foretold.slowdown < 4 / 3
    words = [word.removeprefix("--") for flag in foretold.changes for word in flag.split()]
    changed = parse_recipe("", {**NANO, **dict(zip(words[::2], words[1::2], strict=True))})
    assert changed.image_tower.checkpointing


def test_zero_comes_before_what_costs_a_forward():
    recipe = nano(
        text_tower__width="2048",
        text_tower__num_heads="16",
        text_tower__num_layers="5",
        trainer__batch_size="64",
    )
    foretold = plan(recipe, gpus=8, gpu_memory=6, text_length=20)
    assert not foretold.fits
    assert foretold.changes == ("--engine.backend deepspeed", "--engine.zero_stage 2")
    assert foretold.slowdown == 1
    assert foretold.changed_memory.total <= 6 * GIB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": 0}, "--gpus must be positive, got 0"),
        ({"gpu_memory": -1.0}, "--gpu-memory must be positive"),
        ({"peak_tflops": float("inf")}, "--peak-tflops must be positive"),
        ({"text_length": 78}, r"--text-length must lie in \[1, 77\], got 78"),
        ({"gpus": 257}, "batch_size 256 is smaller than --gpus 257"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        plan(nano(), **{"gpus": 2, "gpu_memory": 40.0, **arguments})


@pytest.mark.parametrize("recipe", ["video_classes", "video_captions"])
def test_a_recipe_of_a_plugin_is_refused(recipe, capsys):
    assert main(["plan", recipe, "--gpus", "8", "--gpu-memory", "40"]) == 2
    assert "plan reckons with image-text pretraining only" in capsys.readouterr().err
    assert main(["verify-gradients", recipe, "--slim"]) == 2
    assert "gradients of image-text pretraining only, not" in capsys.readouterr().err


def test_the_command_prints_the_plan(capsys):
    words = ["plan", "demo", "--gpus", "1", "--gpu-memory", "40", "--trainer.batch_size", "64"]
    words += [word for key, value in NANO.items() for word in (f"--{key}", value)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "It fits in 40 GiB" in said
    assert "64 samples each" in " ".join(said.split())
    assert "1,290" not in said
    assert f"{1290 * 64:,}" in said
    assert main([*words[:5], "1", *words[6:]]) == 0
    assert "does not fit in 1 GiB, and no setting" in " ".join(capsys.readouterr().out.split())


def test_the_command_names_mistakes(capsys):
    assert main(["plan", "demo", "--gpus", "0", "--gpu-memory", "40"]) == 2
    assert "--gpus must be positive, got 0" in capsys.readouterr().err
    assert main(["plan", "florance_stage1", "--gpus", "8", "--gpu-memory", "40"]) == 2
    assert "did you mean florence_stage1" in capsys.readouterr().err


def test_a_model_of_open_clip_is_not_foretold(capsys):
    words = ["plan", "demo", "--model", "open_clip:ViT-B-32", "--gpus", "1", "--gpu-memory", "40"]
    reset = [("image_tower.model", "coswin_tiny"), ("text_tower.width", "512")]
    reset += [("text_tower.num_layers", "12"), ("text_tower.num_heads", "8")]
    assert main([*words, *(word for key, value in reset for word in (f"--{key}", value))]) == 2
    assert "not with open_clip:ViT-B-32" in capsys.readouterr().err
