"""Files of tensors: what goes in comes out, readable by whom the umask lets."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unicl.data.tensors import write_tensors


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.arange(3)}, metadata={"format": "pt"})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]
