#!/usr/bin/env python3
"""Run rows of the re-evaluation's tables 3 and 5, or print the exact command lines.

    run_table.py --dry-run                          all rows, one command line each
    run_table.py table3-08 --launcher slurm --sbatch=--partition=gpu
    run_table.py table5-04 --one-gpu
    collect.py runs/tables                          afterwards

The settings are `estimate.paper.published`. Logs go to OUT/ROW/. No row has been run on GPUs
yet: docs/running/cluster.md says what has been tried.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from table_rows import ONE_GPU, Row, RowError, choose, flags, load_rows

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "scripts" / "examples"
STYLES = {"node": "torchrun.sbatch", "gpu": "srun.sbatch"}


@dataclass(frozen=True)
class Where:
    """How and where rows run; ``style`` is the sbatch file's: one task a node, or a GPU."""

    launcher: str
    style: str
    script: Path
    out: Path
    gpus_per_node: int
    one_gpu: bool
    iterations: int
    endpoint: str
    sbatch: tuple[str, ...]

    def folder(self, row: Row) -> Path:
        """Where the row's logs go."""
        return self.out / (row.name + (ONE_GPU if self.one_gpu else ""))

    def nodes(self, row: Row) -> tuple[int, int]:
        """Nodes, and GPUs on each; raises RowError when the nodes would not be filled."""
        gpus = row.gpus(self.one_gpu)
        per_node = min(gpus, self.gpus_per_node)
        if gpus % per_node:
            raise RowError(
                f"{row.name} needs {gpus} GPUs, which {per_node} GPUs per node do not divide: "
                "give --gpus-per-node 1, 2, 4 or 8"
            )
        return gpus // per_node, per_node


def command(row: Row, where: Where) -> list[str]:
    """The command line that starts, or submits, one row."""
    nodes, per_node = where.nodes(row)
    training = [
        str(where.script),
        *flags(row, one_gpu=where.one_gpu, iterations=where.iterations),
    ]
    if where.launcher == "torchrun":
        if nodes == 1:
            rendezvous = ["--standalone"]
        else:
            rendezvous = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-id", row.name]
            rendezvous += ["--rdzv-endpoint", where.endpoint]
        # Megatron asks for this with tensor parallelism on GPUs before Blackwell.
        start = ["env", "CUDA_DEVICE_MAX_CONNECTIONS=1", "torchrun", *rendezvous]
        return [*start, "--nproc-per-node", str(per_node), "-m", "megatron_bpipe", "run", *training]
    tasks = 1 if where.style == "node" else per_node
    return [
        *("sbatch", "--job-name", row.name, "--nodes", str(nodes)),
        *("--ntasks-per-node", str(tasks), "--gpus-per-node", str(per_node)),
        *("--output", str(where.folder(row) / "slurm-%j.log")),
        *where.sbatch,
        str(EXAMPLES / "slurm" / STYLES[where.style]),
        *training,
    ]


def main() -> int:
    """Print or run the rows asked for; returns the first exit status that is not 0."""
    try:
        args = _arguments()
        rows = load_rows()
        where = _where(args)
        if args.rows:
            rows = choose(rows, args.rows)
        elif where.one_gpu:
            rows = [row for row in rows if row.stage_of]
        lines = [(row, command(row, where)) for row in rows]
    except (RowError, ValueError) as error:
        print(f"run_table: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        for _, line in lines:
            print(shlex.join(line))
        return 0
    status = 0
    for row, line in lines:
        status = status or _start(row, line, where)
    return status


def _start(row: Row, line: list[str], where: Where) -> int:
    folder = where.folder(row)
    folder.mkdir(parents=True, exist_ok=True)
    print(shlex.join(line), flush=True)
    if where.launcher == "slurm":
        return subprocess.run(line, check=False).returncode
    nodes, _ = where.nodes(row)
    if nodes > 1:
        print(f"run_table: start this command on each of {nodes} nodes", file=sys.stderr)
    environment = os.environ | {"PYTHONPATH": _python_path()}
    with (folder / f"node-{socket.gethostname()}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout is not None
        for text in process.stdout:
            sys.stdout.write(text)
            log.write(text)
        return process.wait()


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run rows of the re-evaluation's tables 3 and 5, or print their command lines."
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="table3-01 ... table5-10")
    parser.add_argument("--dry-run", action="store_true", help="only print (all rows by default)")
    parser.add_argument("--launcher", choices=("torchrun", "slurm"), default="torchrun")
    parser.add_argument(
        "--style",
        choices=tuple(STYLES),
        default="node",
        help="with slurm: one task a node with torchrun (default), or one task a GPU",
    )
    parser.add_argument(
        "--script",
        type=Path,
        default=EXAMPLES / "pretrain_gpt.py",
        help="training script: this project's for the wheel (default), or a checkout's own",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "tables", help="for the logs")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--one-gpu", action="store_true", help="single-stage rows on one GPU, divided by t"
    )
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument(
        "--endpoint",
        default="localhost:29500",
        metavar="HOST:PORT",
        help="torchrun on several nodes: any one of them",
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more sbatch option"
    )
    args = parser.parse_args()
    if not args.rows and not args.dry_run:
        raise RowError("name the rows to run (or --dry-run for all command lines)")
    return args


def _where(args: argparse.Namespace) -> Where:
    if args.gpus_per_node < 1:
        raise RowError(f"--gpus-per-node {args.gpus_per_node}: give at least 1")
    if args.iterations < 6:
        raise RowError(f"--iterations {args.iterations}: collect.py needs at least 6")
    return Where(
        launcher=args.launcher,
        style=args.style,
        script=args.script,
        out=args.out,
        gpus_per_node=args.gpus_per_node,
        one_gpu=args.one_gpu,
        iterations=args.iterations,
        endpoint=args.endpoint,
        sbatch=tuple(args.sbatch),
    )


if __name__ == "__main__":
    sys.exit(main())
