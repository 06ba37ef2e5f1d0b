"""Compare models by what they learn from instructions.

  python instruct.py respond quickstart my-run --out evals
  python instruct.py judge evals/answers/*.json --judge gpt-4.1 --out judged

`python instruct.py VERB --help` tells more of each verb.
"""

import argparse
import os
import sys
from pathlib import Path

from torch import nn

from harness.engine.distributed import Launch, choose_device, set_up_kernels
from harness.engine.opening import read_tensors
from harness.run.arguments import (
    add_device,
    add_runs_dir,
    dispatch,
    new_folder,
    parse_into,
    parser_of,
    positive,
    positive_or_zero,
    whole_number,
)
from harness.run.config import ModelConfig, TrainConfig
from harness.run.errors import exit_status_of
from harness.run.run_folder import RunFolder
from harness.run.streams import ignore_output_errors
from instruction.judge import STRENGTH_MARGIN, JudgeRequest, judge
from instruction.respond import ModelSource, RespondRequest, evaluate
from model import fingerprint, load_weights, uninitialized_model
from study.verdicts import MARGIN
from training.context import give_initial_weights


def main() -> None:
    """Do what the verb asks for; raises HarnessError."""
    ignore_output_errors()
    dispatch(__doc__, {"respond": respond_verb, "judge": judge_verb})


def respond_verb(words: list[str]) -> None:
    """Fine-tune models on instructions by one recipe, ask them, and compare them.

      python instruct.py respond quickstart quickstart/untrained --out evals

    RUN is a run's newest checkpoint, RUN/checkpoints/NAME another one, and
    RUN/untrained its initial weights, drawn or imported. The same command goes
    on after an interruption; with more runs and the same --out it adds them.
    """
    parser = parser_of(respond_verb.__doc__, "instruct.py respond")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="models to compare; the first is the baseline")
    parser.add_argument("--out", type=new_folder, required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--data", metavar="DATA", help="a file in Alpaca's format, or hf:OWNER/NAME[/PATH]"
                        "[@REVISION] (default: the set that ships)")  # fmt: skip
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="(default: DIR's, or the one that ships)")
    parser.add_argument("--margin", type=positive, default=MARGIN, help="smallest difference that matters (0.01)")
    add_device(parser)
    add_runs_dir(parser)
    request = parse_into(RespondRequest, parser, words)
    if len(set(request.runs)) < len(request.runs):
        parser.error("RUN: found one twice, wanted each model once")
    device = choose_device(request.device, Launch())
    set_up_kernels(device, use_tf32=False, deterministic=True)
    evaluate(request, ModelSource(build_model, fingerprint), device)


def build_model(folder: RunFolder, config: ModelConfig, train: TrainConfig, weights: Path | None) -> nn.Module:
    """Return a run's model with the weights of a file, or with its initial ones, on the CPU."""
    model = uninitialized_model(config)
    if weights is None:
        give_initial_weights(model, folder, train)
    else:
        load_weights(model, read_tensors(weights), weights)
    return model


def judge_verb(words: list[str]) -> None:
    """Let language models judge the answers of `respond`, and rank who gave them.

      python instruct.py judge evals/answers/*.json --judge gpt-4.1 --out judged

    Any OpenAI-compatible endpoint: OPENAI_BASE_URL and OPENAI_API_KEY come from
    the environment alone. The same command goes on after an interruption.
    """
    parser = parser_of(judge_verb.__doc__, "instruct.py judge")
    parser.usage = "%(prog)s FILE [FILE ...] --judge MODEL --out DIR [options]"
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="answers of one model each")
    parser.add_argument("--judge", metavar="MODEL", action="append", required=True, help="one or more times")
    parser.add_argument("--out", type=new_folder, required=True, metavar="DIR", help="where replies and results go")
    parser.add_argument("--baseline", metavar="RUN", help="to compare the others with (the first FILE's)")
    parser.add_argument(
        "--repeats", type=whole_number(), default=1, metavar="N", help="of each question in each order (1)"
    )
    parser.add_argument("--pairs", action="store_true", help="show two models at a time, not all together")
    parser.add_argument("--max-items", type=whole_number(), metavar="N", help="judge N items, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which answers are shown (0)")
    parser.add_argument(
        "--temperature", type=positive_or_zero, metavar="T", help="of the judge (the endpoint's default)"
    )
    _add_caps(parser)
    parser.add_argument("--offline", action="store_true", help="score the replies in DIR and ask for none")
    parser.add_argument("--margin", type=positive, default=STRENGTH_MARGIN, help="log-odds that matter (0.1)")
    request = parse_into(JudgeRequest, parser, words)
    if request.max_spend is not None and request.price_per_million_tokens is None:
        parser.error("--max-spend: needs --price-per-million-tokens, the dearer of the judge's prices")
    if len(set(request.judge)) < len(request.judge):
        parser.error("--judge: found one twice, wanted each once (--repeats asks again)")
    judge(request, os.environ)


def _add_caps(parser: argparse.ArgumentParser) -> None:
    """Add what bounds the requests to an endpoint."""
    parser.add_argument(
        "--tries", type=whole_number(), default=5, metavar="N", help="for a reply that can be read (5)"
    )
    parser.add_argument("--timeout", type=positive, default=60.0, metavar="SECONDS", help="of one request (60)")
    parser.add_argument("--max-minutes", type=positive, metavar="M", help="stop asking after so long")
    parser.add_argument(
        "--max-spend", type=positive, metavar="COST", help="stop before DIR's replies cost more than this"
    )
    parser.add_argument("--price-per-million-tokens", type=positive_or_zero, metavar="P", help="the dearest kind's")
    parser.add_argument(
        "--max-reply-tokens", type=whole_number(), default=1000, metavar="N", help="of one reply (1000)"
    )
    parser.add_argument("--parallel", type=whole_number(), default=4, metavar="N", help="requests at a time (4)")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
