from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unicl.evaluation.toys import CONTEXT, NAMES, ToyModel, tokenize, toy
from unicl.errors import UniclError, UsageError
from unicl.predictor import _IMAGES, ImageInput, Predictor, _listed, _require_count


def predictor(batch_size: int = 64) -> Predictor:
    return Predictor(toy(), batch_size=batch_size)


def noise(seed: int, *shape: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()


def test_a_path_a_picture_and_an_array_are_the_same(tmp_path: Path) -> None:
    pixels = noise(0, 6, 8, 3)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    inputs: list[ImageInput] = [path, str(path), Image.open(path), pixels]
    embeddings = predictor().embed_images(inputs)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(embeddings, embeddings[:1].repeat(4, axis=0))


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 3), (5, 5, 4)])
def test_grey_and_transparent_arrays(shape: tuple[int, ...]) -> None:
    assert predictor().embed_images([noise(1, *shape)]).shape == (1, 16)


def test_batches_do_not_show() -> None:
    images = [noise(seed, 6, 6, 3) for seed in range(5)]
    np.testing.assert_allclose(
        predictor(2).embed_images(images), predictor().embed_images(images), rtol=1e-5, atol=1e-6
    )


def test_texts_are_embedded_as_they_are() -> None:
    embeddings = predictor(2).embed_texts(NAMES)
    expected = ToyModel().eval().encode_text(tokenize(NAMES)).detach().numpy()
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5, atol=1e-6)


def test_classification_is_a_softmax_over_the_names() -> None:
    images = [noise(seed, 6, 6, 3) for seed in range(3)]
    found = predictor().classify(images, NAMES, templates=("{}",), top_k=6)
    similarities = predictor().embed_images(images) @ predictor().embed_texts(NAMES).T
    expected = torch.from_numpy(10 * similarities).softmax(dim=1).numpy()
    for guesses, shares in zip(found, expected, strict=True):
        assert sum(share for _, share in guesses) == pytest.approx(1, abs=1e-5)
        assert [share for _, share in guesses] == pytest.approx(sorted(shares)[::-1], abs=1e-5)
        assert guesses[0][0] == NAMES[int(shares.argmax())]


def test_no_more_guesses_than_names() -> None:
    found = predictor().classify([noise(0, 4, 4, 3)], ["cat", "dog"], top_k=5)
    assert {name for name, _ in found[0]} == {"cat", "dog"}
    assert len(predictor().classify([noise(0, 4, 4, 3)], NAMES)[0]) == 5


