"""Scores of an answer against its reference that need no judge."""

import re
from collections import Counter

# Numbers whole, with their sign and point, so that -5 is not 5; else runs of letters and digits.
WORD = re.compile(r"(?<![\w.])-?\d+(?:[.,]\d+)*|\w+")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; its signs where it has no word."""
    return WORD.findall(text.lower()) or text.split()


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, counted with repeats (Rajpurkar et al. 2016).

    arXiv:1606.05250, section 6.1; articles are kept here, because some tasks are about them.
    """
    mine, theirs = Counter(words(answer)), Counter(words(reference))
    if not mine or not theirs:
        return float(mine == theirs)
    shared = (mine & theirs).total()
    return 2 * shared / (mine.total() + theirs.total())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where the words are the same in the same order, else 0."""
    return float(words(answer) == words(reference))
