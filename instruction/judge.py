"""Let language models judge collected answers, and rank the models: the work of `instruct.py judge`."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.run.console import progress_bar
from harness.run.errors import ConfigError, DataError, StopRequestedError
from harness.run.files import utc_now, write_json, write_text
from harness.run.recipe import hash_of_json
from instruction.answers import ModelAnswers, load_answers, require_comparable
from instruction.asking import Caps, Collector, JudgePrompt, JudgeSettings, Replies, plan_prompts
from instruction.client import Endpoint
from instruction.journal import Journal, held
from instruction.page import as_json, as_text, page
from instruction.prompt import MOST_SHOWN
from instruction.ranking import Ranking, rank

STRENGTH_MARGIN = 0.1  # in log-odds: preferred in 52.5% of the pairs


@dataclass(frozen=True)
class JudgeRequest:
    """Which answers to judge, by whom, and within which caps."""

    files: list[Path]
    judge: list[str]
    out: Path
    baseline: str | None
    repeats: int
    pairs: bool
    max_items: int | None
    seed: int
    temperature: float | None
    tries: int
    timeout: float
    """Seconds."""
    max_minutes: float | None
    max_spend: float | None
    price_per_million_tokens: float | None
    max_reply_tokens: int
    parallel: int
    offline: bool
    margin: float


def judge(request: JudgeRequest, environment: Mapping[str, str]) -> None:
    """Collect replies, rank the models, and write the result; raises HarnessError.

    Raises StopRequestedError where replies are still missing: the same command goes on from there.
    """
    models = [load_answers(path) for path in request.files]
    require_comparable(models)
    baseline = request.baseline or models[0].model
    names = [model.model for model in models]
    if baseline not in names:
        raise ConfigError(f"--baseline: found {baseline!r:.80}, wanted one of {', '.join(names)}")
    if len(models) < 2 or (len(models) > MOST_SHOWN and not request.pairs):
        raise ConfigError(f"FILE: found {len(models)} models, wanted 2 to {MOST_SHOWN} (or --pairs for more)")
    settings, caps = settings_of(request), caps_of(request)
    prompts = plan_prompts(models, settings)
    with held(request.out), closing(Journal(request.out / "replies.jsonl")) as journal:
        replies, reason = Replies(journal), "--offline"
        if not request.offline:
            address, key = environment.get("OPENAI_BASE_URL"), environment.get("OPENAI_API_KEY")
            endpoint = Endpoint(address, key, timeout_seconds=request.timeout)
            replies.require_endpoint(endpoint.name, settings.judges)
            reason = collect(Collector(endpoint, replies, caps), prompts, replies, caps)
        outcomes = [replies.outcome(prompt, caps.tries) for prompt in prompts]
        left = sum(outcome.state == "open" for outcome in outcomes)
        unfinished = StopRequestedError(
            f"{left:,} of {len(prompts):,} prompts have no reply yet ({reason or 'the endpoint gave none'}); "
            "the same command goes on from here"
        )
        try:
            ranking = rank(outcomes, baseline, request.margin)
        except DataError:
            if left:
                raise unfinished from None
            raise
        report(request.out, ranking, models, describe(settings, models, replies, caps))
        if refused := [outcome.reason for outcome in outcomes if outcome.state == "refused"]:
            print(f"Refused: {len(refused):,} of {len(prompts):,} prompts, which count for nothing ({refused[0]})")
    if left:
        raise unfinished


def settings_of(request: JudgeRequest) -> JudgeSettings:
    """Return the settings on which the requests depend."""
    return JudgeSettings(
        judges=tuple(request.judge),
        seed=request.seed,
        repeats=request.repeats,
        pairs=request.pairs,
        max_items=request.max_items,
        max_reply_tokens=request.max_reply_tokens,
        temperature=request.temperature,
    )


def caps_of(request: JudgeRequest) -> Caps:
    """Return the caps on tries, time and spend."""
    return Caps(
        tries=request.tries,
        parallel=request.parallel,
        max_seconds=None if request.max_minutes is None else 60 * request.max_minutes,
        max_spend=request.max_spend,
        price_per_million_tokens=request.price_per_million_tokens,
    )


def collect(collector: Collector, prompts: Sequence[JudgePrompt], replies: Replies, caps: Caps) -> str:
    """Ask for the missing replies, with a progress bar, and return why it stopped early; empty where it did not."""
    missing = replies.missing(prompts, caps.tries)
    with progress_bar(len(missing), "reply") as bar:
        collector.collect(missing, bar.update)
    return collector.reason


def describe(
    settings: JudgeSettings, models: Sequence[ModelAnswers], replies: Replies, caps: Caps
) -> dict[str, object]:
    """Return how the judging was done and what it used, for judgement.json."""
    return {
        "settings": asdict(settings),
        "answers": {model.model: hash_of_json(asdict(model)) for model in models},
        "recipe_hash": models[0].recipe_hash,
        "data_sha256": models[0].data_sha256,
        "tokens": replies.tokens,
        "spend": caps.price(replies.tokens),
        "time": utc_now(),
    }


def report(out: Path, ranking: Ranking, models: Sequence[ModelAnswers], made_with: dict[str, object]) -> None:
    """Print the ranking, and write judgement.json and judgement.html."""
    write_json(out / "judgement.json", {**as_json(ranking), "made_with": made_with})
    write_text(out / "judgement.html", page(ranking, models, "Answers judged"))
    print(as_text(ranking))
    spend = "" if made_with["spend"] is None else f", at most {made_with['spend']:.4f} spent"
    print(f"Tokens of all replies: {made_with['tokens']:,}{spend}. Wrote {out / 'judgement.json'} and judgement.html")
