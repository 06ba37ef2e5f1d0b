"""What the user asked for: the choices that decide which tokens come out, and nothing else."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """The choices that decide the tokens; kept in the files' metadata, and compared before work is continued."""

    source: str
    revision: str | None = None
    text_field: str = "text"
    validation: Literal["random", "last"] = "random"
    validation_fraction: float = 0.01
    seed: int = 0
    drop_duplicates: bool = False

    def difference(self, other: dict[str, object]) -> str | None:
        """Name the first choice in which `other` is not the same, as `seed 1 there, 0 now`; None if there is none."""
        for name, value in asdict(self).items():
            if other.get(name) != value:
                return f"{name} {other.get(name)} there, {value} now"
        return None

    def split_key(self, pieces: Iterable[bytes]) -> int:
        """Give a number in [0, 2^64) that depends on the seed and the UTF-8 text alone, however it is cut.

        Below fraction x 2^64 a document is held out. So neither order nor workers matter, and equal documents never
        lie in both splits.
        """
        digest = hashlib.blake2b(digest_size=8, key=str(self.seed).encode())
        for piece in pieces:
            digest.update(piece)
        return int.from_bytes(digest.digest(), "little")


def content_digest(pieces: Iterable[bytes]) -> bytes:
    """Give 16 bytes that tell a UTF-8 text from every other, however it is cut."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
