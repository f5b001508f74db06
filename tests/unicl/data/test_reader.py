import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unicl.data.test_loader import folder_of, good, make_loader, picture, tokenize
from unicl.data import reader as reader_module
from unicl.data.augment import EvalTransform
from unicl.data.prompts import PromptSampler
from unicl.data.reader import ImageDecoder, samples_at_once


def test_a_reader_can_be_sent_to_a_fresh_process(tmp_path):
    reader = make_loader(folder_of(tmp_path, good(range(30))))._reader
    piece = pickle.loads(pickle.dumps(reader))[5, 20]
    assert torch.equal(piece.images, reader[5, 20].images)
    np.testing.assert_array_equal(piece.labels, reader[5, 20].labels)


def test_pillows_own_limit_does_not_matter_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    members = [("a.png", picture(1, 90, 90)), ("a.txt", b"t"), *good(range(3))]
    loader = make_loader(folder_of(tmp_path, members), max_image_pixels=9000)
    assert len(next(loader.epoch())) == 4
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_pillows_warnings_stay_inside(tmp_path):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\xff\xff\0\x01\0\0\0\0"
    file = BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", exif=exif)
    with pytest.warns(UserWarning, match="Tag data|EXIF"):
        Image.open(BytesIO(file.getvalue())).getexif()
    members = [("a.jpg", file.getvalue()), ("a.txt", b"t"), *good(range(3))]
    assert len(next(make_loader(folder_of(tmp_path, members)).epoch())) == 4


def test_each_text_is_tokenized_once(tmp_path, monkeypatch):
    seen = []

    def count(texts):
        seen.extend(texts)
        return tokenize(texts)

    members = [
        m for n in range(12) for m in ((f"k{n}.png", picture(n)), (f"k{n}.txt", b"ab"[: n % 3]))
    ]
    shards = folder_of(tmp_path, members)
    none = PromptSampler("none", short_text_words=0, seed=0)
    reader = make_loader(shards, tokenize=count, prompts=none)._reader
    pieces = [reader[0, 12], reader[12, 12]]
    assert sorted(seen) == ["", "a", "ab"]
    for piece in pieces:
        np.testing.assert_array_equal(piece.tokens, tokenize(piece.texts))
    monkeypatch.setattr(reader_module, "_CACHED_TEXTS", 2)
    np.testing.assert_array_equal(reader[0, 12].tokens, pieces[0].tokens)
    assert len(seen) == 6


class Clips:
    """Decodes into clips or views of a shape."""

    def __init__(self, *shape):
        self.shape = shape

    def __call__(self, encoded, seed):
        return torch.zeros(self.shape, dtype=torch.uint8)

    def empty(self):
        return torch.empty(0, *self.shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 8, 8), 256),
        ((3, 8, 32, 32), 32),
        ((12, 3, 32, 32), 21),
        ((4, 3, 16, 32, 32), 4),
        ((12, 3, 32, 8, 8), 1),
    ],
)
def test_a_batch_counts_frames(shape, expected):
    assert samples_at_once(Clips(*shape), 256) == expected


def test_a_batch_of_images_has_as_many():
    decode = ImageDecoder(EvalTransform(8), 10_000)
    assert decode.empty().shape == (0, 3, 8, 8)
    assert samples_at_once(decode, 5) == 5
