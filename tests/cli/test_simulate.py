"""``simulate`` on the command line: what it prints, and one clear line for what it refuses."""

import pytest

from megatron_bpipe.cli.main import main

SIZES = ["simulate", "--pp", "8", "--microbatches", "16"]


def test_stock_beside_bpipe(capsys):
    assert main(SIZES) == 0
    out = capsys.readouterr().out
    assert "1F1B (DAPPLE), Megatron-LM's default: iteration 69, bubble 30.4 %, peak 8" in out
    assert "BPipe on 1F1B, the published budget: iteration 69, bubble 30.4 %, peak 5" in out
    assert "exposed transfers 0" in out


def test_a_slow_link_shows_what_it_costs(capsys):
    flags = ["--forward", "100ms", "--activation", "3GiB", "--link", "15GB/s", "--beside", "none"]
    assert main([*SIZES, *flags]) == 0
    out = capsys.readouterr().out
    assert "peak 15 GiB" in out
    assert "exposed transfers 0 ms" not in out


@pytest.mark.parametrize("base", ["v-half", "interleaved-bpipe", "chimera", "host-offload"])
def test_other_bases(capsys, base):
    assert main([*SIZES, "--base", base]) == 0
    assert "iteration" in capsys.readouterr().out


def test_a_model_outside_the_calibrated_range_is_marked(capsys):
    assert main([*SIZES, "--model", "LLaMA 65B", "--micro-batch", "2"]) == 0
    captured = capsys.readouterr()
    assert "extrapolated: micro-batches 16: fitted on 32 to 128" in captured.err
    assert "GiB" in captured.out
    assert main([*SIZES[:3], "--microbatches", "64", "--model", "GPT-3 96B"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pp", "0", "--microbatches", "8"], "--pp 0: give a number of at least 1"),
        (["--pp", "4"], "--microbatches is missing: give a number"),
        ([*SIZES[1:], "--base", "x"], "schedule 'x' is not known: use 1f1b, bpipe"),
        ([*SIZES[1:], "--base", "bpipe", "--beside", "y"], "schedule 'y' is not known"),
        (["--pp", "3", "--microbatches", "6", "--base", "chimera"], "use 4"),
        ([*SIZES[1:], "--forward", "3 parsecs"], "'3 parsecs' is not a time: write a number and"),
        ([*SIZES[1:], "--transfer", "3ms"], "with units give --forward too"),
        ([*SIZES[1:], "--activation", "3ms"], "'3ms' is not a size"),
        ([*SIZES[1:], "--activation", "3GiB", "--link", "3GiB"], "'3GiB' is not a bandwidth"),
        ([*SIZES[1:], "--activation", "3GiB", "--link", "0GB/s"], "more than 0"),
        ([*SIZES[1:], "--link", "3GB/s"], "--link 3GB/s: give --activation too"),
        ([*SIZES[1:], "--tp-share", "2"], "--tp-share 2.0: a share is from 0 to 1"),
        ([*SIZES[1:], "--model", "BERT"], "model 'BERT' is not known: use 'LLaMA 65B'"),
        ([*SIZES[1:], "--model", "LLaMA 65B", "--gpu", "TPU"], "GPU 'TPU' is not known"),
        ([*SIZES[1:], "--model", "LLaMA 65B", "--tp", "5"], "64 attention heads cannot be divided"),
        (
            ["--pp", "7", "--microbatches", "8", "--model", "LLaMA 65B"],
            "80 layers cannot be divided by the number of stages 7",
        ),
        ([*SIZES[1:], "--model", "LLaMA 65B", "--attention", "sparse"], "'sparse' is not known"),
        ([*SIZES[1:], "--model", "LLaMA 65B", "--micro-batch", "8"], "give --stage-mfu PERCENT"),
        ([*SIZES[1:], "--model", "LLaMA 65B", "--stage-mfu", "400"], "--stage-mfu 400.0: per cent"),
        (["--from-report", "nowhere"], "nowhere/memory.json: No such file"),
        ([*SIZES[1:], "--html", "no/such/place.html"], "there is no folder no/such"),
        ([*SIZES[1:], "--png", "a.gif"], "a.gif: the name must end in .png"),
        ([*SIZES[1:], "--svg", "a.png"], "--svg a.png: the name must end in .svg"),
    ],
)
def test_refusals_are_one_clear_line(capsys, flags, message):
    assert main(["simulate", *flags]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("extrapolated")]
    assert len(lines) == 1
    assert lines[0].startswith("simulate: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("words", "peak"),
    [
        (["--pp", "8", "--budget", "6"], "peak 6 micro-batches"),
        (["--pp", "4", "--chunks", "2"], "peak 4.5 micro-batches"),  # the least
        (["--pp", "4", "--chunks", "2", "--budget", "5"], "peak 5 micro-batches"),
    ],
)
def test_budgets_and_chunks_as_schedule_has_them(words, peak, capsys):
    assert main(["simulate", "--microbatches", "16", *words]) == 0
    said = capsys.readouterr().out
    titles = [line for line in said.splitlines() if line.startswith(("BPipe on", "1F1B", "inter"))]
    assert len(titles) == 2
    assert peak in titles[1]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--budget", "2"], "--budget 2 is too small for --pp 4"),
        (["--base", "gpipe", "--budget", "4"], "--base gpipe: drawn as it is; drop --budget"),
        (["--base", "gpipe", "--chunks", "2"], "drop --chunks or --base"),
        (["--chunks", "0"], "--chunks 0: a stage has at least 1"),
        (["--chunks", "2", "--budget", "2.5"], "use --budget 4.5 or more"),
    ],
)
def test_budgets_and_chunks_that_cannot_be(words, named, capsys):
    assert main(["simulate", "--pp", "4", "--microbatches", "8", *words]) == 2
    assert named in capsys.readouterr().err
