"""The CPU backend: what stands in for CUDA, and when it refuses to.

It changes the process for good, so every test runs in a process of its own.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_bpipe.integration.cpu.flags import CPU_FLAGS, cpu_flags  # noqa: E402
from tests.harness import Megatron  # noqa: E402

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU backend is for machines without a GPU"
)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python that finds this project."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


Check = Callable[[str], None]


@pytest.fixture
def check(megatron: Megatron, tmp_path: Path) -> Check:
    """Run code in a process of its own with the backend installed; it fails if the code does."""

    def run(code: str) -> None:
        script = tmp_path / "code.py"
        head = "import torch\nfrom megatron_bpipe.integration import cpu\n"
        script.write_text(head + code)
        result = megatron.script(str(script), [], world=1)
        assert result.ok, result.logs

    return run


def test_refuses_after_megatron_was_imported() -> None:
    done = run_python(
        "import megatron.core.enums\nfrom megatron_bpipe.integration import cpu\ncpu.install()"
    )
    assert done.returncode != 0
    assert "RuntimeError: the CPU backend must be installed before Megatron" in done.stderr
    assert "python -m megatron_bpipe run" in done.stderr


def test_refuses_where_a_gpu_is() -> None:
    done = run_python(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "from megatron_bpipe.integration import cpu\n"
        "cpu.install()"
    )
    assert done.returncode != 0
    assert "RuntimeError: the CPU backend was asked for, but" in done.stderr
    assert "CUDA_VISIBLE_DEVICES" in done.stderr


def test_install_is_idempotent_and_announced(check: Check) -> None:
    check(
        """
zeros = torch.zeros
cpu.install()
assert torch.zeros is zeros
assert cpu.installed()
assert "\\n" not in cpu.announcement()
assert "CPU" in cpu.announcement()
assert not torch.cuda.is_available()
"""
    )


def test_cuda_extensions_are_refused_as_torch_refuses_them(check: Check) -> None:
    """Megatron 0.15 builds one where it finds nvcc, and expects a RuntimeError without a GPU."""
    check(
        """
from torch.utils import cpp_extension

for asked in ({"with_cuda": True}, {"cuda_sources": ["int a;"]}):
    try:
        cpp_extension.load_inline("never", ["int b;"], **asked)
    except RuntimeError as error:
        assert "CUDA extensions are not built" in str(error)
    else:
        raise AssertionError(asked)
"""
    )


def test_tensors_are_placed_on_the_cpu(check: Check) -> None:
    check(
        """
from megatron_bpipe.integration.cpu.placement import FACTORIES, METHODS

home = torch.device("cpu")
for device in ("cuda", "cuda:3", torch.device("cuda"), torch.cuda.current_device()):
    assert torch.zeros(2, device=device).device == home
    assert torch.ones(2).to(device).device == home
    assert torch.ones(2).to(device=device, dtype=torch.float64).dtype == torch.float64
    assert torch.nn.Linear(2, 2, device=device).weight.device == home
    assert torch.nn.Linear(2, 2).to(device).weight.device == home
tensor = torch.arange(3)
assert tensor.cuda() is tensor
assert tensor.cuda(0, non_blocking=True) is tensor
assert tensor.pin_memory() is tensor
assert torch.empty(2, pin_memory=True).device == home
assert torch.empty_like(tensor, device="cuda").device == home
assert tensor.new_zeros(2, device="cuda").device == home
assert torch.nn.Linear(2, 2).cuda().weight.device == home
for name in FACTORIES:
    assert getattr(torch, name).__name__ == name
for name in METHODS:
    assert getattr(torch.Tensor, name).__name__ == name
with torch.device("meta"):  # torch's own device contexts still see the factories
    assert torch.zeros(2).device.type == "meta"
with torch.cuda.device(torch.cuda.current_device()):
    assert torch.cuda.device_count() == 1
assert torch.cuda.get_device_properties(0).total_memory > 2**20
assert torch.cuda.get_device_capability() == (0, 0)
"""
    )


def test_type_names_are_those_of_cuda(check: Check) -> None:
    check(
        """
assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
assert torch.nn.Parameter(torch.zeros(1).half()).type() == "torch.cuda.HalfTensor"
assert torch.zeros(1).type("torch.cuda.HalfTensor").dtype == torch.float16
assert torch.zeros(1).type(torch.float64).dtype == torch.float64
assert torch.zeros(1).type(dtype=torch.int32).dtype == torch.int32
"""
    )


def test_streams_and_events_are_instant_and_tell_the_time(check: Check) -> None:
    check(
        """
