"""Prepares a dataset: reads in order, tokenises on all cores, writes in order, divides into splits.

One thread reads and writes. Workers are threads, because tokenising releases the GIL, and have at most two batches
each. Results are written in the order of reading, so the bytes do not depend on the number of workers.
"""

import hashlib
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from harness.run.console import progress_bar
from harness.run.errors import ConfigError, DataError
from harness.run.files import write_text
from harness.tokens.token_files import DTYPES, SPLITS, TokenFile, open_split, split_files
from harness.tokens.tokenizer import TOKENIZER_FILE, Tokenizer, read_tokenizer
from preparation.encoding import EncodedBatch, encode_batch
from preparation.hub import PREFIX, commit_of, downloaded, hub_files
from preparation.partial_dataset import (
    PartialDataset,
    PreparationProgress,
    check_sources,
    discard,
    load_progress,
    locked,
    move_into_place,
)
from preparation.python_docs import EMBEDDED
from preparation.readers import Batch, read_batches
from preparation.selection import PreparationSettings, without_place
from preparation.sources import Kind, SourceFile, check_space, local_files
from preparation.token_writer import CHUNK_TOKENS, sha256_of
from preparation.tokenizer_choice import known_tokenizer, learn_tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass(frozen=True)
class PreparationResult:
    """The two splits of a prepared dataset."""

    progress: PreparationProgress | None
    """None if the dataset was there already."""
    splits: tuple[TokenFile, TokenFile]
    skipped: Counter[str]
    """Files of the source that cannot be read, by suffix."""


def prepare(
    settings: PreparationSettings, out_dir: Path, workers: int, is_fresh: bool, checks_space: bool
) -> PreparationResult:
    """Write OUT_DIR/{train,validation}.safetensors, or resume writing them; raises HarnessError."""
    if len(settings.source) > 1000:
        raise ConfigError(f"SOURCE: found a name of {len(settings.source)} characters, wanted a shorter one")
    known = known_tokenizer(settings.tokenizer)
    if known is not None:
        settings = replace(settings, tokenizer=known.identity)
    with locked(out_dir) as folder:
        earlier = None if is_fresh else load_progress(folder, settings)
        if earlier is None and not is_fresh and is_prepared(settings, out_dir):
            return PreparationResult(None, open_both(out_dir), Counter())
        progress = earlier or PreparationProgress(commit=find_commit(settings))
        sources, skipped = find_sources(settings, progress.commit, out_dir)
        if earlier:
            check_sources(folder, sources)
        else:
            discard(folder)
        tokenizer = known or trained_tokenizer(folder, settings, sources, progress.commit)
        if not progress.is_divided:
            if checks_space:
                check_space(folder, sources, progress.train.tokens + progress.validation.tokens, tokenizer.vocab_size)
            read_and_divide(PartialDataset(folder, settings, progress, tokenizer), sources, workers)
        move_into_place(folder, progress, out_dir, metadata_of(settings, progress.commit, sources), tokenizer)
        return PreparationResult(progress, open_both(out_dir), skipped)


def trained_tokenizer(
    folder: Path, settings: PreparationSettings, sources: Sequence[SourceFile], commit: str | None
) -> Tokenizer:
    """Return the tokenizer that was learned from the sources, learning it where it is not in `folder`."""
    if (path := folder / TOKENIZER_FILE).exists():
        return read_tokenizer(path)
    scratch = folder / "download"
    tokenizer = learn_tokenizer(
        settings, sources, lambda source: readable(source, settings, commit, scratch), scratch
    )
    assert tokenizer.document is not None
    write_text(path, tokenizer.document)
    return tokenizer


def readable(
    source: SourceFile, settings: PreparationSettings, commit: str | None, scratch: Path
) -> AbstractContextManager[SourceFile]:
    """Return a context that gives a source file with its path, downloaded into `scratch` if it is on the Hub."""
    if source.path is not None:
        return nullcontext(source)
    assert commit is not None
    return downloaded(settings.source, commit, source, scratch)


def open_both(out_dir: Path) -> tuple[TokenFile, TokenFile]:
    """Open the two splits of a dataset."""
    train, validation = (open_split(out_dir.parent, out_dir.name, split) for split in SPLITS)
    return train, validation


