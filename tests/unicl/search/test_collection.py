import json
from pathlib import Path

import numpy as np
import pytest

from tests.unicl.search.vectors import MODEL, blocks, item, unit
from unicl.errors import UniclError, UsageError
from unicl.search.collection import Collection
from unicl.search.index import SearchIndex

EMPTY = (np.zeros((0, 16), np.float32), [])


def test_blocks_of_nothing_are_passed_over(tmp_path: Path) -> None:
    vectors = unit(250)
    given = [EMPTY, *blocks(vectors), EMPTY]
    written = Collection.write(tmp_path / "embeddings", given, **MODEL)
    np.testing.assert_array_equal(np.load(written.folder / "embeddings.npy"), vectors)
    (read,) = written.blocks()
    np.testing.assert_array_equal(read[0], vectors)
    assert read[1] == [item(number) for number in range(250)]
    assert SearchIndex.build(tmp_path / "index", given, **MODEL).num_items == 250
    with pytest.raises(UsageError, match="there is nothing to embed"):
        Collection.write(tmp_path / "nothing", [EMPTY], **MODEL)


@pytest.mark.parametrize("damage", ["cut", "no JSON", "a number", "another field"])
def test_damaged_items_are_one_line(tmp_path: Path, damage: str) -> None:
    written = Collection.write(tmp_path / "embeddings", blocks(unit(5)), **MODEL)
    path = written.folder / "items.jsonl"
    first, *others = path.read_text().splitlines()
    lines = {
        "cut": others,
        "no JSON": [first[1:], *others],
        "a number": ["1", *others],
        "another field": [json.dumps({"key": "a", "wher": "b", "text": "c"}), *others],
    }
    path.write_text("\n".join(lines[damage]))
    with pytest.raises(UniclError, match=r"items\.jsonl is damaged; embed the images again"):
        list(written.blocks())
    path.unlink()
    with pytest.raises(UniclError, match=r"cannot read .*: No such file"):
        list(written.blocks())
