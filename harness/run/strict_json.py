"""Reads small hand-written JSON files strictly: whatever is ambiguous is refused."""

import json
import math
from pathlib import Path
from typing import Any

from harness.run.errors import ConfigError
from harness.run.files import read_bytes

MAX_FILE_BYTES = 64 * 1024


class _NotJson:
    """Placeholder for NaN or Infinity, until its key is known for the error."""

    def __init__(self, name: str) -> None:
        self.name = name


def read_strict_json(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """Read a small JSON object, refusing duplicate keys, NaN, Infinity, a byte-order mark and over `max_bytes`.

    Raises ConfigError, which names the file, and the key if the error is in one.
    """
    try:
        raw = read_bytes(path, max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), wanted a JSON object") from None
    if len(raw) > max_bytes:
        raise ConfigError(f"{path}: found over {max_bytes} bytes, wanted a small JSON object")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unambiguous_object, parse_constant=_NotJson)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: found bytes that are not UTF-8, wanted a JSON object in UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: found JSON nested too deeply, wanted one flat JSON object") from None
    except json.JSONDecodeError as error:  # its message carries line and column
        raise ConfigError(f"{path}: found invalid JSON ({error}), wanted a JSON object") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}, wanted a JSON object") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found {shown(value)}, wanted a JSON object")
    return value


def unambiguous_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object made of its pairs, for `json.loads`; raises ValueError for duplicate keys and NaN."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"found key {shown(key)} twice")
        if (wrong := _not_json_in(value)) is not None:
            raise ValueError(f"{on_one_line(key)}: found {wrong.name}, which is not JSON")
        seen[key] = value
    return seen


def _not_json_in(value: object) -> _NotJson | None:
    if isinstance(value, list):
        return next((found for found in map(_not_json_in, value) if found is not None), None)
    return value if isinstance(value, _NotJson) else None


def shown(value: object) -> str:
    """Return a value as JSON for a message, at most 80 characters."""
    if isinstance(value, _NotJson):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return "a number too large to represent"
    text = json.dumps(value, default=lambda other: getattr(other, "name", str(other)))
    return text if len(text) <= 80 else text[:77] + "..."


def on_one_line(text: str) -> str:
    """Return untrusted text on one line, without control characters, at most 80 characters."""
    return "".join(c if c.isprintable() else "?" for c in text)[:80] or '""'
