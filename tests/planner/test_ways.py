"""Which budgets are looked at, and a search that is stopped on its way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from megatron_bpipe.cli import plan as plan_command
from megatron_bpipe.cli.main import main
from megatron_bpipe.estimate.memory.stages import FIXED_OVERHEAD
from megatron_bpipe.estimate.models import llama
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.estimate.time.scheduled import budgets_of, held_by_stage
from megatron_bpipe.planner import ways as ways_module
from megatron_bpipe.planner.evaluate import Candidate, Memory
from megatron_bpipe.planner.family import Family, Looked
from megatron_bpipe.planner.inputs.cluster import preset
from megatron_bpipe.planner.inputs.flags import Fixed
from megatron_bpipe.planner.inputs.sources import from_layer_model
from megatron_bpipe.planner.output.megatron_flags import model_flags
from megatron_bpipe.planner.search import search
from megatron_bpipe.planner.space import Question, Refused, shapes
from megatron_bpipe.planner.ways import way_of, ways
from megatron_bpipe.schedule.ops import default_budget

MODEL = llama("20 B", hidden=6144, heads=48, layers=48, seq=4096, vocab=32000, kv_heads=8)
PREDICTOR = from_layer_model(2, FIXED_OVERHEAD)


def tall(p: int, m: int, chunks: int) -> Iterator[Run]:
    """The run at each budget, from the largest to the least."""
    model = llama("a layer a chunk", hidden=1024, heads=16, layers=p * chunks, seq=1024)
    plain = Run(model, Layout(pp=p), 1, m, "flash", chunks=chunks)
    for budget in budgets_of(plain):
        yield Run(model, Layout(pp=p), 1, m, "flash", chunks=chunks, bpipe=True, budget=budget)


@pytest.mark.parametrize("p", range(2, 10))
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("rounds", [2, 3])
def test_from_budget_to_budget_evictors_only_shrink_and_lenders_only_grow(
    p: int, chunks: int, rounds: int
) -> None:
    """What the search relies on where it looks at the largest and the least budget only."""
    own: list[list[int]] = []
    away: list[list[int]] = []
    for run in tall(p, rounds * p, chunks):
        held = held_by_stage(run)
        own.append([here for here, _ in held])
        away.append([there for _, there in held])
    for before, after in itertools.pairwise(own):
        assert all(x >= y for x, y in zip(before, after, strict=True))
    for before, after in itertools.pairwise(away):
        assert all(x <= y for x, y in zip(before, after, strict=True))


def looked_at(question: Question) -> list[tuple[Candidate, Memory]]:
    refused = Refused()
    return [
        found
        for run in shapes(question, refused)
        for found in ways(question, run, PREDICTOR, refused)
    ]


def every_budget(family: Family, look: Callable[[Run], Looked | None]) -> Iterator[Looked]:
    return (found for run in family if (found := look(run)) is not None)


def test_budgets_passed_over_fit_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a search that looks at every budget of every shape."""
    question = Question(MODEL, preset("A100-40GB", 32), 64, Fixed(tp=2), attentions=("flash",))
    quick = looked_at(question)
    monkeypatch.setattr(ways_module, "tried", every_budget)
    whole = looked_at(question)
    runs = {candidate.run for candidate, _ in quick}
    assert runs < {candidate.run for candidate, _ in whole}
    fitting: dict[Run, list[tuple[float, str]]] = {}
    for candidate, memory in whole:
        run = candidate.run
        if memory.fits != "no" and run.budget is not None:
            fitting.setdefault(replace(run, budget=None), []).append((run.budget, memory.fits))
    missed = [(c.run, m.fits) for c, m in whole if c.run not in runs and m.fits != "no"]
    assert missed
    for run, fits in missed:  # a larger budget that fits as well is looked at
        known = fitting[replace(run, budget=None)]
        budget = run.budget or default_budget(run.layout.pp)
        better = [b for b, verdict in known if b > budget and verdict in ("yes", fits)]
        assert any(replace(run, budget=b) in runs for b in better), run
    passed = {way_of(c.run) for c, _ in whole if c.run not in runs}
    assert passed >= {"BPipe", "interleaved BPipe", "host offload"}


@pytest.mark.parametrize("after", [1, 40])
def test_an_interrupted_search_has_the_best_of_what_it_looked_at(after: int) -> None:
    question = Question(MODEL, preset("H100-80GB", 32), 64, attentions=("flash",))
    told: list[tuple[int, float | None]] = []

    def stop(number: int, best: float | None) -> None:
        told.append((number, best))
        if len(told) == after:
            raise KeyboardInterrupt

    found = search(question, PREDICTOR, stop)
    assert found.interrupted
    assert found.looked_at == after == told[after - 1][0]
    fitting = [memory.fits for _, memory in looked_at(question)[:after] if memory.fits != "no"]
    assert bool(found.best) == bool(fitting)
    if found.best:
        assert told[-1][1] == found.best[0].mfu  # and the best so far was told


def test_the_command_says_that_it_was_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while candidates are looked at."""

    def after_100(number: int, best: float | None) -> None:
        if number == 100 and best is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(plan_command, "_progress", lambda: after_100)
    words = ["--gpu", "H100-80GB", "--gpus", "32", "--global-batch", "64", "--attention", "flash"]
    flags = [*model_flags(MODEL), "--bf16"]
    assert main(["plan", *words, "--", *flags]) == 0
    assert "interrupted: these are the best of what was looked at" in capsys.readouterr().out
    assert main(["plan", *words, "--json", "--", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["interrupted"] is True


@pytest.mark.parametrize(
    ("words", "flags", "named"),
    [
        (["--gpu", "V100-32GB"], ["--bf16"], "--bf16: V100-32GB computes in fp16 only"),
        (
            ["--gpu", "V100-32GB"],
            ["--fp16", "--attention-backend", "flash"],
            "--attention-backend flash: V100-32GB has no kernel for it",
        ),
        (["--gpu", "GB200", "--gpus-per-node", "72"], ["--bf16"], "--gpus-per-node 72"),
    ],
)
def test_what_a_machine_cannot_do_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], words: list[str], flags: list[str], named: str
) -> None:
    beside = ["--gpus", "72", "--global-batch", "72"]
    assert main(["plan", *words, *beside, "--", *model_flags(MODEL), *flags]) == 2
    assert named in capsys.readouterr().err


def test_a_v100_is_never_advised_flash_attention(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpu", "V100-32GB", "--gpus", "32", "--global-batch", "64", "--json"]
    main(["plan", *words, "--", *model_flags(MODEL)])
    said = json.loads(capsys.readouterr().out)
    attentions = {plan["attention"] for plan in said["plans"]}
    assert attentions
    assert "flash" not in attentions
    assert "--bf16" not in json.dumps(said)
