"""The techniques that the benchmarks time change nothing but rounding, and the benchmarks measure what they say."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoint_cost, cuda_check, generated_code, gpu_check, memory, throughput, tokens_to_loss
from benchmarks.arrangements import (
    PlainObjective,
    Shape,
    Techniques,
    build_arrangement,
    build_default,
    replace_modules,
    train_config,
)
from harness.engine.costs import GIB, microbatch_gib
from harness.engine.loss import Objective
from harness.run.config import ModelConfig, TrainConfig
from harness.run.errors import ConfigError
from harness.run.model_size import count_parameters
from model import GPTModel, initialise, uninitialized_model
from study.assemble import ComparisonRequest, assemble
from study.results import Result
from tests.conftest import Called
from tests.helpers import REQUIRED_TRAIN, run
from tests.test_model import INTERVENTIONS, STACKS
from tests.test_verdicts import make_metadata

CPU = torch.device("cpu")
TINY = ModelConfig(vocab_size=97, context_length=16, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True)
FUSED = Techniques(fused_attention=True, fused_layer_norm=True)


def model_with(techniques: Techniques) -> GPTModel:
    model = uninitialized_model(TINY)
    initialise(model, 3)
    replace_modules(model, techniques)
    return model


@pytest.mark.parametrize(
    "techniques",
    [Techniques(), replace(FUSED, fused_layer_norm=False), replace(FUSED, fused_attention=False)],
    ids=["published", "plain LayerNorm", "naive attention"],
)
def test_fused_modules_compute_what_the_textbook_says(techniques: Techniques) -> None:
    tokens = torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (model_with(FUSED), model_with(techniques)):
        loss, _ = (Objective if techniques != Techniques() else PlainObjective)(model)(tokens, tokens)
        results.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    (fused, fused_gradients), (plain, plain_gradients) = results
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
    for found, wanted in zip(fused_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(throughput.arrangements(CPU)))
def test_every_arrangement_trains(name: str) -> None:
    shape = Shape(TINY, microbatch_size=2, accumulation_steps=2)
    step = throughput.arrangements(CPU)[name](shape, CPU)
    step()
    step()


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    """A machine that is twice as slow in one round is so for all, and no ratio shows it."""
    shape = Shape(TINY, microbatch_size=4)
    seconds = {"published": [1.0, 2.0, 1.0], "better": [0.5, 1.0, 0.5]}
    rows = throughput.summarise(seconds, {"published": None, "better": None}, shape, peak=1e12)
    assert [row.ratio for row in rows] == [1.0, 2.0]
    assert rows[1].ratio_low == rows[1].ratio_high == 2.0
    assert rows[0].tokens_per_second == 64.0
    assert "| better | 128 | 64 to 128 | 2.000" in throughput.table(rows, shape, CPU, 1e12)


def test_a_contender_is_a_file_with_build(tmp_path: Path) -> None:
    path = tmp_path / "theirs.py"
    path.write_text("def build(shape, device):\n    return lambda: shape.microbatches()[0][0].sum()\n")
    builders = {
        "published": lambda s, d: build_arrangement(s, d, Techniques()),
        "theirs": throughput.load_contender(path),
    }
    seconds, _ = throughput.measure(builders, Shape(TINY, 2), CPU, rounds=2)
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_default_arrangement_is_the_trainer_s_own_step() -> None:
    build_default(Shape(TINY, 2, 2), CPU)()


def test_memory_counted_reaches_the_goals() -> None:
    """32 sequences of 1024 tokens in 24 GB, and 53 with the lean loss; the published arrangement had room for 6."""
    default = memory.count("default", memory.GPT2, FUSED, is_lean=True)
    assert default.fits[24] >= 53
    assert default.fits[40] >= 96


@pytest.mark.parametrize(
    ("change", "is_recomputed"),
    [
        *((change, False) for change in [{}, {"drop_rate": 0.1}, *INTERVENTIONS, *STACKS]),
        *((change, True) for change in [{}, *STACKS]),
    ],
    ids=str,
)
def test_the_plan_s_memory_is_the_memory_counted(change: dict[str, Any], is_recomputed: bool) -> None:
    model = replace(memory.GPT2, n_layers=4, vocab_size=50257 if is_recomputed else 4096, **change)
    batch = {"microbatch_size": 8, "activation_checkpointing": is_recomputed}
    train = TrainConfig(**{**REQUIRED_TRAIN, **batch, "amp_dtype": "bfloat16", "use_amp": True, "compile": False})
    counted = memory.peak_bytes(model, FUSED, 8, True, is_recomputed)
    assert microbatch_gib(model, train) == pytest.approx(counted / GIB, rel=0.1)


def test_a_byte_is_counted_while_it_lives() -> None:
    held = torch.empty(1000, device="meta")
    with memory.PeakTracker([held]) as tracker:
        first = held + 1  # 4000 bytes
        del first
        second = held * 2
        third = second.view(10, 100) + 1
    assert tracker.peak == 8000
    assert third.shape == (10, 100)


def test_generated_code_is_read(tmp_path: Path) -> None:
    """Buffers live from their allocation to their deletion, under whatever name; an operator's results count too."""
    source = """
def call(self, args):
    buf0 = empty_strided_cuda((1000, 2), (2, 1), torch.float32)
    triton_red_fused_0.run(primals_1, buf0, 1000, stream=raw_stream0)
    buf1 = buf0; del buf0  # reuse
    buf2 = torch.ops.cuda_check.flash.default(buf1, 0.1)
    buf3 = buf2[0]
    assert_size_stride(buf3, (500, 4), (4, 1), 'torch.ops.cuda_check.flash.default')
    del buf2
    del buf1
    buf4 = empty_strided_cuda((10, ), (1, ), torch.int64)
    extern_kernels.mm(buf3, primals_1, out=buf4)
    return (buf3, buf4, )

runner = Runner(partitions=[])

def get_args():
    primals_1 = rand_strided((1000, 2), (2, 1), device='cuda:0', dtype=torch.bfloat16)
"""
    program = generated_code.read_program(source, {"cuda_check.flash": ("bfloat16",)})
    assert program.launches == [generated_code.Launch("triton_red_fused_0", (4000, 8000))]
    assert (program.products, program.operators) == (1, 1)
    assert program.peak_bytes == 8000 + 4000
    assert program.kept_bytes == 4000 + 80


