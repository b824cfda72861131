"""Foretelling whether a link will be too slow, from published figures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_bpipe.estimate.hardware import A100_80G
from megatron_bpipe.integration import link_forecast
from megatron_bpipe.integration.link_forecast import bandwidth, forecast, forward_flops
from megatron_bpipe.runtime.transport import TransportError
from megatron_bpipe.runtime.transport.pair.bandwidth import Speed
from megatron_bpipe.runtime.transport.pair.links import Link

GIB = 2**30
H, S = 9984, 2048  # the paper's GPT-3 96B, table 2


def config(**changes: object) -> SimpleNamespace:
    sizes = {"hidden_size": H, "num_attention_heads": 104, "num_query_groups": None}
    sizes |= {"num_layers": 80, "ffn_hidden_size": 4 * H, "gated_linear_unit": False}
    return SimpleNamespace(**sizes | {"num_moe_experts": None} | changes)


def groups(tp: int, cp: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        **{n: SimpleNamespace(size=lambda s=s: s) for n, s in (("tp", tp), ("cp", cp))}
    )


def test_flops_of_a_forward() -> None:
    """A layer's forward is 24 b s h^2 + 4 b s^2 h (Narayanan et al. 2021, appendix)."""
    layer = 24 * 2 * S * H * H + 4 * 2 * S * S * H
    found = forward_flops(config(), S, 2, groups(4, 2), 8)
    assert found == pytest.approx(layer * 10 / 8)


def test_experts_visited_count_and_others_do_not() -> None:
    dense = forward_flops(config(), S, 1, groups(1), 8)
    moe = config(num_moe_experts=64, moe_ffn_hidden_size=4 * H, moe_router_topk=1)
    found = forward_flops(moe, S, 1, groups(1), 8)
    assert dense is not None
    assert found == pytest.approx(dense, rel=0.01)  # the router


def test_a_model_it_does_not_know() -> None:
    assert forward_flops(config(num_attention_heads=7), S, 1, groups(1), 8) is None


@pytest.mark.parametrize(
    ("transport", "link", "expected"),
    [
        ("ipc", Link.NVLINK, 300e9),
        ("ipc", Link.PCIE, 15e9),
        ("ipc", Link.SAME_GPU, 2.039e12 / 2),
        ("host", Link.NVLINK, 15e9),
        ("p2p", Link.NODE, 25e9),
    ],
)
def test_bandwidth_of_a_link(transport: str, link: Link, expected: float) -> None:
    assert bandwidth(transport, link, A100_80G) == expected


def test_an_unknown_transport_has_no_bandwidth() -> None:
    with pytest.raises(TransportError, match="transport 'tcp' is unknown"):
        bandwidth("tcp", Link.NVLINK, A100_80G)


def test_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 GiB and 7.8e12 FLOPs: 50 ms of forward at half of 312 TFLOP/s; over PCIe 72 ms of copy."""
    monkeypatch.setattr(link_forecast, "gpu_here", lambda: A100_80G)
    assert forecast("ipc", Link.NVLINK, GIB, 7.8e12, None) is None
    said = forecast("host", Link.NVLINK, GIB, 7.8e12, None)
    assert said is not None
    assert said.startswith("expected before training (published bandwidth, A100-80GB at 50% MFU)")
    assert "1024.0 MiB a micro-batch at 14.0 GiB/s take 71.6 ms, a forward 50.0 ms" in said
    assert forecast("host", Link.NVLINK, GIB, 7.8e12, Speed(1, out=30e9, back=25e9)) is None
    slow = forecast("ipc", Link.NVLINK, GIB, 7.8e12, Speed(1, out=30e9, back=15e9))
    assert slow is not None
    assert "measured bandwidth" in slow
    assert forecast("host", Link.NVLINK, GIB, None, None) is None


def test_without_a_known_gpu_nothing_is_said() -> None:
    assert link_forecast.gpu_here() is None
    assert forecast("host", None, GIB, 1.0, None) is None
