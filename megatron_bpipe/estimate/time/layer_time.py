"""What computing costs: seconds of one layer, and of the output layer, for one micro-batch.

A pace comes from a profile (here), from a model of the layer (``layer_model``), or from the MFU of
a single stage (``estimate.paper.stage_pace``).  Everything after that, schedule, messages,
transfers, optimizer, is the same for all three.

Units: seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.models import LayerKind
from megatron_bpipe.estimate.profile import Profile
from megatron_bpipe.estimate.runs import Run


@dataclass(frozen=True)
class Apart:
    """A backward split in two, (B, W) of one layer, of a dense one, and of the output layer.

    B is the input's gradient with all that is recomputed, W the weights' gradients; attention,
    norms and the like have no W.
    """

    layer: tuple[float, float]
    head: tuple[float, float]
    dense: tuple[float, float] | None = None


@dataclass(frozen=True)
class Pace:
    """Forward and backward of one layer and of the output layer with its loss.

    ``again`` is what of the layer's backward is its recomputation as a whole; ``dense`` has
    forward, backward and that of the dense layers of a model whose others are mixtures of experts;
    ``embedding`` is the gradient of the word embedding, on the first stage.  ``apart`` is what
    backwards take where they are split, None: not known but from FLOPs (``weight_time``).
    """

    forward: float
    backward: float
    head_forward: float
    head_backward: float
    again: float = 0.0
    dense: tuple[float, float, float] | None = None
    embedding: float = 0.0
    apart: Apart | None = None

    @property
    def layer(self) -> float:
        """Forward and backward of one layer."""
        return self.forward + self.backward

    @property
    def head(self) -> float:
        """Forward and backward of the output layer."""
        return self.head_forward + self.head_backward

    def of(
        self,
        kinds: Mapping[LayerKind, int],
        recomputed: int | None = None,
        apart: Apart | None = None,
    ) -> tuple[float, float, float]:
        """Forward, backward and W of so many layers of each kind.

        ``recomputed`` says how many of them are recomputed as a whole, None: all; ``apart`` how
        backwards are split, None: they are not.
        """
        forward = backward = weight = 0.0
        left = sum(kinds.values()) if recomputed is None else recomputed
        for kind, number in sorted(kinds.items()):
            there, back, again = self.forward, self.backward, self.again
            split = apart.layer if apart else None
            if kind == "dense" and self.dense:
                there, back, again = self.dense
                split = apart.dense if apart else None
            later = 0.0
            if split:
                back, later = split
            repeated = min(left, number)
            left -= repeated
            forward += number * there
            backward += number * back - (number - repeated) * again
            weight += number * later
        return forward, backward, weight


StageTimes = Callable[[Run, Gpu], Pace]
"""The pace of a run on a kind of GPU; raises EstimateError where it is not known."""


def thirds(layer: float, head: float) -> Pace:
    """A pace whose backwards take twice its forwards."""
    return Pace(layer / 3, 2 * layer / 3, head / 3, 2 * head / 3)


def messages_seconds(run: Run, gpu: Gpu, element: int = 2) -> float:
    """Messages between the tensor-parallel ranks in one layer's forward; its backward has as many.

    Two all-reduces, or as many gathers and scatters with sequence parallelism: four passes of
    (t-1)/t of the layer's input over NVLink in either case.
    """
    t = run.layout.tp
    return 4 * (t - 1) / t * element * run.tokens * run.model.hidden / (gpu.nvlink * gpu.link_share)


def profiled_pace(profile: Profile) -> StageTimes:
    """The pace of whatever the profile measured; the messages that it left out are added.

    The profile must be of the run's model (``profile.check_model``).

    On another kind of GPU than the profile's all times are scaled by the peaks' ratio.
    """

    def pace(run: Run, gpu: Gpu) -> Pace:
        if profile.tp != run.layout.tp:
            raise EstimateError(
                f"tp: the profile was made with tensor-parallel size {profile.tp}, not "
                f"{run.layout.tp}: make one for that size"
            )
        row = profile.stage_row(run.micro_batch, run.attention)
        head = profile.head_row(run.micro_batch)
        if row is None or head is None:
            raise EstimateError(
                f"the profile has no micro-batch {run.micro_batch} with attention "
                f"{run.attention!r}: profile that too"
            )
        failure = row.failure or head.failure
        if failure or not (row.forward and row.backward and head.forward and head.backward):
            raise EstimateError(f"micro-batch {run.micro_batch}: the profile says {failure}")
        scale = profile.device.peak_flops / gpu.flops
        messages = messages_seconds(run, gpu, profile.element)
        return Pace(
            scale * row.forward.median / profile.layers + messages,
            scale * row.backward.median / profile.layers + messages,
            scale * head.forward.median,
            scale * head.backward.median,
        )

    return pace
