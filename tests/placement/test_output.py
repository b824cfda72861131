"""What the ``placement`` command prints: table, picture, JSON, SVG, and refusals."""

import argparse
import json
import xml.etree.ElementTree as ET

import pytest

from megatron_bpipe.cli import placement as command
from megatron_bpipe.cli.flags import placement as flags
from megatron_bpipe.placement import ParallelShape, make_report, picture_svg, picture_text


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    flags.add_parser(parser.add_subparsers(required=True))
    return command.run(parser.parse_args(["placement", *words]))


def test_json_of_figure_2(capsys):
    assert call("--pp", "16", "--tp", "1", "--gpus-per-node", "8", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert [[gpu["stage"] for gpu in node] for node in data["nodes"]] == [
        [0, 15, 1, 14, 2, 13, 3, 12],
        [4, 11, 5, 10, 6, 9, 7, 8],
    ]
    assert [gpu["gpu"] for node in data["nodes"] for gpu in node] == list(range(16))
    assert [gpu["rank"] for gpu in data["nodes"][1]] == [4, 11, 5, 10, 6, 9, 7, 8]
    assert data["pairs_across_nodes"] == 0
    assert data["before"]["pairs"] == {"across_nodes": 8, "total": 8}
    first = data["nodes"][0][0]
    assert first == {
        "gpu": 0, "local_gpu": 0, "rank": 0, "stage": 0, "tp": 0, "cp": 0, "dp": 0, "ep": 0,
        "partner_gpu": 1,
    }  # fmt: skip


def test_megatron_placement_as_json(capsys):
    assert call("--pp", "16", "--placement", "megatron", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert [gpu["stage"] for gpu in data["nodes"][0]] == list(range(8))
    assert data["pairs_across_nodes"] == 8


def test_world_instead_of_dp(capsys):
    assert call("--pp", "8", "--tp", "4", "--world", "64", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sizes"]["dp"] == 2


def test_text_shows_table_picture_and_counts(capsys):
    assert call("--pp", "4", "--gpus-per-node", "4") == 0
    assert capsys.readouterr().out == (
        "node  gpu  rank  stage  tp  cp  dp  ep  partner\n"
        "0     0    0     0      0   0   0   0   gpu 1\n"
        "0     1    3     3      0   0   0   0   gpu 0\n"
        "0     2    1     1      0   0   0   0   gpu 3\n"
        "0     3    2     2      0   0   0   0   gpu 2\n"
        "\n"
        "Node 0\n"
        "+---------+---------+---------+---------+\n"
        "|  GPU 0  |  GPU 1  |  GPU 2  |  GPU 3  |\n"
        "| stage 0 | stage 3 | stage 1 | stage 2 |\n"
        "|  pair 0 |  pair 0 |  pair 1 |  pair 1 |\n"
        "+---------+---------+---------+---------+\n"
        "\n"
        "across nodes               megatron order  pair-adjacent\n"
        "pairs (evictor, acceptor)  0 of 2          0 of 2\n"
        "pipeline edges             0 of 3          0 of 3\n"
    )


def test_picture_marks_torn_pairs_and_the_middle_stage():
    text = picture_text(make_report(ParallelShape(pp=3, dp=1), 1))
    assert "pair 0*" in text
    assert "no pair" in text
    assert "* partner on another node" in text


@pytest.mark.parametrize(
    ("shape", "size"),
    [(ParallelShape(pp=16), 8), (ParallelShape(tp=4, pp=8), 8), (ParallelShape(pp=3, dp=2), 2)],
)
def test_svg_has_each_gpu_and_an_arc_for_each_pair(shape, size):
    report = make_report(shape, size)
    root = ET.fromstring(picture_svg(report))
    name = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{name}rect")) == 1 + shape.world // size + shape.world
    whole = report.after.pairs.total - report.after.pairs.across_nodes
    assert len(root.findall(f"{name}path")) == whole


def test_svg_file(tmp_path, capsys):
    target = tmp_path / "placement.svg"
    assert call("--pp", "8", "--svg", str(target)) == 0
    assert target.read_text().startswith("<svg")
    assert call("--pp", "8", "--svg", str(tmp_path / "missing" / "x.svg")) == 2
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pp", "6", "--gpus-per-node", "4"], "4 GPUs per node do not divide a job of 6 ranks"),
        (["--pp", "0"], "pp is 0"),
        (["--pp", "8", "--tp", "3", "--dp", "1"], "tp 3 does not divide 8 GPUs per node"),
        (["--pp", "8", "--world", "12"], "a world of 12 ranks"),
    ],
)
def test_bad_input_is_one_line_on_stderr(words, message, capsys):
    assert call(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
