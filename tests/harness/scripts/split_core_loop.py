"""A loop on megatron.core alone: schedules that split the backward beside stock, part by part.

ZB-H1, plain and under BPipe, beside 1F1B; the V-shapes beside interleaving. For releases whose
training loop is not in the wheel. Writes which were bitwise equal, and what left stage 0.

    split_core_loop.py FOLDER [zb-h1] [v]
"""

import json
import os
import sys
import zlib
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import TransformerConfig

import megatron_bpipe
from megatron_bpipe.integration.install import session
from megatron_bpipe.integration.patches.v_placement.build import with_v_placed_chunks

STAGES, MICROBATCHES, SIZE, LENGTH, VOCABULARY = 4, 8, 2, 32, 128
V = ("v-half", "v-min", "v-zb")


def chunk(chunks, fused, pre_process, post_process, vp_stage=None):
    config = TransformerConfig(
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        overlap_p2p_comm=False,
        microbatch_group_size_per_vp_stage=STAGES,
        num_layers=chunks * STAGES,
        hidden_size=32,
        num_attention_heads=4,
        pipeline_model_parallel_size=STAGES,
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=fused,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    model = GPTModel(
        config=config,
        share_embeddings_and_output_weights=False,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
    number = model.decoder.layers[0].layer_number  # in the whole model
    for name, parameter in model.named_parameters():
        dice = torch.Generator().manual_seed(zlib.crc32(f"{number} {name}".encode()))
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=dice))
    return model


def build(chunk):
    """The stage's two chunks, as Megatron's ``get_model`` asks for them."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    return [
        chunk(pre_process=first, post_process=False, vp_stage=0),
        chunk(pre_process=False, post_process=last, vp_stage=1),
    ]


def whole_stage(*, distributed=False, fused=False):
    """A stage of one chunk, in Megatron's data parallelism if asked for."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = chunk(1, fused, first, last)
    if not distributed:
        return [model]
    how = DistributedDataParallelConfig(overlap_grad_reduce=True)
    config = model.config
    model = DistributedDataParallel(config=config, ddp_config=how, module=model)
    config.no_sync_func = model.no_sync
    config.grad_sync_func = model.start_grad_sync
    config.finalize_model_grads_func = finalize_model_grads
    return [model]


def batches(iteration):
    dice = torch.Generator().manual_seed(iteration)
    for _ in range(MICROBATCHES):
        yield torch.randint(0, VOCABULARY, (SIZE, LENGTH + 1), generator=dice)


def mean(output):
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}


def forward_step(data, model):
    tokens = next(data)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5
    return model(inputs, torch.arange(LENGTH).expand_as(inputs), mask, labels=labels), mean


def inner(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient(parameter):
    return parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad


def train(models):
    """Losses on the last rank; gradients after three iterations by (layer, name), of all ranks."""
    for model in models:
        inner(model).model_type = None  # up to 0.16 the schedule passes it on
    losses = []
    for iteration in range(3):
        for model in models:
            model.zero_grad() if model is inner(model) else model.zero_grad_buffer()
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[batches(iteration) for _ in models],
            model=models,
            num_microbatches=MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=SIZE,
            forward_only=False,
        )
        losses += [one["loss"].item() for one in found]
        with torch.no_grad():
            for parameter in (each for model in models for each in model.parameters()):
                parameter -= 0.1 * gradient(parameter)
    mine = {
        (inner(model).decoder.layers[0].layer_number, name): gradient(parameter).clone()
        for model in models
        for name, parameter in inner(model).named_parameters()
    }
    everyone = [None] * STAGES
    dist.all_gather_object(everyone, (losses, mine))
    return everyone[-1][0], {key: value for _, part in everyone for key, value in part.items()}


def equal(stock, other):
    (losses, gradients), (seen, found) = stock, other
    same = found.keys() == gradients.keys() and len(gradients) > 50
    same = same and all(torch.equal(gradients[key], found[key]) for key in gradients)
    return bool(same and losses == seen and len(seen) == 3 * MICROBATCHES)


def try_zb_h1(answer):
    """ZB-H1 and BPipe on it: without data parallelism, with it, with fused weight gradients."""
    calls = []

    def accumulate(inputs, gradient, main):
        calls.append(1)
        main.add_(gradient.t() @ inputs)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
    )
    layers._grad_accum_fusion_available = True
    for how in ({}, {"distributed": True}, {"distributed": True, "fused": True}):
        stock = train(whole_stage(**how))
        for balanced in (False, True):
            options = megatron_bpipe.Options(schedule="zb-h1", bpipe=balanced, transport="shm")
            megatron_bpipe.install(options)
            said = ", ".join(["bpipe zb-h1" if balanced else "zb-h1", *how])
            calls.clear()
            answer[said] = equal(stock, train(whole_stage(**how)))
            answer[said] &= bool(calls) is ("fused" in how)
            if balanced:
                store = session().store  # acceptors have none
                answer[f"{said}, evicted"] = store.totals.evicted if store is not None else 0
            megatron_bpipe.uninstall()


def try_v(answer):
    """The V-shapes."""
    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    one = partial(chunk, 2, False)
    stock = train(build(one))
    for schedule in V:
        megatron_bpipe.install(megatron_bpipe.Options(schedule=schedule))
        placed = with_v_placed_chunks(build, session().mirror)(one)
        answer[schedule] = equal(stock, train(placed))
        megatron_bpipe.uninstall()


dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(pipeline_model_parallel_size=STAGES)
tensor_parallel.model_parallel_cuda_manual_seed(7)
answer = {}
folder, *asked = sys.argv[1:]
for name, attempt in (("zb-h1", try_zb_h1), ("v", try_v)):
    if name in asked:
        attempt(answer)
with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
    json.dump(answer, file)
