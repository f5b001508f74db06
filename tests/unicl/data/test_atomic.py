import errno
import os
from pathlib import Path

import pytest

from unicl.data.atomic import atomic_file, write_error
from unicl.errors import UniclError, UsageError


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_place_without_a_name_is_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(UsageError, match=r"cannot write .*; choose another place"),
        atomic_file(Path(place)),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "free space or choose another place"),
        (errno.EDQUOT, "free space or choose another place"),
        (errno.EROFS, "choose another place"),
        (errno.EISDIR, "choose another place"),
    ],
)
def test_the_way_out_fits_the_reason(number: int, way_out: str) -> None:
    error = write_error(Path("a/b"), OSError(number, os.strerror(number)))
    assert str(error) == f"cannot write a/b: {os.strerror(number)}; {way_out}"


def test_a_folder_without_files_of_ones_own() -> None:
    with (
        pytest.raises(UniclError, match=r"^cannot write /proc/r: .*; choose another place$"),
        atomic_file(Path("/proc/r")),
    ):
        pass
