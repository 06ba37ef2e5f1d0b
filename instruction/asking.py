"""Collect judges' replies: which prompts there are, what was answered before, and when to stop asking.

Every reply is on disk before it counts, under the SHA-256 of its whole request. So a judging goes on where it was
interrupted, and is scored again without a network.
"""

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from harness.run.errors import ConfigError, DataError
from harness.run.files import utc_now
from harness.run.recipe import hash_of_json
from instruction.answers import Answer, ModelAnswers
from instruction.client import Endpoint, RefusedError, Reply, UnavailableError
from instruction.journal import Journal
from instruction.prompt import labels_of, messages_for, read_reply

LONGEST_WAIT_SECONDS = 60.0
FAILURES_IN_A_ROW = 3  # prompts without any reply, after which the endpoint is taken to be down
BYTES_PER_TOKEN = 2  # lower than any tokenizer in use has on average, so that no reservation is too small


@dataclass(frozen=True)
class JudgeSettings:
    """What the replies depend on; a folder of replies is made with one of these."""

    judges: tuple[str, ...]
    seed: int
    repeats: int
    pairs: bool
    max_items: int | None
    max_reply_tokens: int
    temperature: float | None


@dataclass(frozen=True)
class Caps:
    """When to stop asking; None never."""

    tries: int
    parallel: int
    max_seconds: float | None
    max_spend: float | None
    price_per_million_tokens: float | None

    def price(self, tokens: int) -> float | None:
        """Return what tokens cost; None where the price is not known."""
        return None if self.price_per_million_tokens is None else tokens * self.price_per_million_tokens / 1e6


@dataclass(frozen=True)
class JudgePrompt:
    """Some models' answers to one item after one fine-tuning, shown to one judge in one order."""

    judge: str
    item: str
    seed: int
    repeat: int
    is_reversed: bool
    shown: tuple[str, ...]
    """Models in the order shown."""
    request: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """SHA-256 of the whole request."""
        return hash_of_json(self.request)

    @property
    def largest_cost_tokens(self) -> int:
        """Upper estimate of the tokens that the request uses, reply included."""
        size = sum(len(message["content"].encode()) for message in self.request["messages"])
        return size // BYTES_PER_TOKEN + int(self.request["max_completion_tokens"])


State = Literal["read", "unreadable", "refused", "open"]


@dataclass(frozen=True)
class PromptOutcome:
    """What came of a prompt; scores by model where the reply could be read."""

    prompt: JudgePrompt
    state: State
    scores: Mapping[str, float]
    reason: str = ""
    """Why the endpoint refused."""


def plan_prompts(models: Sequence[ModelAnswers], settings: JudgeSettings) -> list[JudgePrompt]:
    """Return all prompts, each followed by the same answers in reverse; the order of items is keyed by the seed.

    So a judging that is stopped has judged a random part of the items, whole.
    """
    answers = {model.model: {answer.cell: answer for answer in model.answers} for model in models}
    cells = sorted(next(iter(answers.values())))
    items = sorted({item for item, _ in cells}, key=lambda item: hash_of_json([settings.seed, item]))
    wanted = {item: place for place, item in enumerate(items[: settings.max_items])}
    names = sorted(answers)
    groups = list(itertools.combinations(names, 2)) if settings.pairs else [tuple(names)]
    prompts = []
    chosen = sorted((cell for cell in cells if cell[0] in wanted), key=lambda cell: (wanted[cell[0]], cell[1]))
    for item, seed in chosen:
        for group, judge, repeat in itertools.product(groups, settings.judges, range(settings.repeats)):
            place = [settings.seed, item, seed, judge, repeat]
            mixed = tuple(sorted(group, key=lambda name: hash_of_json([*place, group, name])))
            for is_reversed in (False, True):
                shown = mixed[::-1] if is_reversed else mixed
                request = _request(settings, judge, [answers[name][item, seed] for name in shown], [*place, shown])
                prompts.append(JudgePrompt(judge, item, seed, repeat, is_reversed, shown, request))
    return prompts


