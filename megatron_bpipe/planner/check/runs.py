"""Published training runs with all their settings, as data.

No number of the predictions is fitted on them; which terms there are was chosen with all of them in
sight but ``aside``.  Seconds are of one iteration, GiB the allocator's peak
(torch.cuda.max_memory_allocated) of the stage that was reported.  A source that gives MFU or
TFLOP/s is converted by its own count of operations.

Sources::

    reducing   Korthikanti et al. 2022, arXiv 2205.05198, tables 4 and 5: fp16, no flash attention
    ptdp       Narayanan et al. 2021, arXiv 2104.04473, table 2: full recomputation, sums without
               sequence parallelism, stages' messages split over tensor-parallel ranks
    vocabulary Yeung et al. 2024, arXiv 2411.05288, table 5: fp16 (16 bytes a parameter fit its
               differences of memory between vocabularies)
    golden     NVIDIA Megatron-LM, tests/functional_tests, golden values of its own runs
    simumax    github.com/MooreThreads/SimuMax, docs/b200, release 1.2: measured columns
    aside      the same: its runs that were not looked at before the predictions were made
    bpipe      Huang et al. 2024, arXiv 2401.02088, table 3: the re-evaluation
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_bpipe.estimate.memory.activations import (
    FUSED,
    MEGATRON_2023,
    TRANSFORMER_ENGINE,
    Kernels,
)
from megatron_bpipe.estimate.memory.stages import BF16, FP16, StateBytes
from megatron_bpipe.estimate.models import Mla, Model, gpt, llama
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, LAYOUT
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.estimate.settings import Settings
from megatron_bpipe.estimate.time.flops import equation_1, equation_1_corrected


@dataclass(frozen=True)
class PublishedRun:
    """One run: what it was, and what was measured (None: not given).

    ``gib`` is that of ``stage``, None: the fullest.
    """

    name: str
    source: str
    gpu: str
    run: Run
    seconds: float | None = None
    gib: float | None = None
    stage: int | None = None
    kernels: Kernels = TRANSFORMER_ENGINE
    state: StateBytes = BF16
    node: int = 8


OLD = Settings(grad_overlap=False, param_overlap=False, scatter_messages=True)
"""Megatron of 2021 and 2022."""
UNFUSED_2022 = replace(FUSED, fp32_logits=2)
A100, H100, B200, GB200 = "A100-80GB", "H100-80GB", "B200", "GB200"
GPT_22B = gpt("22B", hidden=6144, heads=64, layers=48, seq=2048)
GPT_175B = gpt("175B", hidden=12288, heads=96, layers=96, seq=2048)
GPT_530B = gpt("530B", hidden=20480, heads=128, layers=105, seq=2048)
GPT_1T = gpt("1T", hidden=25600, heads=160, layers=128, seq=2048)


def reducing() -> Iterator[PublishedRun]:
    """Full recomputation, then selective with sequence parallelism."""
    for model, p, chunks, b, batch, d, full, selective in (
        (GPT_22B, 1, 1, 4, 4, 1, 1.42, 1.10),
        (GPT_175B, 8, 3, 1, 64, 1, 18.13, 13.75),
        (GPT_530B, 35, 3, 1, 280, 1, 49.05, 37.83),
        (GPT_1T, 64, 1, 1, 512, 1, 94.42, 71.49),
        (GPT_530B, 35, 3, 1, 2240, 8, None, 39.15),
    ):
        run = Run(model, Layout(8, 1, 1, d, p), b, batch, "full", chunks=chunks, settings=OLD)
        both = {
            "full": (replace(run, unfused=True), full),
            "selective, SP": (
                replace(
                    run, layout=replace(run.layout, sequence_parallel=True), attention="recompute"
                ),
                selective,
            ),
        }
        for way, (this, seconds) in both.items():
            if seconds is not None:
                name = f"{model.name} {way}" + (f", d {d}" if d > 1 else "")
                yield PublishedRun(
                    name, "reducing", A100, this, seconds, kernels=UNFUSED_2022, state=FP16
                )


def ptdp() -> Iterator[PublishedRun]:
    """TFLOP/s that count the recomputed forward too: 4/3 of equation 1, v/(12lh) as it must be."""
    small = replace(GPT_175B, name="174.6B")
    for model, p, batch, speeds in (
        (small, 12, 1536, {384: 153, 768: 149, 1536: 141}),
        (GPT_530B, 35, 2240, {560: 171, 1120: 167, 2240: 159}),
    ):
        for gpus, speed in speeds.items():
            layout = Layout(8, 1, 1, gpus // (8 * p), p)
            run = Run(model, layout, 1, batch, "full", unfused=True, settings=OLD)
            flops = 96 / 72 * equation_1(model, batch)
            yield PublishedRun(
                f"{model.name} on {gpus}",
                "ptdp",
                A100,
                run,
                flops / (speed * 1e12 * gpus),
                kernels=UNFUSED_2022,
                state=FP16,
            )


def vocabulary() -> Iterator[PublishedRun]:
    """1F1B with t 1, d 1, b 1, m 128: MFU and GiB for four vocabularies."""
    for p, layers, heads, hidden, seq, mfus, peaks in (
        (8, 32, 24, 3072, 2048, (46.16, 40.48, 33.11, 25.23), (14.86, 16.32, 19.25, 25.64)),
        (8, 32, 24, 3072, 4096, (47.05, 41.87, 35.00, 26.75), (21.39, 22.85, 25.78, 31.64)),
        (16, 48, 32, 4096, 2048, (45.66, 40.09, 32.44, 24.21), (24.03, 25.98, 29.92, 38.71)),
        (16, 48, 32, 4096, 4096, (47.56, 41.21, 33.88, 25.33), (36.99, 38.94, 42.85, 50.90)),
        (32, 64, 40, 5120, 2048, (42.81, 37.28, 28.97, 20.86), (33.45, 35.89, 41.17, 52.16)),
        (32, 64, 40, 5120, 4096, (43.68, 38.11, 30.05, 21.63), (54.97, 57.41, 62.29, 73.05)),
    ):
        for thousands, mfu, gib in zip((32, 64, 128, 256), mfus, peaks, strict=True):
            model = replace(
                gpt("", hidden=hidden, heads=heads, layers=layers, seq=seq, vocab=1000 * thousands),
                tied_embeddings=False,
            )
            run = Run(model, Layout(pp=p), 1, 128, "flash")
            seconds = equation_1_corrected(model, 128) / (mfu / 100 * p * 312e12)
            name = f"p {p}, s {seq}, V {thousands}k"
            yield PublishedRun(
                name, "vocabulary", A100, run, seconds, gib, kernels=FUSED, state=FP16
            )


GOLDEN_7B = replace(
    gpt("7B", hidden=4096, heads=32, layers=32, seq=8192, vocab=131073),
    kv_heads=8,
    tied_embeddings=False,
)
GOLDEN_15B = replace(
    gpt("15B", hidden=6144, heads=48, layers=32, seq=4096, vocab=256000),
    kv_heads=8,
    tied_embeddings=False,
    learned_positions=False,
    dropout=False,
    bias=False,
)
DETERMINISTIC = Settings(deterministic=True, grad_fusion=False)


def golden() -> Iterator[PublishedRun]:
    """Medians of the golden values of commit d98e8a64 (August 2026)."""
    pipeline = Run(
        GOLDEN_7B,
        Layout(pp=4, dp=2),
        1,
        8,
        "flash",
        chunks=8,
        distributed_optimizer=True,
        settings=DETERMINISTIC,
    )
    tensor = replace(pipeline, layout=Layout(tp=4, dp=2), micro_batch=2, chunks=1)
    for gpu, run, seconds, peak in (
        (A100, pipeline, 2.942, 60_489_064_448),
        (H100, pipeline, 1.151, 60_720_852_992),
        (GB200, pipeline, 0.787, 60_519_342_080),
        (A100, tensor, 2.587, 58_188_115_968),
        (H100, tensor, 1.115, 57_143_791_616),
        (GB200, tensor, 0.853, 58_217_476_096),
    ):
        way = "t 1 p 4 v 8 d 2" if run is pipeline else "t 4 d 2"
        node = 4 if gpu == GB200 else 8
        yield PublishedRun(
            f"7B {way}", "golden", gpu, run, seconds, peak / 2**30, run.layout.pp - 1, node=node
        )


LLAMA_70B = llama(
    "70B", hidden=8192, heads=64, kv_heads=8, layers=12, seq=4096, vocab=128256, ffn=28672
)
LLAMA_405B = llama(
    "405B", hidden=16384, heads=128, kv_heads=16, layers=4, seq=4096, vocab=128256, ffn=53248
)


def simumax() -> Iterator[PublishedRun]:
    """Eight B200: b 1, bf16, no overlap of data-parallel messages, fused loss."""
    settings = Settings(grad_overlap=False, param_overlap=False, loss_fusion=True)
    for model, t, p, milliseconds, gib in (
        (LLAMA_70B, 1, 2, (843.0, 1476.8, 5436.5), 66.55),
        (LLAMA_70B, 2, 1, (725.5, 1387.0, 5376.5), 60.68),
        (LLAMA_70B, 4, 1, (409.8, 765.6, 2964.6), 39.07),
        (LLAMA_405B, 1, 2, (1074.6, 1935.4, 7046.4), 87.08),
        (LLAMA_405B, 2, 1, (907.3, 1716.8, 6604.1), 81.59),
        (LLAMA_405B, 4, 1, (476.0, 899.6, 3455.4), 52.89),
    ):
        d = 8 // (t * p)
        layout = Layout(t, 1, 1, d, p, sequence_parallel=t > 1)
        for m, taken in zip((4, 8, 32), milliseconds, strict=True):
            run = Run(
                model, layout, 1, m * d, "flash", distributed_optimizer=d > 1, settings=settings
            )
            name = f"{model.name} ({model.layers} layers) t {t} p {p} d {d} m {m}"
            yield PublishedRun(name, "simumax", B200, run, taken / 1000, gib)


DEEPSEEK_V2 = Model(
    name="DeepSeek-V2", hidden=5120, heads=128, kv_heads=128, layers=4, seq=4096, vocab=102400,
    ffn=12288, gated=True, norm="rmsnorm", bias=False, tied_embeddings=False,
    learned_positions=False, dropout=False, experts=160, experts_per_token=6, expert_ffn=1536,
    shared_ffn=3072, qk_norm=True, mla=Mla(1536, 512, 128, 64, 128),
)  # fmt: skip
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2, name="DeepSeek-V3", hidden=7168, vocab=129280, ffn=18432, experts=256,
    experts_per_token=8, expert_ffn=2048, shared_ffn=2048, moe_layers="0111",
)  # fmt: skip


def aside() -> Iterator[PublishedRun]:
    """The same source's runs that nobody had looked at when the model of a layer was made.

    Eight tensor-parallel ranks, latent attention with experts, long sequences cut over ranks.
    """
    settings = Settings(grad_overlap=False, param_overlap=False, loss_fusion=True)

    def published(name: str, run: Run, milliseconds: float, gib: float) -> PublishedRun:
        given = replace(run, settings=settings, distributed_optimizer=run.layout.dp > 1)
        return PublishedRun(name, "aside", B200, given, milliseconds / 1000, gib)

    for model, ep, p, times, gib in (
        (LLAMA_70B, 1, 1, (280.9, 556.7, 2073.7), 28.29),
        (LLAMA_405B, 1, 1, (258.8, 488.1, 1901.8), 38.57),
        (DEEPSEEK_V2, 8, 1, (366.6, 676.2, 2721.3), 45.63),
        (DEEPSEEK_V2, 4, 2, (282.1, 492.6, 1727.7), 44.70),
        (DEEPSEEK_V3, 8, 1, (603.2, 1101.7, 4141.2), 104.30),
        (DEEPSEEK_V3, 4, 2, (452.2, 771.6, 2718.6), 114.00),
    ):
        layout = Layout(8, sequence_parallel=True)
        if model.experts:
            layout = Layout(ep=ep, dp=8 // p, pp=p)
        for m, taken in zip((4, 8, 32), times, strict=True):
            run = Run(model, layout, 1, m * layout.dp, "flash")
            name = f"{model.name} t {layout.tp} p {p} ep {ep} d {layout.dp} m {m}"
            yield published(name, run, taken, gib)
    for model, t, thousands, taken, gib in (
        (LLAMA_70B, 2, 32, 1758.0, 68.43),
        (LLAMA_70B, 1, 32, 1768.1, 104.51),
        (LLAMA_405B, 2, 32, 1984.7, 87.03),
        (LLAMA_405B, 1, 32, 2003.6, 139.22),
        (LLAMA_70B, 2, 128, 11315.7, 112.67),
        (LLAMA_70B, 1, 128, 11301.9, 147.99),
        (LLAMA_405B, 2, 128, 10577.6, 118.13),
    ):
        layout = Layout(t, 8 // t, sequence_parallel=t > 1)
        run = Run(replace(model, seq=1024 * thousands), layout, 1, 4, "flash")
        found = published(f"{model.name} t {t} cp {8 // t} s {thousands}k", run, taken, gib)
        yield replace(found, run=replace(found.run, distributed_optimizer=True))


def bpipe() -> Iterator[PublishedRun]:
    """The re-evaluation's runs without BPipe; with it they hold the one constant that is fitted."""
    for experiment in EXPERIMENTS:
        if experiment.bpipe:
            continue
        run = replace(experiment.run(), settings=replace(OLD, scatter_messages=False))
        seconds = equation_1(run.model, run.global_batch) / (
            experiment.mfu / 100 * LAYOUT.gpus * 312e12
        )
        name = f"{experiment.model} b {run.micro_batch} {run.attention}"
        yield PublishedRun(name, "bpipe", A100, run, seconds, kernels=MEGATRON_2023)


def published_runs() -> tuple[PublishedRun, ...]:
    """All of them."""
    return tuple(
        found
        for source in (reducing, ptdp, vocabulary, golden, simumax, aside, bpipe)
        for found in source()
    )
