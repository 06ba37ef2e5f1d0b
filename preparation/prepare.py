"""The whole of a preparation: read in order, tokenise on all cores, write in order, divide, publish.

One thread reads and writes. The workers are threads, because tokenising holds no lock, and have two batches each at
most. Results are written in the order of reading, so the bytes do not depend on the number of workers.
"""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Never

import numpy as np
from tqdm import tqdm

from harness.run.errors import ConfigError, DataError
from harness.tokens.token_files import SPLITS, TokenFile, open_split, split_files
from harness.tokens.tokenizer import gpt2_encoding
from preparation.encoding import EncodedBatch, encode_batch
from preparation.hub import PREFIX, commit_of, fetched, hub_files
from preparation.readers import Batch, read_batches
from preparation.settings import Settings
from preparation.sources import SourceFile, check_space, local_files
from preparation.token_writer import CHUNK_TOKENS, sha256_of
from preparation.work import Progress, Work, check_sources, discard, load_progress, locked, publish

PYTHON_DOCS = "python-docs"
PYTHON_DOCS_BYTES = 18_000_000  # of text, about: for the progress bar and the estimate of space


@dataclass(frozen=True)
class Outcome:
    """What a preparation came to; `progress` is None where the dataset was there already."""

    progress: Progress | None
    splits: tuple[TokenFile, TokenFile]


def prepare(settings: Settings, out_dir: Path, workers: int, is_fresh: bool, checks_space: bool) -> Outcome:
    """Make OUT_DIR/{train,validation}.safetensors, or go on making them; raises HarnessError."""
    if len(settings.source) > 1000:
        raise ConfigError(f"SOURCE: found a name of {len(settings.source)} characters, wanted a shorter one")
    with locked(out_dir) as folder:
        earlier = None if is_fresh else load_progress(folder, settings)
        if earlier is None and not is_fresh and is_prepared(settings, out_dir):
            return Outcome(None, open_both(out_dir))
        progress = earlier or Progress(commit=find_commit(settings))
        sources = find_sources(settings, progress.commit, out_dir)
        if earlier:
            check_sources(folder, sources)
        else:
            discard(folder)
        if not progress.is_divided:
            if checks_space:
                check_space(folder, sources, 2 * (progress.train.tokens + progress.validation.tokens))
            read_and_divide(Work(folder, settings, progress), sources, workers)
        publish(folder, progress, out_dir, metadata_of(settings, progress.commit, sources))
        return Outcome(progress, open_both(out_dir))


def open_both(out_dir: Path) -> tuple[TokenFile, TokenFile]:
    """Open the two splits of a dataset."""
    train, validation = (open_split(out_dir.parent, out_dir.name, split) for split in SPLITS)
    return train, validation


def is_prepared(settings: Settings, out_dir: Path) -> bool:
    """Whether this very dataset lies in OUT_DIR; raises ConfigError where another one does."""
    if not any(split_files(out_dir, split) for split in SPLITS):
        return False
    hint = "wanted another OUT_DIR, or --fresh"
    for split in SPLITS:
        if not split_files(out_dir, split):
            raise ConfigError(f"{out_dir}: found no {split} split beside the other, {hint}")
        file = open_split(out_dir.parent, out_dir.name, split)
        try:
            found = json.loads(file.metadata.get("settings", ""))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"{file.path}: already there and not from here, {hint}")
        if difference := settings.difference(found):
            raise ConfigError(f"{file.path}: made with other options ({difference}), {hint}")
        if settings.source != PYTHON_DOCS and not settings.source.startswith(PREFIX):
            sources = local_files(settings.source, out_dir)
            newest = max(source.mtime_ns for source in sources)
            if file.metadata.get("files_sha256") != fingerprint(sources) or newest > file.path.stat().st_mtime_ns:
                raise ConfigError(f"{file.path}: made before SOURCE changed, {hint}")
    return True


def find_commit(settings: Settings) -> str | None:
    """Give the commit to read, None where the source is not on the Hub."""
    return commit_of(settings.source, settings.revision) if settings.source.startswith(PREFIX) else None


def find_sources(settings: Settings, commit: str | None, out_dir: Path) -> Sequence[SourceFile]:
    """Give the files of the source in the order in which they are read."""
    if settings.source == PYTHON_DOCS:
        return [SourceFile(f"Python {sys.version.split()[0]}", "python-docs", PYTHON_DOCS_BYTES, Path(sys.prefix))]
    return hub_files(settings.source, commit) if commit else local_files(settings.source, out_dir)