def is_prepared(settings: PreparationSettings, out_dir: Path) -> bool:
    """Return whether OUT_DIR holds this dataset; raises ConfigError if it holds another one."""
    if not any(split_files(out_dir, split) for split in SPLITS):
        return False
    hint = "wanted another OUT_DIR, or --fresh"
    for split in SPLITS:
        if not split_files(out_dir, split):
            raise ConfigError(f"{out_dir}: found no {split} split beside the other, {hint}")
        file = open_split(out_dir.parent, out_dir.name, split)
        try:
            found = json.loads(file.metadata.get("settings", ""))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not re.fullmatch("[0-9]{1,18}", file.metadata.get("documents", "")):
            raise ConfigError(f"{file.path}: already there and not made by prepare_dataset.py, {hint}")
        if difference := settings.difference(found):
            raise ConfigError(f"{file.path}: made with other options ({difference}), {hint}")
        if settings.source not in EMBEDDED and not settings.source.startswith(PREFIX):
            sources, _ = local_files(settings.source, out_dir)
            newest = max(source.mtime_ns for source in sources)
            if file.metadata.get("files_sha256") != fingerprint(sources) or newest > file.path.stat().st_mtime_ns:
                raise ConfigError(f"{file.path}: made before SOURCE changed, {hint}")
    return True


def find_commit(settings: PreparationSettings) -> str | None:
    """Return the Hub commit to read; None for a source that is not on the Hub."""
    return commit_of(settings.source, settings.revision) if settings.source.startswith(PREFIX) else None


def find_sources(
    settings: PreparationSettings, commit: str | None, out_dir: Path
) -> tuple[list[SourceFile], Counter[str]]:
    """List the files of the source in the order in which they are read, and count those that cannot be, by suffix."""
    if settings.source in EMBEDDED:
        kind, size = cast(Kind, settings.source), EMBEDDED[settings.source].size
        return [SourceFile(f"Python {sys.version.split()[0]}", kind, size, Path(sys.prefix))], Counter()
    return hub_files(settings.source, commit) if commit else local_files(settings.source, out_dir)


def fingerprint(sources: Sequence[SourceFile]) -> str:
    """Return a SHA-256 (hex) over the names and sizes of all files."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{json.dumps(source.name)} {source.size}\n".encode())
    return digest.hexdigest()


def metadata_of(settings: PreparationSettings, commit: str | None, sources: Sequence[SourceFile]) -> dict[str, str]:
    """Return the metadata of both files that says where their tokens come from."""
    revision = {"revision": commit} if commit else {}
    own = {
        "settings": json.dumps(settings.stored()),
        "files": str(len(sources)),
        "files_sha256": fingerprint(sources),
    }
    return {"source": without_place(settings.source), **revision, **own}


def read_and_divide(partial: PartialDataset, sources: Sequence[SourceFile], workers: int) -> None:
    """Write the tokens of all sources, starting where `partial` stopped, and divide them into splits."""
    partial.sources = sources
    partial.tokenizer.encode("")  # built and cached here, or every worker would build its own at the same time
    with closing(partial):
        done = sum(source.size for source in sources[: partial.progress.files])
        total = sum(source.size for source in sources)
        bar = progress_bar(total, "B", initial=done, unit_scale=True, leave=False, delay=1)
        with bar, ThreadPoolExecutor(workers) as pool:
            for number, source in enumerate(sources):
                if number >= partial.progress.files:
                    read_file(partial, source, pool, 2 * workers, bar)
        divide(partial)
        partial.progress.is_divided = True
        partial.save()


def read_file(
    partial: PartialDataset, source: SourceFile, pool: ThreadPoolExecutor, window: int, bar: "tqdm[Any]"
) -> None:
    """Write the tokens of one file, starting where `partial` stopped; saves regularly and after a download."""
    settings, progress, scratch = partial.settings, partial.progress, partial.folder / "download"
    before = bar.n
    with readable(source, settings, progress.commit, scratch) as file:
        batches = read_batches(file, settings, progress.items, scratch)
        for encoded in in_order(batches, partial, pool, window):
            write_batch(partial, encoded)
            progress.items += len(encoded.batch.items)
            bar.set_postfix(
                documents=f"{progress.train.documents + progress.validation.documents:,}",
                tokens=f"{progress.train.tokens + progress.validation.tokens:,}",
                refresh=False,
            )
            bar.update(max(0, before + min(encoded.batch.file_bytes, source.size) - bar.n))
            partial.save_if_due()
        progress.files, progress.items = progress.files + 1, 0
        if source.path is None:
            partial.save()  # before the download is deleted
    bar.update(before + source.size - bar.n)


def in_order(
    batches: Iterator[Batch], partial: PartialDataset, pool: ThreadPoolExecutor, window: int
) -> Iterator[EncodedBatch]:
    """Tokenise batches on the pool and yield the results in order, with at most `window` batches in flight."""
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(encode_batch, batch, partial.settings, partial.tokenizer))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def write_batch(partial: PartialDataset, encoded: EncodedBatch) -> None:
    """Append a batch's documents to their splits, leaving out duplicates."""
    progress, settings, long = partial.progress, partial.settings, encoded.batch.long
    keep = np.ones(len(encoded.token_counts), dtype=bool)
    if partial.seen is not None:
        if long is None:
            keep[:] = [partial.seen.is_new(digest) for digest in encoded.content_digests]
            progress.duplicates += int((~keep).sum())
        else:
            if long.is_first:
                progress.keeps_long = partial.seen.is_new(long.content_digest)
                progress.duplicates += not progress.keeps_long
            keep[:] = progress.keeps_long
    progress.empty_documents += encoded.empty_documents
    if encoded.bad_documents:
        progress.first_bad = progress.first_bad or encoded.bad_documents[0]
        progress.bad_documents += len(encoded.bad_documents)
    held_out = np.zeros_like(keep)
    if settings.validation == "random":
        held_out = np.array([settings.is_held_out(int(key)) for key in encoded.split_keys], dtype=bool)
    ends = long is None or long.is_last
    for writer, chosen in ((partial.train, keep & ~held_out), (partial.validation, keep & held_out)):
        if chosen.any():
            tokens = encoded.tokens[np.repeat(chosen, encoded.token_counts)]
            writer.append(tokens, int(chosen.sum()) if ends else 0, int(encoded.text_bytes[chosen].sum()))


