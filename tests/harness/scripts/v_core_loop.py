"""A loop on megatron.core alone: the V-shapes beside stock interleaving, part by part.

For releases whose training loop is not in the wheel. Writes which schedules were bitwise equal.
"""

import json
import os
import sys
import zlib

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

import megatron_bpipe
from megatron_bpipe.integration.install import session
from megatron_bpipe.integration.patches.v_placement.build import with_v_placed_chunks

STAGES, MICROBATCHES, SIZE, LENGTH, VOCABULARY = 4, 8, 2, 32, 128


def chunk(pre_process, post_process, vp_stage):
    config = TransformerConfig(
        virtual_pipeline_model_parallel_size=2,
        overlap_p2p_comm=False,
        microbatch_group_size_per_vp_stage=STAGES,
        num_layers=2 * STAGES,
        hidden_size=32,
        num_attention_heads=4,
        pipeline_model_parallel_size=STAGES,
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=False,
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


def train(models):
    """Losses on the last rank; gradients after three iterations by (layer, name), of all ranks."""
    for model in models:
        model.model_type = None  # up to 0.16 the schedule passes it on
    losses = []
    for iteration in range(3):
        for parameter in (each for model in models for each in model.parameters()):
            parameter.grad = None
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
                parameter -= 0.1 * parameter.grad
    mine = {
        (model.decoder.layers[0].layer_number, name): parameter.grad
        for model in models
        for name, parameter in model.named_parameters()
    }
    everyone = [None] * STAGES
    dist.all_gather_object(everyone, (losses, mine))
    return everyone[-1][0], {key: value for _, part in everyone for key, value in part.items()}


dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(pipeline_model_parallel_size=STAGES)
parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
tensor_parallel.model_parallel_cuda_manual_seed(7)
losses, gradients = train(build(chunk))
answer = {}
for schedule in ("v-half", "v-min", "v-zb"):
    megatron_bpipe.install(megatron_bpipe.Options(schedule=schedule))
    placed = with_v_placed_chunks(build, session().mirror)(chunk)
    seen, other = train(placed)
    megatron_bpipe.uninstall()
    same = other.keys() == gradients.keys() and len(gradients) > 100
    same = same and all(torch.equal(gradients[key], other[key]) for key in gradients)
    answer[schedule] = bool(same and losses == seen and len(seen) == 3 * MICROBATCHES)
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(answer, file)
