"""Can ``--bpipe`` run here? Each thing it needs, what was found, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_bpipe import __version__
from megatron_bpipe.estimate.time.kernels.fused_softmax_rules import why_not_fused
from megatron_bpipe.integration import cpu
from megatron_bpipe.integration.checks.driver import why_unusable
from megatron_bpipe.integration.checks.hook_points import HOOK_POINTS, Feature
from megatron_bpipe.integration.checks.probe import missing
from megatron_bpipe.integration.checks.versions import megatron_version
from megatron_bpipe.runtime.torch_internals import probe
from megatron_bpipe.runtime.transport.host.limits import available_bytes
from megatron_bpipe.runtime.transport.pair.catalogue import SPECS
from megatron_bpipe.runtime.transport.pair.links import Link, one_machine

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what.
        found: what is there.
        ok: whether that will do.
        needed: whether ``--bpipe`` cannot run without it.
        remedy: what to do where it will not do.
    """

    name: str
    found: str
    ok: bool = True
    needed: bool = True
    remedy: str = ""


def examine(progress: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Look at everything; slow only where Megatron is slow to import.

    ``progress`` is told what comes next.
    """
    findings = [Finding("megatron_bpipe", __version__), _python(), _torch(), _torch_internals()]
    findings.append(_device())
    progress("Megatron, which takes up to a minute to import")
    findings += _megatron()
    progress("links and transports")
    findings += [*_links(), *_transports()]
    progress("memory and limits")
    findings += [_memory(), *_limits(), _dev_shm()]
    findings += [_optional(name) for name in ("transformer_engine", "flash_attn", "apex")]
    return findings


def fused_softmax(heads: int, tp: int, micro_batch: int, seq: int) -> Finding:
    """Whether unfused attention gets Megatron's fused softmax kernel, which BPipe's gain rests on.

    The re-evaluation's rows 7 and 8 differ by this kernel as much as by BPipe; see
    `estimate.time.kernels.fused_softmax_rules`.
    """
    why = why_not_fused(micro_batch, heads // tp, seq)
    remedy = "another --tp, another micro-batch or flash attention may gain more than BPipe"
    found = "; ".join(why) or f"runs at micro-batch {micro_batch} with {heads // tp} heads a rank"
    return Finding("fused softmax", found, not why, needed=False, remedy=remedy)


def can_run(findings: list[Finding]) -> bool:
    """Whether nothing that is needed is missing."""
    return all(f.ok for f in findings if f.needed)


def _python() -> Finding:
    found = sys.version.split()[0]
    return Finding("python", found, sys.version_info >= (3, 12), remedy="use Python >= 3.12")


def _torch() -> Finding:
    return Finding("torch", torch.__version__)


def _torch_internals() -> Finding:
    lacking = probe()
    found = "; ".join(lacking) or "all that is used is there and does what it must"
    remedy = "use a torch release that was tried: this one lacks what is listed"
    return Finding("torch internals", found, not lacking, remedy=remedy)


def _device() -> Finding:
    if not torch.cuda.is_available():
        unusable = why_unusable()
        if not cpu.installed():
            cpu.install()
        if unusable is not None:
            return Finding("device", unusable, False)
        return Finding("device", "no CUDA device: CPU ranks over gloo, for trying out")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("device", f"{len(names)} GPU(s): {', '.join(sorted(set(names)))}")


def _megatron() -> list[Finding]:
    try:
        import megatron.core
    except ImportError as error:
        remedy = "pip install megatron-core, or run inside a Megatron-LM checkout"
        return [Finding("megatron-core", f"cannot be imported: {error}", False, remedy=remedy)]
    where = Path(megatron.core.__file__).parents[2]
    findings = [Finding("megatron-core", f"{megatron_version()} in {where}")]
    features: list[tuple[Feature, str, str]] = [
        ("schedule", "schedule hook points", "use a supported release"),
        (
            "training",
            "training loop",
            "use a wheel from 0.18 on or a checkout for pretrain(); loops on megatron.core alone "
            "can do without",
        ),
        (
            "v_placement",
            "V placement",
            "only v-half, v-min and v-zb need it: take another schedule",
        ),
        ("profile", "profile", "only the command profile needs it: use a wheel from 0.18 on"),
    ]
    if cpu.installed():
        features.insert(
            2, ("cpu", "CPU backend", "only CPU ranks need it: use a supported release")
        )
    for feature, name, remedy in features:
        lacking = missing(feature)
        count = sum(point.feature == feature for point in HOOK_POINTS)
        found = "; ".join(lacking) or f"all {count} hook points there"
        needed = feature == "schedule"
        findings.append(Finding(name, found, not lacking, needed=needed, remedy=remedy))
    return findings


def _links() -> list[Finding]:
    """How the GPUs that this process sees are linked, two by two."""
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        return []
    from megatron_bpipe.runtime.transport.cuda.device_info import device_info, link_between

    gpus = [device_info(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    pairs = [(a, b) for a in range(len(gpus)) for b in range(a + 1, len(gpus))]
    links = {(a, b): link_between(gpus[a], gpus[b], one_host=True) for a, b in pairs}
    kinds = sorted({link.value for link in links.values()})
    fast = Link.NVLINK in links.values()
    remedy = (
        "pip install nvidia-ml-py to know"
        if Link.PEER in links.values()
        else "without NVLink between partners BPipe was seen to cost 11-17 %"
    )
    findings = [Finding("links", ", ".join(kinds), fast, needed=False, remedy=remedy)]
    closed = [f"{a}-{b}" for (a, b), link in links.items() if link is Link.HOST]
    found = f"no peer access between GPUs {', '.join(closed)}" if closed else "between all GPUs"
    findings.append(Finding("peer access", found, not closed, needed=False))
    return findings


def _transports() -> list[Finding]:
    """Those for this kind of device: whether the machine allows them, whoever the partner is."""
    here = one_machine(on_gpu=torch.cuda.is_available())
    findings = []
    for spec in SPECS.values():
        if spec.obstacle(here):
            continue
        why = spec.probe()
        found = why or f"{spec.summary}: nothing in its way"
        finding = Finding(f"transport {spec.name}", found, not why, spec.needed, spec.remedy)
        findings.append(finding)
    return findings


def _memory() -> Finding:
    available = available_bytes()
    found = "unknown" if available is None else f"{available / GIB:.1f} GiB available"
    return Finding("host memory", found, needed=False)


def _limits() -> list[Finding]:
    findings = []
    for name, limit in (
        ("address space", resource.RLIMIT_AS),
        ("open files", resource.RLIMIT_NOFILE),
    ):
        soft, _ = resource.getrlimit(limit)
        endless = soft == resource.RLIM_INFINITY
        good = endless or name != "open files" or soft >= 1024
        found = "unlimited" if endless else str(soft)
        remedy = "raise it: ulimit -n 4096"
        findings.append(Finding(f"limit of {name}", found, good, needed=False, remedy=remedy))
    return findings


def _dev_shm() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding("/dev/shm", "absent; pools do not use it", needed=False)
    remedy = "NCCL and data loaders may need more: docker run --shm-size=8g"
    found = f"{size / GIB:.2f} GiB; pools do not use it"
    return Finding("/dev/shm", found, size >= GIB, needed=False, remedy=remedy)


def _optional(name: str) -> Finding:
    distribution = {"flash_attn": "flash-attn", "transformer_engine": "transformer-engine"}
    try:
        version = importlib.metadata.version(distribution.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        version = "not installed (optional)"
    return Finding(name, version, needed=False)
