"""Layers of each stage as Megatron's flags fix them.

Four ways: a layout, so many layers on the first and the last stage, embedding and loss counted as
layers, and layers or chunks of a virtual stage.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from megatron_bpipe.estimate.errors import EstimateError

LAYERS = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
)
"""The flags' names; they go into the command as they are."""


@dataclass(frozen=True)
class Layers:
    """What is fixed: the flags as words, and what they say.

    ``layout`` layers of each virtual stage in order; ``first``, ``last`` of these stages;
    ``ends`` how many of embedding and loss count as layers of theirs; ``each`` layers a virtual
    stage, ``chunks`` virtual stages a rank.
    """

    words: tuple[str, ...] = ()
    layout: tuple[int, ...] = ()
    first: int | None = None
    last: int | None = None
    ends: tuple[int, int] = (0, 0)
    each: int | None = None
    chunks: int | None = None

    @property
    def uneven(self) -> bool:
        """Whether stages get unlike numbers of layers by these flags."""
        return bool(self.layout or self.first or self.last or any(self.ends))

    def on(self, p: int, layers: int) -> tuple[int, tuple[int, ...]]:
        """Chunks and the layers of each virtual stage (empty: even) on so many stages.

        Raises EstimateError where they do not divide.
        """
        if self.layout:
            if len(self.layout) % p:
                raise EstimateError(
                    f"--pipeline-model-parallel-layout has {len(self.layout)} stages: give "
                    f"--pipeline-model-parallel-size, of which that is a multiple, not {p}"
                )
            return len(self.layout) // p, self.layout
        chunks = self._chunks(p, layers)
        if p == 1 or not self.uneven:
            if layers % (p * chunks):
                raise EstimateError(
                    f"{layers} layers cannot be divided by {p} stages of {chunks} chunks: change "
                    "one of them"
                )
            return chunks, ()
        if any(self.ends):
            return chunks, self._counted(p * chunks, layers)
        return chunks, self._apart(p, chunks, layers)

    def _chunks(self, p: int, layers: int) -> int:
        if self.chunks is not None:
            return self.chunks
        if self.each is None:
            return 1
        total = layers + sum(self.ends)
        if total % (p * self.each):
            raise EstimateError(
                f"--num-layers-per-virtual-pipeline-stage {self.each}: {total} layers cannot be "
                f"divided by {p} stages of such chunks"
            )
        return total // (p * self.each)

    def _counted(self, parts: int, layers: int) -> tuple[int, ...]:
        total = layers + sum(self.ends)
        if total % parts:
            raise EstimateError(
                f"--account-for-embedding/loss-in-pipeline-split: {total} layers with these cannot "
                f"be divided by {parts}"
            )
        found = [total // parts] * parts
        found[0] -= self.ends[0]
        found[-1] -= self.ends[1]
        return tuple(found)

    def _apart(self, p: int, chunks: int, layers: int) -> tuple[int, ...]:
        """First and last as given, the others alike, each cut into its chunks."""
        fixed = [n for n in (self.first, self.last) if n is not None]
        others = p - len(fixed)
        left = layers - sum(fixed)
        name = "--decoder-first/last-pipeline-num-layers"
        if left < 0 or (others == 0 and left) or (others and left % others):
            raise EstimateError(
                f"{name}: {left} layers are left for {others} stages, which does not divide"
            )
        stages = [left // others if others else 0] * p
        stages[0] = self.first if self.first is not None else stages[0]
        stages[-1] = self.last if self.last is not None else stages[-1]
        for number in stages:
            if number % chunks:
                raise EstimateError(
                    f"{name}: {number} layers are not a multiple of {chunks} chunks"
                )
        return tuple(stages[part % p] // chunks for part in range(p * chunks))


def given_layers(given: argparse.Namespace) -> Layers:
    """What the flags fix; raises EstimateError for those that Megatron refuses together."""
    words: list[str] = []
    for name in LAYERS:
        value = getattr(given, name)
        if value in (None, False):
            continue
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(value)]
    layout = given.pipeline_model_parallel_layout
    if layout is not None and len(words) > 2:
        raise EstimateError(
            f"--pipeline-model-parallel-layout {layout}: Megatron takes it alone, not beside "
            f"{next(w for w in words[2:] if w.startswith('--'))}"
        )
    return Layers(
        tuple(words),
        layout_layers(layout) if layout is not None else (),
        given.decoder_first_pipeline_num_layers,
        given.decoder_last_pipeline_num_layers,
        (
            int(given.account_for_embedding_in_pipeline_split),
            int(given.account_for_loss_in_pipeline_split),
        ),
        given.num_layers_per_virtual_pipeline_stage,
        given.num_virtual_stages_per_pipeline_rank,
    )


def layout_layers(text: str) -> tuple[int, ...]:
    """Transformer layers of each virtual stage of a layout such as ``Et*3|(tt|)*6,tmL``.

    Raises EstimateError for one that cannot be read, or whose prediction layers lie elsewhere than
    with the loss.
    """
    plain = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        plain = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), plain)
    parts = plain.split("|")
    odd = set(plain) - set("EtmL|")
    if odd or not parts[0].startswith("E") or not parts[-1].endswith("L"):
        raise EstimateError(
            f"--pipeline-model-parallel-layout {text}: stages divided by | of E, t, m and L, the "
            "first with E, the last with L, are expected"
        )
    if any("m" in part for part in parts[:-1]):
        raise EstimateError(
            f"--pipeline-model-parallel-layout {text}: the planner knows layers of multi-token "
            "prediction (m) on the last stage only"
        )
    return tuple(part.count("t") for part in parts)
