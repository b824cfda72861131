"""The rows of tables 3 and 5 of the re-evaluation (`estimate.paper.published`), as flags.

A row of table 3 is the whole model on t x p GPUs. A row of table 5 is one of p equal stages: l/p
layers on one tensor-parallel group (p = 1). On a single GPU such a stage is divided by t: a/t
heads of the same width and f/t columns of the FFN, which are exactly the matrix multiplications of
one tensor-parallel rank. What sequence parallelism would split (LayerNorm, dropout) is whole there
and there are no tensor-parallel messages, so it is the faster by the latter, the slower by the
former.

The paper does not say whether its single stage had an embedding and an output layer. Here it has a
vocabulary of `STAGE_VOCAB` tokens, whose output layer is about 0.4 % of the stage's FLOPs and not
counted. A smaller one does not hold the tokens of Megatron's mock data, which go up to 4095.

Units: FLOPs of one iteration, sequences for batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpipe.estimate.models import Model, model_named
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, GLOBAL_BATCH, LAYOUT
from megatron_bpipe.estimate.runs import Attention
from megatron_bpipe.estimate.time.flops import equation_1, layer_flops_equation_1

STAGE_VOCAB = 4608
ONE_GPU = "-one-gpu"

ATTENTION = {
    # Transformer Engine's plain attention: scores and probabilities are kept for the backward.
    "none": ["--attention-backend", "unfused"],
    # The same, with the attention computed again in the backward (selective recomputation).
    "recompute": [
        *("--attention-backend", "unfused"),
        *("--recompute-granularity", "selective", "--recompute-modules", "core_attn"),
    ],
    # The flash-attn package, through Transformer Engine.
    "flash": ["--attention-backend", "flash"],
}


class RowError(ValueError):
    """A row that does not exist or cannot run as asked; says which, why, and what to ask for."""


@dataclass(frozen=True)
class Row:
    """One row; ``stage_of`` is 0 for the whole model, else p of the stage's pipeline."""

    table: int
    id: int
    model: str
    micro_batch: int
    global_batch: int
    attention: Attention
    bpipe: bool
    tensor_parallel: int
    pipeline_parallel: int = 1
    stage_of: int = 0

    @property
    def name(self) -> str:
        """Name of the row and of its folder of logs."""
        return f"table{self.table}-{self.id:02d}"

    @property
    def sizes(self) -> Model:
        """The model of table 2."""
        return model_named(self.model)

    @property
    def published_mfu(self) -> float:
        """What the re-evaluation measured, per cent."""
        experiment = next(e for e in EXPERIMENTS if e.id == self.id)
        return experiment.mfu if self.table == 3 else experiment.stage_mfu

    def gpus(self, one_gpu: bool = False) -> int:
        """Number of GPUs the row runs on."""
        return 1 if one_gpu else self.tensor_parallel * self.pipeline_parallel

    def flops(self, one_gpu: bool = False) -> float:
        """FLOPs of one iteration by equation 1; of a stage without the head's term."""
        if not self.stage_of:
            return equation_1(self.sizes, self.global_batch)
        stage = layer_flops_equation_1(self.sizes, self.global_batch) / self.stage_of
        return stage / self.tensor_parallel if one_gpu else stage


def load_rows() -> list[Row]:
    """All rows, table by table; no stage of table 5 was measured with BPipe."""
    whole = [
        Row(
            *(3, e.id, e.model, e.micro_batch, GLOBAL_BATCH, e.attention, e.bpipe),
            tensor_parallel=LAYOUT.tp,
            pipeline_parallel=LAYOUT.pp,
        )
        for e in EXPERIMENTS
    ]
    stages = [
        Row(
            *(5, e.id, e.model, e.micro_batch, GLOBAL_BATCH, e.attention, False),
            tensor_parallel=LAYOUT.tp,
            stage_of=LAYOUT.pp,
        )
        for e in EXPERIMENTS
    ]
    return whole + stages


def choose(rows: list[Row], names: list[str]) -> list[Row]:
    """The rows of these names; raises RowError for a name that is none."""
    known = {row.name: row for row in rows}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RowError(f"no row {unknown[0]!r}: choose from {', '.join(known)}")
    return [known[name] for name in names]


def flags(row: Row, *, one_gpu: bool = False, iterations: int = 20) -> list[str]:
    """The row as flags of Megatron.

    Raises RowError when the whole model is asked onto one GPU.
    """
    if one_gpu and not row.stage_of:
        raise RowError(f"{row.name} is a whole model: only single-stage rows fit on one GPU")
    return [
        *_parallel(row, one_gpu),
        *_model(row, one_gpu),
        *ATTENTION[row.attention],
        *("--micro-batch-size", str(row.micro_batch)),
        *("--global-batch-size", str(row.global_batch)),
        *("--bf16", "--optimizer", "adam", "--lr", "1e-4"),
        *("--mock-data", "--tokenizer-type", "NullTokenizer"),
        "--no-create-attention-mask-in-dataloader",
        *("--train-iters", str(iterations), "--eval-iters", "0"),
        *("--log-interval", "1", "--log-throughput"),
        *(["--bpipe", "--bpipe-placement", "pair-adjacent"] if row.bpipe else []),
    ]


def _parallel(row: Row, one_gpu: bool) -> list[str]:
    if one_gpu:
        return ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    return [
        *("--tensor-model-parallel-size", str(row.tensor_parallel), "--sequence-parallel"),
        *("--pipeline-model-parallel-size", str(row.pipeline_parallel)),
    ]


def _model(row: Row, one_gpu: bool) -> list[str]:
    model, share = row.sizes, row.tensor_parallel if one_gpu else 1
    vocab = STAGE_VOCAB if row.stage_of else model.vocab
    words = [
        *("--num-layers", str(model.layers // (row.stage_of or 1))),
        *("--hidden-size", str(model.hidden)),
        *("--num-attention-heads", str(model.heads // share)),
        *("--kv-channels", str(model.hidden // model.heads)),
        *("--ffn-hidden-size", str(model.ffn // share)),
        *("--seq-length", str(model.seq), "--max-position-embeddings", str(model.seq)),
        # Some releases count the end-of-document token on top: this pads to the same size in all.
        *("--vocab-size", str(vocab - 1)),
        *("--normalization", "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"),
        *("--position-embedding-type", "learned_absolute" if model.learned_positions else "rope"),
    ]
    if model.gated:
        words.append("--swiglu")
    if not model.bias:
        words.append("--disable-bias-linear")
    if not model.tied_embeddings:
        words.append("--untie-embeddings-and-output-weights")
    if not model.dropout:
        words += ["--attention-dropout", "0", "--hidden-dropout", "0"]
    return words
