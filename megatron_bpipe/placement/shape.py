"""How a job is cut into ranks, and which coordinates a logical rank has.

Megatron numbers its ranks by an order such as ``tp-cp-ep-dp-pp``: the first axis changes fastest.
It keeps two such grids over the same ranks: the dense one (tp, cp, dp, pp; ep counts as 1) and the
expert one (tp, ep, expert dp, pp; cp counts as 1).  Both must agree on the pipeline stage.

Units: none.  Ranks, slots, stages and coordinates count from 0.
Source: ``RankGenerator`` and ``initialize_model_parallel`` in megatron/core/parallel_state.py
(read in 0.19.2); a test compares every coordinate with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_ORDER = "tp-cp-ep-dp-pp"
AXES = ("tp", "cp", "ep", "dp", "pp")


class PlacementError(ValueError):
    """A shape, node size or placement that cannot be used; says what is wrong and what to do."""


@dataclass(frozen=True)
class Coordinates:
    """Where one logical rank stands: in the dense grid, and its expert-parallel rank."""

    tp: int
    cp: int
    dp: int
    ep: int
    stage: int


@dataclass(frozen=True)
class ParallelShape:
    """Sizes of every kind of parallelism, and Megatron's order of the axes (fastest first).

    ``dp`` is the data-parallel size of the dense layers; ``ep`` is carved out of ``cp * dp`` and
    does not multiply the world.  Expert layers have the tensor-parallel size of the dense ones
    (Megatron's default).  Raises PlacementError for sizes below 1, an order that is not one of the
    five axes each once, and a ``cp`` and ``ep`` that the rank order cannot hold.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    order: str = DEFAULT_ORDER

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise PlacementError(
                    f"{axis} is {getattr(self, axis)}: give a size of at least 1 (1 turns it off)"
                )
        _check_order(self.order, {axis: getattr(self, axis) for axis in AXES})
        lanes = self.cp * self.dp
        if lanes % self.ep:
            raise PlacementError(
                f"ep {self.ep} does not divide cp x dp = {self.cp} x {self.dp} = {lanes}: choose "
                f"an ep from {_divisors(lanes)} or change dp"
            )
        if self.pp > 1 and self._stage_strides_differ():
            raise PlacementError(
                f"order {self.order!r} with cp {self.cp} and ep {self.ep}: dense and expert layers "
                "would disagree on the pipeline stage of a rank, and Megatron stops; use an order "
                f"that ends in pp (the default {DEFAULT_ORDER!r}) or ep equal to cp"
            )

    def _stage_strides_differ(self) -> bool:
        dense = _strides(self.axes, self.dense_sizes)
        expert = _strides(self.axes, self.expert_sizes)
        return dense["pp"] != expert["pp"]

    @classmethod
    def from_world(
        cls,
        world: int,
        *,
        tp: int = 1,
        cp: int = 1,
        ep: int = 1,
        pp: int = 1,
        order: str = DEFAULT_ORDER,
    ) -> ParallelShape:
        """The shape of a job of ``world`` ranks; the data-parallel size is what is left over.

        Raises PlacementError when the model-parallel sizes do not divide the world.
        """
        model = max(tp, 1) * max(cp, 1) * max(pp, 1)
        if world < 1 or world % model:
            raise PlacementError(
                f"a world of {world} ranks is not a multiple of tp x cp x pp = "
                f"{tp} x {cp} x {pp} = {model}: start {max(1, world // model) * model} ranks or "
                "change these sizes"
            )
        return cls(tp=tp, cp=cp, ep=ep, dp=world // model, pp=pp, order=order)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def axes(self) -> tuple[str, ...]:
        """All five axes, fastest first; those that the order leaves out (size 1) come last."""
        named = tuple(self.order.lower().split("-"))
        return named + tuple(axis for axis in AXES if axis not in named)

    @property
    def dense_sizes(self) -> Mapping[str, int]:
        """Axis sizes of the dense grid."""
        return {"tp": self.tp, "cp": self.cp, "ep": 1, "dp": self.dp, "pp": self.pp}

    @property
    def expert_sizes(self) -> Mapping[str, int]:
        """Axis sizes of the expert grid: cp is 1, dp is what ep leaves of cp x dp."""
        expert_dp = self.cp * self.dp // self.ep
        return {"tp": self.tp, "cp": 1, "ep": self.ep, "dp": expert_dp, "pp": self.pp}

    @property
    def stage_stride(self) -> int:
        """Difference between the ranks of neighbouring stages of one pipeline."""
        return _strides(self.axes, self.dense_sizes)["pp"]

    def coordinates(self, rank: int) -> Coordinates:
        """Where this logical rank stands; raises PlacementError outside 0..world-1."""
        if not 0 <= rank < self.world:
            raise PlacementError(f"rank {rank} is not one of this job's: 0 to {self.world - 1}")
        dense = _digits(rank, self.axes, self.dense_sizes)
        expert = _digits(rank, self.axes, self.expert_sizes)
        return Coordinates(dense["tp"], dense["cp"], dense["dp"], expert["ep"], dense["pp"])

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that differ in this axis only, each in the order of the axis.

        ``axis`` is ``tp``, ``cp``, ``dp``, ``pp`` (dense grid), ``ep`` (expert grid) or ``dp-cp``,
        over which Megatron reduces the gradients of dense layers.
        """
        sizes = self.expert_sizes if axis == "ep" else self.dense_sizes
        moving = tuple(axis.split("-"))
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            digits = _digits(rank, self.axes, sizes)
            fixed = tuple(digits[name] for name in AXES if name not in moving)
            groups.setdefault(fixed, []).append(rank)
        return tuple(tuple(group) for group in groups.values())


def _check_order(order: str, sizes: Mapping[str, int]) -> None:
    named = order.lower().split("-")
    for name in named:
        if name not in AXES:
            raise PlacementError(
                f"order {order!r} names {name!r}: use tp, cp, ep, dp and pp joined by -, "
                f"as in {DEFAULT_ORDER!r}"
            )
        if named.count(name) > 1:
            raise PlacementError(f"order {order!r} names {name} twice: name each axis once")
    for name, size in sizes.items():
        if size > 1 and name not in named:
            raise PlacementError(
                f"order {order!r} leaves out {name}, whose size is {size}: add it, "
                f"as in {DEFAULT_ORDER!r}"
            )


def _strides(axes: tuple[str, ...], sizes: Mapping[str, int]) -> dict[str, int]:
    strides, stride = {}, 1
    for axis in axes:
        strides[axis] = stride
        stride *= sizes[axis]
    return strides


def _digits(rank: int, axes: tuple[str, ...], sizes: Mapping[str, int]) -> dict[str, int]:
    digits = {}
    for axis in axes:
        rank, digits[axis] = divmod(rank, sizes[axis])
    return digits


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
