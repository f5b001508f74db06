"""An exported folder onto the Hugging Face hub."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from unicl.errors import UniclError, UsageError


@runtime_checkable
class Hub(Protocol):
    """What is needed of a hub's client; `huggingface_hub.HfApi` has it."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Create a repository."""

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        """Upload all files of a folder in one commit."""


def require_pushable(repo_id: str) -> None:
    """Refuse, before there is any work, what could not be uploaded after it.

    Raises:
        UsageError: There is no token, or the name is no repository's.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is no repository's name: {_line(error)}") from error
    if get_token() is None:
        raise UsageError("there is no token for the hub; run `hf auth login`, or set HF_TOKEN")


def push_to_hub(
    folder: Path, repo_id: str, *, private: bool = False, hub: Hub | None = None
) -> str:
    """Upload an exported folder, creating the repository where there is none.

    Args:
        folder: What an export wrote.
        repo_id: `NAME` or `ORGANISATION/NAME`, which `require_pushable` takes.
        private: Only you can see a repository that is created.
        hub: The client; unset takes huggingface_hub's, with its stored token.

    Returns:
        The repository's address.

    Raises:
        UsageError: The folder is none that an export wrote.
        UniclError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    if not (folder / "README.md").is_file():
        raise UsageError(f"{folder} is no exported model: it has no README.md; export one first")
    client: Hub = hub or HfApi()
    try:
        address = client.create_repo(repo_id, private=private, exist_ok=True)
        client.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Upload {folder.name}"
        )
    except Exception as error:  # the network and the hub's answers fail in many ways
        raise UniclError(
            f"cannot upload {folder} to {repo_id}: {_line(error)}; the folder is as it was"
        ) from error
    return str(address)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
