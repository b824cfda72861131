"""Who gets how much of a shared link, by hand."""

import pytest

from megatron_bpipe.simulate.contention import ContentionModel
from megatron_bpipe.simulate.network import Link, Network

LINK = Link(bandwidth=50.0)


names: list[str] = []


def ended(model: ContentionModel) -> dict[str, float]:
    ends: dict[str, float] = {}
    while (found := model.next_over(None)) is not None:
        found[1]()
        ends[names.pop()] = found[0]
    return ends


def begin(name: str):
    return lambda: names.append(name)


@pytest.mark.parametrize(("contention", "first", "second"), [(True, 3.0, 4.0), (False, 2.0, 3.0)])
def test_two_flows_on_one_shared_link(contention, first, second):
    """100 bytes each at 50 bytes/s, the second a second later.  Shared: 50 alone, then 25 a second
    for both until the first has its other 50 at 3; the second has 50 by then, the rest alone."""
    network = Network(LINK, contention=contention, tp_share=0.0 if contention else 1e-12)
    model = ContentionModel(network)
    model.flow(0.0, network.path(0, 1), 100.0, begin("first"))
    assert model.next_over(1.0) is None
    model.flow(1.0, network.path(0, 2), 100.0, begin("second"))
    assert ended(model) == pytest.approx({"first": first, "second": second})
    assert not model.busy


def test_opposite_ways_share_only_a_half_duplex_link():
    for full_duplex, end in ((True, 2.0), (False, 4.0)):
        network = Network(LINK, contention=True, full_duplex=full_duplex)
        model = ContentionModel(network)
        model.flow(0.0, network.path(0, 1), 100.0, begin("there"))
        model.flow(0.0, network.path(1, 0), 100.0, begin("back"))
        assert ended(model) == pytest.approx({"there": end, "back": end})


def test_a_flow_slows_the_computations_at_both_its_ends():
    """u = 1/4: 50 bytes beside computations take 1.25 s; of 2 s of work 1 is left then."""
    network = Network(LINK, tp_share=0.25)
    model = ContentionModel(network)
    for stage in (0, 1, 2):
        model.compute(0.0, stage, 2.0, begin(f"stage {stage}"))
    model.flow(0.0, network.path(0, 1), 50.0, begin("copy"))
    ends = ended(model)
    assert ends["copy"] == pytest.approx(1.25)
    assert ends["stage 0"] == ends["stage 1"] == pytest.approx(2.25)
    assert ends["stage 2"] == pytest.approx(2.0)


def test_other_nodes_have_their_own_links():
    network = Network(LINK, remote=Link(10.0, 0.5), nodes=(0, 0, 1))
    assert network.path(0, 1).links == (("fabric-out", 0), ("fabric-in", 1))
    assert network.path(0, 2).links == (("net-out", 0), ("net-in", 2))
    assert network.path(0, 2).seconds(5) == 1.0
    assert network.host_path(1, out=True).links == (("pcie-out", 1),)
