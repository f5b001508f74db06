"""Embeddings on disk: made once, exact for any number of ranks, whole or made again."""

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from tests.unicl.evaluation.toys import NAMES, TEMPLATES, ToyModel, toy
from tests.unicl.ranks import on_ranks
from unicl.data.image_sets import ImageSet
from unicl.data.shards import RawSample, SampleError
from unicl.distributed import Ranks
from unicl.errors import UniclError
from unicl.evaluation import cache
from unicl.evaluation.cache import (
    ImageEmbeddings,
    Setting,
    classifier,
    image_blocks,
    image_embeddings,
    texts_embeddings,
)
from unicl.evaluation.embeddings import embed_texts
from unicl.evaluation.zero_shot import class_embeddings


@dataclass
class Noise:
    """Pictures of noise, some of which are damaged."""

    num_samples: int = 10
    damaged: tuple[int, ...] = ()
    reason: str = "undecodable image"
    content: str = "noise"

    def digest(self) -> str:
        return self.content

    def read(self, index: int) -> RawSample:
        if index in self.damaged:
            raise SampleError(self.reason)
        pixels = np.random.default_rng(index).integers(0, 256, (6, 6, 3), np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return RawSample(f"{index}", file.getvalue(), None)

    def locate(self, index: int) -> tuple[str, int]:
        return "noise", index


def noise(**changes: object) -> ImageSet:
    return ImageSet(name="noise", split="", splits=(), images=Noise(**changes))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_BLOCK", 4)


def setting(folder: Path | None, **changes: object) -> Setting:
    return replace(Setting(batch_size=3, num_workers=0, cache=folder), **changes)


def count_forwards(model: ToyModel) -> list[bool]:
    model.autocast.clear()
    return model.autocast


def test_a_set_is_embedded_once(tmp_path: Path) -> None:
    model, images = toy(), noise()
    first = image_embeddings(model, images, setting(tmp_path))
    assert first.rows.tolist() == list(range(10))
    assert first.embeddings.shape == (10, 16)
    assert first.features.shape == (10, 48)
    forwards = count_forwards(model.model)
    again = image_embeddings(model, images, setting(tmp_path))
    assert not forwards
    torch.testing.assert_close(again.embeddings, first.embeddings, rtol=0, atol=0)
    torch.testing.assert_close(again.features, first.features, rtol=0, atol=0)
    fresh = image_embeddings(model, images, setting(None))
    torch.testing.assert_close(fresh.embeddings, first.embeddings, rtol=0, atol=0)


def test_the_key_knows_model_data_and_arithmetic(tmp_path: Path) -> None:
    def made(model: ToyModel, images: ImageSet, **changes: object) -> bool:
        pretrained = toy(model)
        forwards = count_forwards(model)
        image_embeddings(pretrained, images, setting(tmp_path, **changes))
        return bool(forwards)

    assert made(ToyModel(), noise())
    assert not made(ToyModel(), noise())
    assert not made(ToyModel(), noise(), batch_size=5)
    assert made(ToyModel(), noise(content="other noise"))
    assert made(ToyModel(), noise(), autocast=torch.bfloat16)
    other = ToyModel()
    with torch.no_grad():
        other.pixels.bias[0] += 1e-3
    assert made(other, noise())


def test_an_interrupted_embedding_goes_on(tmp_path: Path) -> None:
    model = toy()
    blocks = image_blocks(model, noise(), setting(tmp_path))
    first = next(blocks)
    blocks.close()
    forwards = count_forwards(model.model)
    embedded = image_embeddings(model, noise(), setting(tmp_path))
    assert len(forwards) == 3  # two batches of the second block, one of the third
    torch.testing.assert_close(embedded.embeddings[:4], first.embeddings, rtol=0, atol=0)


def test_a_bar_is_told_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int | None]] = []
    bar = nullcontext(lambda done, total: told.append((done, total)))
    monkeypatch.setattr(cache, "progress_bar", lambda title: bar)
    images = noise(damaged=(5,))
    for expected in ([3, 4, 4, 7, 8, 8, 10, 10], [4, 8, 10]):  # the second time from the cache
        told.clear()
        image_embeddings(toy(), images, setting(tmp_path))
        assert told == [(done, 10) for done in expected]


def test_blocks_do_not_wait_in_memory_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    most_alive = 0

    def blocks(*given: object) -> Iterator[ImageEmbeddings]:
        nonlocal most_alive
        for block in image_blocks(*given):
            made.append(weakref.ref(block.features))
            most_alive = max(most_alive, sum(features() is not None for features in made))
            yield block
            del block

    monkeypatch.setattr(cache, "image_blocks", blocks)
    assert image_embeddings(toy(), noise(num_samples=20), setting(None)).features.shape == (20, 48)
    assert len(made) == 5
    assert most_alive <= 2  # the one before, and the one that takes its place


