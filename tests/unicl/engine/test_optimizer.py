"""What decays, and which rate each layer gets; timm's own groups are the oracle."""

import pytest
import timm
import torch
import torch.distributed as dist
from timm.optim import param_groups_layer_decay

from tests.unicl.engine.test_gradient_matrix import (
    BATCH,
    build_model,
    samples,
)
from tests.unicl.engine.toy import ToyModel, ToyTask
from tests.unicl.ranks import on_ranks
from unicl.config import EngineConfig, OptimizerConfig
from unicl.distributed import ALONE, Ranks
from unicl.engine.gradient_cache import backward
from unicl.engine.optimizer import parameter_groups, rate_factors
from unicl.engine.torch_backend import TorchBackend
from unicl.errors import UsageError
from unicl.pretraining import Pretraining
from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower
from unicl.towers.two_tower import TwoTower

RATES = OptimizerConfig(image_rate=0.1, text_rate=2.0, layer_decay=0.5)


@pytest.mark.parametrize(
    "name", ["coswin_nano", "test_vit", "test_resnet", "test_mambaout", "test_convnext"]
)
def test_layer_decay_is_that_of_timm(name):
    size = {"img_size": 32} if name in ("coswin_nano", "test_vit") else {}
    classifier = timm.create_model(name, num_classes=3, **size)
    groups = param_groups_layer_decay(classifier, layer_decay=0.7)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    expected = {n: scales[id(p)] for n, p in classifier.named_parameters()}
    tower = ImageTower(name, embed_dim=8, image_size=32)
    text = TextTower(width=16, num_layers=1, num_heads=2, embed_dim=8)
    factors = rate_factors(TwoTower(tower, text), OptimizerConfig(layer_decay=0.7))
    names = [n for n, _ in tower.backbone.named_parameters()]
    assert len({expected[n] for n in names}) > 3
    for n in names:
        assert factors[f"image.backbone.{n}"] == pytest.approx(expected[n]), n
    assert factors["image.projection.weight"] == 1


def test_what_stands_on_the_towers_has_its_own_rate():
    model = build_model()
    model.heads = torch.nn.Linear(4, 4)
    model.rates = {"heads": 50.0}
    factors = rate_factors(model, RATES)
    assert factors["heads.weight"] == factors["heads.bias"] == 50
    assert factors["image.projection.weight"] == pytest.approx(0.1)
    scales = {g["lr_scale"] for g in parameter_groups(model, RATES)}
    assert {50.0, 2.0, 1.0} <= scales


def test_layers_of_the_text_tower():
    factors = rate_factors(build_model(), RATES)
    expected = {
        "text.projection.weight": 2,
        "text.norm.bias": 2,
        "text.blocks.1.fc1.weight": 1,
        "text.blocks.0.qkv.bias": 0.5,
        "text.token_embedding.weight": 0.25,
        "text.positional_embedding": 0.25,
        "image.projection.weight": 0.1,
    }
    assert {name: factors[name] for name in expected} == pytest.approx(expected)


def test_every_parameter_is_in_one_group_and_matrices_decay():
    model = build_model()
    groups = parameter_groups(model, RATES)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(found) == sorted(names.values())
    decaying = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert {"text.blocks.0.qkv.weight", "image.projection.weight"} <= decaying
    assert not {"text.token_embedding.weight", "text.norm.weight", "logit_scale"} & decaying
    assert len(parameter_groups(model, OptimizerConfig())) == 2


def test_layer_decay_without_effect_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="layer_decay has no effect"):
        TorchBackend(ToyTask(ToyModel()), RATES, ALONE)
    model = build_model()
    monkeypatch.delattr(type(model.image.backbone), "group_matcher")
    with pytest.raises(UsageError, match=r"layer_decay has no effect on coswin_nano"):
        rate_factors(model, RATES)


def check_rates(kinds):
    """A first step of AdamW moves by its rate, so rates can be read off the weights."""
    ranks = Ranks(dist.group.WORLD)
    rates = OptimizerConfig(image_rate=0.1, text_rate=2.0, layer_decay=0.5, weight_decay=0.0)
    before = build_model().state_dict()
    factors = rate_factors(build_model(), rates)
    own = torch.arange(BATCH).tensor_split(ranks.size)[ranks.rank]
    for kind in kinds:
        task = Pretraining(build_model(), ranks=ranks)
        backend = build_rated(kind, task, ranks, rates)
        backward(task, backend, task.inputs(samples("unique")[own]))
        backend.step(0.01, norm=1.0)
        weights, norms = backend.weights(), backend.weight_norms()
        for tower in norms if ranks.first else ():
            whole = torch.cat([v.flatten() for n, v in weights.items() if n.startswith(tower)])
            assert norms[tower] == pytest.approx(float(whole.double().norm()), rel=1e-4), kind
        for name, value in weights.items():
            moved = (value - before[name]).abs().max()
            # Where all of a gradient vanishes AdamW's eps counts.
            low = 0 if name.endswith(("bias_table", "bias")) else 0.9
            factor = 0.01 * factors.get(name, 1.0)
            assert low * factor <= moved <= 1.02 * factor, (kind, name, moved / factor)


def build_rated(kind, task, ranks, rates):
    if kind == "torch":
        return TorchBackend(task, rates, ranks)
    from unicl.engine.deepspeed_backend import DeepSpeedBackend

    engine = EngineConfig(backend="deepspeed", zero_stage=kind, persistence_threshold=0)
    return DeepSpeedBackend(task, rates, ranks, engine)


@pytest.mark.slow
def test_every_backend_follows_the_rates():
    on_ranks(2, check_rates, ("torch", 2, 3))
