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


def push_to_hub(
    folder: Path, repo_id: str, *, private: bool = False, hub: Hub | None = None
) -> str:
    """Upload an exported folder, creating the repository where there is none.

    Args:
        folder: What an export wrote.
        repo_id: `NAME` or `ORGANISATION/NAME`.
        private: Only you can see a repository that is created.
        hub: The client; unset takes huggingface_hub's, with its stored token.

    Returns:
        The repository's address.

    Raises:
        UsageError: The folder is none that an export wrote, there is no token, or the name is no
            repository's.
        UniclError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    if not (folder / "README.md").is_file():
        raise UsageError(f"{folder} is no exported model: it has no README.md; export one first")
    if hub is None and get_token() is None:
        raise _no_token()
    client: Hub = hub or HfApi()
    try:
        address = client.create_repo(repo_id, private=private, exist_ok=True)
        client.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Upload {folder.name}"
        )
    except LocalTokenNotFoundError as error:
        raise _no_token() from error
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is no repository's name: {_line(error)}") from error
    except Exception as error:  # the network and the hub's answers fail in many ways
        raise UniclError(
            f"cannot upload {folder} to {repo_id}: {_line(error)}; the folder is as it was"
        ) from error
    return str(address)


def _no_token() -> UsageError:
    return UsageError("there is no token for the hub; run `hf auth login`, or set HF_TOKEN")


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
