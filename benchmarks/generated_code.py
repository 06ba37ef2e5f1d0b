"""Let Inductor write the CUDA code of a function on a machine without a GPU, and read it.

Fake tensors are traced, the graphs' devices are changed to cuda:0, and Inductor lowers them for a card that it is
told about. Nothing is run, so nothing here is a time. It takes a CUDA build of torch with its Triton, and no driver.
What is replaced below is private to torch; tried with 2.13.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int64": 8, "int32": 4, "bool": 1, "uint8": 1}
CARDS = {
    "sm_80": ("NVIDIA A100-SXM4-40GB", 8, 0, 108),
    "sm_86": ("NVIDIA GeForce RTX 3090", 8, 6, 82),
    "sm_90": ("NVIDIA H100 80GB HBM3", 9, 0, 132),
    "sm_120": ("NVIDIA GeForce RTX 5090", 12, 0, 170),
}


class NoGuard:
    """Stands for the guards that make a device current."""

    def __init__(self, *_: object) -> None:
        self.idx = self.prev_idx = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> bool:
        return False


@contextmanager
def pretending_to_have(architecture: str) -> Iterator[None]:
    """Have torch and Triton answer as with one card of the architecture."""
    import torch._dynamo.device_interface as interfaces
    import torch._functorch.config
    import torch._inductor.compile_fx
    import torch._inductor.config
    import torch._inductor.scheduler
    import torch._inductor.utils
    import torch.utils._triton
    import triton
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    name, major, minor, multiprocessors = CARDS[architecture]
    is_large = major in (8, 9) and minor == 0
    properties = SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=multiprocessors, total_memory=40 * 2**30,
        max_threads_per_multi_processor=2048 if is_large else 1536, max_threads_per_block=1024, warp_size=32,
        regs_per_multiprocessor=65536, shared_memory_per_block=49152, L2_cache_size=40 * 2**20,
        shared_memory_per_block_optin=166_912 if is_large else 101_376,
        shared_memory_per_multiprocessor=167_936 if is_large else 102_400,
        gcnArchName="", uuid="", is_integrated=0, is_multi_gpu_board=0,
        memory_clock_rate=1_215_000, memory_bus_width=5120, clock_rate=1_410_000,
    )  # fmt: skip
    capability = 10 * major + minor
    of_cuda: dict[str, Any] = {
        "is_available": True, "_lazy_init": None, "device_count": 1, "current_device": 0, "synchronize": None,
        "get_device_properties": properties, "_get_device_properties": properties, "set_device": None,
        "get_device_capability": (major, minor), "get_device_name": name, "is_bf16_supported": True,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }  # fmt: skip
    of_interface = {
        "is_triton_capable": True, "raise_if_triton_unavailable": None, "is_available": True, "current_device": 0,
        "exchange_device": 0, "maybe_exchange_device": 0, "get_compute_capability": capability,
        "get_device_properties": properties,
    }  # fmt: skip
    of_worker = {"get_device_properties": properties, "current_device": 0}
    of_triton = {
        "get_current_target": GPUTarget("cuda", capability, 32), "get_current_device": 0, "get_current_stream": 0,
        "get_active_torch_device": torch.device("cuda", 0), "is_active": True, "map_python_to_cpp_type": "int",
    }  # fmt: skip
    interface, inductor = interfaces.CudaInterface, torch._inductor
    with ExitStack() as stack:

        def answer(owner: Any, answers: dict[str, Any]) -> None:
            for key, value in answers.items():
                stack.enter_context(patch.object(owner, key, _always(value), create=True))

        answer(torch.cuda, of_cuda)
        raw = ("getDevice", "getCurrentRawStream", "exchangeDevice", "maybeExchangeDevice", "setDevice")
        answer(torch._C, {f"_cuda_{key}": 0 for key in raw})
        answer(torch.accelerator, {"current_device_index": 0, "current_stream": None})
        answer(torch._subclasses.fake_tensor, {"init_gpu_context": None, "init_cuda_context": None})
        answer(interface, of_interface)
        answer(interface.Worker, of_worker)
        for module in (torch.utils._triton, inductor.utils, inductor.scheduler, inductor.graph, inductor.compile_fx):
            answer(module, {"has_triton": True, "has_triton_package": True})
        for owner, key in ((torch.cuda, "device"), (torch.cuda, "_DeviceGuard"), (interface, "device")):
            stack.enter_context(patch.object(owner, key, NoGuard))
        stack.enter_context(patch.object(torch.cuda, "_CudaDeviceProperties", SimpleNamespace))
        caches = {"compile_threads": 1, "fx_graph_cache": False, "autotune_local_cache": False}
        stack.enter_context(inductor.config.patch(caches))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        triton.runtime.driver.set_active(SimpleNamespace(**{key: _always(of_triton[key]) for key in of_triton}))
        DeviceProperties.create.cache_clear()
        yield


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def generate(architecture: str, function: Callable[..., Any], *arguments: torch.Tensor) -> dict[str, str]:
    """Return the CUDA source that Inductor writes for a function's forward pass and, of a scalar, its backward pass.

    `arguments` are fake CPU tensors. Raises an error of torch where a graph breaks, and ValueError where a second
    call with other tensors compiles again.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_compiler  # type: ignore[attr-defined]
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import detect_fake_mode
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    graphs: dict[str, list[Any]] = {"forward": [], "backward": []}

    def keep(kind: str) -> Any:
        def compiler(module: Any, _: Any) -> Any:
            graphs[kind].append(module)
            return module

        return make_boxed_compiler(compiler)

    def partition(module: Any, inputs: Any, **options: Any) -> Any:
        values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
        with V.set_fake_mode(detect_fake_mode([value for value in values if isinstance(value, torch.Tensor)])):
            joint_graph_passes(module)
        options.pop("compiler", None)
        return min_cut_rematerialization_partition(module, inputs, compiler="inductor", **options)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        decompositions=select_decomp_table(),
        partition_fn=partition,
    )
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for _ in range(2):
        out = compiled(*arguments)
        if isinstance(out, torch.Tensor) and out.requires_grad:
            out.backward()  # type: ignore[no-untyped-call]
        arguments = tuple(torch.empty_like(argument) for argument in arguments)
    if any(len(modules) > 1 for modules in graphs.values()):
        raise ValueError("a second micro-batch was compiled again")
    traced = {kind: modules[0] for kind, modules in graphs.items() if modules}
    with pretending_to_have(architecture):
        return {kind: _lowered(module, kind == "backward") for kind, module in traced.items()}


