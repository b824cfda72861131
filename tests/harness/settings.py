"""Hooks of a rank that set something up: stand-ins, first values, odd tensors, memory watched."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.harness.rank import after_each_step


def allocator_agrees(job: dict[str, Any]) -> None:
    """Dump, per op boundary, live bytes by weak reference and the allocator's own number."""
    from megatron_bpipe.runtime.observe import recorder

    rows: list[list[Any]] = []
    stock = recorder.Recorder.op_done

    def op_done(self: Any, op: Any, start: float, end: float, moved: int) -> None:
        stock(self, op, start, end, moved)
        last = self.timeline[-1][-1]
        rows.append([str(op), last.live_bytes, self.allocated() - self._baseline])

    def write(step: int, model: Any, result: Any) -> None:
        Path(job["out"], f"allocator{os.environ['RANK']}.json").write_text(json.dumps(rows))

    recorder.Recorder.op_done = op_done  # type: ignore[method-assign]
    after_each_step(write)


def watch_memory(job: dict[str, Any]) -> None:
    """Write this rank's resident memory and the allocator's bytes after every step."""
    import psutil

    from megatron_bpipe.runtime.observe.memory import allocated_bytes

    process = psutil.Process()
    rows = []

    def look(step: int, model: Any, result: Any) -> None:
        rows.append([process.memory_info().rss, allocated_bytes(torch.device("cpu"))])
        if step % 100 == 0:
            path = Path(job["out"], f"memory{os.environ['RANK']}.json")
            path.write_text(json.dumps(rows))

    after_each_step(look)


def gradient_accumulation_fusion(job: dict[str, Any]) -> None:
    """Stand in for apex's CUDA extension, so that Megatron's fused path runs on a CPU.

    The fused path accumulates into ``weight.main_grad`` inside the backward: it needs the saved
    weight to be the Parameter itself. Each rank writes how often it did so in the last step.
    """
    from types import SimpleNamespace

    from megatron.core.tensor_parallel import layers
    from megatron.training import argument_utils, arguments

    calls = 0

    def accumulate(inputs: torch.Tensor, gradient: torch.Tensor, main: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        main.add_(gradient.t() @ inputs)

    def count(step: int, model: Any, result: Any) -> None:
        nonlocal calls
        assert calls, "no weight gradient took the fused path"
        Path(job["out"], f"fused{os.environ['RANK']}.json").write_text(str(calls))
        calls = 0

    after_each_step(count)

    extension: Any = SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
    )
    layers.fused_weight_gradient_mlp_cuda = extension
    sys.modules["fused_weight_gradient_mlp_cuda"] = extension  # imported where it is deferred
    layers._grad_accum_fusion_available = True
    # the CPU's default is not to fuse: switch it on where the configuration is made
    stock = argument_utils.core_transformer_config_from_args

    def fused(args: Any, *positional: Any, **named: Any) -> Any:
        args.gradient_accumulation_fusion = True
        return stock(args, *positional, **named)

    for module in (argument_utils, arguments):
        module.core_transformer_config_from_args = fused


def deferral_of_the_output_layer_alone(job: dict[str, Any]) -> None:
    """Let ``--defer-embedding-wgrad-compute`` be the output layer's.

    Megatron means it so, but asks every ColumnParallelLinear for it: with Transformer Engine only
    the output layer is one, with local layers the others fail for want of a buffer.
    """
    import copy

    from megatron.core.tensor_parallel import layers

    stock = layers.ColumnParallelLinear.__init__

    def init(self: Any, *positional: Any, **named: Any) -> None:
        stock(self, *positional, **named)
        if self.embedding_activation_buffer is None:
            self.config = copy.copy(self.config)
            self.config.defer_embedding_wgrad_compute = False

    layers.ColumnParallelLinear.__init__ = init


def as_in_a_rehearsal(job: dict[str, Any]) -> None:
    """Messages through the host and collectives one by one, as ``--bpipe-rehearsal`` has them."""
    import torch.distributed as dist

    from megatron_bpipe.integration.single_gpu.launch import send_through_host
    from megatron_bpipe.integration.single_gpu.uncoalesced_collectives import REPLACEMENTS

    used: set[str] = set()

    def noted(name: str, instead: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            if name not in used:
                used.add(name)
                path = Path(job["out"], f"used{os.environ['RANK']}.json")
                path.write_text(json.dumps(sorted(used)))
            return instead(*positional, **named)

        return call

    dist.batch_isend_irecv = noted("messages", send_through_host(dist.batch_isend_irecv))
    for name, instead in REPLACEMENTS.items():
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, noted(name, instead))


