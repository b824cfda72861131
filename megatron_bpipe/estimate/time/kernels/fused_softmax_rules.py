"""When Megatron's fused scale-mask-softmax kernel cannot run, and attention becomes slow.

Without flash attention Megatron computes scale, causal mask and softmax in one kernel only if all
of these hold (b micro-batch, a/t heads of one tensor-parallel rank, s sequence length)::

    bf16 or fp16          16 < s <= longest       s % 4 == 0
    (b a/t) % 4 == 0      (b a/t) % batches per block == 0

Batches per block is 8 for s <= 128 and 4 above (get_batch_per_block: 128 threads in warps of 32,
two rows a warp up to 128 columns).  Otherwise it converts to fp32, scales, applies softmax and
converts back in separate memory-bound kernels: the slow kernels that the re-evaluation saw in its
experiment (7).

Read in is_kernel_available of these releases::

    v2.6               2021-08-27  megatron/model/fused_softmax.py          longest 2048
    23.04, 23.06       2023        megatron/model/fused_softmax.py          longest 4096
    core_v0.4.0-0.5.0  2023-12 on  megatron/model/fused_softmax.py          longest 16384
    core_v0.6.0-0.17.1             megatron/legacy/model/fused_softmax.py   longest 16384
    core_v0.4.0-0.19.0, main of    megatron/core/fusions/fused_softmax.py   longest 4096
      2026-08-22

The condition on b a/t is the same in all of them.  The kernels themselves are in
megatron/fused_kernels up to 23.06 and in apex (csrc/megatron) later; get_batch_per_block is the
same in both.  With Transformer Engine's attention this file is not used.

What it explains: GPT-3 96B has 104 heads, at t = 4 that is 26 a rank: not divisible at b = 1,
divisible at b = 2.  So rows (7) and (8) of table 3 differ by this kernel as much as by BPipe.  At
t = 2 (52 heads a rank) it runs at b = 1, which is the figure of BPipe (ICML 2023) that
section 3.2 calls contradictory.  LLaMA 65B has 16 heads a rank and never suffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpipe.estimate.runs import Run


@dataclass(frozen=True)
class KernelRule:
    """The longest sequence one implementation takes, and where that was read."""

    longest: int
    source: str


RULES = {
    "2023": KernelRule(4096, "megatron/model/fused_softmax.py in 23.04 and 23.06"),
    "core": KernelRule(4096, "megatron/core/fusions/fused_softmax.py in core_v0.4.0 to 0.19.0"),
    "legacy": KernelRule(
        16384,
        "megatron/model/fused_softmax.py in core_v0.4.0 and 0.5.0, megatron/legacy/model/"
        "fused_softmax.py in core_v0.6.0 to 0.17.1",
    ),
}


def why_not_fused(
    micro_batch: int,
    heads_per_rank: int,
    seq: int,
    rule: KernelRule = RULES["core"],
    *,
    half_precision: bool = True,
) -> tuple[str, ...]:
    """The conditions that fail, in words; empty when the fused causal kernel runs."""
    reasons = []
    if not half_precision:
        reasons.append("the input is not bf16 or fp16")
    if not 16 < seq <= rule.longest:
        reasons.append(f"the sequence length {seq} is not from 17 to {rule.longest}")
    if seq % 4:
        reasons.append(f"the sequence length {seq} is not a multiple of 4")
    block = batches_per_block(seq)
    rows = micro_batch * heads_per_rank
    if rows % block:
        reasons.append(
            f"micro-batch {micro_batch} x {heads_per_rank} heads a rank = {rows} is not a "
            f"multiple of {block}"
        )
    return tuple(reasons)


def batches_per_block(seq: int) -> int:
    """Attention matrices that one thread block handles together: a multiple of 4 in either case."""
    return 8 if seq <= 128 else 4


def softmax_trap(run: Run, rule: KernelRule = RULES["core"]) -> str | None:
    """A warning with remedies when this run falls back to the slow kernels, otherwise None.

    None with flash attention, and when the reason is not the number of heads: then neither BPipe
    nor another micro-batch helps.
    """
    if run.attention == "flash":
        return None
    model, tp = run.model, run.layout.tp

    def fused(micro_batch: int, t: int) -> bool:
        return not why_not_fused(micro_batch, model.heads // t, model.seq, rule)

    larger = next((b for b in (2 * run.micro_batch, 4 * run.micro_batch) if fused(b, tp)), None)
    if fused(run.micro_batch, tp) or larger is None:
        return None
    reason = why_not_fused(run.micro_batch, model.heads // tp, model.seq, rule)[0]
    smaller = next(
        (t for t in range(tp - 1, 0, -1) if tp % t == 0 and fused(run.micro_batch, t)), 0
    )
    remedies = ["flash attention", f"micro-batch {larger}"]
    if smaller:
        remedies.insert(1, f"tensor-parallel size {smaller}")
    return (
        f"{model.name} at t={tp}: {reason}, so the fused softmax kernel does not run. Use "
        f"{', '.join(remedies[:-1])} or {remedies[-1]}; a gain from BPipe that comes with a "
        "larger micro-batch may be this kernel's."
    )
