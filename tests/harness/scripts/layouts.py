"""Several pipelines one after the other in each process, under one installation of BPipe.

Collectives of all ranks come wherever NCCL and Megatron's timers may put them: at each group's
first batched message, where NCCL builds its communicator, and at the start of the schedule.

``layouts.py FOLDER P...``: trains pipelines of P stages in turn, stock and then BPipe, fails in an
iteration of the last one, starts torch.distributed anew and trains that one again.
"""

import gc
import json
import os
import sys
import weakref
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.timers import Timers
from megatron.core.transformer import TransformerConfig

import megatron_bpipe
from megatron_bpipe.integration.install import session

SIZE, LENGTH, VOCABULARY, ITERATIONS = 2, 16, 64, 2
FAILS = 3  # the rank that raises
built: list[weakref.ref] = []


def build_communicators() -> None:
    """Let the first batched message of a group wait for all its ranks, as NCCL does."""
    stock = dist.batch_isend_irecv

    def batch_isend_irecv(ops):
        group = ops[0].group
        if not any(known() is group for known in built):
            built.append(weakref.ref(group))
            dist.barrier(group)
        return stock(ops)

    dist.batch_isend_irecv = batch_isend_irecv


def build(stages: int) -> torch.nn.Module:
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(
        num_layers=stages,
        hidden_size=32,
        num_attention_heads=4,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    config.timers = Timers(2, "minmax")  # --timing-log-level 2
    return GPTModel(
        config=config,
        share_embeddings_and_output_weights=False,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def batches(count: int, seed: int):
    dice = torch.Generator().manual_seed(seed)
    for number in range(count):
        yield number, torch.randint(0, VOCABULARY, (SIZE, LENGTH + 1), generator=dice)


def mean(output: torch.Tensor):
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}


def forward_step(fails: bool, data, model):
    number, tokens = next(data)
    if fails and number == 4 and dist.get_rank() == FAILS:
        raise ValueError("injected")
    positions = torch.arange(LENGTH).expand(SIZE, LENGTH)
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5
    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:].contiguous()), mean


def iteration(model: torch.nn.Module, stages: int, seed: int, *, fails: bool = False) -> list:
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, fails),
        data_iterator=batches(stages + 2, seed),
        model=model,
        num_microbatches=stages + 2,
        seq_length=LENGTH,
        micro_batch_size=SIZE,
        forward_only=False,
    )


def train(stages: int) -> list[torch.Tensor]:
    """Losses and gradients of a fresh model, in process groups made anew."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    model, seen = build(stages), []
    for seed in range(ITERATIONS):
        model.zero_grad()
        seen += [loss["loss"] for loss in iteration(model, stages, seed)]
        with torch.no_grad():
            for parameter in model.parameters():
                seen.append(parameter.grad.clone())
                parameter -= 0.1 * parameter.grad
    return seen


def fail(stages: int) -> str:
    """An iteration in which one rank raises, and what every rank then does to start again."""
    said = ""
    try:
        iteration(build(stages), stages, 0, fails=True)
    except (ValueError, RuntimeError) as error:
        said = type(error).__name__
    assert session().pools is None
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()  # closes the connections, by which the others' messages fail
    store = dist.FileStore(f"{folder}/again", int(os.environ["WORLD_SIZE"]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    return said


folder, layouts = sys.argv[1], list(map(int, sys.argv[2:]))
build_communicators()
dist.init_process_group("gloo")
expected = {stages: train(stages) for stages in layouts}
megatron_bpipe.install(megatron_bpipe.Options(bpipe=True, transport="auto", deadline=60.0))
found = []


def compare(stages: int) -> None:
    actual = train(stages)
    store, lent = session().store, session().acceptor_end
    found.append(
        {
            "stages": stages,
            "equal": all(map(torch.equal, actual, expected[stages])),
            "tensors": len(actual),
            "evicted": store.totals.evicted if store is not None else 0,
            "lent": lent.pool_bytes if lent is not None else 0,
            "pair": session().pools.pair,
        }
    )


for stages in layouts:
    compare(stages)
failed = fail(layouts[-1])
compare(layouts[-1])
with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
    json.dump({"found": found, "failed": failed}, file)
megatron_bpipe.uninstall()
