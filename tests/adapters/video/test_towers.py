"""Towers that see videos in views, against the towers of single views."""

import torch
from torch import nn
from torch.nn.functional import normalize

from adapters.video.coswin3d import coswin3d
from adapters.video.towers import VideoClassifier, VideoTwoTower
from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower
from unicl.towers.two_tower import TwoTower


def image_model() -> TwoTower:
    torch.manual_seed(0)
    image = ImageTower("coswin_nano", embed_dim=16, image_size=32)
    text = TextTower(width=16, num_layers=1, num_heads=1, context_length=8, embed_dim=16)
    return TwoTower(image, text, initial_scale=20.0).eval()


def clip_tower(embed_dim: int = 16) -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(
        "coswin_nano", embed_dim=embed_dim, image_size=32, backbone=coswin3d("coswin_nano")
    ).eval()


def videos(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_a_video_is_the_mean_of_its_frames() -> None:
    model = image_model()
    frames = videos(3, 5, 3, 32, 32)
    with torch.no_grad():
        found = VideoTwoTower.of(model, view_dims=3).encode_image(frames)
        single = torch.stack([model.encode_image(video) for video in frames])
    assert torch.allclose(found, normalize(single.mean(1), dim=-1), atol=1e-6)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3))


def test_a_single_frame_is_the_image_itself() -> None:
    model = image_model()
    images = videos(3, 3, 32, 32)
    video = VideoTwoTower.of(model, view_dims=3)
    with torch.no_grad():
        assert torch.allclose(video.encode_image(images), model.encode_image(images), atol=1e-6)


def test_both_models_share_all_weights() -> None:
    model = image_model()
    video = VideoTwoTower.of(model, view_dims=3)
    assert video.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(video.parameters(), model.parameters(), strict=True))
    assert video.scale() == model.scale()
    assert not video.training


def test_a_locked_tower_stays_locked() -> None:
    model = image_model()
    model.lock("image")
    video = VideoTwoTower.of(model, view_dims=3).train()
    assert not video.image.training
    assert video.text.training


def test_clips_have_views_or_none() -> None:
    model = VideoTwoTower(clip_tower(), nn.Identity(), view_dims=4).eval()
    clips = videos(2, 3, 3, 4, 32, 32)
    with torch.no_grad():
        found, features = model.encode_image_twice(clips)
        single = torch.stack([model.encode_image(views) for views in clips])
        assert torch.allclose(found, normalize(single.mean(1), dim=-1), atol=1e-6)
        assert torch.allclose(model.encode_image(clips), found, atol=1e-6)
        pooled = torch.stack([model.image.pool(views) for views in clips])
    assert torch.allclose(features, pooled.mean(1), atol=1e-5)


def test_probabilities_are_averaged_over_views() -> None:
    model = VideoClassifier(clip_tower(), num_classes=5, width=256).eval()
    clips = videos(2, 3, 3, 4, 32, 32)
    with torch.no_grad():
        single = torch.stack([model.logits(views).softmax(-1) for views in clips])
        found, features = model.encode_image_twice(clips)
        assert torch.allclose(found, single.mean(1), atol=1e-6)
        assert torch.allclose(model.encode_image(clips), found, atol=1e-6)
    assert features.shape == (2, 256)
    assert torch.allclose(found.sum(-1), torch.ones(2))


def test_frames_are_classified_together() -> None:
    torch.manual_seed(0)
    tower = ImageTower("coswin_nano", embed_dim=16, image_size=32)
    model = VideoClassifier(tower, num_classes=5, width=256, view_dims=3).eval()
    frames = videos(2, 4, 3, 32, 32)
    with torch.no_grad():
        single = torch.stack([model.logits(video[:, None]) for video in frames])
        assert torch.allclose(model.logits(frames), single.mean(1), atol=1e-6)


def test_a_rank_may_have_no_videos() -> None:
    none = videos(0, 3, 4, 32, 32)
    with torch.no_grad():
        head = VideoClassifier(clip_tower(), num_classes=5, width=256).eval()
        assert head.logits(none).shape == (0, 5)
        clips = VideoTwoTower(clip_tower(), nn.Identity(), view_dims=4).eval()
        assert clips.encode_image(none).shape == (0, 16)
        frames = VideoTwoTower.of(image_model(), view_dims=3)
        assert frames.encode_image(videos(0, 4, 3, 32, 32)).shape == (0, 16)


def test_all_that_a_classifier_learns_gets_a_gradient() -> None:
    model = VideoClassifier(clip_tower(), num_classes=5, width=256, dropout=0.1)
    model.logits(videos(2, 3, 4, 32, 32)).square().sum().backward()
    learning = {name for name, value in model.named_parameters() if value.requires_grad}
    assert learning == {name for name, value in model.named_parameters() if value.grad is not None}
    assert "logit_scale" not in learning