def divide(partial: PartialDataset) -> None:
    """Move documents between the splits: the last ones to validation if so chosen, and one to a split that is empty.

    A single document is cut in two.
    """
    train, validation, fraction = partial.train, partial.validation, partial.settings.validation_fraction
    documents = train.counts.documents + validation.counts.documents
    if documents == 0:
        bad = f" ({partial.progress.first_bad})" if partial.progress.first_bad else ""
        raise DataError(f"SOURCE: found no document, wanted at least one that is not empty{bad}")
    if train.counts.documents == 0:
        validation.copy_tail(validation.start_of_last(1), 1, train)
        partial.save()  # the copy must be durable before the original is cut off
        validation.truncate()
    if documents == 1:
        cut_in_two(partial, fraction)
    elif validation.counts.documents == 0:
        last = 1
        if partial.settings.validation == "last":
            last = min(max(1, round(fraction * documents)), documents - 1)
        train.copy_tail(train.start_of_last(last), last, validation)


def cut_in_two(partial: PartialDataset, fraction: float) -> None:
    """Move the end of the only document to the validation split; each part ends with a document end."""
    train = partial.train
    cut = round((train.counts.tokens - 1) * (1 - fraction))
    train.copy_tail(cut, 1, partial.validation)
    train.counts.documents = 1
    train.counts.tokens += 1  # for the document end, which `finish` writes


def verify(dataset: Path) -> Iterator[TokenFile]:
    """Yield both splits after comparing their tokens with the SHA-256 in their metadata; raises DataError."""
    for split in SPLITS:
        file = open_split(dataset.parent, dataset.name, split)
        wanted = file.metadata.get("sha256")
        if wanted is None:
            raise DataError(f"{file.path}: found no SHA-256 in it, wanted a file that prepare_dataset.py made")
        kind = np.dtype(DTYPES[file.dtype])
        starts = range(0, file.length, CHUNK_TOKENS)
        found = sha256_of(file.read(start, CHUNK_TOKENS).astype(kind) for start in starts)
        if found != wanted:
            raise DataError(f"{file.path}: found tokens with SHA-256 {found}, wanted {wanted}")
        yield file
