"""Models of videos: from image weights, from runs of each kind, and made of models of images."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from adapters.video.pretrained import StillClip, adapt, build_model
from adapters.video.towers import VideoClassifier, VideoTwoTower
from tests.adapters.video.runs import clip_recipe, head_recipe
from unicl.config import find_plugin, parse_recipe, recipe_to_toml
from unicl.data.image_sets import open_image_set
from unicl.errors import UsageError
from unicl.evaluation.cache import Setting, _key, decoder_of, image_embeddings
from unicl.models import load, load_for, load_model


def frames(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def clip_of(runs):
    return next(runs.glob("classes/test/*/*.mp4")).read_bytes()


@pytest.mark.parametrize("merge_steps", ["1", "3"])
@pytest.mark.parametrize("num_frames", ["4", "1"])
def test_an_inflated_model_sees_a_still_clip_as_the_image(runs, merge_steps, num_frames):
    weights = {"weights": str(runs / "image"), "video__num_frames": num_frames}
    recipe = clip_recipe(runs, video__merge_steps=merge_steps, **weights)
    model = build_model(recipe, start=True).eval()
    image, _ = load_model(runs / "image")
    pictures = frames(3)
    still = pictures[:, :, None].expand(-1, -1, int(num_frames), -1, -1)
    tokens = load(runs / "image").tokenize(["a red circle", "a blue bar"])
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(still), image.encode_image(pictures), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(model.encode_text(tokens), image.encode_text(tokens))
    assert model.scale() == image.scale()


def test_without_weights_clips_are_not_images(runs):
    """The control of the test above: it is the weights that make them alike."""
    torch.manual_seed(1)
    model = build_model(clip_recipe(runs, weights=str(runs / "image")), start=False).eval()
    image, _ = load_model(runs / "image")
    with torch.no_grad():
        found = model.encode_image(frames(2)[:, :, None].expand(-1, -1, 4, -1, -1))
        assert not torch.allclose(found, image.encode_image(frames(2)), atol=1e-2)


def test_a_head_starts_on_inflated_features(runs):
    recipe = head_recipe(runs, weights=str(runs / "image"), video__class_names="a,b,c")
    model = build_model(recipe, start=True).eval()
    assert isinstance(model, VideoClassifier)
    image, _ = load_model(runs / "image")
    still = frames(3)[:, :, None].expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        probabilities, features = model.encode_image_twice(still)
        expected = image.encode_image_twice(frames(3))[1]
    torch.testing.assert_close(features, expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3))


def test_a_run_of_frames_is_the_mean_of_its_images(runs):
    recipe = clip_recipe(runs, video__tower="frames", weights=str(runs / "image"))
    model = build_model(recipe, start=True).eval()
    image, _ = load_model(runs / "image")
    pictures = frames(8).unflatten(0, (2, 4))
    with torch.no_grad():
        single = torch.stack([image.encode_image(video) for video in pictures])
        found = model.encode_image(pictures)
    torch.testing.assert_close(found, normalize(single.mean(1), dim=-1))


@pytest.mark.parametrize(
    ("name", "view", "kind"),
    [
        ("texts", (1, 3, 4, 32, 32), VideoTwoTower),
        ("head", (1, 3, 4, 32, 32), VideoClassifier),
        ("frames", (4, 3, 32, 32), VideoTwoTower),
    ],
)
def test_runs_of_each_kind_are_loaded(runs, name, view, kind):
    loaded = load(runs / name)
    assert isinstance(loaded.model, kind)
    assert not loaded.model.training
    clip = decoder_of(loaded)(clip_of(runs), 0)
    assert clip.shape == view
    assert loaded.reading == {
        "num_frames": 4, "sampling": "dense", "frame_stride": 2, "num_clips": 1, "num_crops": 1,
    }  # fmt: skip
    assert len(loaded.classes) == (6 if name == "head" else 0)
    with torch.no_grad():
        embedded = loaded.model.encode_image(clip[None])
    assert embedded.shape == (1, 6 if name == "head" else 16)
    if name == "head":
        torch.testing.assert_close(embedded.sum(-1), torch.ones(1))
        with pytest.raises(UsageError, match="head has a classification head and no text tower"):
            loaded.tokenize(["a text"])
    else:
        assert loaded.tokenize(["a text"]).shape == (1, 16)


def test_a_run_is_as_it_was_trained(runs):
    recipe = load_recipe_of(runs / "texts")
    assert recipe.weights == str(runs / "image")
    loaded = load(runs / "texts")
    again = build_model(recipe, start=False)
    again.load_state_dict(loaded.model.state_dict())
    before = build_model(recipe, start=True).state_dict()
    changed = [n for n, w in again.state_dict().items() if not torch.equal(w, before[n])]
    assert "image.backbone.patch_embed.proj.weight" in changed


def load_recipe_of(run):
    recipe = parse_recipe((run / "recipe.toml").read_text())
    assert parse_recipe(recipe_to_toml(recipe)) == recipe
    return recipe


def test_a_model_of_images_takes_twelve_frames(runs):
    image = load(runs / "image")
    video = adapt(image, {})
    assert decoder_of(video)(clip_of(runs), 0).shape == (12, 3, 32, 32)
    assert video.reading["num_frames"] == 12
    changed = adapt(image, {"video.num_frames": "2", "video.num_clips": "3"})
    assert decoder_of(changed)(clip_of(runs), 0).shape == (6, 3, 32, 32)
    assert changed.reading == {**video.reading, "num_frames": 2, "num_clips": 3}


def test_a_model_of_videos_keeps_its_way_but_for_overrides(runs):
    texts = load(runs / "texts")
    assert adapt(texts, {}).reading == texts.reading
    changed = adapt(texts, {"video.num_crops": "3", "video.num_frames": "2"})
    assert decoder_of(changed)(clip_of(runs), 0).shape == (3, 3, 2, 32, 32)
    assert changed.model is texts.model
    assert changed.reading == {**texts.reading, "num_crops": 3, "num_frames": 2}
    # A picture beside has as many frames as a clip.
    assert isinstance(changed.transform, StillClip)
    assert changed.transform.num_frames == 2


def test_a_model_of_open_clip_is_adapted(tmp_path):
    from open_clip.factory import _MODEL_CONFIGS, _rescan_model_configs

    tower = {"layers": 1, "width": 32}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "head_width": 16, **tower},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "heads": 2, **tower},
    }
    (tmp_path / "tiny-video.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-video.json")
    try:
        model = load_for(find_plugin("video"), "open_clip:tiny-video")
    finally:
        _MODEL_CONFIGS.pop("tiny-video", None)
        _rescan_model_configs()
    assert isinstance(model.model, VideoTwoTower)
    assert decoder_of(model).empty().shape == (0, 12, 3, 32, 32)
    videos = frames(4).unflatten(0, (2, 2))
    with torch.no_grad():
        single = torch.stack(
            [model.model.encode_image(video) for video in videos.flatten(0, 1)[:, None]]
        )
        found = model.model.encode_image(videos)
    torch.testing.assert_close(found, normalize(single.view(2, 2, -1).mean(1), dim=-1))


@pytest.mark.parametrize("name", ["texts", "frames", "head"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "video.tower",
            "3d",
            r"video\.tower has no effect here; .*video\.num_crops",
        ),
        ("video.tube_frames", "1", "has no effect here"),
        ("video.class_names", "a", "has no effect here"),
        ("video.num_crop", "3", r"did you mean video\.num_crops"),
        ("trainer.steps", "3", "unknown key trainer.steps"),
        ("video.num_frames", "0", "num_frames must be positive"),
    ],
)
def test_what_cannot_be_overridden(runs, name, key, value, message):
    with pytest.raises(UsageError, match=message):
        adapt(load(runs / name), {key: value})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"video.tube_stride": "1"}, "tube_stride has no effect here"),
        ({"video.targets": "classes"}, "video.targets has no effect here"),
        ({"video.tower": "3d", "video.dropout": "0.1"}, "dropout has no effect here"),
        ({"video.tower": "4d"}, "video.tower must be one of 3d, frames"),
        ({"video.num_crop": "3"}, "did you mean video.num_crops"),
    ],
)
def test_what_a_model_of_images_has_no_use_for(runs, overrides, message):
    with pytest.raises(UsageError, match=message):
        adapt(load(runs / "image"), overrides)


@pytest.mark.parametrize("num_frames", ["1", "4"])
def test_a_model_of_images_is_inflated(runs, num_frames):
    image = load(runs / "image")
    video = adapt(image, {"video.tower": "3d", "video.num_frames": num_frames})
    assert decoder_of(video).empty().shape == (0, 1, 3, int(num_frames), 32, 32)
    pictures = frames(3)
    still = pictures[:, :, None].expand(-1, -1, int(num_frames), -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            video.model.encode_image(still), image.model.encode_image(pictures), rtol=0, atol=1e-5
        )
    picture = Image.fromarray(pictures[0].permute(1, 2, 0).numpy())
    assert video.transform(picture, 0).shape == (3, int(num_frames), 32, 32)


def test_towers_of_other_strides_are_not_taken_for_each_other(runs):
    """Their weights are equal, and so is how they read: only the architecture tells them apart."""
    image = load(runs / "image")
    given = {"video.tower": "3d", "video.num_frames": "4"}
    found = [adapt(image, {**given, "video.tube_stride": stride}) for stride in ("1", "2", "2")]
    one, other, again = (model.fingerprint for model in found)
    assert one != other == again
    assert image.fingerprint not in (one, other)


def test_an_image_model_and_its_adapted_form_are_of_one_space(runs):
    """Texts embedded for images are found again for videos; the clips themselves are not."""
    image = load(runs / "image")
    video = adapt(image, {})
    more = adapt(image, {"video.num_clips": "2"})
    assert image.fingerprint == video.fingerprint == more.fingerprint
    names = {load(runs / name).fingerprint for name in ("image", "texts", "frames", "head")}
    assert len(names) == 4
    texts = {_key(model, Setting(), "texts", "content") for model in (image, video, more)}
    assert len(texts) == 1


def test_each_way_of_reading_is_remembered_by_itself(runs, tmp_path):
    image = load(runs / "image")
    data = find_plugin("video").open_set(
        str(runs / "classes"), split="test", root=runs, kind="classes"
    )
    setting = Setting(num_workers=0, cache=tmp_path)
    entries = []
    for overrides in ({}, {"video.num_frames": "2"}, {"video.num_frames": "12"}):
        embedded = image_embeddings(adapt(image, overrides), data, setting)
        assert len(embedded.rows) == 12
        entries.append(len([*tmp_path.iterdir()]))
    assert entries == [1, 2, 2]
    pictures = open_image_set(str(runs / "images/test"), root=runs)
    image_embeddings(image, pictures, setting)
    image_embeddings(adapt(image, {}), pictures, setting)
    assert len([*tmp_path.iterdir()]) == 4
