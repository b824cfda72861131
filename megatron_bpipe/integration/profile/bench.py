"""All measurements in order; every row is handed out as it is found."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch

from megatron_bpipe.estimate.profile import HeadRow, Profile, StageRow
from megatron_bpipe.estimate.runs import Attention
from megatron_bpipe.estimate.time.flops import layer_flops, mfu_percent
from megatron_bpipe.integration.profile.device import describe, empty_caches, memory_limited
from megatron_bpipe.integration.profile.group import one_rank_of
from megatron_bpipe.integration.profile.measure import measure, out_of_memory
from megatron_bpipe.integration.profile.model import Share
from megatron_bpipe.integration.profile.settings import ProfileError, Settings
from megatron_bpipe.integration.profile.stage import Part, build_head, build_layers, how_flash


@dataclass(frozen=True)
class Progress:
    """The ``done``-th of ``total`` measurements has given ``row``; ``profile`` has all so far."""

    done: int
    total: int
    row: StageRow | HeadRow
    profile: Profile


def measure_share(
    settings: Settings, share: Share, command: str, progress: Callable[[Progress], None]
) -> Profile:
    """Measure all that ``settings`` asks for; see `run_profile`."""
    with one_rank_of(share.args):
        device = describe(share.dtype, settings.peak_flops, settings.memory_limit)
        profile = Profile(
            model=share.model,
            tp=share.tp,
            sequence_parallel=bool(share.args.sequence_parallel),
            ep=int(share.args.expert_model_parallel_size),
            element=share.element,
            layers=share.layers,
            device=device,
            stage=(),
            head=(),
            made_by=_made_by(share, command),
        )
        with memory_limited(settings.memory_limit):
            return _Bench(settings, share, profile, progress).run()


@dataclass
class _Bench:
    settings: Settings
    share: Share
    profile: Profile
    progress: Callable[[Progress], None]
    done: int = 0

    @property
    def total(self) -> int:
        return len(self.settings.micro_batches) * (len(self.settings.attention) + 1)

    def run(self) -> Profile:
        for attention in self.settings.attention:
            self._layers(attention)
        self._head()
        return self.profile

    def _layers(self, attention: Attention) -> None:
        share = self.share

        def row(micro_batch: int, part: Part) -> StageRow:
            found = measure(part, micro_batch, self.settings.repeats, self.settings.warm_up)
            if isinstance(found, str):
                return StageRow(micro_batch, attention, failure=found)
            flops = layer_flops(share.model, micro_batch) * share.layers / share.tp
            seconds = found.forward.median + found.backward.median
            mfu = mfu_percent(flops, seconds, 1, self.profile.device.peak_flops)
            return StageRow(micro_batch, attention, found.forward, found.backward, found.moved, mfu)

        def failed(micro_batch: int, why: str) -> StageRow:
            return StageRow(micro_batch, attention, failure=why)

        self._rows(f"attention {attention}", lambda: build_layers(share, attention), row, failed)

    def _head(self) -> None:
        def row(micro_batch: int, part: Part) -> HeadRow:
            found = measure(part, micro_batch, self.settings.repeats, self.settings.warm_up)
            if isinstance(found, str):
                return HeadRow(micro_batch, failure=found)
            return HeadRow(micro_batch, found.forward, found.backward, found.moved)

        def failed(micro_batch: int, why: str) -> HeadRow:
            return HeadRow(micro_batch, failure=why)

        self._rows("the output layer", lambda: build_head(self.share), row, failed)

    def _rows[Row: (StageRow, HeadRow)](
        self,
        what: str,
        build: Callable[[], Part],
        row: Callable[[int, Part], Row],
        failed: Callable[[int, str], Row],
    ) -> None:
        """Measure each micro-batch of one part; after one that failed, no larger one."""
        part, why = _built(what, build)
        for micro_batch in self.settings.micro_batches:
            if part is None:
                self._found(failed(micro_batch, why))
                continue
            try:
                found = row(micro_batch, part)
            except Exception as error:
                said = " ".join(str(error).split()) or type(error).__name__
                raise ProfileError(f"micro-batch {micro_batch}, {what}: {said}") from error
            self._found(found)
            if found.failure is not None:
                part, why = None, f"not tried: {_short(found.failure)} at {micro_batch}"
        if part is not None:
            part.close()
            empty_caches()

    def _found(self, row: StageRow | HeadRow) -> None:
        profile = self.profile
        if isinstance(row, StageRow):
            profile = replace(profile, stage=(*profile.stage, row))
        else:
            profile = replace(profile, head=(*profile.head, row))
        self.done += 1
        rows = f"{self.done} of {self.total}"
        self.profile = replace(profile, made_by={**profile.made_by, "rows": rows})
        self.progress(Progress(self.done, self.total, row, self.profile))


def _built(what: str, build: Callable[[], Part]) -> tuple[Part | None, str]:
    """The part, or why its parameters alone did not fit."""
    try:
        return build(), ""
    except Exception as error:
        failure = out_of_memory(error)
        if failure is None:
            said = " ".join(str(error).split()) or type(error).__name__
            raise ProfileError(f"Megatron cannot build {what}: {said}") from error
        error.__traceback__ = None
    empty_caches()
    return None, f"{failure}, and these are the parameters alone"


def _short(failure: str) -> str:
    return failure.partition(":")[0]


def _made_by(share: Share, command: str) -> dict[str, str]:
    """What a reader needs to make it again."""
    args = share.args
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": str(share.dtype).removeprefix("torch."),
        "layers": f"--transformer-impl {args.transformer_impl}",
        "flash": how_flash(args),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
        "system": platform.platform(terse=True),
    }
