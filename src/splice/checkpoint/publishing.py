"""Publishing: adapters become one commit in a repository on the Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from splice.checkpoint.card import CARD_NAME, tag_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class Publication(NamedTuple):
    """Where to publish, and under which words: the arguments of `PeftModel.push_to_hub` that say so."""

    # Id of the repository, "user/name"; it is made if it does not exist.
    repo_id: str
    # Title of the commit; None for "Upload model" or "Upload config".
    commit_message: str | None = None
    # Text below the title.
    commit_description: str | None = None
    # Whether a repository that is made is private; None for what the organisation sets. One that exists stays as it is.
    private: bool | None = None
    # A token, True for the one that is logged in, False for none; None for the one that is logged in, if any.
    token: bool | str | None = None
    # Branch to commit to, which is made if it does not exist; None for the main one.
    revision: str | None = None
    # Whether the commit becomes a pull request, in place of a commit on the branch.
    create_pr: bool = False
    # Tags to add to the model card.
    tags: Iterable[str] = ()


def publish(target: Publication, what: str, write: Callable[[Path], None], write_card: Callable[[Path], None]) -> str:
    """Upload what `write` puts into a folder, in one commit. The Hub is asked for nothing before all is written.

    Files of the repository that are not written anew stay, and so does what its authors wrote in its model card.

    Args:
        target: where to.
        what: "model" or "config", for the commit's title.
        write: puts the files into the folder that it is given.
        write_card: brings a model card in that folder up to date.

    Returns:
        The URL of the commit, as `huggingface_hub.CommitInfo`.

    Raises:
        What `write` raises; huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    from huggingface_hub import HfApi

    # All files are written before the first request: a save that fails must not leave an empty repository behind.
    api = HfApi(token=target.token)
    with tempfile.TemporaryDirectory(prefix="splice-") as temporary:
        folder = Path(temporary, "files")
        folder.mkdir()
        write(folder)
        repository = api.create_repo(target.repo_id, private=target.private, exist_ok=True).repo_id
        branch = target.revision
        if branch is not None and not branch.startswith("refs/pr") and not target.create_pr:
            api.create_branch(repository, branch=branch, exist_ok=True)
        card = _card_of(api, repository, branch, Path(temporary, "card"))
        if card is not None:
            shutil.copyfile(card, folder / CARD_NAME)
            write_card(folder)
        tag_card(folder, target.tags)
        if card is not None and (folder / CARD_NAME).read_bytes() == Path(card).read_bytes():
            (folder / CARD_NAME).unlink()  # it stays as it is, which the Hub may refuse to be sent
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=target.commit_message or f"Upload {what}",
            commit_description=target.commit_description,
            revision=branch,
            create_pr=target.create_pr,
        )


def _card_of(api: HfApi, repository: str, branch: str | None, folder: Path) -> str | None:
    """The repository's own model card, fetched into `folder`, where it has one."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return api.hf_hub_download(repository, CARD_NAME, revision=branch, local_dir=folder)
    except EntryNotFoundError:
        return None
