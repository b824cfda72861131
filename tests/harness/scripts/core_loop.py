"""A loop of one's own on megatron.core: stock and BPipe one after the other in each process.

For what pretrain_gpt.py's flags cannot say on a CPU. Every mode compares losses and gradients of
three iterations bitwise, and wants something evicted.
"""

import dataclasses
import inspect
import json
import os
import sys
from functools import partial

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
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention

import megatron_bpipe
from megatron_bpipe.integration.patches.process_groups import default_groups
from tests.harness.core import IN_PARTS

STAGES, MICROBATCHES, SIZE, LONGEST, VOCABULARY = 4, 8, 2, 64, 128
CHUNKS = 2  # of the interleaved modes


class ScaledDotProductAttention(DotProductAttention):
    """torch's own attention, in place of Megatron's unfused one."""

    def forward(self, query, key, value, attention_mask, *_, **__):
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


# in these, Megatron finalises the gradients over process groups, tied embeddings among them
DISTRIBUTED = ("gradients finalised", "own process groups")


def build(mode: str) -> list[torch.nn.Module]:
    """The stage's model chunks; only the interleaved modes have several."""
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    count = CHUNKS if mode.startswith("interleaved") else 1
    overlapped = mode.startswith("interleaved") and not mode.endswith("not overlapped")
    virtual = count if count > 1 else None
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    config = TransformerConfig(
        virtual_pipeline_model_parallel_size=virtual,
        overlap_p2p_comm=overlapped,
        batch_p2p_comm=not overlapped,
        microbatch_group_size_per_vp_stage=STAGES,
        num_layers=STAGES * count,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=STAGES,
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        variable_seq_lengths="variable lengths" in mode,
        # with overlap, stock up to 0.17 frees outputs that gloo still sends
        deallocate_pipeline_outputs=mode != "outputs not deallocated" and not overlapped,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        num_microbatches_with_partial_activation_checkpoints=(
            2 if mode == "partial checkpointing" else None
        ),
        recompute_method="uniform" if mode == "partial checkpointing" else None,
        recompute_num_layers=1 if mode == "partial checkpointing" else None,
        calculate_per_token_loss=mode in DISTRIBUTED,
    )
    spec = get_gpt_layer_local_spec()
    if mode == "SDPA":
        spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
    models: list[torch.nn.Module] = [
        GPTModel(
            config=config,
            share_embeddings_and_output_weights=mode in DISTRIBUTED,
            transformer_layer_spec=spec,
            vocab_size=VOCABULARY,
            max_sequence_length=LONGEST,
            pre_process=parallel_state.is_pipeline_first_stage() and chunk == 0,
            post_process=parallel_state.is_pipeline_last_stage() and chunk == count - 1,
            vp_stage=chunk if count > 1 else None,
        )
        for chunk in range(count)
    ]
    if mode not in DISTRIBUTED:
        return models
    (model,) = models
    how = DistributedDataParallelConfig(overlap_grad_reduce=True)
    model = DistributedDataParallel(config=config, ddp_config=how, module=model)
    config.no_sync_func = model.no_sync
    config.grad_sync_func = model.start_grad_sync
    config.finalize_model_grads_func = finalize_model_grads
    return [model]


def batches(mode: str, iteration: int):
    dice = torch.Generator().manual_seed(iteration)
    for _ in range(MICROBATCHES):
        length = LONGEST
        if "variable lengths" in mode:
            length = int(torch.randint(2, 9, (), generator=dice)) * 8
        yield torch.randint(0, VOCABULARY, (SIZE, length + 1), generator=dice)


def mean(output: torch.Tensor):
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}


def total(output: torch.Tensor):
    loss = output.float().sum()
    return loss, torch.tensor(output.numel(), dtype=torch.int), {"loss": loss.detach().clone()}


def forward_step(mode, data, model, checkpoint_all=None):
    tokens = next(data)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    length = inputs.size(1)
    positions = torch.arange(length).expand_as(inputs)
    mask = torch.ones(1, 1, length, length).tril() < 0.5
    if mode == "partial checkpointing":
        model.config.recompute_granularity = "full" if checkpoint_all else None
    return model(inputs, positions, mask, labels=labels), total if mode in DISTRIBUTED else mean


def train(mode: str) -> list:
    models = build(mode)
    schedule = get_forward_backward_func()
    seen = []
    for iteration in range(3):
        if mode == "evaluation first":
            with torch.no_grad():
                run(schedule, mode, models, 100 + iteration, forward_only=True)
        for model in models:
            model.zero_grad_buffer() if mode in DISTRIBUTED else model.zero_grad()
        losses = run(schedule, mode, models, iteration, forward_only=False)
        seen += [loss["loss"] for loss in losses]
        name = "main_grad" if mode in DISTRIBUTED else "grad"
        with torch.no_grad():
            for parameter in (each for model in models for each in model.parameters()):
                gradient = getattr(parameter, name)
                seen.append(gradient.clone())
                parameter -= 0.1 * gradient
    return seen


def own_groups(model) -> dict:
    """What a caller passes who does not use Megatron's global process groups."""
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    communicator = schedules.P2PCommunicator(pp_group=pipeline, config=model.config)
    known = inspect.signature(schedules.forward_backward_pipelining_without_interleaving).parameters
    name = "pg_collection" if "pg_collection" in known else "grad_finalize_pgs"
    return {"p2p_communicator": communicator, name: default_groups(schedules)}


def run(schedule, mode, models, iteration, *, forward_only):
    data = [batches(mode, iteration) for _ in models]
    several = len(models) > 1
    return schedule(
        forward_step_func=partial(forward_step, mode),
        data_iterator=data if several else data[0],
        model=models if several else models[0],
        num_microbatches=MICROBATCHES,
        seq_length=LONGEST,
        micro_batch_size=SIZE,
        forward_only=forward_only,
        **(own_groups(models[0]) if mode == "own process groups" else {}),
    )


dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(pipeline_model_parallel_size=STAGES)
found = {}
for name in json.loads(sys.argv[1]):
    mode = name.removesuffix(IN_PARTS)
    expected = train(mode)
    for transport in ("shm", "p2p"):
        options = megatron_bpipe.Options(
            bpipe=True, transport=transport, parts=1 if mode == name else 4, deadline=60.0
        )
        megatron_bpipe.install(options)
        actual = train(mode)
        from megatron_bpipe.integration.install import session

        store = session().store
        evicted = dataclasses.asdict(store.totals)["evicted"] if store is not None else 0
        megatron_bpipe.uninstall()
        equal = len(actual) == len(expected) and all(map(torch.equal, actual, expected))
        found[f"{name}, {transport}"] = {"equal": equal, "evicted": evicted}
with open(f"{sys.argv[2]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
