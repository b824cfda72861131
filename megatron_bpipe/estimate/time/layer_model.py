"""Seconds of a layer that nobody has measured: what its kernels compute, read, write and send.

::

    forward  = products + attention + traffic + messages
    backward = products of both gradients + attention + traffic + the messages that stay exposed
               + what is recomputed

* products at the rate of their shape on this GPU (``matrix_products``), attention likewise;
* traffic: norms, activation functions, dropout and residual additions, rotations, permutations of
  experts' tokens, each as many times through memory as its kernel reads and writes;
* where a schedule computes the weights' gradients apart (W), B has all but their products.  What
  ran beside these is then exposed in B; with sequence parallelism W gathers the input again;
* messages: with sequence parallelism a gather and a scatter around attention and around the FFN,
  without it a sum after each.  Backwards the gather of a column-parallel layer's input runs beside
  the product of its input's gradient, and the scatter (or sum) of that gradient beside the product
  of its weights' (megatron/core/tensor_parallel/layers.py,
  LinearWithGradAccumulationAndAsyncCommunication): only what is longer than the product counts.
  Experts exchange their tokens before and after; context parallelism sends keys and values round
  a ring beside attention.

Nothing here is fitted on training runs.  ``plan --check`` compares it with published ones.

Units: seconds, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.memory.activations import FUSED, Kernels, expert_rows
from megatron_bpipe.estimate.models import LayerKind
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.kernels.attention_time import attention_seconds
from megatron_bpipe.estimate.time.kernels.collectives import (
    all_to_all_seconds,
    gather_seconds,
    reduce_seconds,
    ring_bandwidth,
)
from megatron_bpipe.estimate.time.kernels.head_time import embedding_seconds, head_seconds
from megatron_bpipe.estimate.time.kernels.matrix_products import KERNEL, Product, forward_backward
from megatron_bpipe.estimate.time.layer_time import Apart, Pace, StageTimes

UNFUSED_NORMS = (34, 60)
"""Passes over the hidden state of two RMSNorms of single operations, each to fp32 (3), square (4),
mean (2), times the inverse root (4), to bf16 (3), times the weight (1); backwards the derivatives
of all of them."""
UNFUSED_ROTATION = 5
"""Passes where one kernel has one: two products, a copy with halves swapped, a sum, a joining."""
VARIATION = {False: 1.05, True: 1.08}
"""How much slower than the usual GPU the slowest of a job is, which all others wait for; by whether
the job has more than one node.  5 % and more among the eight GPUs of one node
(github.com/stas00/ml-engineering, compute/accelerator, "Not all accelerators are created equal");
8 % over clusters (Sinha et al. 2022, arXiv 2208.11035)."""


@dataclass(frozen=True)
class Part:
    """One part of a layer: seconds forwards and backwards, and what --recompute-modules calls it.

    ``repeated`` is what its recomputation takes; ``inputs`` and ``weights`` are B and W where the
    backward is split (``inputs`` None: there is no W).
    """

    forward: float
    backward: float
    modules: tuple[str, ...] = ()
    inputs: float | None = None
    weights: float = 0.0

    @property
    def repeated(self) -> float:
        """Seconds of doing it again."""
        return self.forward


def layer_model(kernels: Kernels = FUSED) -> StageTimes:
    """The pace of any run on any GPU."""
    known: dict[tuple[object, ...], Pace] = {}

    def pace(run: Run, gpu: Gpu) -> Pace:
        # a layer knows nothing of stages, schedules or the batch
        how = (run.attention, run.recompute, run.unfused, run.settings)
        layout = run.layout
        sizes = (layout.tp, layout.cp, layout.ep, layout.etp, layout.sequence_parallel)
        key = (gpu, run.model, sizes, layout.gpus, run.micro_batch, how)
        found = known.get(key)
        if found is None:
            found = known[key] = _pace(run, gpu, kernels)
        return found

    return pace


def _pace(run: Run, gpu: Gpu, kernels: Kernels) -> Pace:
    model, gpus = run.model, run.layout.gpus
    slower = 1.0 if gpus == 1 else VARIATION[gpus > max(gpu.node, 8)]

    def paced(*seconds: float) -> tuple[float, ...]:
        return tuple(slower * value for value in seconds)

    kind = model.kind(model.layers - 1)
    forward, backward, again, *split = paced(*layer_seconds(run, gpu, kernels, kind))
    dense, dense_split = None, None
    if kind == "moe" and model.moe_layers:
        first, second, third, *both = paced(*layer_seconds(run, gpu, kernels, "dense"))
        dense, dense_split = (first, second, third), (both[0], both[1])
    head_forward, head_backward, *heads = paced(*head_seconds(run, gpu, kernels))
    embedding = slower * embedding_seconds(run, gpu, kernels)
    apart = Apart((split[0], split[1]), (heads[0], heads[1]), dense_split)
    return Pace(forward, backward, head_forward, head_backward, again, dense, embedding, apart)


def layer_seconds(
    run: Run, gpu: Gpu, kernels: Kernels, kind: LayerKind
) -> tuple[float, float, float, float, float]:
    """Forward, backward, what of it is recomputation of the whole layer; B and W if it is split."""
    found = layer_parts(run, gpu, kernels, kind)
    forward = sum(part.forward for part in found.values())
    backward = sum(part.backward for part in found.values())
    inputs = sum(p.backward if p.inputs is None else p.inputs for p in found.values())
    weights = sum(part.weights for part in found.values())
    recompute = run.recomputes
    if recompute.method:
        return forward, backward + forward, forward, inputs + forward, weights
    again = sum(
        part.repeated
        for part in found.values()
        if any(module in recompute.modules for module in part.modules)
    )
    return forward, backward + again, 0.0, inputs + again, weights


def layer_parts(run: Run, gpu: Gpu, kernels: Kernels, kind: LayerKind) -> dict[str, Part]:
    """All parts of one layer, by name."""
    model, t, sp = run.model, run.layout.tp, run.layout.sp
    e, h, tokens = kernels.element, model.hidden, run.tokens
    bandwidth = gpu.memory_bandwidth * gpu.memory_share
    line = e * tokens * h // sp / bandwidth  # one pass over the hidden state
    masks = 2 * kernels.mask * tokens * h // sp / bandwidth if model.dropout else 0.0
    there, back = (4, 6) if kernels.fused_norm or model.norm == "layernorm" else UNFUSED_NORMS
    parts = {
        "norms": Part(there * line + 2 * KERNEL, back * line + 2 * KERNEL, ("layernorm",)),
        # forwards x + f(x) twice; backwards both branches' gradients are added
        "residual": Part(6 * line + masks + 2 * KERNEL, 6 * line + masks + 2 * KERNEL),
        "attention": Part(*attention_seconds(run, gpu, kernels), ("core_attn",)),
        **_around_attention(run, gpu, kernels, line),
    }
    if model.dropout:
        parts["dropout"] = Part(0.0, 4 * line + masks)
    if run.layout.cp > 1:
        parts["context"] = _context(run, gpu, kernels, parts["attention"])
    if kind == "dense":
        return parts | _ffn(run, gpu, kernels, tokens, model.ffn, t, "mlp")
    if model.shared_ffn:
        parts |= {
            f"shared {name}": part
            for name, part in _ffn(
                run, gpu, kernels, tokens, model.shared_ffn, t, "shared_experts"
            ).items()
        }
    return parts | _experts(run, gpu, kernels)


def _around_attention(run: Run, gpu: Gpu, kernels: Kernels, line: float) -> dict[str, Part]:
    model, t, sp = run.model, run.layout.tp, run.layout.sp
    e, h, tokens = kernels.element, model.hidden, run.tokens
    bandwidth = gpu.memory_bandwidth * gpu.memory_share
    parts: dict[str, Part] = {}
    if model.mla:
        mla = model.mla
        down = [Product(tokens // sp, mla.kv_lora + mla.rope, h)]
        up = [Product(tokens, model.heads // t * (mla.nope + mla.v), mla.kv_lora)]
        if mla.q_lora:
            down.append(Product(tokens // sp, mla.q_lora, h))
            up.append(Product(tokens, model.q_width // t, mla.q_lora))
        else:
            down.append(Product(tokens, model.q_width // t, h))
        parts["down"] = _linear(run, gpu, kernels, down, ())
        parts["up"] = _linear(run, gpu, kernels, up, ("mla_up_proj",))
        width = 2 * model.q_width + model.context_width
    else:
        qkv = Product(tokens, (model.q_width + 2 * model.kv_width) // t, h)
        parts["qkv"] = _column(run, gpu, kernels, qkv)
        width = model.q_width + 2 * model.kv_width
    parts["projection"] = _row(run, gpu, kernels, Product(tokens, h, model.context_width // t))
    turned = 0.0 if model.learned_positions else 2.0 * e * tokens * width / t / bandwidth
    turned *= 2 if model.qk_norm else 1
    turned *= 1 if kernels.fused_norm else UNFUSED_ROTATION
    joined = 2.0 * e * tokens * width / t / bandwidth
    parts["rotation"] = Part(turned, turned + joined)
    return parts


def _ffn(
    run: Run, gpu: Gpu, kernels: Kernels, tokens: int, width: int, t: int, module: str
) -> dict[str, Part]:
    """A dense FFN, cut by t."""
    model, h = run.model, run.model.hidden
    widths = 2 if model.gated else 1
    first = _column(run, gpu, kernels, Product(tokens, widths * width // t, h))
    second = _row(run, gpu, kernels, Product(tokens, h, width // t))
    return {
        "ffn in": replace(first, modules=(module,)),
        "activation": _activation(gpu, kernels, model.gated, tokens * width // t, (module,)),
        "ffn out": replace(second, modules=(module,)),
    }


def _experts(run: Run, gpu: Gpu, kernels: Kernels) -> dict[str, Part]:
    """Router, exchange of tokens, the experts of this GPU with equal shares."""
    model, layout, h, e = run.model, run.layout, run.model.hidden, kernels.element
    bandwidth = gpu.memory_bandwidth * gpu.memory_share
    mine, etp = model.experts // layout.ep, layout.expert_tp
    rows, own = expert_rows(run), run.tokens // layout.sp
    widths, narrow = (2 if model.gated else 1), model.expert_width // etp
    each = max(1, rows // mine)
    grouped = _linear(
        run,
        gpu,
        kernels,
        [Product(each, widths * narrow, h, mine), Product(each, h, narrow, mine)],
        ("moe",),
    )
    local = max(1, gpu.domain // etp)
    sent = e * model.experts_per_token * own * h
    exchange = all_to_all_seconds(gpu, layout.ep, local, sent)
    if etp > 1:
        exchange += gather_seconds(gpu, etp, e * rows * h)
    # sorted by expert before and after they travel, and back again
    permuted = 8 * e * rows * h / bandwidth
    router = _linear(run, gpu, kernels, [Product(own, model.experts, h)], ("moe",))
    return {
        "router": Part(router.forward + 12 * KERNEL, router.backward + 12 * KERNEL, ("moe",)),
        "exchange": Part(2 * exchange, 2 * exchange, ("moe",)),
        "permutation": Part(permuted + 6 * KERNEL, permuted + 6 * KERNEL, ("moe",)),
        "experts": grouped,
        "activation": _activation(gpu, kernels, model.gated, rows * narrow, ("moe", "moe_act")),
    }


def _activation(
    gpu: Gpu, kernels: Kernels, gated: bool, elements: int, modules: tuple[str, ...]
) -> Part:
    """Reads and writes of GELU or SwiGLU, each of one kernel; unfused SwiGLU writes silu too."""
    inputs = 2 if gated else 1
    extra = 3 if gated and not kernels.fused_swiglu else 0
    once = kernels.element * elements / (gpu.memory_bandwidth * gpu.memory_share)
    return Part(
        (inputs + 1 + extra) * once + KERNEL, (2 * inputs + 1 + extra) * once + KERNEL, modules
    )


def _linear(
    run: Run, gpu: Gpu, kernels: Kernels, products: list[Product], modules: tuple[str, ...]
) -> Part:
    """Linear layers without messages."""
    forward = backward = weights = 0.0
    for product in products:
        there, back, later = forward_backward(
            gpu, product, kernels.element, fused=run.settings.grad_fusion
        )
        forward, backward, weights = forward + there, backward + back, weights + later
    return Part(forward, backward + weights, modules, backward, weights)


def _column(run: Run, gpu: Gpu, kernels: Kernels, product: Product) -> Part:
    """A layer cut by columns: its input is gathered (or there), its input's gradient summed."""
    layout, size = run.layout, kernels.element * run.tokens * run.model.hidden
    there, inputs, weights = forward_backward(
        gpu, product, kernels.element, fused=run.settings.grad_fusion
    )
    if layout.tp == 1:
        return Part(there, inputs + weights, (), inputs, weights)
    if not layout.sequence_parallel:
        total = reduce_seconds(gpu, layout.tp, size)
        return Part(there, inputs + max(weights, total), (), inputs + total, weights)
    message = gather_seconds(gpu, layout.tp, size)
    forward = _beside(run, there, message)
    backward = max(inputs, message) + max(weights, message)
    return Part(forward, backward, (), inputs + message, message + weights)


