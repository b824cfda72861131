"""Builds the two chunks of a stage under the V placement.

Megatron tells a model's builder whether the chunk begins or ends the model by the stage's number.
Chunk 1 of stage 0 ends it here, and chunk 1 of stage p-1 does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_bpipe.integration.patches.v_placement.mirror import UPWARD_CHUNK, Mirror
from megatron_bpipe.integration.patches.v_placement.tied import tie


def with_v_placed_chunks(stock: Callable[..., Any], mirror: Mirror) -> Callable[..., Any]:
    """``stock`` (whose first argument builds one chunk), with chunk 1 built from the other end."""

    @functools.wraps(stock)
    def build_all(build: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        built: list[Any] = []

        def build_chunk(*inner: Any, **given: Any) -> Any:
            if given.get("vp_stage") == UPWARD_CHUNK:
                given |= {"pre_process": False, "post_process": mirror.stage == 0}
                inner = tuple(map(mirror.turned, inner))
                given = {name: mirror.turned(value) for name, value in given.items()}
                with mirror.seen_by(UPWARD_CHUNK):
                    model = build(*inner, **given)
                model.sharded_state_dict = mirror.wrapped(model.sharded_state_dict, UPWARD_CHUNK)
            else:
                model = build(*inner, **given)
            built.append(model)
            if len(built) == UPWARD_CHUNK + 1:
                tie(*built)
                built.clear()
            return model

        return stock(build_chunk, *positional, **named)

    return build_all