def one_stage_at_a_time(job: dict[str, Any]) -> None:
    """As `benchmarks/rehearsal.py --turns` has it; writes the seconds of this rank's turns."""
    from benchmarks.gpu_lock import take_turns
    from megatron_bpipe.integration.patches.import_hook import after_import

    seconds, captures = [0.0], [0.0]

    def patch(schedules: Any) -> None:
        take_turns(schedules, Path(job["out"], "turn"), seconds, captures)

    def note(step: int, model: Any, result: Any) -> None:
        Path(job["out"], f"turns{os.environ['RANK']}.json").write_text(json.dumps(seconds))
        seconds.append(0.0)
        assert all(s > 0 for s in captures) == (os.environ["RANK"] == "0")  # who evicts
        captures.append(0.0)

    after_import("megatron.core.pipeline_parallel.schedules", patch)
    after_each_step(note)


def every_link_is_slow(job: dict[str, Any]) -> None:
    """Let each copy seem to be waited for and to take a hundred forwards; foretell the like."""
    from dataclasses import replace

    from megatron_bpipe.estimate.hardware import A100_80G
    from megatron_bpipe.integration import link_forecast
    from megatron_bpipe.runtime.observe import link_watch

    link_watch.EXPOSED = -1.0  # whatever was waited for is more
    stock = link_watch.too_slow
    link_watch.too_slow = lambda size, copy, forward: stock(size, 100 * forward, forward)
    link_forecast.gpu_here = lambda: replace(A100_80G, nvlink=1e3)


def odd_saved_tensors(job: dict[str, Any]) -> None:
    """Let each layer save what no hook of ours may touch: a sparse tensor, and a checkpoint's."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from torch.utils.checkpoint import checkpoint

    # it takes fp8=False for True, and then fails where Transformer Engine is not installed
    begin = CheckpointWithoutOutput.__init__
    CheckpointWithoutOutput.__init__ = lambda self, fp8=None: begin(self, None)
    stock = TransformerLayer.forward

    def forward(self: Any, *positional: Any, **named: Any) -> Any:
        hidden, context = stock(self, *positional, **named)
        hidden = checkpoint(lambda x: x + 0.1 * x.tanh(), hidden, use_reentrant=False)
        return _SavesSparse.apply(hidden), context

    TransformerLayer.forward = forward


class _SavesSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.eye(8).to_sparse())
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (eye,) = ctx.saved_tensors
        return gradient * (eye.sum() / 8)


def parameters_by_name(job: dict[str, Any]) -> None:
    """Let every parameter begin with values that its name in the whole model alone decides."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    stock = GPTModel.__init__

    def init(self: Any, *positional: Any, **named: Any) -> None:
        stock(self, *positional, **named)
        layers = {
            name: module.layer_number
            for name, module in self.named_modules()
            if hasattr(module, "layer_number") and name.split(".")[-2:-1] == ["layers"]
        }
        for name, parameter in self.named_parameters():
            _fill(name, parameter, layers, parallel_state)

    GPTModel.__init__ = init


def _fill(name: str, parameter: Any, layers: dict[str, int], parallel_state: Any) -> None:
    for layer, number in layers.items():
        if name.startswith(layer + "."):
            name = f"layer {number}{name[len(layer) :]}"
    name = name.replace("output_layer", "embedding.word_embeddings")
    shard = 0
    if getattr(parameter, "tensor_model_parallel", False):
        shard = parallel_state.get_tensor_model_parallel_rank()
    dice = torch.Generator().manual_seed(hash_of(f"{name} {shard}"))
    if parameter.dim() > 1:
        values = 0.02 * torch.randn(parameter.shape, generator=dice)
        parameter.data.copy_(values)


def hash_of(text: str) -> int:
    """The same number in every process."""
    import zlib

    return zlib.crc32(text.encode())


def both_ways_are_fed_alike(job: dict[str, Any]) -> None:
    """Give Chimera's second pipeline the samples of the first (a control)."""
    from megatron_bpipe.integration.patches.chimera.copies import Copies

    stock = Copies.fed_as
    Copies.fed_as = lambda self, way: stock(self, 0)  # type: ignore[method-assign]
