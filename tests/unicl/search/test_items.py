from pathlib import Path

import numpy as np
import pytest

from tests.unicl.search.vectors import item
from unicl.errors import UniclError
from unicl.search.items import Item, Items, ItemWriter


def write(folder: Path, items: list[Item], former: Path | None = None) -> Items:
    folder.mkdir()
    with ItemWriter(folder, former) as writer:
        for start in range(0, len(items), 3):
            writer.write(items[start : start + 3])
    return Items.open(folder)


def test_items_come_back_as_they_were(tmp_path: Path) -> None:
    # An empty text, a line break, letters beyond ASCII, and a path whose bytes are no UTF-8.
    written = [
        Item("a", "b.jpg", ""),
        Item("", "", "two\nlines"),
        Item("ключ", "写真/猫.jpg", "\U0001f431"),
        Item("z", "bad\udcff.jpg", '"quoted"'),
    ]
    items = write(tmp_path / "items", written)
    assert len(items) == 4
    assert list(items) == written
    assert items[3] == written[3]


def test_items_are_appended_to_former_ones(tmp_path: Path) -> None:
    numbered = [item(number) for number in range(10)]
    write(tmp_path / "former", numbered[:4])
    items = write(tmp_path / "items", numbered[4:], tmp_path / "former")
    assert list(items) == numbered
    assert list(Items.open(tmp_path / "former")) == numbered[:4]


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there(tmp_path: Path, row: int) -> None:
    items = write(tmp_path / "items", [item(0), item(1)])
    with pytest.raises(IndexError, match="of 2"):
        items[row]


def test_damaged_items(tmp_path: Path) -> None:
    write(tmp_path / "items", [item(0), item(1)])
    lines = tmp_path / "items" / "items.jsonl"
    data = lines.read_bytes()
    lines.write_bytes(b"[" + data[1:].replace(b"]", b"?"))
    with pytest.raises(UniclError, match="item 1 is damaged"):
        Items.open(tmp_path / "items")[1]
    lines.write_bytes(data[:-1])
    with pytest.raises(UniclError, match="are damaged; build the index again"):
        Items.open(tmp_path / "items")
    np.save(tmp_path / "items" / "items.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UniclError, match="are damaged; build the index again"):
        Items.open(tmp_path / "items")
