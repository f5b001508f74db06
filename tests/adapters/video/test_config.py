import pytest

from adapters.video.plugin import plugin
from unicl.config import load_recipe, parse_recipe
from unicl.errors import UsageError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "open_clip:RN50"}, "tower 3d inflates a CoSwin only, not open_clip:RN50"),
        (
            {"model": "open_clip:RN50", "video.tower": "frames", "video.targets": "classes"},
            "puts a head on a tower that is built here, not on open_clip:RN50; .* to texts",
        ),
        ({"image_tower.model": "resnet18"}, "3d inflates a CoSwin only, .* resnet18"),
        *(
            (
                {"video.tower": "frames", f"video.{name}": value},
                f"video.{name} has no effect on video.tower frames; leave it out",
            )
            for name, value in (
                ("tube_frames", "4"),
                ("tube_stride", "1"),
                ("merge_steps", "1"),
                ("time_windows", "2,4"),
                ("space_windows", "7"),
            )
        ),
        ({"video.class_names": "a,b"}, "class_names needs targets classes"),
        ({"video.dropout": "0.1"}, "dropout needs targets classes"),
        ({"video.label_smoothing": "1"}, r"label_smoothing must lie in \[0, 1\), got 1"),
        ({"video.merge_steps": "2"}, "merge_steps must be odd and positive, got 2"),
        ({"video.randaugment_magnitude": "31"}, r"magnitude must lie in \[0, 30\], got 31"),
    ],
)
def test_what_does_not_fit_together(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe("", {"task": "video", **overrides})


def test_captions_do_not_follow_a_head() -> None:
    head = parse_recipe("", {"task": "video", "video.targets": "classes"})
    with pytest.raises(UsageError, match="no text tower, which captions need"):
        plugin.follow(parse_recipe("", {"task": "video"}), head)


@pytest.mark.parametrize(
    ("name", "samples", "epochs", "warmup_epochs"),
    [("video_classes", 240_000, 30, 2.5), ("video_captions", 180_000, 5, 0.14)],
)
def test_steps_are_the_epochs_that_the_recipe_promises(
    name: str, samples: int, epochs: int, warmup_epochs: float
) -> None:
    recipe = load_recipe(name)
    assert f"{epochs} epochs" in recipe.description
    of_an_epoch = samples / recipe.trainer.batch_size
    assert recipe.trainer.steps / of_an_epoch == pytest.approx(epochs, rel=1e-3)
    assert recipe.schedule.warmup_steps / of_an_epoch == pytest.approx(warmup_epochs, rel=0.02)


def test_a_run_hands_on_its_clips_and_tower_but_not_its_training() -> None:
    keys = {"video.num_frames": "4", "video.tube_stride": "1"}
    captions = load_recipe("video_captions", keys)
    followed = plugin.follow(load_recipe("video_classes"), captions).video
    assert (followed.num_frames, followed.tube_stride, followed.sampling) == (4, 1, "uniform")
    assert (followed.targets, followed.randaugment_ops) == ("classes", 2)


def test_a_model_of_open_clip_learns_names_at_its_own_rate() -> None:
    recipe = load_recipe("video_classes")
    for towers in (
        parse_recipe("", {"model": "open_clip:RN50"}),
        parse_recipe("", {"task": "video", "model": "open_clip:RN50", "video.tower": "frames"}),
    ):
        followed = plugin.follow(recipe, towers)
        assert (followed.video.tower, followed.video.targets) == ("frames", "texts")
        assert (followed.optimizer.layer_decay, followed.optimizer.learning_rate) == (1.0, 2e-5)
