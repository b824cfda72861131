"""Bytes a second of messages between two gloo processes, both waiting for each: a ping-pong."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

size, repeats, target = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo")
rank, message = dist.get_rank(), torch.zeros(size, dtype=torch.uint8)
for turn in range(-5, repeats):
    if turn == 0:
        start = time.perf_counter()
    for sender in (0, 1):
        if rank == sender:
            dist.send(message, 1 - rank)
        else:
            dist.recv(message, sender)
if rank == 0:
    target.write_text(json.dumps(2 * repeats * size / (time.perf_counter() - start)))
dist.destroy_process_group()
