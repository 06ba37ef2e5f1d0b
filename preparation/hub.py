"""Datasets on the Hub: their files at one commit, fetched one at a time."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from harness.run.errors import ConfigError, DataError, hub_errors
from preparation.sources import WANTED, SourceFile, kind_of

PREFIX = "hf:"


def dataset_of(source: str) -> tuple[str, str | None]:
    """Cut hf:OWNER/NAME[/sub/folder] into the dataset and the folder in it; raises ConfigError."""
    parts = source.removeprefix(PREFIX).strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise ConfigError(f"SOURCE: found {source}, wanted {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME/sub/folder")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def commit_of(source: str, revision: str | None) -> str:
    """Ask the Hub for the commit that a revision (None: the newest) stands for; raises DataError."""
    dataset, _ = dataset_of(source)
    with hub_errors(f"{source}: cannot be had from the Hub", DataError):
        return str(HfApi().dataset_info(dataset, revision=revision).sha)


def hub_files(source: str, commit: str) -> list[SourceFile]:
    """List the files of a dataset, or of a folder or file in it, in the order of names; raises DataError.

    README.md is the dataset's card and no document.
    """
    dataset, place = dataset_of(source)
    is_file = place is not None and kind_of(place)[0] is not None
    folder = str(PurePosixPath(place).parent) if place and is_file else place
    with hub_errors(f"{source}: cannot be had from the Hub", DataError):
        entries = HfApi().list_repo_tree(
            dataset,
            None if folder == "." else folder,
            recursive=not is_file,
            revision=commit,
            repo_type="dataset",
        )
        found = [entry for entry in entries if isinstance(entry, RepoFile)]
    files = [
        SourceFile(entry.path, kind, entry.size)
        for entry in found
        if (kind := kind_of(entry.path)[0])
        and (entry.path == place if is_file else PurePosixPath(entry.path).name != "README.md")
    ]
    if not files:
        raise DataError(f"SOURCE: found no file in {source} at {commit}, wanted {WANTED}")
    return sorted(files, key=lambda file: PurePosixPath(file.name))


@contextmanager
def fetched(source: str, commit: str, file: SourceFile, folder: Path) -> Iterator[SourceFile]:
    """Download one file into `folder`, for as long as the context lasts; raises DataError.

    An interrupted download is continued, so nothing is deleted where the context ends in an error. What is left over
    from another file goes first: there is never more than one.
    """
    home = folder / hashlib.sha256(file.name.encode()).hexdigest()[:16]
    for other in folder.glob("*"):
        if other.is_dir() and other != home:
            shutil.rmtree(other)
        elif other.is_file():  # unpacked from what was fetched
            other.unlink()
    with hub_errors(f"{source}: cannot be had from the Hub", DataError):
        dataset, _ = dataset_of(source)
        path = hf_hub_download(dataset, file.name, repo_type="dataset", revision=commit, local_dir=home)
    yield replace(file, path=Path(path))
    shutil.rmtree(home)
