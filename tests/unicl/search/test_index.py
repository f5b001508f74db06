import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unicl.search.vectors import MODEL, blocks, item, nearest, unit
from unicl.errors import UniclError, UsageError
from unicl.evaluation.retrieval import load_faiss
from unicl.search import change
from unicl.search.approximate import search_lists
from unicl.search.change import Added
from unicl.search.index import Found, SearchIndex


def keys(found: list[list[Found]]) -> list[list[str]]:
    return [[one.item.key for one in best] for best in found]


def recall_at_10(found: list[list[str]], truth: np.ndarray) -> float:
    return float(
        np.mean(
            [
                len({*best} & {f"key{row}" for row in rows}) / 10
                for best, rows in zip(found, truth, strict=True)
            ]
        )
    )


def state(folder: Path) -> dict[str, bytes]:
    """Every file of an index but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "index.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.mark.parametrize("num_items", [1, 3, 250])
def test_an_exact_index_agrees_with_brute_force(folder: Path, num_items: int) -> None:
    vectors, queries = unit(num_items), unit(7, seed=1)
    index = SearchIndex.build(folder, blocks(vectors), **MODEL)
    found = index.search(queries, 10)
    expected = nearest(queries, vectors, 10)
    assert keys(found) == [[f"key{row}" for row in rows] for rows in expected]
    similarities = [[one.similarity for one in best] for best in found]
    assert np.allclose(
        similarities, [vectors[rows] @ q for rows, q in zip(expected, queries, strict=True)]
    )
    assert found[0][0].item == item(int(expected[0][0]))
    assert (index.num_items, index.dim, index.kind) == (num_items, 16, "exact")
    assert (index.model, index.fingerprint) == ("cats-and-dogs", "1f2e")
    assert index.facts.recall == 1.0
    assert index.facts.summary().startswith("exact, ")


def test_an_approximate_index_measures_a_recall_that_holds_for_other_queries(folder: Path) -> None:
    vectors, queries = unit(6000), unit(500, seed=1)
    index = SearchIndex.build(folder, blocks(vectors), kind="approximate", recall=0.9, **MODEL)
    found = keys(index.search(queries, 10))
    truth = nearest(queries, vectors, 10)
    recall = recall_at_10(found, truth)
    assert recall == pytest.approx(index.facts.recall, abs=0.02)
    assert recall >= 0.9
    assert index.kind == "approximate"
    assert 1 < index.facts.num_probed < index.facts.num_lists == (6000 - 1000) // 39
    assert index.facts.num_learned_from == 6000
    # One list fewer would not have done.
    opened = index._state.index
    _, rows = search_lists(opened, queries, 10, index.facts.num_probed - 1)
    assert recall_at_10([[f"key{row}" for row in best] for best in rows], truth) < 0.93


def test_a_higher_recall_takes_more_lists(folder: Path) -> None:
    probed = []
    for recall in (0.5, 0.9, 0.99):
        index = SearchIndex.build(
            folder, blocks(unit(3000)), kind="approximate", recall=recall, **MODEL
        )
        assert index.facts.recall >= recall
        assert index.facts.reached
        probed.append(index.facts.num_probed)
    assert probed == sorted(set(probed))


def test_recall_is_held_to_for_texts_apart(folder: Path) -> None:
    # Texts lie apart from all images, so their nearest images are spread over many lists.
    vectors = unit(3000)
    generator = np.random.default_rng(5)
    texts = generator.standard_normal((200, 16)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    settings = {"kind": "approximate", "recall": 0.9, **MODEL}
    without = SearchIndex.build(folder, blocks(vectors), **settings).facts
    facts = SearchIndex.build(folder, blocks(vectors), texts=texts, **settings).facts
    assert without.text_recall is None
    assert facts.text_recall >= 0.9
    assert facts.num_probed > without.num_probed
    assert "for texts" in facts.summary()


def test_a_recall_that_is_not_reached_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half precision finds nearly everything, so something else has to lose every fifth item.
    monkeypatch.setattr(
        "unicl.search.approximate._recalls",
        lambda index, sample, num_probed: np.full(len(sample.queries), 0.8),
    )
    index = SearchIndex.build(folder, blocks(unit(500)), kind="approximate", **MODEL)
    assert index.facts.recall == pytest.approx(0.8)
    assert index.facts.num_probed == index.facts.num_lists
    assert not index.facts.reached
    assert "no number of lists reaches the wanted 0.95" in index.facts.summary()


def test_equal_images_do_not_spoil_the_measure(folder: Path) -> None:
    # Each vector thirty times: any ten of them are right.
    vectors = np.repeat(unit(100), 30, axis=0)
    index = SearchIndex.build(folder, blocks(vectors), kind="approximate", **MODEL)
    assert index.facts.recall > 0.99
    assert index.facts.num_probed < 4


@pytest.mark.parametrize("num_items", [1, 10, 80])
def test_a_small_approximate_index(folder: Path, num_items: int) -> None:
    vectors = unit(num_items)
    index = SearchIndex.build(folder, blocks(vectors), kind="approximate", recall=1.0, **MODEL)
    assert index.facts.recall == 1.0
    found = [[one.similarity for one in best] for best in index.search(vectors, 10)]
    truth = np.take_along_axis(vectors @ vectors.T, nearest(vectors, vectors, 10), axis=1)
    assert np.allclose(found, truth, atol=1e-3)  # of half precision


def test_auto_is_exact_until_that_gets_slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change, "_EXACT_BYTES", 400 * 16 * 4)
    vectors = unit(500)
    assert SearchIndex.build(folder, blocks(vectors[:400]), **MODEL).kind == "exact"
    assert SearchIndex.build(folder, blocks(vectors), **MODEL).kind == "approximate"
    assert SearchIndex.build(folder, blocks(vectors), kind="exact", **MODEL).kind == "exact"


def test_adding_to_an_exact_index_is_building_it_at_once(tmp_path: Path) -> None:
    vectors = unit(300)
    whole = SearchIndex.build(tmp_path / "whole", blocks(vectors), **MODEL)
    grown = SearchIndex.build(tmp_path / "grown", blocks(vectors[:120]), **MODEL)
    assert grown.add(blocks(vectors[:200], 120), **MODEL) == Added(80, 0)
    assert grown.add(blocks(vectors, 200), **MODEL) == Added(100, 0)
    for index in (grown, SearchIndex.open(tmp_path / "grown")):
        assert index.num_items == 300
        assert index.search(vectors[:20], 300) == whole.search(vectors[:20], 300)
    (data,) = (tmp_path / "grown").glob("data-*")  # former data is gone
    (other,) = (tmp_path / "whole").glob("data-*")
    assert (data / "index.faiss").read_bytes() == (other / "index.faiss").read_bytes()
    assert (data / "items.jsonl").read_bytes() == (other / "items.jsonl").read_bytes()


def test_adding_to_an_approximate_index(folder: Path) -> None:
    vectors, queries = unit(4000), unit(300, seed=1)
    settings = {"kind": "approximate", "recall": 0.9, **MODEL}
    index = SearchIndex.build(folder, blocks(vectors[:2500]), **settings)
    assert index.add(blocks(vectors, 2500), **MODEL) == Added(1500, 0)
    facts = SearchIndex.open(folder).facts
    assert facts == index.facts
    assert (index.num_items, facts.num_learned_from) == (4000, 2500)
    assert facts.reached
    # Its measure knows the newcomers: it holds for all items together.
    truth = nearest(queries, vectors, 10)
    found = keys(index.search(queries, 10))
    recall = recall_at_10(found, truth)
    assert recall == pytest.approx(facts.recall, abs=0.02)
    # Looking at everything finds the same as brute force.
    assert [{*best} for best in keys(index.search(queries[:5], 4000))] == [
        {f"key{row}" for row in range(4000)}
    ] * 5


def test_an_index_that_chose_to_be_exact_chooses_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change, "_EXACT_BYTES", 400 * 16 * 4)
    vectors = unit(500)
    index = SearchIndex.build(folder, blocks(vectors[:300]), **MODEL)
    index.add(blocks(vectors, 300), **MODEL)
    assert (index.kind, index.num_items) == ("approximate", 500)
    assert keys(index.search(vectors[:10], 1)) == [[f"key{row}"] for row in range(10)]


@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_a_key_is_taken_once(folder: Path, kind: str) -> None:
    vectors = unit(200)
    twice = [*blocks(vectors[:100]), *blocks(-vectors[:100])]
    index = SearchIndex.build(folder, twice, kind=kind, **MODEL)
    assert index.num_skipped == 100
    assert index.num_items == 100
    assert index.add(blocks(vectors), **MODEL) == Added(100, 100)
    before = state(folder)
    assert index.add(blocks(vectors), **MODEL) == Added(0, 200)
    if kind == "approximate":
        assert state(folder) == before
    assert keys(index.search(vectors[:3], 1)) == [["key0"], ["key1"], ["key2"]]


@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_more_than_there_is(folder: Path, kind: str) -> None:
    vectors = unit(120)
    index = SearchIndex.build(folder, blocks(vectors), kind=kind, recall=0.5, **MODEL)
    for k in (100, 120, 1000):
        found = index.search(vectors[:4], k)
        assert [len(best) for best in found] == [min(k, 120)] * 4
        assert found[0][0].item.key == "key0"
        for best in found:
            similarities = [one.similarity for one in best]
            assert similarities == sorted(similarities, reverse=True)
            assert len({one.item.key for one in best}) == len(best)


def test_no_queries(folder: Path) -> None:
    index = SearchIndex.build(folder, blocks(unit(20)), **MODEL)
    assert index.search(np.empty((0, 16), np.float32)) == []


def interrupted(vectors: np.ndarray, error: BaseException) -> Iterator:
    yield from blocks(vectors)
    raise error


@pytest.mark.parametrize("kind", ["exact", "approximate"])
@pytest.mark.parametrize("error", [OSError(5, "lost"), KeyboardInterrupt()])
def test_a_failed_change_leaves_the_former_index(
    folder: Path, kind: str, error: BaseException
) -> None:
    vectors = unit(300)
    index = SearchIndex.build(folder, blocks(vectors[:200]), kind=kind, **MODEL)
    before = state(folder)
    with pytest.raises(type(error)):
        index.add(interrupted(vectors, error), **MODEL)
    assert state(folder) == before
    with pytest.raises(type(error)):
        SearchIndex.build(folder, interrupted(vectors, error), kind=kind, **MODEL)
    assert state(folder) == before
    assert index.num_items == 200
    assert index.add(blocks(vectors), **MODEL) == Added(100, 200)


@pytest.mark.parametrize(("cut", "first"), [("write", True), ("commit", False)])
def test_a_killed_change_leaves_the_former_index(folder: Path, cut: str, first: bool) -> None:
    vectors = unit(60)
    if not first:
        SearchIndex.build(folder, blocks(vectors[:40]), **MODEL)
    before = state(folder)
    code = f"""
