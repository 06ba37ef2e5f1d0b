"""Which runs an experiment consists of: interventions, designs, two-level fractions, and what each can see.

A design is a list of arms; an arm is the set of interventions that are on. Standard errors are in units of the
training noise sigma, the standard deviation of the test loss between runs that differ in seeds only.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Literal, get_args

from harness.run.errors import ConfigError
from harness.run.strict_json import read_strict_json

DesignName = Literal["one-at-a-time", "leave-one-out", "full-factorial", "fraction", "replicates"]
DESIGNS: tuple[DesignName, ...] = get_args(DesignName)
Resolution = Literal["III", "IV", "V"]
RESOLUTIONS: dict[Resolution, int] = {"III": 3, "IV": 4, "V": 5}
ROMAN = {1: "I", 2: "II", 3: "III", 4: "IV", 5: "V", 6: "VI", 7: "VII", 8: "VIII"}
BASELINE, STACK = "baseline", "stack"
MAX_FACTORS = 8
LETTERS = "ABCDEFGH"
Word = frozenset[int]


@dataclass(frozen=True)
class Intervention:
    """One named change: the keys it sets in train.json and model.json."""

    name: str
    train: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """A recipe of an experiment: the interventions that are on."""

    name: str
    on: tuple[str, ...]


@dataclass(frozen=True)
class Design:
    """Arms in the order they should run, and how they were chosen."""

    name: DesignName
    factors: tuple[str, ...]
    arms: tuple[Arm, ...]
    generators: tuple[Word, ...] = ()
    """Of a fraction, each a word of the defining relation: the factors whose product of signs is always +1."""

    @property
    def is_factorial(self) -> bool:
        """Say whether effects are contrasts over all runs."""
        return self.name in ("full-factorial", "fraction")

    def effect_se(self, seeds: int) -> float:
        """Return the standard error of one effect in units of sigma, with `seeds` runs of every arm.

        A difference of two arms: sqrt(2/k). A contrast over all N runs of a two-level factorial: 2/sqrt(N). A mean
        of replicates: 1/sqrt(k) (Box, Hunter and Hunter 2005, Statistics for Experimenters, chapters 3 and 5).
        """
        if self.name == "replicates":
            return 1 / math.sqrt(seeds)
        return 2 / math.sqrt(len(self.arms) * seeds) if self.is_factorial else math.sqrt(2 / seeds)

    def sees(self) -> str:
        """Say in words what the design can tell."""
        if self.is_factorial:
            resolution = self.resolution()
            if resolution is None:
                return "main effects and every two-way interaction, clear of all others"
            return {
                3: "main effects, mixed up with two-way interactions: for screening",
                4: "main effects; two-way interactions mixed up with each other",
            }.get(resolution, "main effects and two-way interactions")
        return {
            "one-at-a-time": "each change alone, against the baseline",
            "leave-one-out": "whether each change still helps inside the stack",
            "replicates": "the noise",
        }[self.name]

    def resolution(self) -> int | None:
        """Return the length of the shortest word of the defining relation; None for a full factorial."""
        return min(map(len, defining_relation(self.generators)), default=None)

    def aliases(self) -> list[tuple[Word, list[Word]]]:
        """Return every effect of one or two factors, with those of one or two factors that it is mixed up with."""
        relation = defining_relation(self.generators)
        small = [frozenset(c) for size in (1, 2) for c in combinations(range(len(self.factors)), size)]
        partners = {word: {word ^ other for other in relation} - {word} for word in small}
        return [(word, [other for other in small if other in partners[word]]) for word in small]

    def generators_in_letters(self) -> list[str]:
        """Return the generators as they are written in textbooks, for example E=ABCD."""
        return [f"{LETTERS[max(word)]}={spell(word - {max(word)})}" for word in self.generators]


def spell(word: Word) -> str:
    """Write a set of factors as letters."""
    return "".join(LETTERS[factor] for factor in sorted(word))


def load_interventions(path: Path) -> list[Intervention]:
    """Read {"NAME": {"train": {...}, "model": {...}}}; raises ConfigError with one line for every error."""
    problems, found = [], []
    for name, patch in read_strict_json(path).items():
        if not name or not all(c.isalnum() or c in "-_" for c in name) or name in (BASELINE, STACK):
            problems.append(f"{path}: {name!r}: wanted a name of letters, digits, '-' and '_', not a reserved one")
        elif not isinstance(patch, dict) or not patch or set(patch) - {"train", "model"}:
            problems.append(f"{path}: {name}: found {json.dumps(patch)[:60]}, wanted patches under train or model")
        elif not all(isinstance(part, dict) and part for part in patch.values()):
            problems.append(f"{path}: {name}: found an empty patch, wanted keys with values")
        else:
            found.append(Intervention(name, patch.get("train", {}), patch.get("model", {})))
    if not found and not problems:
        problems.append(f"{path}: found no intervention, wanted at least one")
    if problems:
        raise ConfigError(*problems)
    return found


def make_design(
    name: DesignName, factors: Sequence[str], resolution: Resolution = "V", generators: Sequence[str] = ()
) -> Design:
    """Make a design over named factors; raises ConfigError where it is impossible, saying what is possible."""
    count = len(factors)
    if name == "replicates":
        return Design(name, (), (Arm(BASELINE, ()),))
    if name == "one-at-a-time":
        arms = [Arm(BASELINE, ()), *(Arm(factor, (factor,)) for factor in factors)]
        return Design(name, tuple(factors), tuple(arms))
    if name == "leave-one-out":
        if count < 2:
            raise ConfigError("--design leave-one-out: found 1 intervention, wanted at least 2 to stack")
        left_out = (Arm(f"without-{factor}", tuple(f for f in factors if f != factor)) for factor in factors)
        return Design(name, tuple(factors), (Arm(BASELINE, ()), Arm(STACK, tuple(factors)), *left_out))
    if not 2 <= count <= MAX_FACTORS:
        raise ConfigError(f"--design {name}: found {count} interventions, wanted 2 to {MAX_FACTORS}")
    words: tuple[Word, ...] = ()
    if name == "fraction":
        words = parse_generators(generators, count) if generators else best_generators(count, resolution)
    return Design(name, tuple(factors), tuple(factorial_arms(factors, words)), words)


def with_stack(design: Design) -> Design:
    """Add an arm with all changes to a one-at-a-time design; raises ConfigError for others, which have their own."""
    if design.name != "one-at-a-time" or len(design.factors) < 2:
        raise ConfigError("--with-stack: wanted --design one-at-a-time with at least 2 interventions")
    return replace(design, arms=(*design.arms, Arm(STACK, design.factors)))


def factorial_arms(factors: Sequence[str], generators: Sequence[Word]) -> Iterator[Arm]:
    """Yield the arms whose signs (+1 on, -1 off) multiply to +1 in every generator; all arms without one."""
    for size in range(len(factors) + 1):
        for on in combinations(range(len(factors)), size):
            signs = [1 if factor in on else -1 for factor in range(len(factors))]
            if all(math.prod(signs[factor] for factor in word) == 1 for word in generators):
                names = tuple(factors[factor] for factor in on)
                arm = STACK if size == len(factors) else ".".join(names) or BASELINE
                yield Arm(arm, names)


def defining_relation(generators: Sequence[Word]) -> list[Word]:
    """Return all words that the generators generate: every product of some of them."""
    words = []
    for chosen in chain.from_iterable(combinations(generators, n) for n in range(1, len(generators) + 1)):
        product: Word = frozenset()
        for word in chosen:
            product ^= word
        words.append(product)
    return words


def best_generators(factors: int, resolution: Resolution) -> tuple[Word, ...]:
    """Find the smallest fraction of at least a resolution, with the fewest short words among its size.

    Raises ConfigError where only the full factorial has it.
    """
    wanted = RESOLUTIONS[resolution]
    for basic in range(2, factors):
        extra = range(basic, factors)
        words = [frozenset(c) for size in range(2, basic + 1) for c in combinations(range(basic), size)]
        candidates = (
            tuple(word | {factor} for word, factor in zip(chosen, extra, strict=True))
            for chosen in combinations(words, len(extra))
        )
        best = min(candidates, key=_aberration, default=None)
        if best is not None and min(map(len, defining_relation(best))) >= wanted:
            return best
    raise ConfigError(
        f"--resolution {resolution}: found {factors} interventions, of which no fraction has it; wanted a lower "
        f"resolution or --design full-factorial ({2**factors} arms)"
    )


def _aberration(generators: Sequence[Word]) -> list[int]:
    """Order fractions: first by fewest words of length 1, then 2, and so on (Fries and Hunter 1980)."""
    lengths = [len(word) for word in defining_relation(generators)]
    return [lengths.count(length) for length in range(1, MAX_FACTORS + 1)]


def parse_generators(texts: Sequence[str], factors: int) -> tuple[Word, ...]:
    """Read generators such as E=ABCD; raises ConfigError."""
    words, known = [], LETTERS[:factors]
    for text in texts:
        left, _, right = text.upper().partition("=")
        if len(left) != 1 or len(right) < 2 or len(set(left + right)) != len(left + right):
            raise ConfigError(f"--generators: found {text!r}, wanted for example E=ABCD")
        if unknown := set(left + right) - set(known):
            raise ConfigError(f"--generators: found {sorted(unknown)[0]} in {text!r}, wanted letters of {known}")
        words.append(frozenset(known.index(letter) for letter in left + right))
    shortest = min((len(word) for word in defining_relation(words)), default=0)
    if len(words) >= factors or shortest < 3:
        raise ConfigError(
            f"--generators: found {' '.join(texts)}, which mixes up main effects with each other; "
            "wanted a fraction of resolution III or more"
        )
    return tuple(words)


def alternatives(factors: Sequence[str]) -> list[Design]:
    """Return every design that these factors allow, the smallest first, so that a user sees what less would cost."""
    found = [make_design("one-at-a-time", factors)]
    for name in ("leave-one-out", "full-factorial"):
        if 2 <= len(factors) <= MAX_FACTORS:
            found.append(make_design(name, factors))
    for resolution in RESOLUTIONS:
        try:
            fraction = make_design("fraction", factors, resolution)
        except ConfigError:
            continue
        if fraction not in found:
            found.append(fraction)
    return sorted(found, key=lambda design: len(design.arms))