def fingerprint(sources: Sequence[SourceFile]) -> str:
    """Give a SHA-256 (hex) over names and sizes."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{json.dumps(source.name)} {source.size}\n".encode())
    return digest.hexdigest()


def metadata_of(settings: Settings, commit: str | None, sources: Sequence[SourceFile]) -> dict[str, str]:
    """Give what both files say of where their tokens come from."""
    revision = {"revision": commit} if commit else {}
    own = {"settings": json.dumps(asdict(settings)), "files": str(len(sources)), "files_sha256": fingerprint(sources)}
    return {"source": settings.source, **revision, **own}


def read_and_divide(work: Work, sources: Sequence[SourceFile], workers: int) -> None:
    """Write the tokens of all sources, from where `work` stopped, and divide them into splits."""
    work.sources = sources
    gpt2_encoding()  # made once here, or every worker would make its own at the same time
    with closing(work):
        done = sum(source.size for source in sources[: work.progress.files])
        seconds = 1 if sys.stderr.isatty() else 30
        with tqdm(
            total=sum(source.size for source in sources), initial=done, unit="B", unit_scale=True, leave=False,
            delay=seconds, mininterval=seconds,
        ) as bar, ThreadPoolExecutor(workers) as pool:  # fmt: skip
            for number, source in enumerate(sources):
                if number >= work.progress.files:
                    read_file(work, source, pool, 2 * workers, bar)
        divide(work)
        work.progress.is_divided = True
        work.save()


def read_file(work: Work, source: SourceFile, pool: ThreadPoolExecutor, window: int, bar: "tqdm[Never]") -> None:
    """Write the tokens of one file, from where `work` stopped; saves now and then, and at the end of a download."""
    settings, progress, scratch = work.settings, work.progress, work.folder / "download"
    before = bar.n
    context = nullcontext(source)
    if source.path is None:
        assert progress.commit is not None
        context = fetched(settings.source, progress.commit, source, scratch)  # type: ignore[assignment]
    with context as file:
        batches = read_batches(file, settings, progress.items, scratch)
        for encoded in in_order(batches, settings, pool, window):
            write(work, encoded)
            progress.items += len(encoded.batch.items)
            bar.set_postfix(
                documents=f"{progress.train.documents + progress.validation.documents:,}",
                tokens=f"{progress.train.tokens + progress.validation.tokens:,}",
                refresh=False,
            )
            bar.update(max(0, before + min(encoded.batch.file_bytes, source.size) - bar.n))
            work.save_if_due()
        progress.files, progress.items = progress.files + 1, 0
        if source.path is None:
            work.save()  # before the download is deleted
    bar.update(before + source.size - bar.n)


def in_order(
    batches: Iterator[Batch], settings: Settings, pool: ThreadPoolExecutor, window: int
) -> Iterator[EncodedBatch]:
    """Tokenise batches on the pool and give the results in their order, with at most `window` under way."""
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(encode_batch, batch, settings))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def write(work: Work, encoded: EncodedBatch) -> None:
    """Append a batch's documents to their splits, without those that were seen before."""
    progress, settings, long = work.progress, work.settings, encoded.batch.long
    keep = np.ones(len(encoded.counts), dtype=bool)
    if work.seen is not None:
        if long is None:
            keep[:] = [work.seen.is_new(content) for content in encoded.contents]
            progress.duplicates += int((~keep).sum())
        else:
            if long.is_first:
                progress.keeps_long = work.seen.is_new(long.content)
                progress.duplicates += not progress.keeps_long
            keep[:] = progress.keeps_long
    progress.empty_documents += encoded.empty_documents
    held_out = np.zeros_like(keep)
    if settings.validation == "random":
        held_out = encoded.split_keys.astype(np.float64) < settings.validation_fraction * 2.0**64
    ends = long is None or long.is_last
    for writer, chosen in ((work.train, keep & ~held_out), (work.validation, keep & held_out)):
        if chosen.any():
            tokens = encoded.tokens[np.repeat(chosen, encoded.counts)]
            writer.append(tokens, int(chosen.sum()) if ends else 0, int(encoded.text_bytes[chosen].sum()))


def divide(work: Work) -> None:
    """Give the validation split its documents where they are the last ones, and neither split none.

    A document is moved to a split that would be empty; a single document is cut in two.
    """
    train, validation, fraction = work.train, work.validation, work.settings.validation_fraction
    documents = train.counts.documents + validation.counts.documents
    if documents == 0:
        raise DataError("SOURCE: found no document, wanted at least one that is not empty")
    if train.counts.documents == 0:
        validation.copy_tail(validation.start_of_last(1), 1, train)
        work.save()  # before what was copied is cut off
        validation.cut_back()
    if documents == 1:
        cut_in_two(work, fraction)
    elif validation.counts.documents == 0:
        last = 1
        if work.settings.validation == "last":
            last = min(max(1, round(fraction * documents)), documents - 1)
        train.copy_tail(train.start_of_last(last), last, validation)


def cut_in_two(work: Work, fraction: float) -> None:
    """Move the end of the only document to the validation split; each half gets a document end."""
    train = work.train
    cut = round((train.counts.tokens - 1) * (1 - fraction))
    train.copy_tail(cut, 1, work.validation)
    train.counts.documents = 1
    train.counts.tokens += 1  # for the document end, which is written at last


def verify(dataset: Path) -> Iterator[TokenFile]:
    """Read both splits of a dataset through and compare their SHA-256 with the files' own; raises DataError."""
    for split in SPLITS:
        file = open_split(dataset.parent, dataset.name, split)
        wanted = file.metadata.get("sha256")
        if wanted is None:
            raise DataError(f"{file.path}: found no SHA-256 in it, wanted a file that prepare_dataset.py made")
        kind = np.dtype({"U16": "<u2", "I32": "<i4", "U32": "<u4"}[file.dtype])
        starts = range(0, file.length, CHUNK_TOKENS)
        found = sha256_of(file.read(start, CHUNK_TOKENS).astype(kind) for start in starts)
        if found != wanted:
            raise DataError(f"{file.path}: found tokens with SHA-256 {found}, wanted {wanted}")
        yield file
