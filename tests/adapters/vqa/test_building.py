"""What a run of question answering is made of, what it starts from, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.vqa.building import build, build_model, build_tokens, complete
from adapters.vqa.config import VqaConfig
from tests.adapters.detection.runs import recipe_of as detection_recipe
from tests.adapters.vqa.roberta import write_roberta
from tests.adapters.vqa.runs import DATA, FUSION, TOWERS, recipe_of
from unicl import Predictor
from unicl.build import open_shards, train
from unicl.config import parse_recipe, recipe_to_toml
from unicl.distributed import ALONE
from unicl.engine.checkpoint import checkpoints
from unicl.engine.metrics import read_metrics
from unicl.engine.optimizer import parameter_groups
from unicl.errors import UniclError, UsageError
from unicl.models import read_recipe

OBJECTIVES = pytest.mark.parametrize("objective", list(DATA))


def weights_of(run):
    return load_file(checkpoints(run / "checkpoints")[-1] / "model.safetensors")


def started(recipe):
    """Build the model of a recipe with the weights to start from, and others than before."""
    recipe = complete(recipe)
    torch.manual_seed(5)
    return build_model(recipe, build_tokens(recipe), start=True)


def bare(runs, objective, **given):
    """Return a recipe that says nothing of towers and co-attention."""
    given = {key.replace("__", "."): value for key, value in given.items()}
    own = {"vqa.objective": objective, "data.train": str(runs / DATA[objective])}
    if objective == "answers":
        own["vqa.min_answer_count"] = "1"
    of_towers = ("image_tower.", "text_tower.", "embed_dim")
    rest = {key: value for key, value in TOWERS.items() if not key.startswith(of_towers)}
    return parse_recipe("", {"task": "vqa", **rest, **own, **given})


@OBJECTIVES
def test_towers_are_those_of_the_weights(runs, objective):
    recipe = complete(bare(runs, objective, weights=str(runs / "towers")))
    run = read_recipe(runs / "towers")
    assert recipe.image_tower == run.image_tower
    assert recipe.text_tower == run.text_tower
    assert recipe.embed_dim == run.embed_dim == 16
    # Towers know nothing of co-attention, but of how long texts are.
    assert recipe.vqa.width == VqaConfig.width
    assert recipe.vqa.max_text_length == run.text_tower.context_length == 24


@OBJECTIVES
@pytest.mark.parametrize("inside", ["", "checkpoints/step-00000001"])
def test_co_attention_is_that_of_the_weights(runs, objective, inside):
    weights = runs / "pretraining" / inside
    recipe = complete(bare(runs, objective, weights=str(weights)))
    run = read_recipe(runs / "pretraining")
    assert recipe.image_tower == run.image_tower
    for name in ("width", "num_layers", "num_heads", "mlp_ratio", "max_text_length"):
        assert getattr(recipe.vqa, name) == getattr(run.vqa, name), name
    assert recipe.vqa.objective == objective
    assert recipe.vqa.dropout == VqaConfig.dropout != run.vqa.dropout


def test_what_is_set_stays(runs):
    given = {
        "image_tower__image_size": "48",
        "image_tower__window_size": "3",
        "text_tower__context_length": "30",
        "vqa__max_text_length": "20",
        "vqa__width": "8",
        "vqa__num_heads": "2",
    }
    recipe = complete(bare(runs, "captions", weights=str(runs / "pretraining"), **given))
    assert (recipe.image_tower.image_size, recipe.image_tower.window_size) == (48, 3)
    assert recipe.image_tower.model == "coswin_nano"
    assert recipe.text_tower.context_length == 30
    assert (recipe.vqa.max_text_length, recipe.vqa.width, recipe.vqa.num_layers) == (20, 8, 2)


def test_answers_are_those_of_the_data(runs):
    path = runs / "questions/v2_mscoco_train2014_annotations.json"
    main = [each["multiple_choice_answer"] for each in json.loads(path.read_text())["annotations"]]
    count = 2
    often = {answer for answer in main if main.count(answer) >= count}
    assert 0 < len(often) < len(set(main))
    recipe = complete(recipe_of(runs, "answers", vqa__min_answer_count=str(count)))
    assert set(recipe.vqa.answers) == often
    assert len(recipe.vqa.answers) == len(often)
    given = complete(recipe_of(runs, "answers", vqa__answers="yes,no"))
    assert given.vqa.answers == ("yes", "no")
    assert set(read_recipe(runs / "answers").vqa.answers) == set(main)
    assert complete(recipe_of(runs, "captions")).vqa.answers == ()


@OBJECTIVES
def test_from_towers_only_towers_are_taken(runs, objective):
    towers = weights_of(runs / "towers")
    model = started(recipe_of(runs, objective, weights=str(runs / "towers")))
    own = model.state_dict()
    for name, weight in towers.items():
        assert torch.equal(own[name], weight), name
    rest = {name.partition(".")[0] for name in own.keys() - towers.keys()}
    assert rest == {"fusion", "heads", "text"}
    assert {n for n in own.keys() - towers.keys() if n[:5] == "text."} == {"text.mask_embedding"}


@OBJECTIVES
def test_from_a_pretraining_run_comes_all_that_fits(runs, objective):
    whole = weights_of(runs / "pretraining")
    own = started(recipe_of(runs, objective, weights=str(runs / "pretraining"))).state_dict()
    for name in own.keys() & whole.keys():
        assert torch.equal(own[name], whole[name]), name
    missing = {".".join(name.split(".")[:2]) for name in own.keys() - whole.keys()}
    assert missing == ({"heads.answers"} if objective == "answers" else set())
    assert ("heads.words.decoder.weight" in own) == (objective != "answers")


def test_what_does_not_fit_starts_anew(runs):
    whole = weights_of(runs / "pretraining")
    recipe = recipe_of(runs, "captions", weights=str(runs / "pretraining"), vqa__num_layers="3")
    deeper = started(recipe).state_dict()
    more = {".".join(name.split(".")[:3]) for name in deeper.keys() - whole.keys()}
    assert more == {"fusion.image_layers.2", "fusion.text_layers.2"}
    assert all(torch.equal(deeper[name], whole[name]) for name in deeper.keys() & whole.keys())
    recipe = recipe_of(runs, "captions", weights=str(runs / "pretraining"), vqa__width="32")
    wider = started(recipe).state_dict()
    fitting = {n for n in wider.keys() & whole.keys() if wider[n].shape == whole[n].shape}
    assert {name for name in fitting if name.startswith(("image.", "text."))} == {
        name for name in whole if name.startswith(("image.", "text."))
    }
    assert all(torch.equal(wider[name], whole[name]) for name in fitting)
    assert not any(name.startswith("fusion.image_layers") and "weight" in name for name in fitting)


def test_another_size_of_images_is_carried(runs):
    given = {"image_tower__image_size": "64", "image_tower__window_size": "4"}
    recipe = recipe_of(runs, "answers", weights=str(runs / "pretraining"), **given)
    model, whole = started(recipe), weights_of(runs / "pretraining")
    own = model.state_dict()
    changed = {n for n in own if n in whole and own[n].shape != whole[n].shape}
    assert all("relative_position" in name for name in changed)
    assert all(torch.equal(own[n], whole[n]) for n in own.keys() & whole.keys() - changed)
    small = started(recipe_of(runs, "answers"))
    places = [m.look(torch.zeros(1, 3, s, s)).shape[1] for m, s in ((small, 32), (model, 64))]
    assert places == [1, 4]


def test_a_longer_context_is_carried(runs):
    given = {"text_tower__context_length": "30", "vqa__max_text_length": "30"}
    recipe = recipe_of(runs, "answers", weights=str(runs / "pretraining"), **given)
    own, whole = started(recipe).state_dict(), weights_of(runs / "pretraining")
    name = "text.positional_embedding"
    assert own[name].shape == (30, 16)
    assert torch.equal(own[name][:24], whole[name])


def test_a_file_of_towers_is_enough(runs, tmp_path):
    save_file(weights_of(runs / "towers"), tmp_path / "towers.safetensors")
    recipe = recipe_of(runs, "answers", weights=str(tmp_path / "towers.safetensors"))
    own, towers = started(recipe).state_dict(), weights_of(runs / "towers")
    assert all(torch.equal(own[name], weight) for name, weight in towers.items())


def test_weights_of_another_kind_are_one_line(runs, tmp_path):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "other.pth").write_bytes(b"no weights")
    detector = tmp_path / "detector"
    detector.mkdir()
    (detector / "recipe.toml").write_text(recipe_to_toml(detection_recipe(runs)))
    for weights, kind, message in (
        ("other.safetensors", UsageError, r"other\.safetensors has no whole model's weights"),
        ("other.pth", UniclError, r"other\.pth"),
        ("detector", UsageError, "is a run of detection; start from two towers or a run of vqa"),
        ("nowhere", UsageError, "weights names no run, .* file: .*nowhere"),
    ):
        with pytest.raises(kind, match=message) as caught:
            train(recipe_of(runs, "answers", weights=str(tmp_path / weights)), tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objective", "given", "message"),
    [
        ("pretraining", {"data__train": "{runs}/questions"}, "has questions, which .* answers is"),
        ("captions", {"data__train": "{runs}/questions"}, "has questions, which .* answers is for"),
        ("captions", {"data__train": "{runs}/towers"}, "{runs}/towers"),
        ("captions", {"data__train": "nowhere"}, "no image set and no folder 'nowhere'"),
        ("answers", {"data__train": "{runs}/pairs"}, "pairs has no questions; expected JSON"),
        ("answers", {"data__train": "nowhere"}, "there is no folder 'nowhere' of questions"),
        ("answers", {"data__train": ""}, "data.train is not set"),
        ("answers", {"evaluation__data": "{runs}/pairs"}, "pairs has no questions"),
        ("answers", {"vqa__split": "dev"}, "has no split 'dev'; it has train, val"),
        (
            "answers",
            {"vqa__min_answer_count": "99"},
            r"of 99 questions; lower vqa\.min_answer_count",
        ),
        ("answers", {"vqa__answers": "zebra"}, "no question of .* an answer that is in the vocab"),
        ("answers", {"weights": "{runs}/pairs"}, "pairs is not a run"),
        (
            "answers",
            {"weights": "{runs}/towers", "image_tower__model": "test_resnet"},
            r"does not fit image_tower\.model",
        ),
        ("pretraining", {"image_tower__locked": "true"}, r"locked needs `weights`"),
    ],
)
def test_mistakes_are_one_line_and_occupy_nothing(runs, tmp_path, objective, given, message):
    given = {key: value.format(runs=runs) for key, value in given.items()}
    with pytest.raises(UsageError, match=message.format(runs=runs)) as caught:
        train(recipe_of(runs, objective, **given), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_hard_negatives_need_what_embeds_texts(runs, tmp_path):
    save_file(weights_of(runs / "towers"), tmp_path / "towers.safetensors")
    given = {"vqa__text_encoder": f"roberta:{write_roberta(tmp_path / 'roberta')}"}
    train(recipe_of(runs, "pretraining", **given), tmp_path / "roberta_run")
    for weights, why in (
        ("towers.safetensors", r"towers\.safetensors is but a file of weights"),
        ("roberta_run", "roberta_run reads texts by RoBERTa"),
    ):
        recipe = recipe_of(runs, "pretraining", weights=str(tmp_path / weights), **given)
        with pytest.raises(UsageError, match=rf"hard needs a run with a text tower, and .*{why}"):
            train(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        own = {"weights": str(tmp_path / weights), "vqa__negatives": "random", **given}
        started(recipe_of(runs, "pretraining", **own))


@OBJECTIVES
def test_a_run_that_is_cut_ends_as_a_whole_one(runs, tmp_path, objective):
    """Also where what it started from is gone."""
    shutil.copytree(runs / "towers", tmp_path / "towers")
    given = {
        "weights": str(tmp_path / "towers"),
        "trainer__steps": "4",
        "trainer__keep_last": "4",
        "vqa__dropout": "0.2",
        "image_tower__drop_path_rate": "0.2",
        "data__crop_scale": "0.6,1",
    }
    whole = train(recipe_of(runs, objective, **given), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for newest in checkpoints(tmp_path / "cut/checkpoints")[2:]:
        shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "towers")
    given["data__num_workers"] = "1"
    assert train(recipe_of(runs, objective, **given), tmp_path / "cut").step == whole.step == 4
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    start = weights_of(runs / "towers")
    assert not all(torch.equal(one[name], weight) for name, weight in start.items())


def test_a_run_goes_on_without_the_weights_that_gave_its_sizes(runs, tmp_path):
    shutil.copytree(runs / "pretraining", tmp_path / "started")
    sizes = ("embed_dim", "image_tower", "text_tower", "vqa.width", "vqa.num", "vqa.max_text")
    bare = {key: value for key, value in {**TOWERS, **FUSION}.items() if not key.startswith(sizes)}
    given = {
        **bare,
        "vqa.objective": "answers",
        "vqa.min_answer_count": "1",
        "data.train": str(runs / "questions"),
        "weights": str(tmp_path / "started"),
        "trainer.steps": "3",
        "trainer.keep_last": "3",
    }
    recipe = parse_recipe("", given)
    train(recipe, tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run/checkpoints")[-1])
    shutil.rmtree(tmp_path / "started")
    assert train(recipe, tmp_path / "run").step == 3
    own = read_recipe(tmp_path / "run")
    assert (own.vqa.width, own.text_tower.width, own.image_tower.image_size) == (16, 16, 32)
    other = parse_recipe("", {**given, "text_tower.width": "64"})
    shutil.rmtree(checkpoints(tmp_path / "run/checkpoints")[-1])
    with pytest.raises(UsageError, match=r"holds a run with another text_tower.width"):
        train(other, tmp_path / "run")


@pytest.mark.parametrize("change", ["answer", "image"])
def test_a_run_does_not_go_on_with_other_data(runs, tmp_path, change):
    shutil.copytree(runs / "questions", tmp_path / "questions")
    recipe = recipe_of(tmp_path, "answers", vqa__answers="yes,no,1,2,3")
    train(recipe, tmp_path / "run")
    if change == "answer":
        path = tmp_path / "questions/v2_mscoco_train2014_annotations.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["answers"][0]["answer"] = "nothing"
        path.write_text(json.dumps(content))
    else:
        path = next((tmp_path / "questions/train2014").iterdir())
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UsageError, match=r"has other samples than .*run was trained on"):
        train(recipe, tmp_path / "run")


def test_hard_negatives_lie_in_the_run(runs):
    folder = runs / "pretraining/negatives"
    images, texts = np.load(folder / "images.npy"), np.load(folder / "texts.npy")
    predictor = Predictor.load(runs / "towers", device="cpu")
    pairs = open_shards(runs / "pairs")
    expected = predictor.embed_texts(pairs.table().texts)
    np.testing.assert_allclose(texts, expected, atol=1e-3)
    assert images.shape == (pairs.num_samples, 16)
    about = json.loads((folder / "done.json").read_text())
    assert about["scale"] == pytest.approx(predictor.model.scale().item())
    assert not (runs / "captions/negatives").exists()


def test_negatives_are_embedded_once(runs, tmp_path):
    run = tmp_path / "run"
    recipe = recipe_of(runs, "pretraining", weights=str(runs / "towers"), trainer__steps="1")
    train(recipe, run)
    kept = {path.name: path.read_bytes() for path in (run / "negatives").iterdir()}
    assert kept.keys() == {"images.npy", "texts.npy", "done.json"}
    # Nobody looks whether what is whole is right.
    marked = kept["texts.npy"][:-2] + b"\0\0"
    (run / "negatives/texts.npy").write_bytes(marked)
    shutil.rmtree(run / "checkpoints")
    train(recipe, run)
    assert (run / "negatives/texts.npy").read_bytes() == marked


@pytest.mark.parametrize("name", ["images.npy", "texts.npy", "done.json"])
@pytest.mark.parametrize("left", [None, 0, 40, 200])
def test_damaged_negatives_are_made_anew(runs, tmp_path, name, left):
    folder = tmp_path / "negatives"
    shutil.copytree(runs / "pretraining/negatives", folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    if left is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(whole[name][: min(left, len(whole[name]) - 5)])
    recipe = complete(recipe_of(runs, "pretraining", weights=str(runs / "towers")))
    build(recipe, ALONE, start=False).prepare(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.parametrize(
    ("objective", "data", "names"),
    [
        ("pretraining", "pairs", {"matching/accuracy", "words/accuracy"}),
        (
            "answers",
            "questions",
            {
                *(f"vqa/accuracy{kind}" for kind in ("", "/number", "/other", "/yes/no")),
                *(f"vqa/type/{kind}" for kind in ("colour", "shape", "existence", "count")),
            },
        ),
        ("captions", "pairs", {"captions/cider", *(f"captions/bleu{n}" for n in range(1, 5))}),
    ],
)
def test_what_is_measured_during_training(runs, tmp_path, objective, data, names):
    given = {"evaluation__data": str(runs / data), "trainer__keep_best": min(names)}
    run = train(recipe_of(runs, objective, **given), tmp_path / "run")
    assert run.metrics.keys() == names
    assert all(0 <= share <= 1 for share in run.metrics.values())
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if min(names) in row]
    assert rows
    assert rows[-1]["step"] == 2


def test_co_attention_and_head_learn_faster(runs):
    given = {"vqa__fusion_rate": "3", "vqa__head_rate": "7", "optimizer__text_rate": "2"}
    recipe = complete(recipe_of(runs, "answers", **given))
    model = build(recipe, ALONE, start=True).task.model
    groups = parameter_groups(model, recipe.optimizer)
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    named = {p: name for name, p in model.named_parameters()}
    found = {(named[p].partition(".")[0], scale) for p, scale in scales.items()}
    assert found == {("image", 1), ("text", 2), ("fusion", 3), ("heads", 7)}