def test_a_damaged_block_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    expected = image_embeddings(model, noise(), setting(tmp_path))
    block = sorted(tmp_path.rglob("*.safetensors"))[1]
    block.write_bytes(block.read_bytes()[:-8])
    again = image_embeddings(model, noise(), setting(tmp_path))
    assert "is damaged" in caplog.text
    torch.testing.assert_close(again.embeddings, expected.embeddings, rtol=0, atol=0)


def test_what_cannot_be_read_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = noise(damaged=(1, 8))
    for _ in range(2):
        embedded = image_embeddings(toy(), images, setting(tmp_path))
        assert embedded.rows.tolist() == [0, 2, 3, 4, 5, 6, 7, 9]
        assert embedded.skipped == {"undecodable image": 2}
    assert "(undecodable image: 1)" in caplog.text


def test_a_block_may_have_nothing_that_can_be_read(tmp_path: Path) -> None:
    for _ in range(2):
        embedded = image_embeddings(toy(), noise(damaged=(8, 9)), setting(tmp_path))
        assert embedded.rows.tolist() == list(range(8))


def test_what_may_be_there_the_next_time_is_not_remembered_as_lost(tmp_path: Path) -> None:
    lost = noise(damaged=(5,), reason="unreadable file")
    assert len(image_embeddings(toy(), lost, setting(tmp_path)).rows) == 9
    found = image_embeddings(toy(), noise(), setting(tmp_path))
    assert len(found.rows) == 10
    assert found.skipped == {}


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    place = tmp_path / "a file"
    place.touch()
    with pytest.raises(
        UniclError, match=r"^cannot write .*; choose another place \(--cache DIR\), or"
    ):
        image_embeddings(toy(), noise(), setting(place))
    model = toy()
    image_embeddings(model, noise(), setting(tmp_path / "cache"))
    (entry,) = (tmp_path / "cache").iterdir()
    files = {path.name for path in entry.iterdir()}
    block = entry / "block-0000000004.safetensors"
    block.unlink()
    block.mkdir()
    with pytest.raises(UniclError, match=r"Is a directory; .* remember nothing \(--cache none\)$"):
        image_embeddings(model, noise(), setting(tmp_path / "cache"))
    assert {path.name for path in entry.iterdir()} == files


def test_a_complete_cache_need_not_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = image_embeddings(toy(), noise(), setting(tmp_path))
    monkeypatch.setattr(cache, "atomic_file", None)
    again = image_embeddings(toy(), noise(), setting(tmp_path))
    torch.testing.assert_close(again.embeddings, expected.embeddings, rtol=0, atol=0)


def test_nothing_to_embed() -> None:
    with pytest.raises(UniclError, match="noise has no sample that can be read"):
        image_embeddings(toy(), noise(num_samples=3, damaged=(0, 1, 2)), setting(None))


def test_texts_are_embedded_once(tmp_path: Path) -> None:
    model = toy()
    texts = ["cat", "dog", "cat", "moon"]
    expected = embed_texts(model.model, texts, model.tokenize)
    model.model.text_batches.clear()
    for _ in range(2):
        embedded = texts_embeddings(model, texts, setting(tmp_path))
        torch.testing.assert_close(embedded, expected)
    assert sum(len(batch) for batch in model.model.text_batches) == 3
    classes = class_embeddings(model.model, NAMES, TEMPLATES, model.tokenize)
    model.model.text_batches.clear()
    for _ in range(2):
        made = classifier(model, NAMES, TEMPLATES, setting(tmp_path))
        torch.testing.assert_close(made, classes)
    assert sum(len(b) for b in model.model.text_batches) == len(NAMES) * len(TEMPLATES)


def embed_on_ranks(folder: Path) -> None:
    cache._BLOCK = 4
    alone, shared = setting(None), setting(folder, ranks=Ranks(dist.group.WORLD))
    model, images = toy(), noise(damaged=(5,))
    for _ in range(2):
        embedded = image_embeddings(model, images, shared)
        expected = image_embeddings(model, images, alone)
        torch.testing.assert_close(embedded.embeddings, expected.embeddings)
        torch.testing.assert_close(embedded.features, expected.features)
        assert embedded.rows.tolist() == expected.rows.tolist()
        for names in (NAMES, NAMES[:2]):
            torch.testing.assert_close(
                classifier(model, names, TEMPLATES, shared),
                classifier(model, names, TEMPLATES, alone),
            )


def test_ranks_share_the_work_and_get_all_of_it(tmp_path: Path) -> None:
    on_ranks(3, embed_on_ranks, tmp_path)
    model = toy()
    forwards = count_forwards(model.model)
    image_embeddings(model, noise(damaged=(5,)), setting(tmp_path))
    assert not forwards
