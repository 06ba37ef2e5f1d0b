"""imported/source.json: where the weights of an imported run came from."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.run.files import read_json, write_json

OPTIONAL = ("commit", "stored_vocab_size")


@dataclass(frozen=True)
class Origin:
    """What source.json holds; an empty `source` where nothing was imported."""

    source: str = ""
    """As the user named it: hf:OWNER/NAME, a folder or a file."""
    commit: str | None = None
    """Of the model on the Hub; None for a source on disk."""
    tokenizer_is_gpt2: bool | None = None
    """Whether the model's own tokenizer is GPT-2's; None where it came without one."""
    files: dict[str, str] | None = None
    """SHA-256 (hex) of every weights file, by name."""
    stored_vocab_size: int | None = None
    """Token ids before padding was dropped; None where all were kept."""
    time: str = ""
    logit_parity: dict[str, Any] | None = None
    """Fields of `Parity`; None where the logits were not compared."""

    @classmethod
    def read(cls, path: Path) -> "Origin":
        """Read the file; what is missing in it, or all where there is no file, has its default."""
        document = read_json(path)
        if not isinstance(document.get("source"), str):
            return cls()
        return cls(**{key: document[key] for key in cls.__dataclass_fields__ if key in document})

    def write(self, path: Path) -> None:
        """Replace the file; optional keys are in it only where they have a value."""
        document = asdict(self)
        write_json(path, {key: value for key, value in document.items() if key not in OPTIONAL or value is not None})

    def __str__(self) -> str:
        return f"{self.source} at {self.commit}" if self.commit else self.source