def _request(settings: JudgeSettings, judge: str, answers: Sequence[Answer], salt: object) -> dict[str, Any]:
    request: dict[str, Any] = {
        "model": judge,
        "messages": messages_for(answers, salt),
        "max_completion_tokens": settings.max_reply_tokens,
    }
    if settings.temperature is not None:
        request["temperature"] = settings.temperature
    return request


class Replies:
    """All replies of a folder, by request; what was spent on them."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._lock = threading.Lock()
        self._by_key: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.tokens = 0
        self._reserved = 0
        self._endpoints: set[tuple[str, str]] = set()
        for line in journal.lines:
            try:
                self._count(line)
            except (KeyError, TypeError, ValueError):
                raise DataError(f"{journal.path}: found a line that is not a judge's reply") from None

    def _count(self, line: dict[str, Any]) -> None:
        self._by_key[line["key"]].append(line)
        self._endpoints.add((line["judge"], line["endpoint"]))
        self.tokens += int(line["tokens"])

    def require_endpoint(self, name: str, judges: Sequence[str]) -> None:
        """Raise ConfigError where another endpoint answered for one of the judges: it may be another model."""
        other = sorted((judge, place) for judge, place in self._endpoints if judge in judges and place != name)
        if other:
            judge, place = other[0]
            raise ConfigError(
                f"{self.journal.path}: {judge} has replies of {place}, wanted those of {name} (or another --out)"
            )

    def reserve(self, tokens: int, caps: Caps) -> bool:
        """Reserve tokens for a request under way; return False where that would exceed the spend."""
        with self._lock:
            cost = caps.price(self.tokens + self._reserved + tokens)
            if caps.max_spend is not None and (cost is None or cost > caps.max_spend):
                return False
            self._reserved += tokens
            return True

    def add(self, prompt: JudgePrompt, reserved: int, line: Mapping[str, object]) -> None:
        """Write the result of a request to disk, and release the tokens that were reserved for it."""
        whole = {"key": prompt.key, "judge": prompt.judge, "time": utc_now(), "request": prompt.request, **line}
        try:
            self.journal.append(whole)
        finally:
            with self._lock:
                self._reserved -= reserved
                self._count(whole)

    def outcome(self, prompt: JudgePrompt, tries: int) -> PromptOutcome:
        """Return what came of a prompt: the first reply that can be read counts, and `tries` that cannot end it."""
        labels, unreadable, refusal = labels_of(len(prompt.shown)), 0, None
        for line in self._by_key.get(prompt.key, []):
            if line.get("refused"):
                refusal = str(line.get("reason", ""))
            if not isinstance(line.get("text"), str):
                continue  # the endpoint did not answer
            if (scores := read_reply(line["text"], labels)) is not None:
                by_model = {model: scores[label] for label, model in zip(labels, prompt.shown, strict=True)}
                return PromptOutcome(prompt, "read", by_model)
            unreadable += 1
        if unreadable >= tries:
            return PromptOutcome(prompt, "unreadable", {})
        return PromptOutcome(prompt, "open", {}) if refusal is None else PromptOutcome(prompt, "refused", {}, refusal)

    def missing(self, prompts: Sequence[JudgePrompt], tries: int) -> list[JudgePrompt]:
        """Return the prompts to ask for: those without an outcome, then those refused, which are asked once more.

        A refusal may be the request's fault, or that of an account or a server that has been put right since.
        """
        states = {prompt.key: self.outcome(prompt, tries).state for prompt in prompts}
        return [prompt for state in ("open", "refused") for prompt in prompts if states[prompt.key] == state]


class Collector:
    """Asks for what is missing, on several threads, within the caps."""

    def __init__(self, endpoint: Endpoint, replies: Replies, caps: Caps) -> None:
        self._endpoint, self._replies, self._caps = endpoint, replies, caps
        self._deadline = None if caps.max_seconds is None else time.monotonic() + caps.max_seconds
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._failures_in_a_row = 0
        self._refused_in_a_row: set[str] = set()
        self.reason = ""
        """Why it stopped early; empty where it did not."""

    def collect(self, prompts: Sequence[JudgePrompt], progress: Callable[[], object]) -> None:
        """Ask until every prompt has an outcome or a cap is reached; `progress` is called after each prompt.

        Raises what no further request could mend (ConfigError, an error of the disk). An interrupt waits for the
        replies under way, which are paid for.
        """
        with ThreadPoolExecutor(self._caps.parallel) as pool:
            under_way = [pool.submit(self._settle, prompt, progress) for prompt in prompts]
            try:
                for future in under_way:
                    future.result()
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)

    def _halt(self, reason: str) -> None:
        with self._lock:
            self.reason = self.reason or reason
        self._stop.set()

    def _settle(self, prompt: JudgePrompt, progress: Callable[[], object]) -> None:
        """Ask for one prompt until its outcome is known, the endpoint fails too often, or asking stops."""
        failures, is_second_chance = 0, self._state_of(prompt) == "refused"
        while not self._stop.is_set() and (is_second_chance or self._state_of(prompt) == "open"):
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._halt("--max-minutes is reached")
                return
            reserved = prompt.largest_cost_tokens
            if not self._replies.reserve(reserved, self._caps):
                self._halt("--max-spend is reached")
                return
            failure = self._ask(prompt, reserved)
            if failure is None:
                self._answered()
            elif isinstance(failure, RefusedError):
                if not is_second_chance:
                    self._refused(prompt, failure)
                break
            else:
                failures += 1
                if failures >= self._caps.tries:
                    self._failed(failure)
                    return
                self._wait(failure, failures)
                continue
            is_second_chance = False
        progress()

    def _state_of(self, prompt: JudgePrompt) -> State:
        return self._replies.outcome(prompt, self._caps.tries).state

    def _answered(self) -> None:
        with self._lock:
            self._failures_in_a_row = 0
            self._refused_in_a_row.clear()

    def _failed(self, failure: UnavailableError) -> None:
        with self._lock:
            self._failures_in_a_row += 1
            is_down = self._failures_in_a_row >= FAILURES_IN_A_ROW
        if is_down:
            self._halt(f"the endpoint does not answer ({failure})")

    def _refused(self, prompt: JudgePrompt, refusal: RefusedError) -> None:
        """Stop where several items in a row are refused: then the cause is not in the items."""
        with self._lock:
            self._refused_in_a_row.add(prompt.item)
            is_hopeless = len(self._refused_in_a_row) >= FAILURES_IN_A_ROW
        if is_hopeless:
            self._halt(f"the endpoint refuses every request ({refusal})")

    def _ask(self, prompt: JudgePrompt, reserved: int) -> UnavailableError | RefusedError | None:
        """Send one request and store its result; return the failure where there was no reply."""
        line: dict[str, object] = {"endpoint": self._endpoint.name, "text": None, "tokens": 0}
        failure: UnavailableError | RefusedError | None = None
        try:
            reply: Reply = self._endpoint.ask(prompt.request)
            counted = reserved if reply.tokens is None else reply.tokens
            line |= {"text": reply.text, "tokens": counted, "is_estimate": reply.tokens is None}
        except RefusedError as error:
            failure = error
            line |= {"refused": True, "reason": str(error)}
        except UnavailableError as error:
            failure = error
            line |= {"reason": str(error), "tokens": reserved if error.may_cost else 0, "is_estimate": True}
        except BaseException:
            self._stop.set()
            raise
        self._replies.add(prompt, reserved, line)
        return failure

    def _wait(self, failure: UnavailableError, failures: int) -> None:
        """Wait as long as the endpoint asks, or 1, 2, 4, ... seconds, and no longer than the time that is left."""
        seconds = float(2 ** (failures - 1)) if failure.wait_seconds is None else failure.wait_seconds
        seconds = min(seconds, LONGEST_WAIT_SECONDS)
        if self._deadline is not None:
            seconds = min(seconds, max(0.0, self._deadline - time.monotonic()))
        self._stop.wait(seconds)
