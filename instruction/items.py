"""Instructions with their references, in the Alpaca format, from a file or the Hub; and which of them are held out.

A file holds objects with the keys `instruction`, `input` (may be empty or left out) and `output`: a JSON list, one
object a line (.jsonl), or a Parquet table. Other keys are passed over.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.run.config import DATASET_NAME
from harness.run.errors import DataError, first_line, hub_errors
from harness.run.files import ROOT
from harness.run.recipe import hash_of_json
from instruction.recipe import Recipe

BUILTIN_SET = "assets/instructions/instructions.json"  # from the project's root, wherever a command is run
SUFFIXES = (".json", ".jsonl", ".parquet")
KEYS = ("instruction", "input", "output")
HUB_NAME = re.compile(rf"({DATASET_NAME.strip('^$')})" r"((?:/[\w.-]+)*)(?:@([\w./-]+))?", re.ASCII)
HUB_PREFIX = "hf:"
HUB_CARD = "dataset_infos.json"  # describes a dataset and holds no items
PLACES = re.compile(r"\{(instruction|input)\}")


@dataclass(frozen=True)
class Item:
    """One instruction; `output` is the reference answer."""

    instruction: str
    input: str
    output: str

    @property
    def key(self) -> str:
        """Hash of instruction and input, 16 hex digits: the same item has the same key in every file."""
        return hash_of_json([self.instruction, self.input])[:16]


@dataclass(frozen=True)
class ItemSet:
    """All items of a source, each question once, with a SHA-256 (hex) over them in order."""

    source: str
    items: tuple[Item, ...]
    sha256: str
    without_answer: int = 0
    """Objects that were left out because their `output` is empty, as some of Alpaca's are."""


@dataclass(frozen=True)
class Split:
    """Items to fine-tune on and items to ask; no question is in both."""

    train: tuple[Item, ...]
    test: tuple[Item, ...]


def load_items(source: str) -> ItemSet:
    """Read a file, or `hf:OWNER/NAME[/PATH][@REVISION]` from the Hub; raises DataError naming the place of an error.

    Where a question comes twice, the first answer counts.
    """
    first: dict[str, Item] = {}
    without_answer = 0
    for path in _files(source):
        for place, value in _objects(path):
            item = _item(place, value)
            if item.output:
                first.setdefault(item.key, item)
            else:
                without_answer += 1
    if not first:
        raise DataError(f"{source}: found no item, wanted objects with {', '.join(KEYS)}")
    items = tuple(first.values())
    sha256 = hash_of_json([[item.instruction, item.input, item.output] for item in items])
    return ItemSet(source, items, sha256, without_answer)


def _files(source: str) -> list[Path]:
    if source.startswith(HUB_PREFIX):
        return _download(source.removeprefix(HUB_PREFIX))
    path = ROOT / BUILTIN_SET if source == BUILTIN_SET else Path(source)
    if not path.is_file():
        raise DataError(f"{source}: found no such file, wanted a {_listed()} file, or hf:OWNER/NAME")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{source}: found a name without a known ending, wanted {_listed()}")
    return [path]


def _listed() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _download(name: str) -> list[Path]:
    """Download the item files of a Hub dataset into the Hub's cache and return their paths; raises DataError."""
    from huggingface_hub import snapshot_download  # takes a while to import, wanted here only

    found = HUB_NAME.fullmatch(name)
    if found is None:
        raise DataError(f"--data: found {name[:80]!r}, wanted hf:OWNER/NAME, hf:OWNER/NAME/PATH or ...@REVISION")
    dataset, inside, revision = found[1], found[3].strip("/"), found[4]
    patterns = [f"{inside}*{suffix}" for suffix in SUFFIXES] + [inside] * bool(inside)
    with hub_errors(f"dataset {dataset}: could not be downloaded", DataError):
        folder = snapshot_download(dataset, repo_type="dataset", revision=revision, allow_patterns=patterns)
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix in SUFFIXES and path.name != HUB_CARD]
    # The cache may hold files that an earlier call asked for.
    wanted = [path for path in paths if path.relative_to(folder).as_posix().startswith(inside)]
    if not wanted:
        raise DataError(f"dataset {dataset}: the Hub has no {_listed()} file in it")
    return wanted


def _objects(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the place (for errors) and the value of every object in a file."""
    if path.suffix == ".parquet":
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(_rows(path), start=1))
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: found a byte that is not UTF-8 at {error.start}, wanted UTF-8 text") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}: line {number}", _parsed(line, f"{path}: line {number}")
        return
    values = _parsed(text, str(path))
    if not isinstance(values, list):
        raise DataError(f"{path}: found {type(values).__name__}, wanted a list of objects")
    yield from ((f"{path}: item {number}", value) for number, value in enumerate(values, start=1))


def _rows(path: Path) -> list[dict[str, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs a package that is not installed (pip install pyarrow)") from None
    try:
        table = parquet.read_table(path)
        rows: list[dict[str, object]] = table.select([key for key in KEYS if key in table.column_names]).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({first_line(error)})") from None
    return rows


def _parsed(text: str, place: str) -> Any:
    def refuse(name: str) -> object:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise DataError(f"{place}: found JSON nested too deeply, wanted flat objects") from None
    except ValueError as error:
        raise DataError(f"{place}: found invalid JSON ({error})") from None


def _item(place: str, value: object) -> Item:
    if not isinstance(value, dict):
        raise DataError(f"{place}: found {type(value).__name__}, wanted an object")
    texts = {}
    for key in KEYS:
        text = value.get(key)
        if key == "input" and text is None:  # left out, or null in a Parquet table
            text = ""
        if not isinstance(text, str):
            raise DataError(f"{place}: {key}: found {type(text).__name__}, wanted text")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            raise DataError(f"{place}: {key}: found text that is not valid Unicode") from None
        texts[key] = text.strip()
    if not texts["instruction"]:
        raise DataError(f"{place}: instruction: found nothing, wanted text")
    return Item(**texts)


def split_items(items: Sequence[Item], recipe: Recipe) -> Split:
    """Hold out `test_fraction` of the items, at most `max_test_items`, by a keyed hash of what is asked.

    Where an item goes depends on its question and the split seed alone, so that a longer file moves no item to the
    other side; what `max_test_items` turns away is not trained on either. Both sides come in the order of the hash.
    """

    def place(item: Item) -> int:
        digest = hashlib.blake2b(item.key.encode(), digest_size=8, key=str(recipe.split_seed).encode()).digest()
        return int.from_bytes(digest, "little")

    ordered = sorted(items, key=place)
    bound = recipe.test_fraction * 2**64
    test = [item for item in ordered if place(item) < bound]
    train = [item for item in ordered if place(item) >= bound]
    return Split(tuple(train), tuple(test[: recipe.max_test_items]))


def prompt_of(item: Item, recipe: Recipe) -> str:
    """Return the recipe's prompt for an item; braces inside the item's own text are left as they are."""
    template = recipe.prompt if item.input else recipe.prompt_without_input
    return PLACES.sub(lambda found: item.instruction if found[1] == "instruction" else item.input, template)