import time
stream = torch.cuda.Stream(device=torch.cuda.current_device(), priority=-1)
start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
with torch.cuda.stream(stream):
    start.record()
    time.sleep(0.02)
    end.record(stream)
stream.wait_event(end)
stream.wait_stream(torch.cuda.current_stream())
assert stream.record_event().query()
assert 15 < start.elapsed_time(end) < 1000
torch.zeros(2).record_stream(stream)
torch.cuda.synchronize()
assert not torch.cuda.is_current_stream_capturing()
"""
    )


def test_the_cuda_generator_is_the_cpu_generator(check: Check) -> None:
    check(
        """
torch.cuda.manual_seed(7)
state = torch.cuda.get_rng_state()
first = torch.rand(4)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(4), first)
torch.manual_seed(7)
assert torch.equal(torch.rand(4), first)
assert torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator
"""
    )


def test_a_data_loader_draws_beside_the_generator(check: Check) -> None:
    """The control is the seed that it has drawn."""
    check(
        """
before = torch.cuda.get_rng_state()
loader = torch.utils.data.DataLoader(range(4))
iter(loader)
assert torch.equal(torch.cuda.get_rng_state(), before)
torch.manual_seed(5)
drawn = torch.empty((), dtype=torch.int64).random_().item()
torch.manual_seed(5)
assert iter(loader)._base_seed == drawn
"""
    )


def test_megatrons_generators_are_saved_and_restored(check: Check) -> None:
    check(
        """
import logging
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

warned = []
handler = logging.Handler()
handler.emit = warned.append
logging.getLogger().addHandler(handler)
tracker = CudaRNGStatesTracker()
tracker.add("a", 1)
tracker.add("b", 2)
torch.manual_seed(3)
outside = torch.rand(2)
torch.manual_seed(3)
with tracker.fork("a"):
    first = torch.rand(2)
with tracker.fork("b"):
    other = torch.rand(2)
assert torch.equal(torch.rand(2), outside)
with tracker.fork("a"):
    second = torch.rand(2)
torch.manual_seed(1)
assert torch.equal(torch.rand(2), first)
assert torch.equal(torch.rand(2), second)
assert not torch.equal(first, other)
assert not [r for r in warned if "CPU RNG state" in r.getMessage()]
"""
    )


def test_memory_reports_are_of_the_process(check: Check) -> None:
    check(
        """
before = torch.cuda.memory_allocated()
ballast = torch.ones(64 * 2**20, dtype=torch.uint8)
assert torch.cuda.memory_allocated() - before > 32 * 2**20
assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated()
assert torch.cuda.memory_stats()["allocated_bytes.all.current"] > 0
torch.cuda.reset_peak_memory_stats()
torch.cuda.empty_cache()
"""
    )


def test_norms_are_marked_for_sequence_parallelism(check: Check) -> None:
    check(
        """
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm

for parallel in (True, False):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=parallel,
    )
    norm = WrappedTorchNorm(config, 8)
    assert config.sequence_parallel is parallel
    assert isinstance(norm, torch.nn.LayerNorm)
    assert [p.sequence_parallel for p in norm.parameters()] == [parallel, parallel]
"""
    )


def test_a_gpu_only_flag_is_named_with_the_remedy(megatron: Megatron, tmp_path: Path) -> None:
    script = tmp_path / "code.py"
    script.write_text(
        "from megatron.training.arguments import parse_and_validate_args\nparse_and_validate_args()"
    )
    result = megatron.script(str(script), ["--distributed-backend", "nccl"], world=1)
    assert result.status == {0: 2}
    assert "--distributed-backend nccl needs a GPU, and there is none" in result.log(0)
    assert "give gloo" in result.log(0)


def test_flags_are_those_that_this_release_knows() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--distributed-backend")
    parser.add_argument("--no-rope-fusion", action="store_true")
    assert cpu_flags(parser) == ["--distributed-backend", "gloo", "--no-rope-fusion"]
    assert cpu_flags(["--transformer-impl", "--lr"]) == ["--transformer-impl", "local"]
    assert cpu_flags() == [word for flag in CPU_FLAGS for word in flag]
    assert cpu_flags([]) == []


def test_megatrons_parser_knows_all_flags(check: Check) -> None:
    check(
        """
import argparse
from megatron.training.arguments import add_megatron_arguments

parser = add_megatron_arguments(argparse.ArgumentParser())
assert cpu.cpu_flags(parser) == cpu.cpu_flags()
assert parser.parse_args([]) == parser.parse_args(cpu.cpu_flags())  # they are the defaults
"""
    )
