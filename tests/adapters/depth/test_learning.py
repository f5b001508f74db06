"""What only the depth map shows is learned from it, and cannot be learned without."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adapters.depth.rgbd import RgbdDecoder
from adapters.depth.sets import open_rgbd_folder
from tests.adapters.depth.rooms import png, write
from unicl.data.augment import EvalTransform, TrainTransform
from unicl.data.image_sets import ClassificationSet
from unicl.data.loader import Loader
from unicl.data.order import SampleOrder
from unicl.data.prompts import PromptSampler
from unicl.data.reader import Transform
from unicl.data.shards import RawSample
from unicl.towers.image import ImageTower

SIZE = 32
SHAPES = ("disc", "ring", "bars")
STEPS = 60


class Labelled:
    """A class folder to train on."""

    def __init__(self, images: ClassificationSet) -> None:
        self.images = images
        self.num_samples = images.num_samples

    def read(self, index: int) -> RawSample:
        sample = self.images.read(index)
        return RawSample(sample.key, sample.image, b"-")

    def label(self, index: int, text: str, key: str) -> int:
        return int(self.images.targets[index])

    def locate(self, index: int) -> tuple[str, int]:
        return self.images.locate(index)


def write_shapes(folder: Path) -> None:
    """Write images of noise, in front of which something stands that has no colour."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :40]
    for split, count in (("train", 24), ("test", 16)):
        for number in range(count * len(SHAPES)):
            shape = SHAPES[number % len(SHAPES)]
            row, column = random.uniform(16, 24, 2)
            radius = np.hypot(rows - row, columns - column)
            shown = {
                "disc": radius < 9,
                "ring": (radius > 7) & (radius < 12),
                "bars": (np.abs(rows - row) < 12) & (columns.astype(int) // 4 % 2 == 0),
            }[shape]
            depth = np.where(shown, random.uniform(700, 900), random.uniform(3000, 5000))
            depth = (depth + random.normal(0, 20, (40, 40))).astype(np.uint16)
            depth[random.random((40, 40)) < 0.02] = 0
            name = folder / split / shape / f"{number}"
            pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
            write(name.with_suffix(".png"), png(pixels))
            write(name.with_suffix(".depth.png"), png(depth))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    write_shapes(path)
    return path


def loader_of(folder: Path, split: str, transform: Transform) -> Loader:
    images = open_rgbd_folder(folder, split=split)
    shuffle = split == "train"
    return Loader(
        Labelled(images),
        SampleOrder(np.array([images.num_samples]), seed=0, window=1, shuffle=shuffle),
        decode=RgbdDecoder(transform, 10_000),
        tokenize=lambda texts: torch.zeros(len(texts), 1, dtype=torch.int64),
        prompts=PromptSampler("none", short_text_words=0, seed=0),
        batch_size=12,
        num_workers=0,
        seed=0,
        max_skipped_share=None,
    )


def tower_of(in_chans: int) -> ImageTower:
    torch.manual_seed(0)
    tower = ImageTower("test_resnet", embed_dim=3, image_size=SIZE, in_chans=in_chans)
    stem = tower.backbone.get_submodule(tower.backbone.pretrained_cfg["first_conv"])
    with torch.no_grad():
        stem.weight[:, 3:] = 0  # as it is carried over from RGB
    return tower


def test_depth_is_learned_and_colours_tell_nothing(folder: Path) -> None:
    """Two towers see the same images, one without their depth; features are logits."""
    towers = {in_chans: tower_of(in_chans) for in_chans in (3, 4)}
    batches = loader_of(folder, "train", TrainTransform(SIZE, flip=True)).batches()
    weights = [weight for tower in towers.values() for weight in tower.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=6e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for _, batch in zip(range(STEPS), batches, strict=False):
        losses = [
            F.cross_entropy(tower(batch.images[:, :in_chans]), batch.labels)
            for in_chans, tower in towers.items()
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    right = dict.fromkeys(towers, 0)
    count = 0
    with torch.no_grad():
        for batch in loader_of(folder, "test", EvalTransform(SIZE, crop=1.0)).epoch():
            count += len(batch.labels)
            for in_chans, tower in towers.items():
                guesses = tower.eval()(batch.images[:, :in_chans]).argmax(1)
                right[in_chans] += int((guesses == batch.labels).sum())
    assert count == 16 * len(SHAPES)
    assert right[4] / count >= 0.9
    assert right[3] / count <= 0.6
