"""A GPU that cannot be used is refused in one line, and compiled code is made once."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ddp_train
from harness.engine import distributed, loss
from harness.engine.distributed import Launch, choose_device
from harness.run.config import load_model_config
from harness.run.errors import ConfigError
from model import uninitialized_model
from tests.conftest import Called
from tests.helpers import TINY_MODEL, write

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def pretend(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    """Let torch.cuda answer as on another machine."""
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The driver may be too old for this build of torch, which would then train on the CPU without a word."""
    pretend(monkeypatch, is_available=False)
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(distributed, "NVIDIA_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(
        ConfigError, match=f"found a GPU that torch {torch.__version__.replace('+', '.')} .* cannot use"
    ):
        choose_device("auto", Launch())
    assert choose_device("cpu", Launch()).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto", Launch()).type == "cpu"


@pytest.mark.parametrize(
    ("capability", "built", "fits"),
    [
        ((7, 0), CUDA_13, False),  # V100
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80"], True),
        ((8, 9), CUDA_13, True),  # RTX 4090, by the code for 8.6
        ((10, 3), CUDA_13, True),  # B300
        ((11, 0), CUDA_13, False),
        ((12, 1), ["sm_90a", "compute_90"], True),
        ((8, 0), ["sm_86", "compute_90"], False),
    ],
)
def test_a_gpu_without_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str], fits: bool
) -> None:
    pretend(
        monkeypatch, is_available=True, device_count=1, get_device_capability=capability, get_arch_list=built,
        get_device_name="a card",
    )  # fmt: skip
    if fits:
        assert choose_device("auto", Launch()) == torch.device("cuda", 0)
    else:
        with pytest.raises(
            ConfigError, match=r"found a card \(sm_\d+\), wanted a GPU that this torch has kernels for"
        ):
            choose_device("auto", Launch())


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.usefixtures("without_charts")
def test_nothing_is_compiled_again_inside_the_clock(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch,
    shuffle: bool,
) -> None:  # fmt: skip
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(loss, "compiled_softmax_gradient", lambda: loss.softmax_gradient)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    torch._dynamo.reset()
    folder = make_run(train={"compile": True, "shuffle": shuffle})
    place = (folder.name, datasets_dir, "--runs-dir", folder.parent, "--device", "cpu", "--max-steps", 2)
    done = call(ddp_train.main, *place)
    assert done.status == 0, done.stderr
    assert len(graphs) == 1
    assert done.stdout.startswith("Training on 1 x cpu\n")


def test_the_compiler_s_splitter_sees_every_parameter_of_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cuts the graph where DDP's buckets end; what it misses is reduced later than it could be."""
    from torch._dynamo.backends.distributed import DDPOptimizer

    model = uninitialized_model(
        load_model_config(write(tmp_path / "model.json", {**TINY_MODEL, "n_layers": 1, "qkv_bias": True}))
    )
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        splitter = DDPOptimizer(bucket_bytes_cap=2**30, backend_compile_fn=lambda part, _: part)
        splitter.compile_fn(graph, inputs)
        seen.extend(name for bucket in splitter.buckets for name in bucket.params)
        return graph

    monkeypatch.setattr(loss, "compiled_softmax_gradient", lambda: loss.softmax_gradient)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    torch.compile(loss.Objective(model), backend=backend, fullgraph=True)(tokens, tokens.clone())
    assert len(set(seen)) == len(list(model.parameters())), seen


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_attention_drops_at_the_rate_that_was_asked_for(device: str) -> None:
    """Some kernels round it to a sixteenth. Each visible position has the same weight, and a value of its own."""
    length = 64
    query = torch.zeros(64, 8, length, length, device=device, dtype=torch.float16 if device == "cuda" else None)
    value = torch.eye(length, device=device, dtype=query.dtype).expand_as(query)
    torch.manual_seed(1)
    kept = F.scaled_dot_product_attention(query, query, value, dropout_p=0.1, is_causal=True) > 0
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    rate = 1 - kept[..., visible].float().mean().item()
    assert rate == pytest.approx(0.1, abs=0.002)  # a million draws: a standard error of 0.0003


def test_kernels_are_set_up_for_the_rank_s_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    distributed.set_up_kernels(torch.device("cuda", 3), use_tf32=True, deterministic=False)
    assert chosen == [torch.device("cuda", 3)]


def test_deterministic_kernels_do_not_fill_what_is_written_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch would write NaN into every new tensor, a pass over memory each."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "")
    distributed.set_up_kernels(torch.device("cpu"), use_tf32=False, deterministic=True)
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(("drop_rate", "seeds"), [(0.0, 0), (0.1, 8)])
@pytest.mark.usefixtures("without_charts")
def test_generators_are_seeded_only_for_dropout(
    make_run: Callable[..., Path], datasets_dir: Path, call: Callable[..., Called], monkeypatch: pytest.MonkeyPatch,
    drop_rate: float, seeds: int,
) -> None:  # fmt: skip
    keys: list[tuple[int, ...]] = []
    monkeypatch.setattr(ddp_train, "seed_dropout", lambda *key: keys.append(key))
    folder = make_run(model={"drop_rate": drop_rate})
    place = (folder.name, datasets_dir, "--runs-dir", folder.parent, "--device", "cpu", "--max-steps", 2)
    assert call(ddp_train.main, *place).status == 0
    assert len(keys) == seeds
