"""Mixes the sequences of several datasets by weight.

Where each sequence of the mixture comes from is computed on its own, so that resuming needs no state, and any
beginning of the mixture has each dataset's share as exactly as whole sequences allow.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Mixture:
    """Datasets by number; `shares[d]` is the share of dataset d in what the datasets before it leave."""

    shares: tuple[Fraction, ...]

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Mixture":
        """Return the mixture of positive weights, which are taken as the decimal numbers they are written as."""
        exact = [Fraction(str(weight)) for weight in weights]
        return cls(tuple(weight / sum(exact[number:]) for number, weight in enumerate(exact)))

    def place(self, index: int) -> tuple[int, int]:
        """Return the dataset of the mixture's sequence `index`, and the number of the sequence in that dataset.

        Of n sequences that reach a dataset, it takes floor(n x share), evenly spread as the pixels of Bresenham's
        line, and the datasets after it share the others.
        """
        for dataset, share in enumerate(self.shares):
            taken = int(index * share)
            if int((index + 1) * share) > taken:
                return dataset, taken
            index -= taken
        raise AssertionError("the last dataset takes all that reaches it")

    def counts(self, sequences: int) -> list[int]:
        """Return how many of the first `sequences` sequences each dataset gives."""
        found = []
        for share in self.shares:
            found.append(int(sequences * share))
            sequences -= found[-1]
        return found

    def fitting(self, available: Sequence[int]) -> int:
        """Return the length of the longest mixture for which each dataset has enough sequences."""

        def is_too_long(sequences: int) -> bool:
            return any(count > most for count, most in zip(self.counts(sequences), available, strict=True))

        return bisect_right(range(sum(available) + 1), False, key=is_too_long) - 1