@pytest.mark.parametrize("sequences", [1, 12, 64, 128, 192])
def test_the_compiled_loss_is_lean_at_every_size(sequences: int) -> None:
    """A chunk's logits and their gradient, weight and its gradient, and what the result itself takes."""
    assert cuda_check.loss_bytes(cuda_check.Case("sm_90", sequences)) <= cuda_check.MOST_LOSS_BYTES


def test_memory_estimate_is_what_generated_code_allocates() -> None:
    """The plan's estimate of a micro-batch against benchmarks/results/cuda-check.json, within a tenth."""
    rows = {row["case"]: row for row in json.loads((throughput.RESULTS / "cuda-check.json").read_text())["rows"]}
    cases: list[tuple[str, dict[str, Any], float]] = [
        ("bfloat16", {}, 0.0),
        ("float16, dropout 0.1", {}, 0.1),
        ("bfloat16, activation_checkpointing", {"activation_checkpointing": True}, 0.0),
    ]
    for size in (12, 64):
        config = replace(train_config(Shape(throughput.GPT2, size)), use_amp=True)
        for words, changes, drop_rate in cases:
            model = replace(throughput.GPT2, drop_rate=drop_rate)
            estimated = microbatch_gib(model, replace(config, **changes)) * 1024
            assert estimated == pytest.approx(rows[f"sm_90, {size} x 1024, {words}"]["peak_mib"], rel=0.1), words
    assert not any(row["problems"] for row in rows.values())


def test_a_step_of_the_gpu_check_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "import sys; print('first\\nno such card', file=sys.stderr); sys.exit(3)"]
    found = {"advice": {"peak": "unknown"}, "curve": gpu_check.last_line_of(failing)}
    monkeypatch.setattr(gpu_check, "run_step", lambda name, _: {**found.get(name, {"all": "well"}), "seconds": 1})
    done = call(lambda: sys.exit(gpu_check.main()), "--device", "cpu", "--results", tmp_path)
    assert done.status == 1
    text = (tmp_path / "gpu-cpu.md").read_text()
    assert "| curve | 1 | FAILED: status 3: no such card |" in text
    assert "| tests | 1 | all well |" in text
    assert json.loads((tmp_path / "gpu-cpu.json").read_text())["steps"]["curve"]["output"] == [
        "first",
        "no such card",
    ]


def test_the_cost_of_a_checkpoint_is_measured() -> None:
    shape = Shape(gpu_check.TINY, 2)
    seconds, size = checkpoint_cost.measure(shape.model, train_config(shape), torch.device("cpu"), rounds=2)
    assert [len(values) for values in seconds.values()] == [2, 2, 2]
    assert size > 3 * 4 * count_parameters(shape.model).total


@pytest.mark.slow
def test_every_step_of_the_gpu_check_runs_on_a_cpu(tmp_path: Path) -> None:
    done = run("-m", "benchmarks.gpu_check", "--device", "cpu", "--results", tmp_path, check=None)
    assert done.returncode == 0, done.stdout
    steps = json.loads((tmp_path / "gpu-cpu.json").read_text())["steps"]
    assert set(steps) == set(gpu_check.STEPS)


def of_lengths(name: str, losses: dict[int, float], seed: int) -> list[Result]:
    return [
        Result(f"{name}-{tokens}-s{seed}", name, str(seed), f"{seed}/{seed}", loss, make_metadata(tokens_seen=tokens))
        for tokens, loss in losses.items()
    ]


def test_tokens_to_equal_loss_are_found_between_lengths_of_the_same_seed(tmp_path: Path) -> None:
    # Losses are 10 - log2(tokens), so that 1.5 below the longest's is reached at 2^-1.5 of its tokens.
    reached = [run for seed in (1, 2, 3) for run in of_lengths("old", {1024: 1.5 + seed / 10}, seed)]
    by = [run for seed in (1, 2, 3) for run in of_lengths("new", {256: 2 + seed / 10, 512: 1 + seed / 10}, seed)]
    found = tokens_to_loss.ratios(reached, by)
    assert found == {f"old-1024-s{seed}": pytest.approx(2**-1.5) for seed in (1, 2, 3)}
    assert "On 3 seeds: 35.4% of the tokens, 95% CI 35.4% to 35.4%" in tokens_to_loss.in_words(found)
    table = tmp_path / "losses.csv"
    tokens_to_loss.write_table(table, reached, by)
    judged = assemble(ComparisonRequest(tmp_path, losses=table, baseline="reached")).judgement.arms
    assert {item.group.recipe: item.estimate.difference for item in judged if item.estimate} == {
        "256 tokens": pytest.approx(0.5),
        "512 tokens": pytest.approx(-0.5),
    }
    with pytest.raises(ConfigError, match="old-1024-s1: found runs on its seeds with losses 2"):
        tokens_to_loss.ratios(reached, by[::2])
