"""What embed, index and search do around the index itself, with a toy for a model."""

import errno
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unicl.corpus import write_corpus
from tests.unicl.evaluation.toys import toy
from tests.unicl.ranks import on_ranks
from tests.unicl.search.vectors import unit
from unicl import searching
from unicl.cli import main
from unicl.data.image_sets import open_images
from unicl.distributed import Launch
from unicl.errors import UniclError, UsageError
from unicl.evaluator import Options
from unicl.models import load
from unicl.search import change
from unicl.search.collection import Collection
from unicl.search.index import SearchIndex
from unicl.search.items import Item
from unicl.searching import add_to_index, build_index, embed, search


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("unicl"), "propagate", True)  # the command line ends it
    caplog.set_level("INFO", "unicl")
    _load_by(monkeypatch, lambda name, device: toy())


def _load_by(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    monkeypatch.setattr(searching, "load", load)
    monkeypatch.setattr("unicl.models.load", load)


def embedded(data: str, out: str, **options: object) -> Collection:
    given = Options(out=Path(out), device="cpu", num_workers=0, **options)  # type: ignore[arg-type]
    written = embed("toy", data, given)
    assert written is not None
    return written


def keys(*folders: str) -> list[str]:
    opened = [Collection.open(Path(folder)) for folder in folders]
    return [item.key for each in opened for _, block in each.blocks() for item in block]


def pictures(folder: str, count: int = 3) -> None:
    Path(folder).mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{number}.png")


def test_the_parts_of_a_set_are_different_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, part in enumerate(("train", "test")):
        write_corpus(tmp_path / "shards" / part, num_samples=12, seed=seed)
        embedded("shards", part, split=part)
    assert len({*keys("train", "test")}) == 24
    assert build_index(Path("index"), [Path("train"), Path("test")]).num_items == 24
    assert "24 items in index: exact" in caplog.text


def test_what_embed_takes_of_a_set_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(tmp_path / "shards" / "val", num_samples=12)
    for _, block in embedded("shards", "val").blocks():
        assert all(json.loads(item.where)["split"] == "val" for item in block)
    assert "shards has no test part, its val is taken" in caplog.text
    pictures("photos")
    Path("photos/link.png").symlink_to("nowhere.png")
    embedded("photos", "embeddings")
    assert "3 embeddings of width 16 in embeddings, 1 left out: broken link" in caplog.text


def test_one_folder_by_two_paths_is_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for place in ("a", "b"):
        pictures(f"{tmp_path}/{place}/photos")
        monkeypatch.chdir(tmp_path / place)
        embedded("photos", "relative")
        embedded(str(tmp_path / place / "photos"), "absolute")
        assert keys("relative") == keys("absolute")
    monkeypatch.chdir(tmp_path)
    folders = [Path(place, how) for place in "ab" for how in ("relative", "absolute")]
    index = build_index(Path("index"), folders)
    assert (index.num_items, index.num_skipped) == (6, 6)
    assert "6 items in index, 6 were there twice" in caplog.text


def test_a_known_set_is_no_folder_of_that_name(tmp_path: Path) -> None:
    pictures("digits")
    place = json.loads(_first_item("digits").where)
    assert place["set"] == "digits"
    assert _first_item("digits").key.startswith("digits/test/")
    own = replace(open_images("digits", root=tmp_path), name="./digits")
    (item,) = searching._items(own, [0], Options())
    assert json.loads(item.where)["set"] == str(tmp_path / "digits")
    assert item.key.startswith(f"{tmp_path}/digits/test/")


def test_what_cannot_be_done_is_told_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _load_by(monkeypatch, None)
    with pytest.raises(UsageError, match="batch_size must be positive, got 0"):
        embedded("digits", "embeddings", batch_size=0)
    given = Options(out=Path("embeddings"), num_workers=-1)
    with pytest.raises(UsageError, match="num_workers must not be negative, got -1"):
        embed("toy", "digits", given)
    for name, value in Launch(0, 2, 0, "localhost", 1).environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--download is for one process, not 2"):
        embedded("cifar10", "embeddings", download=True)


def _first_item(data: str) -> Item:
    return searching._items(open_images(data, root=Path()), [0], Options())[0]


def test_a_query_image_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures("photos")
    embedded("photos", "embeddings")
    build_index(Path("index"), [Path("embeddings")])
    asked: list[str] = []
    read = searching.read_image
    monkeypatch.setattr(searching, "read_image", lambda place: asked.append(place) or read(place))
    answers = search("index", texts=["a cat"], images=["photos/1.png"], k=1, device="cpu").answers
    assert asked == ["photos/1.png"]
    assert [answer.image for answer in answers] == [None, Path("photos/1.png").read_bytes()]
    assert answers[1].found[0].item.key.endswith("/photos/1.png")
    with pytest.raises(UsageError, match="there is no image file missing"):
        search("index", images=["missing.png"])
    Path("half.png").write_bytes(Path("photos/1.png").read_bytes()[:100])
    with pytest.raises(UniclError, match=r"cannot read half\.png: "):
        search("index", images=["half.png"], device="cpu")


def test_an_index_is_not_replaced_unless_it_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = collection("embeddings", ["a cat"] * 5)
    build_index(Path("index"), [folder])
    with pytest.raises(UsageError, match=r"index holds .* 5 items already; .* remove it and build"):
        build_index(Path("index"), [folder])
    before = sorted(Path("index").rglob("*"))
    read = Path.open

    def stale(path: Path, mode: str = "r", *rest: object) -> object:
        if path.name == "index.faiss":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, mode, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", stale)
        with pytest.raises(UniclError, match=r"cannot read .*index.faiss: Stale file handle$"):
            build_index(Path("index"), [folder])
    assert sorted(Path("index").rglob("*")) == before
    next(Path("index").glob("data-*/items.jsonl")).unlink()
    with pytest.raises(UniclError, match="is missing; build the index again"):
        search("index", texts=["a cat"])
    assert build_index(Path("index"), [folder]).num_items == 5
    before = sorted(folder.iterdir())
    with pytest.raises(UsageError, match="embeddings is no index and not empty"):
        build_index(folder, [folder])
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_nothing_to_look_for(text: str) -> None:
    build_index(Path("index"), [collection("embeddings", ["a cat"])])
    with pytest.raises(UsageError, match="a text to look for is empty"):
        search("index", texts=["a dog", text])


def test_tables_show_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    pictures("photos/below")
    embedded("photos", "embeddings")
    build_index(Path("index"), [Path("embeddings")])
    searched = search("index", texts=["a cat"], k=1, device="cpu")
    (hit,) = json.loads(searching.to_json(searched))[0]["found"]
    assert hit["where"] == str(tmp_path / "photos" / hit["key"].split("/photos/")[1])
    for here, heading, shown in (
        (".", "image", hit["where"].removeprefix(f"{tmp_path}/")),
        ("index", f"image in {tmp_path}/photos/below", Path(hit["where"]).name),
    ):
        monkeypatch.chdir(tmp_path / here)
        searching.show(searched)
        table = capsys.readouterr().out
        assert [cell.strip() for cell in table.split("┃")[1:-1]] == ["similarity", heading]
        assert f"│ {shown} " in table


def collection(folder: str, texts: list[str], *, first: int = 0, **changed: str) -> Path:
    items = [Item(f"key{first + row}", "", text) for row, text in enumerate(texts)]
    names = {"model": "toy", "fingerprint": toy().fingerprint} | changed
    blocks = [(unit(len(items), seed=first), items)]
    return Collection.write(Path(folder), blocks, **names).folder


def test_recall_is_held_to_for_the_items_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = collection("embeddings", ["", "a cat", "a dog"] * 100)
    given = []
    build = SearchIndex.build
    monkeypatch.setattr(
        SearchIndex, "build", lambda *a, **k: given.append(k["texts"]) or build(*a, **k)
    )
    assert build_index(Path("approximate"), [folder], kind="approximate").facts.text_recall
    assert given[0].shape == (2, 16)
    assert build_index(Path("exact"), [folder]).facts.text_recall is None
    assert given[1] is None
    # An index that becomes approximate only by what is added.
    monkeypatch.setattr(change, "_EXACT_BYTES", 350 * 16 * 4)
    more = collection("more", ["a tree"] * 100, first=300)
    assert add_to_index(Path("exact"), [more]).facts.text_recall


def test_an_index_does_without_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = collection("embeddings", ["a cat"] * 50)
    other = collection("other", ["a cat"] * 50, fingerprint="of other weights")
    index = build_index(Path("of_other"), [other], kind="approximate")
    assert index.facts.text_recall is None
    assert "toy is not what it was" in caplog.text

    def gone(name: str, device: str) -> None:
        raise UniclError("there is no toy")

    _load_by(monkeypatch, gone)
    assert build_index(Path("index"), [folder], kind="approximate").facts.text_recall is None
    (said,) = [r.getMessage() for r in caplog.records if "there is no toy" in r.getMessage()]
    assert said.startswith("recall is measured for images only")


def test_an_index_finds_its_model_from_any_folder(tmp_path: Path) -> None:
    pictures("photos")
    Path("toy").mkdir()
    assert embedded("photos", "embeddings").model == str(tmp_path / "toy")


def test_a_model_that_has_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(Path("index"), [collection("embeddings", ["a cat"], model="runs/gone")])
    _load_by(monkeypatch, load)
    with pytest.raises(UsageError, match=r"no model runs/gone: .*; where the model of index has"):
        search("index", texts=["a cat"], device="cpu")
    with pytest.raises(UsageError, match=r"no model elsewhere: no such file or folder;"):
        search("index", texts=["a cat"], model="elsewhere", device="cpu")


@pytest.mark.parametrize("option", [("--kind", "exact"), ("--recall", "0.9")])
def test_add_keeps_the_settings(
    option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "more", "--out", "index", "--add", *option]) == 2
    assert f"error: {option[0]} is for a new index" in capsys.readouterr().err


def test_a_full_folder_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    pictures("photos")
    on_ranks(2, _embed_into_photos, tmp_path)


def _embed_into_photos(folder: Path) -> None:
    os.chdir(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # the ranks have met already
    with pytest.raises(UsageError, match="photos is not empty"):
        embed("no model", "photos", Options(out=Path("photos"), device="cpu"))
