"""Random numbers: the CUDA generator is the CPU generator.

Dropout and weight initialisation draw from the generator of the device they run on,
which here is the CPU's. So Megatron's ``CudaRNGStatesTracker``
(``core/tensor_parallel/random.py``) must save, seed and restore that one.

A data loader draws a seed on the host whenever it is iterated. On a GPU that leaves the numbers of
dropout alone, so it must here: a run that is resumed makes its loaders after it has restored them.
"""

import functools
import logging
from collections.abc import Callable, Iterable

import torch
from torch.utils.data import dataloader

from megatron_bpipe.integration.checks.hook_points import RANDOM
from megatron_bpipe.integration.cpu.replace import replace


def _get_state(device: object = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_state(new_state: torch.Tensor, device: object = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _set_state_all(new_states: Iterable[torch.Tensor]) -> None:
    for state in new_states:
        _set_state(state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _call_now(function: Callable[[], object], **kwargs: object) -> None:
    """Stand in for ``_lazy_call``, which queues until CUDA is initialised: it never is."""
    function()


class _TheGenerator(tuple[torch.Generator, ...]):
    """Stand in for ``default_generators``, whatever the device in the brackets.

    The tracker writes ``default_generators[torch.cuda.current_device()]``.
    """

    def __getitem__(self, device: object) -> torch.Generator:  # type: ignore[override]
        return next(iter(self))


def _is_not_cpu_changed(record: logging.LogRecord) -> bool:
    """Drop the tracker's warning that the CPU generator moved inside a fork.

    ``CudaRNGStatesTracker.fork`` compares it before and after, to find code that
    draws on the CPU by mistake; here all code draws there.
    """
    return not record.getMessage().startswith("CPU RNG state changed within GPU RNG context")


def _begin_aside(stock: Callable[..., None]) -> Callable[..., None]:
    """The start of a loader's iterator, which leaves the generator as it was."""

    @functools.wraps(stock)
    def begin(iterator: object, loader: object) -> None:
        state = _get_state()
        stock(iterator, loader)
        _set_state(state)

    return begin


def install() -> None:
    """Let every way to reach the CUDA generator lead to the CPU's."""
    for module in (torch.cuda, torch.cuda.random):
        replace(
            module,
            _lazy_call=_call_now,
            _lazy_init=lambda: None,
            get_rng_state=_get_state,
            get_rng_state_all=lambda: [_get_state()],
            initial_seed=lambda: torch.default_generator.initial_seed(),
            manual_seed=_seed,
            manual_seed_all=_seed,
            set_rng_state=_set_state,
            set_rng_state_all=_set_state_all,
        )
    iterator = dataloader._BaseDataLoaderIter
    replace(iterator, __init__=_begin_aside(iterator.__init__))
    replace(torch.cuda, default_generators=_TheGenerator((torch.default_generator,)))
    logging.getLogger(RANDOM).addFilter(_is_not_cpu_changed)
