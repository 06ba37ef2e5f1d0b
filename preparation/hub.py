"""Datasets on the Hugging Face Hub: lists their files at one commit and downloads one at a time."""

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
    """Split hf:OWNER/NAME[/sub/folder] into the dataset and the folder in it; raises ConfigError."""
    parts = source.removeprefix(PREFIX).strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise ConfigError(f"SOURCE: found {source}, wanted {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME/sub/folder")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def commit_of(source: str, revision: str | None) -> str:
    """Return the commit that a revision stands for on the Hub (None: the newest); raises DataError."""
    dataset, _ = dataset_of(source)
    with hub_errors(f"{source}: cannot be had from the Hub", DataError):
        return str(HfApi().dataset_info(dataset, revision=revision).sha)


def hub_files(source: str, commit: str) -> list[SourceFile]:
    """List the files of a dataset, or of a folder or file in it, sorted by name; raises DataError.

    README.md is left out: it is the dataset's card, not a document.
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
def downloaded(source: str, commit: str, file: SourceFile, folder: Path) -> Iterator[SourceFile]:
    """Yield a file downloaded into `folder`, which is deleted when the block ends without an error; raises DataError.

    After an error it stays, so that an interrupted download can be resumed. Leftovers of other files are deleted
    first, so that at most one download is on disk.
    """
    home = folder / hashlib.sha256(file.name.encode()).hexdigest()[:16]
    for other in folder.glob("*"):
        if other.is_dir() and other != home:
            shutil.rmtree(other)
        elif other.is_file():  # decompressed from the download
            other.unlink()
    with hub_errors(f"{source}: cannot be had from the Hub", DataError):
        dataset, _ = dataset_of(source)
        path = hf_hub_download(dataset, file.name, repo_type="dataset", revision=commit, local_dir=home)
    yield replace(file, path=Path(path))
    shutil.rmtree(home)
