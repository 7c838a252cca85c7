"""What torch's compiler writes for an NVIDIA GPU, without one: the Triton kernels of graphs that are traced on a CPU.

A graph is traced and differentiated with tensors of a CPU that have no values, moved to a device that does not exist,
and given to the compiler's own passes, scheduler and code generator; nothing is run. Triton must be installed, which
only torch's builds for GPUs bring.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda", 0)
H100 = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65_536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The code of one graph.

    Attributes:
        code: The program that launches the kernels, with the kernels in it.
        fused_bytes: What the Triton kernels read and write, at the sizes that the graph was traced with.
        other_bytes: The same of matrix products and attention.
    """

    code: str
    fused_bytes: int
    other_bytes: int

    @property
    def launches(self) -> Counter[str]:
        """How often the program calls each kernel: `triton_…`, products by `extern_kernels`, operators of torch."""
        body = self.code[self.code.index("def call(") :].partition("def get_args")[0]
        triton = re.findall(r"\b(triton_\w+)\.run\(", body)
        return Counter(triton + re.findall(r"\b(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", body))

    @property
    def allocated(self) -> list[tuple[str, str]]:
        """Shape and type of each buffer that the program allocates."""
        return re.findall(r"empty_strided_cuda\(\(([^)]*?),?\), \([^)]*\), torch\.(\w+)\)", self.code)


@contextmanager
def imagined_gpu() -> Iterator[None]:
    """Let the compiler believe in an H100 while it writes code."""
    import triton  # only with torch's builds for GPUs
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    own = DeviceProperties(type="cuda", index=0, cc=90, **H100)
    seen = SimpleNamespace(name="H100", minor=0, total_memory=80 * 2**30, gcnArchName="", **H100)
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    with ExitStack() as stack:
        for owner, name, value in (
            (fake_tensor, "init_gpu_context", lambda _: None),
            (DeviceProperties, "create", classmethod(lambda *_: own)),
            (CudaInterface, "get_device_properties", staticmethod(lambda *_: seen)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "get_device_properties", lambda *_: seen),
            (scheduler, "has_triton", lambda: True),
            (triton.runtime.driver, "_active", driver),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def write_code(graph_module: Any, inputs: Sequence[Any], *, backward: bool) -> Written:
    """Return the compiler's code for a graph, as if its tensors were on a GPU."""
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    moved_module = copy.deepcopy(graph_module)
    for node in moved_module.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}
    moved_module.recompile()
    mode: Any = torch._guards.detect_fake_mode(inputs)
    with imagined_gpu(), V.set_fake_mode(mode), DebugContext(), config.patch(compile_threads=1):
        moved = [_moved(value, mode) for value in inputs]
        FakeTensorProp(moved_module, mode=mode).propagate_dont_convert_inputs(*moved)
        _recursive_post_grad_passes(moved_module, is_inference=False)
        lowered = GraphLowering(moved_module, example_inputs=moved, shape_env=mode.shape_env, is_backward=backward)
        with V.set_graph_handler(lowered):
            lowered.run(*moved)
            code, _ = lowered.codegen()
            traffic = {False: 0, True: 0}
            for node in lowered.scheduler.nodes:
                traffic[bool(node.is_extern())] += int(node.get_read_write_buffers_sizes())
    return Written(code=code.value, fused_bytes=traffic[False], other_bytes=traffic[True])


def _moved(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)


def writing_backend(written: list[Written]) -> Callable[..., Any]:
    """Return a backend for `torch.compile` that appends the code of each graph and runs the graph as it was traced."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    def compiler(graph_module: Any, inputs: Sequence[Any], *, backward: bool) -> Any:
        written.append(write_code(graph_module, inputs, backward=backward))
        return make_boxed_func(graph_module.forward)

    return aot_autograd(
        fw_compiler=partial(compiler, backward=False),
        bw_compiler=partial(compiler, backward=True),
        decompositions=select_decomp_table(),
        partition_fn=partition_fn,
    )


def without_values(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace the tensors of a module on the meta device by tensors of a CPU that have no values either."""
    convert = mode.fake_tensor_converter.from_meta_and_device
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                fake = convert(mode, weight.detach(), torch.device("cpu"))
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = convert(mode, buffer, torch.device("cpu"))
