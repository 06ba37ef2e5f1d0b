"""Let language models judge the answers that ift_respond.py collected, and rank the models that gave them.

  OPENAI_API_KEY=... python ift_judge.py evals/instructions/answers/*.json --judge gpt-4.1-mini --out evals/judged

Any OpenAI-compatible endpoint: OPENAI_BASE_URL and OPENAI_API_KEY come from the environment alone. The same command
goes on after an interruption; --offline scores what is there without a network.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from harness.run.errors import ConfigError, DataError, StopRequestedError, exit_status_of
from harness.run.files import utc_now, write_json, write_text
from harness.run.recipe import hash_of_json
from instruction.answers import ModelAnswers, load_answers, require_comparable
from instruction.client import Endpoint
from instruction.journal import Journal, held
from instruction.judging import Caps, Collector, JudgePrompt, Replies, Settings, plan_showings
from instruction.page import as_json, as_text, page
from instruction.prompt import MOST_SHOWN
from instruction.ranking import Ranking, rank

MARGIN = 0.1  # in log-odds: preferred in 52.5% of the pairs


def main() -> None:
    """Collect replies, rank, store."""
    arguments = parse_arguments()
    models = [load_answers(path) for path in arguments.files]
    require_comparable(models)
    baseline = arguments.baseline or models[0].model
    names = [model.model for model in models]
    if baseline not in names:
        raise ConfigError(f"--baseline: found {baseline!r:.80}, wanted one of {', '.join(names)}")
    if len(models) < 2 or (len(models) > MOST_SHOWN and not arguments.pairs):
        raise ConfigError(f"FILE: found {len(models)} models, wanted 2 to {MOST_SHOWN} (or --pairs for more)")
    settings, caps = settings_of(arguments), caps_of(arguments)
    showings = plan_showings(models, settings)
    with held(arguments.out), closing(Journal(arguments.out / "replies.jsonl")) as journal:
        replies, reason = Replies(journal), "--offline"
        if not arguments.offline:
            environment = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
            endpoint = Endpoint(*environment, timeout_seconds=arguments.timeout)
            replies.require_endpoint(endpoint.name, settings.judges)
            reason = collect(Collector(endpoint, replies, caps), showings, replies, caps)
        outcomes = [replies.outcome(showing, caps.tries) for showing in showings]
        left = sum(outcome.state == "open" for outcome in outcomes)
        unfinished = StopRequestedError(
            f"{left:,} of {len(showings):,} showings have no reply yet ({reason or 'the endpoint gave none'}); "
            "the same command goes on from here"
        )
        try:
            ranking = rank(outcomes, baseline, arguments.margin)
        except DataError:
            if left:
                raise unfinished from None
            raise
        report(arguments.out, ranking, models, describe(settings, models, replies, caps))
        if refused := [outcome.reason for outcome in outcomes if outcome.state == "refused"]:
            print(f"Refused: {len(refused):,} of {len(showings):,} showings, which count for nothing ({refused[0]})")
    if left:
        raise unfinished


def parse_arguments() -> argparse.Namespace:
    """Read the command line; bad usage exits with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s FILE [FILE ...] --judge MODEL --out DIR [options]",
    )
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="answers of one model each")
    parser.add_argument("--judge", metavar="MODEL", action="append", required=True, help="one or more times")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where replies and results go")
    parser.add_argument("--baseline", metavar="RUN", help="to compare the others with (the first FILE's)")
    parser.add_argument("--repeats", type=_whole, default=1, help="showings of each question in each order (1)")
    parser.add_argument("--pairs", action="store_true", help="show two models at a time, not all together")
    parser.add_argument("--max-items", type=_whole, metavar="N", help="judge N items, drawn by the seed (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which answers are shown (0)")
    parser.add_argument("--temperature", type=_positive_or_zero, help="of the judge (the endpoint's default)")
    parser.add_argument("--tries", type=_whole, default=5, help="for a reply that can be read, or any reply (5)")
    parser.add_argument("--timeout", type=_positive, default=60.0, help="of one request, in seconds (60)")
    parser.add_argument("--max-minutes", type=_positive, help="stop asking after so long")
    parser.add_argument("--max-spend", type=_positive, help="stop asking before DIR's replies cost more than this")
    parser.add_argument("--price-per-million-tokens", type=_positive_or_zero, metavar="P", help="the dearest kind's")
    parser.add_argument("--max-reply-tokens", type=_whole, default=1000, help="of one reply (1000)")
    parser.add_argument("--parallel", type=_whole, default=4, help="requests at a time (4)")
    parser.add_argument("--offline", action="store_true", help="score the replies in DIR and ask for none")
    parser.add_argument("--margin", type=_positive, default=MARGIN, help="log-odds that matter (0.1)")
    arguments = parser.parse_args()
    if arguments.max_spend is not None and arguments.price_per_million_tokens is None:
        parser.error("--max-spend: needs --price-per-million-tokens, the dearer of the judge's prices")
    if len(set(arguments.judge)) < len(arguments.judge):
        parser.error("--judge: found one twice, wanted each once (--repeats asks again)")
    return arguments


def _number(text: str, lowest: float, is_allowed: bool, words: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (lowest < value < math.inf or (is_allowed and value == lowest)):
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted {words}")
    return value


def _positive(text: str) -> float:
    return _number(text, 0, False, "a number above 0")


def _positive_or_zero(text: str) -> float:
    return _number(text, 0, True, "a number of at least 0")


def _whole(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a whole number above 0")
    return int(text)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Give what the requests depend on."""
    return Settings(
        judges=tuple(arguments.judge),
        seed=arguments.seed,
        repeats=arguments.repeats,
        pairs=arguments.pairs,
        max_items=arguments.max_items,
        max_reply_tokens=arguments.max_reply_tokens,
        temperature=arguments.temperature,
    )


def caps_of(arguments: argparse.Namespace) -> Caps:
    """Give the caps on tries, time and spend."""
    return Caps(
        tries=arguments.tries,
        parallel=arguments.parallel,
        max_seconds=None if arguments.max_minutes is None else 60 * arguments.max_minutes,
        max_spend=arguments.max_spend,
        price_per_million_tokens=arguments.price_per_million_tokens,
    )


def collect(collector: Collector, showings: Sequence[JudgePrompt], replies: Replies, caps: Caps) -> str:
    """Ask for the replies that are missing, with a progress bar; gives why it stopped early, or nothing."""
    missing = replies.missing(showings, caps.tries)
    with tqdm(total=len(missing), unit="reply", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        collector.collect(missing, bar.update)
    return collector.reason


def describe(settings: Settings, models: Sequence[ModelAnswers], replies: Replies, caps: Caps) -> dict[str, object]:
    """Say how the judging was done and what it used."""
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


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
