"""Uploads, to a hub that only writes down what it is asked."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from unicl.errors import UniclError, UsageError
from unicl.export.hub import push_to_hub, require_pushable


class Recorder:
    """A hub that records its calls, or fails."""

    def __init__(self, error=None):
        self.calls = []
        self.error = error

    def create_repo(self, repo_id, *, private, exist_ok):
        validate_repo_id(repo_id)
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error:
            raise self.error
        self.calls.append(("upload", repo_id, folder_path, commit_message))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").touch()
    return tmp_path / "mine"


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_is_uploaded_into_a_repository_of_that_name(folder, private):
    hub = Recorder()
    assert push_to_hub(folder, "org/mine", private=private, hub=hub) == "https://hub/org/mine"
    assert hub.calls == [
        ("create", "org/mine", private, True),
        ("upload", "org/mine", folder, "Upload mine"),
    ]


def test_the_real_client_takes_the_same_arguments(folder, monkeypatch):
    hub = Recorder()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            HfApi, name, lambda self, *args, _name=name, **kw: getattr(hub, _name)(*args, **kw)
        )
    push_to_hub(folder, "org/mine")
    assert len(hub.calls) == 2


def test_what_cannot_be_uploaded_is_told_beforehand(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="no token for the hub; run `hf auth login`"):
        require_pushable("org/mine")
    with pytest.raises(UsageError, match="'a/b/c' is no repository's name: "):
        require_pushable("a/b/c")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    require_pushable("org/mine")


def test_what_goes_wrong_is_one_line(folder, tmp_path):
    with pytest.raises(UniclError, match=r"cannot upload .* to org/mine: no network; the") as error:
        push_to_hub(folder, "org/mine", hub=Recorder(OSError("no network\nat all")))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"it has no README.md; export one first"):
        push_to_hub(tmp_path, "org/mine", hub=Recorder())