def _row(run: Run, gpu: Gpu, kernels: Kernels, product: Product) -> Part:
    """A layer cut by rows: its output is summed, its output's gradient gathered (or there)."""
    layout, size = run.layout, kernels.element * run.tokens * run.model.hidden
    there, inputs, weights = forward_backward(
        gpu, product, kernels.element, fused=run.settings.grad_fusion
    )
    if layout.tp == 1:
        return Part(there, inputs + weights, (), inputs, weights)
    if not layout.sequence_parallel:
        total = reduce_seconds(gpu, layout.tp, size)
        return Part(there + total, inputs + weights, (), inputs, weights)
    message = gather_seconds(gpu, layout.tp, size)
    back = _beside(run, inputs, message)
    return Part(_beside(run, there, message), back + weights, (), back, weights)


def _beside(run: Run, product: float, message: float) -> float:
    """A message before or after a product, or in t pieces beside it, all but one of them."""
    if not run.settings.tp_overlap:
        return product + message
    piece = 1 / run.layout.tp
    return max(product + piece * message, message + piece * product)


def _context(run: Run, gpu: Gpu, kernels: Kernels, attention: Part) -> Part:
    """Keys and values round the ring beside attention: what is longer than it."""
    layout = run.layout
    together = max(1, gpu.domain // layout.tp)
    rate = ring_bandwidth(gpu, layout.cp, together)
    size = 2 * kernels.element * run.tokens * run.model.kv_width / layout.tp
    sent = (layout.cp - 1) * size / rate
    return Part(max(0.0, sent - attention.forward), max(0.0, 2 * sent - attention.backward))
