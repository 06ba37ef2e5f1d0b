"""Datasets on the Hugging Face Hub: lists their files at one commit and downloads one at a time."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from harness.run.errors import ConfigError, DataError, hub_errors
from preparation.sources import WANTED, SourceFile, is_hidden, kind_of, suffix_of

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


def hub_files(source: str, commit: str) -> tuple[list[SourceFile], Counter[str]]:
    """List the files of a dataset, or of a folder or file in it, sorted by name, and count the others by suffix.

    Left out are hidden files and those about the dataset: its card, its description and its loading script. Raises
    DataError.
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
        names = {PurePosixPath(entry.path): entry.size for entry in entries if isinstance(entry, RepoFile)}
    about = {"README.md", "dataset_infos.json", f"{dataset.split('/')[1]}.py"}
    found = [
        name
        for name in sorted(names)
        if (name == PurePosixPath(place or ""))
        or not (is_file or name.name in about or any(map(is_hidden, name.parts)))
    ]
    files = [SourceFile(str(name), kind, names[name]) for name in found if (kind := kind_of(name.name)[0])]
    if not files:
        raise DataError(f"SOURCE: found no file in {source} at {commit}, wanted {WANTED}")
    return files, Counter(suffix_of(name.name) for name in found if kind_of(name.name)[0] is None)


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