import os, signal
from unicl.search import change
from unicl.search.index import SearchIndex
from tests.unicl.search.vectors import MODEL, blocks, unit
def die(*arguments): os.kill(os.getpid(), signal.SIGKILL)
if {cut!r} == "write": change._write = die
else: change.Draft.commit = die
SearchIndex.build({str(folder)!r}, blocks(unit(60)), **MODEL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -9
    after = state(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)  # what was cut short lies beside it ...
    assert SearchIndex.build(folder, blocks(vectors), **MODEL).num_items == 60
    assert len(list(folder.glob("data-*"))) == 1  # ... until the next change


def test_only_one_process_changes_an_index(folder: Path) -> None:
    vectors = unit(60)
    index = SearchIndex.build(folder, blocks(vectors[:40]), **MODEL)

    def meanwhile() -> Iterator:
        with pytest.raises(UniclError, match="another process is changing the index"):
            SearchIndex.open(folder).add(blocks(vectors), **MODEL)
        yield from blocks(vectors)

    assert index.add(meanwhile(), **MODEL) == Added(20, 40)


def test_an_open_index_stays_what_it_is_while_others_add(folder: Path) -> None:
    vectors = unit(60)
    index = SearchIndex.build(folder, blocks(vectors[:40]), **MODEL)
    reader = SearchIndex.open(folder)
    index.add(blocks(vectors), **MODEL)
    assert reader.num_items == 40
    assert len(reader.search(vectors[:1], 100)[0]) == 40
    assert len(index.search(vectors[:1], 100)[0]) == 60
    # And adds to what the folder holds by now, not to what it saw.
    more = unit(80)
    assert reader.add(blocks(more, 50), **MODEL) == Added(20, 10)
    assert reader.num_items == 80


def test_threads_search_at_the_same_time(folder: Path) -> None:
    vectors = unit(2000)
    index = SearchIndex.build(folder, blocks(vectors), kind="approximate", **MODEL)
    expected = [index.search(vectors[start : start + 50], 5) for start in range(0, 200, 50)]
    found: dict[int, list] = {}

    def ask(number: int) -> None:
        for _ in range(5):
            found[number] = index.search(vectors[50 * number : 50 * number + 50], 5)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_opening_and_searching_maps_the_files(folder: Path, kind: str) -> None:
    vectors = unit(20_000, 256)
    index = SearchIndex.build(folder, blocks(vectors, size=5000), kind=kind, **MODEL)
    index.search(vectors[:1])  # what is made once, such as threads, is there now
    before = anonymous_memory()
    index = SearchIndex.open(folder)
    index.search(vectors[:1])
    taken = anonymous_memory() - before
    size = (folder / "data-1" / "index.faiss").stat().st_size
    assert size > 9e6
    assert taken < size / 4


def anonymous_memory() -> int:
    """Bytes that this process holds and that no file holds for it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_gpus_are_used_where_there_are_some(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss, carried = load_faiss(), []

    def carry(index: Any) -> Any:
        carried.append(type(index))
        return index

    # A machine with a GPU runs the real thing in the tests above.
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", carry, raising=False)
    vectors = unit(500)
    index = SearchIndex.build(folder, blocks(vectors), kind="exact", **MODEL)
    index.search(vectors[:1], 5)
    assert carried == []
    found = index.search(vectors[:100], 5)
    assert carried == [faiss.IndexFlatIP]
    monkeypatch.undo()
    assert found == SearchIndex.open(folder).search(vectors[:100], 5)


# What a person can get wrong.


def test_another_model_is_refused(folder: Path) -> None:
    index = SearchIndex.build(folder, blocks(unit(20)), **MODEL)
    before = state(folder)
    with pytest.raises(
        UsageError, match=r"made with cats-and-dogs .*1f2e.*, not with birds .*9a9a"
    ):
        index.add(blocks(unit(30)), model="birds", fingerprint="9a9a")
    assert state(folder) == before


def test_another_width_is_refused(folder: Path) -> None:
    index = SearchIndex.build(folder, blocks(unit(20)), **MODEL)
    before = state(folder)
    with pytest.raises(UsageError, match="are 8 wide, the index is 16 wide"):
        index.add(blocks(unit(30, 8)), **MODEL)
    assert state(folder) == before
    with pytest.raises(UsageError, match="the queries are 8 wide, the index is 16 wide"):
        index.search(unit(1, 8))
    with pytest.raises(UsageError, match="are 8 wide, the index is 16 wide"):
        SearchIndex.build(folder, [*blocks(unit(10)), *blocks(unit(10, 8))], **MODEL)
    with pytest.raises(UsageError, match="the texts' embeddings are 8 wide"):
        SearchIndex.build(folder, blocks(unit(10)), texts=unit(3, 8), **MODEL)
    assert state(folder) == before


@pytest.mark.parametrize("wrong", [2 * unit(5), np.full((5, 16), np.nan, np.float32)])
def test_vectors_that_are_not_of_unit_length_are_refused(folder: Path, wrong: np.ndarray) -> None:
    with pytest.raises(UsageError, match="the embeddings must be of unit length: row 0 has"):
        SearchIndex.build(folder, blocks(wrong), **MODEL)
    index = SearchIndex.build(folder, blocks(unit(20)), **MODEL)
    with pytest.raises(UsageError, match="the queries must be of unit length"):
        index.search(wrong)


@pytest.mark.parametrize("nothing", [[], [(np.empty((0, 16), np.float32), [])]])
def test_an_empty_set_is_refused(folder: Path, nothing: list) -> None:
    with pytest.raises(UsageError, match="no embeddings to make an index of"):
        SearchIndex.build(folder, nothing, **MODEL)
    with pytest.raises(UsageError, match="holds no index"):
        SearchIndex.open(folder)


def test_impossible_settings(folder: Path) -> None:
    with pytest.raises(UsageError, match="no kind of index 'fast'; choose from auto, exact"):
        SearchIndex.build(folder, blocks(unit(20)), kind="fast", **MODEL)
    with pytest.raises(UsageError, match="recall must be above 0 and at most 1, got 95"):
        SearchIndex.build(folder, blocks(unit(20)), recall=95.0, **MODEL)
    with pytest.raises(UsageError, match="5 embeddings and 4 items"):
        SearchIndex.build(folder, [(unit(5), [item(row) for row in range(4)])], **MODEL)
    index = SearchIndex.build(folder, blocks(unit(20)), **MODEL)
    with pytest.raises(UsageError, match="k of at least 1, got 0"):
        index.search(unit(1), 0)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("not to be mixed with an index")
    with pytest.raises(UsageError, match=r"is no index and not empty \(there is thesis.tex\)"):
        SearchIndex.build(tmp_path, blocks(unit(20)), **MODEL)
    with pytest.raises(UniclError, match=r"thesis\.tex"):
        SearchIndex.build(tmp_path / "thesis.tex", blocks(unit(20)), **MODEL)
    with pytest.raises(UsageError, match="holds no index"):
        SearchIndex.open(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"version": 1}', '{"version": 1, "facts": {"milliseconds": 1}}']
)
def test_a_damaged_description(folder: Path, text: str) -> None:
    SearchIndex.build(folder, blocks(unit(20)), **MODEL)
    (folder / "index.json").write_text(text)
    with pytest.raises(UniclError, match=r"index\.json is damaged; build the index again"):
        SearchIndex.open(folder)
    assert SearchIndex.build(folder, blocks(unit(20)), **MODEL).num_items == 20  # the way out


def test_a_description_of_another_version(folder: Path) -> None:
    SearchIndex.build(folder, blocks(unit(20)), **MODEL)
    description = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**description, "version": 2}))
    with pytest.raises(UniclError, match="is of another version of unicl"):
        SearchIndex.open(folder)


def test_a_failed_build_keeps_the_index_of_another_version(folder: Path) -> None:
    SearchIndex.build(folder, blocks(unit(20)), **MODEL)
    description = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**description, "version": 2}))
    before = state(folder)
    with pytest.raises(UsageError, match="no embeddings"):
        SearchIndex.build(folder, [], **MODEL)
    assert state(folder) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": "../../elsewhere"},
        {"sizes": {"index.faiss": "many"}},
        {"sizes": {}},
        {"kind": "fast"},
        {"num_items": None},
        {"colour": "red"},
    ],
)
def test_a_description_that_is_none(folder: Path, wrong: dict) -> None:
    SearchIndex.build(folder, blocks(unit(20)), **MODEL)
    description = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**description, **wrong}))
    with pytest.raises(UniclError, match=r"index\.json is damaged; build the index again"):
        SearchIndex.open(folder)


@pytest.mark.parametrize("name", ["index.faiss", "items.jsonl", "items.npy", "sample.npz"])
@pytest.mark.parametrize("harm", ["cut", "gone", "overwritten"])
def test_damaged_data(folder: Path, name: str, harm: str) -> None:
    SearchIndex.build(folder, blocks(unit(100)), kind="approximate", **MODEL)
    path = folder / "data-1" / name
    data = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(data[:-1])
    elif harm == "overwritten":
        path.write_bytes(b"?" * len(data))
    with pytest.raises(UniclError, match=r"damaged|build the index again"):
        use(folder)


def use(folder: Path) -> None:
    index = SearchIndex.open(folder)
    index.search(unit(1))
    index.add(blocks(unit(200)), **MODEL)
