"""Loading from the Hub and uploading to it, with stand-ins for the network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from bitfast.checkpoints.files import CheckpointError
from bitfast.modeling import BitForImageClassification, BitModel
from tests.tiny_models import (
    SAVING,
    assert_same_weights,
    file_names,
    ours,
)


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours("BitForImageClassification")
    calls: dict[str, Any] = {}

    def upload_folder(*, folder_path: str, **options: Any) -> str:
        calls["upload"] = options
        calls["files"] = file_names(Path(folder_path))
        assert_same_weights(BitForImageClassification.from_pretrained(folder_path), model)
        return "commit"

    def create_repo(repo_id: str, **options: Any) -> SimpleNamespace:
        calls["create"] = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(repo_id: str, **options: Any) -> None:
        calls["branch"] = {"repo_id": repo_id, **options}

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "create_branch", create_branch)
    commit = model.push_to_hub(
        "mine", private=True, token="t", revision="dev", create_pr=True, max_shard_size=5000
    )
    assert commit == "commit"
    assert calls["create"] == {"repo_id": "mine", "private": True, "token": "t", "exist_ok": True}
    assert calls["branch"] == {
        "repo_id": "me/mine",
        "branch": "dev",
        "token": "t",
        "exist_ok": True,
    }
    assert calls["upload"] == {
        "repo_id": "me/mine",
        "commit_message": "Upload model",
        "commit_description": None,
        "token": "t",
        "revision": "dev",
        "create_pr": True,
    }
    assert {"config.json", "model.safetensors.index.json"} < calls["files"]


def test_save_and_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours("BitModel")
    uploads = []

    def upload_folder(**options: Any) -> None:
        uploads.append((options["repo_id"], options["commit_message"], options["token"]))

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    model.save_pretrained(tmp_path / "name", push_to_hub=True, token="t", commit_message="Hello")
    assert uploads == [("name", "Hello", "t")]
    assert_same_weights(BitModel.from_pretrained(tmp_path / "name"), model)


def test_nothing_is_created_for_a_model_that_cannot_be_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ours("BitModel", bad=object())
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: pytest.fail("created"))
    with pytest.raises(TypeError, match="bad"):
        model.push_to_hub("mine")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serve a folder, laid out like the Hub's cache, in place of hf_hub_download."""
    repo = tmp_path / "models--me--mine"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    calls: list[dict[str, Any]] = []

    def add(folder: Path) -> None:
        for path in folder.iterdir():
            shutil.copy(path, repo / "blobs" / path.name)
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))

    def download(repo_id: str, filename: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, "filename": filename, **options})
        if not (snapshot / filename).exists():
            raise errors.EntryNotFoundError(f"no {filename}")
        return str(snapshot / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(add=add, calls=calls, snapshot=snapshot)


@pytest.mark.parametrize("saving", SAVING[:4], ids=str)
def test_loading_from_the_hub(hub: Any, saving: dict[str, Any], tmp_path: Path) -> None:
    model = ours("BitForImageClassification")
    model.save_pretrained(tmp_path / "saved", **saving)
    hub.add(tmp_path / "saved")
    where = {
        "revision": "v1",
        "cache_dir": "here",
        "force_download": True,
        "local_files_only": True,
        "token": "t",
    }
    loaded = BitForImageClassification.from_pretrained("me/mine", **where)
    assert_same_weights(loaded, model)
    assert loaded.name_or_path == "me/mine"
    assert hub.calls[0]["filename"] == "config.json"
    for call in hub.calls:
        assert {key: call[key] for key in where} == where
        assert call["repo_id"] == "me/mine"
        assert call["subfolder"] is None
    # The cache's own folder, full of links, is a local checkpoint too.
    assert_same_weights(BitForImageClassification.from_pretrained(hub.snapshot), model)


def hub_error(kind: Any) -> Exception:
    if not issubclass(kind, errors.HfHubHTTPError) or kind is errors.LocalEntryNotFoundError:
        return kind("reason")
    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    return kind("reason", response=response)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.RepositoryNotFoundError, "no such local folder and no such Hub repository"),
        (errors.GatedRepoError, "gated"),
        (errors.RevisionNotFoundError, "no revision 'main'"),
        (errors.EntryNotFoundError, r"no file config\.json"),
        (errors.LocalEntryNotFoundError, "not in the local cache"),
        (errors.HfHubHTTPError, "cannot download"),
        (errors.HFValidationError, "neither a local folder nor"),
        (ConnectionError, "cannot download"),
    ],
)
def test_hub_errors_are_explained(kind: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=said) as caught:
        BitModel.from_pretrained("me/mine")
    assert "me/mine" in str(caught.value)
