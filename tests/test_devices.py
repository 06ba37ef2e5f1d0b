"""A GPU that cannot be used is refused in one line, and compiled code is made once."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ddp_train
from harness.engine import distributed, loss
from harness.engine.distributed import Launch, choose_device
from harness.run.errors import ConfigError
from tests.conftest import Called

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