def test_the_model_is_left_as_it_was() -> None:
    used = predictor()
    used.model.train()
    used.embed_images([noise(0, 4, 4, 3)])
    used.embed_texts(["cat"])
    assert used.model.training


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no image file .*cat\.jpg"):
        predictor().embed_images([tmp_path / "cat.jpg"])


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n torn"])
def test_an_undecodable_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(data)
    with pytest.raises(UniclError, match=r"cannot read .*cat\.png: ") as error:
        predictor().embed_images([path])
    assert "\n" not in str(error.value)
    assert "BytesIO" not in str(error.value)
    assert error.value.exit_code == 1


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    Image.fromarray(noise(0, 64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(UniclError, match=r"cannot read .*cat\.png: "):
        predictor().embed_images([path])


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(UniclError, match="cannot read"):
        predictor().embed_images([tmp_path])


def test_an_array_that_is_no_image() -> None:
    with pytest.raises(UsageError, match=r"image 1: .* got uint8 of shape \[4, 4, 2\]"):
        predictor(1).embed_images([noise(0, 4, 4, 3), noise(0, 4, 4, 2)])


ONE_IMAGE = noise(0, 4, 4, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is empty"),
        ("cat.jpg", "one str: put it in brackets"),
        (b"\x89PNG", "one bytes: put it in brackets"),
        (Path("cat.jpg"), "one PosixPath: put it in brackets"),
        (ONE_IMAGE, "one ndarray: put it in brackets"),
        (ONE_IMAGE[0], "one ndarray: put it in brackets"),
        (np.array(3), "must be a list, got ndarray"),
        (Image.fromarray(ONE_IMAGE), "one Image: put it in brackets"),
        (None, "must be a list, got NoneType"),
        (3, "must be a list, got int"),
        ({"cat.jpg"}, "must be a list, got set"),
        ((path for path in ["cat.jpg"]), "must be a list, got generator"),
        ([ONE_IMAGE, None], r"images\[1\] must be a path, .* got NoneType"),
        ([torch.zeros(3, 4, 4)], r"images\[0\] must be .* got Tensor"),
    ],
)
def test_what_is_no_list_of_images(images: object, message: str) -> None:
    # Called alone, for the suite's type checks would refuse these earlier, with other words.
    with pytest.raises(UsageError, match=message):
        _listed(images, "images", _IMAGES, "a path, a PIL image or an array")


def test_an_empty_picture() -> None:
    with pytest.raises(UsageError, match=r"image 0: .* got uint8 of shape \[0, 4, 3\]"):
        predictor().embed_images([noise(0, 0, 4, 3)])
    with pytest.raises(UsageError, match="image 0: an image needs pixels, got 0 x 5"):
        predictor().embed_images([Image.new("RGB", (0, 5))])


def test_an_array_of_images_is_a_list_of_them() -> None:
    images = noise(0, 3, 4, 4, 3)
    listed = predictor().embed_images(list(images))
    np.testing.assert_array_equal(predictor().embed_images(images), listed)
    assert predictor().embed_images(noise(0, 3, 5, 5)).shape == (3, 16)
    assert _listed(np.array(["cat", "dog"]), "names", (str,), "a text") == ["cat", "dog"]
    _require_count(np.int64(3), "top_k")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat", "names must be a list, got one str"),
        ({"cat": 1}, "names must be a list, got dict"),
        (None, "names must be a list, got NoneType"),
        (["cat", 2], r"names\[1\] must be a text, got int"),
    ],
)
def test_what_is_no_list_of_names(names: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _listed(names, "names", (str,), "a text")


@pytest.mark.parametrize("template", ["no", "{0}", "{x} {}", "{", "{} {}", ""])
def test_a_template_has_one_place_for_the_name(template: str) -> None:
    with pytest.raises(UsageError, match=r"template .* must have \{\} once"):
        predictor().classify([ONE_IMAGE], ["cat"], templates=[template])


@pytest.mark.parametrize("top_k", [0, -1, 1.5, None, True, np.int64(0)])
def test_top_k_is_a_positive_number(top_k: object) -> None:
    with pytest.raises(UsageError, match="top_k must be a positive whole number"):
        _require_count(top_k, "top_k")


def test_names_and_templates_that_cannot_be_used() -> None:
    image = noise(0, 4, 4, 3)
    with pytest.raises(UsageError, match="'cat' occurs twice"):
        predictor().classify([image], ["cat", "cat"])
    with pytest.raises(UsageError, match=r"no templates 'klip': choose from .*clip"):
        predictor().classify([image], ["cat"], templates="klip")
    with pytest.raises(UsageError, match="names is empty"):
        predictor().classify([image], [])
    with pytest.raises(UsageError, match="batch_size"):
        predictor(0)


def test_loading_takes_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("unicl.models.load", lambda name, device: (asked.append(name), toy())[1])
    loaded = Predictor.load("runs/demo", device="cpu", batch_size=3)
    assert asked == ["runs/demo"]
    assert loaded.tokenize(["cat"]).shape == (1, CONTEXT)
    assert loaded.embed_images([noise(0, 9, 9, 3)]).shape == (1, 16)
    assert loaded.batch_size == 3
    assert repr(loaded) == "<Predictor of toy on cpu>"


def test_a_url_is_fetched(tmp_path: Path) -> None:
    path = tmp_path / "an image.png"
    Image.fromarray(noise(0, 6, 8, 3)).save(path)
    by_url, by_path = predictor().embed_images([path.as_uri(), path])
    np.testing.assert_array_equal(by_url, by_path)


@pytest.mark.parametrize(
    "place",
    ["file:///nowhere/image.png", "http://127.0.0.1:1/image.png", "http://127.0.0.1:1/my cat.png"],
)
def test_a_url_that_leads_nowhere(place: str) -> None:
    with pytest.raises(UniclError, match=f"cannot read {place}: "):
        predictor().embed_images([place])


def test_a_url_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise IncompleteRead(b"half", 4)

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Answer())
    with pytest.raises(UniclError, match=r"cannot read http://h/cat\.png: IncompleteRead"):
        predictor().embed_images(["http://h/cat.png"])


def test_a_picture_is_called_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    Image.fromarray(noise(0, 60, 80, 3)).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UniclError, match=r"cannot read .*half\.png: "), Image.open(path) as picture:
        predictor().embed_images([picture])


def test_half_precision_is_asked_for_by_name() -> None:
    model = ToyModel()
    embeddings = Predictor(toy(model), precision="bf16").embed_images([noise(0, 9, 9, 3)])
    assert model.autocast == [True]
    assert embeddings.dtype == np.float32
    with pytest.raises(UsageError, match="precision must be one of fp32, bf16, fp16, got 'int8'"):
        Predictor(toy(), precision="int8")


def test_threads_share_a_predictor() -> None:
    shared = predictor(2)
    images = [noise(seed, 6, 6, 3) for seed in range(8)]
    expected = shared.classify(images, NAMES)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(shared.classify, images, NAMES) for _ in range(8)]
        assert all(found.result() == expected for found in asked)


def test_a_classifier_is_made_once() -> None:
    model = ToyModel()
    asked = Predictor(toy(model))
    for _ in range(3):
        asked.classify([noise(0, 6, 6, 3)], NAMES)
    assert len(model.text_batches) == 1
