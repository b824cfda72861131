"""Pipeline messages of a rehearsal: what two ranks exchange at once arrives, in order."""

import json
import os
import sys

import torch
import torch.distributed as dist

from megatron_bpipe.integration.single_gpu.launch import send_through_host

dist.init_process_group("gloo")
exchange = send_through_host(dist.batch_isend_irecv)
me, other = dist.get_rank(), 1 - dist.get_rank()
sent = [torch.full((3, 5), 10.0 * me + i).t() for i in range(4)]  # not contiguous
received = [torch.zeros(5, 3, requires_grad=True) for _ in sent]
ops = [dist.P2POp(dist.isend, tensor.contiguous(), other) for tensor in sent[:2]]
ops += [dist.P2POp(dist.irecv, tensor, other) for tensor in received[:2]]
for request in exchange(ops):
    request.wait()
group = dist.new_group([0, 1])
ops = [dist.P2POp(dist.irecv, tensor, other, group) for tensor in received[2:]]
ops += [dist.P2POp(dist.isend, tensor.contiguous(), other, group) for tensor in sent[2:]]
for request in exchange(ops):
    request.wait()
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump([tensor.unique().tolist() for tensor in received], file)