def _lowered(module: Any, is_backward: bool) -> str:
    """Return the source that Inductor writes for a traced graph, its tensors moved to cuda:0."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    sources: list[str] = []

    def keep_source(self: Any) -> Any:
        code = (self.codegen_with_cpp_wrapper() if self.cpp_wrapper else self.codegen())[0]
        sources.append(getattr(code, "value", code))
        return SimpleNamespace(__file__="none", __path__="none", value=sources[-1], call=_always(None))

    device, mode = torch.device("cuda", 0), FakeTensorMode()
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
        node.args = tuple(device if isinstance(argument, torch.device) else argument for argument in node.args)

    def on_cuda(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    inputs = [on_cuda(node.meta["val"]) for node in placeholders]
    for node in placeholders:
        node.meta.pop("tensor_meta", None)
    module.recompile()
    with torch.no_grad():
        FakeTensorProp(module, mode=mode).propagate_dont_convert_inputs(*inputs)
    kept = {"_compile_to_module": keep_source, "compile_to_module": keep_source}
    try:
        with (
            patch.multiple(GraphLowering, **kept),
            torch._guards.tracing(torch._guards.TracingContext(mode)),
            mode,
            torch.no_grad(),
        ):
            compile_fx_inner(module, inputs, is_backward=is_backward)
    except Exception:
        if not sources:  # once the source is written, what fails is running it, which was never meant
            raise
    return "\n".join(sources)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel in generated code: its name, and the bytes of the tensors that it reads or writes."""

    kernel: str
    tensor_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """What a generated wrapper does, in order."""

    launches: list[Launch]
    """Kernels that Inductor wrote."""
    products: int
    """Calls of cuBLAS."""
    operators: int
    """Calls of opaque operators: attention and loss."""
    peak_bytes: int
    """Most bytes alive at once of what it makes itself, without its inputs."""
    kept_bytes: int
    """Bytes alive at its end: results, and what the backward pass needs."""


def read_program(source: str, operator_types: dict[str, tuple[str, ...]], is_backward: bool = False) -> Program:
    """Read a generated wrapper; `operator_types` are those of each opaque operator's results.

    A backward pass holds what was kept for it until it has used it.
    """
    body = source[source.index("def call(self") :]
    sizes: dict[str, int] = {}
    for name, shape, dtype in re.findall(r"^    (\w+) = rand_strided\(\(([^)]*)\).*dtype=torch\.(\w+)\)", body, re.M):
        sizes[name] = _size(shape, dtype)
    given = {name: size for name, size in sizes.items() if not name.startswith(("primals", "tangents"))}
    alive = given if is_backward else {}
    place: dict[str, int] = {}
    launches, products, operators, peak = [], 0, 0, 0
    for line in map(str.strip, body[: body.index("runner = Runner")].splitlines()):
        if made := re.match(r"(\w+) = empty_strided_cuda\(\(([^)]*)\), \([^)]*\), torch\.(\w+)\)", line):
            alive[made[1]] = sizes[made[1]] = _size(made[2], made[3])
        elif moved := re.match(r"(\w+) = (?:reinterpret_tensor\()?(\w+)\b.*; *del (\w+)", line):
            sizes[moved[1]] = sizes.get(moved[2], 0)
            if moved[2] == moved[3] and moved[2] in alive:
                alive[moved[1]] = alive.pop(moved[2])
        elif picked := re.match(r"(\w+) = \w+\[(\d+)\]$", line):
            place[picked[1]] = int(picked[2])
        elif result := re.match(r"assert_size_stride\((\w+), \(([^)]*)\), .*'torch\.ops\.([\w.]+)\.\w+'", line):
            dtype = operator_types.get(result[3], ("float32",))[place.get(result[1], 0)]
            alive[result[1]] = sizes[result[1]] = _size(result[2], dtype)
        elif gone := re.match(r"del (\w+)", line):
            alive.pop(gone[1], None)
        elif ran := re.match(r"(triton_\w+)\.run\((.*), stream", line):
            launches.append(Launch(ran[1], tuple(_argument_sizes(ran[2], sizes))))
        products += line.startswith("extern_kernels.")
        operators += "= torch.ops." in line
        peak = max(peak, sum(alive.values()))
    return Program(launches, products, operators, peak, sum(alive.values()))


def _size(shape: str, dtype: str) -> int:
    return math.prod(int(side) for side in shape.split(",") if side.strip()) * BYTES[dtype]


def _argument_sizes(arguments: str, sizes: dict[str, int]) -> list[int]:
    names = dict.fromkeys(re.findall(r"\b(?:buf\d+|\w*_\d+|primals_\d+|tangents_\d+)\b", arguments))
    return [sizes[name] for name in names if name in sizes]
