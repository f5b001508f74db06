import os
from pathlib import Path

import pytest

from unicl.errors import UniclError, UsageError
from unicl.search.folder import Facts, Output, drafting


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("size", [10, 1 << 20])  # less and more than a buffer
def test_a_full_disk_is_one_line(size: int) -> None:
    with (
        pytest.raises(UniclError, match="cannot write /dev/full: No space left"),
        Output(Path("/dev/full")) as output,
    ):
        output.write(b"x" * size)


def test_an_error_of_the_block_comes_first() -> None:
    with pytest.raises(ZeroDivisionError), Output(Path(os.devnull)) as output:
        output.write(bytes(1 // 0))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UniclError, match="cannot write"), drafting(tmp_path / "file" / "index"):
        pass


def test_a_draft_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with drafting(tmp_path) as draft:
        (draft.path / "something").write_text("lost")
        assert list(tmp_path.glob("data-*")) == [draft.path]
    assert not list(tmp_path.glob("data-*"))


@pytest.mark.parametrize(
    ("recall", "text_recall", "reached"),
    [(0.96, None, True), (0.94, None, False), (0.96, 0.94, False), (0.96, 0.0, False)],
)
def test_every_recall_has_to_be_reached(
    recall: float, text_recall: float | None, reached: bool
) -> None:
    facts = Facts(
        milliseconds=1.0,
        recall=recall,
        text_recall=text_recall,
        wanted_recall=0.95,
        num_lists=10,
        num_probed=10,
    )
    assert facts.reached == reached
    assert ("no number of lists" in facts.summary()) != reached


def test_folders_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    for name in ("data-1", "data-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text("dear")
    error = r"no index and not empty \(there is data-1\)"
    with pytest.raises(UsageError, match=error), drafting(tmp_path):
        pass
    assert len(list(tmp_path.glob("data-*/results.csv"))) == 2
    assert not (tmp_path / "index.lock").exists()


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "index.lock").touch()
    (tmp_path / "data-1").mkdir()
    with drafting(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["index.lock"]
