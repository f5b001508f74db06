"""Files of tensors."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that has the rights of any other new file.

    The library's own writer lets nobody but the owner read it, whatever the umask says.

    Raises:
        OSError: The disk is full, ...
        SafetensorError: The same, as the library says it.
    """
    path.touch()
    rights = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(rights)
