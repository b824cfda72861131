"""Everything that only runs where there is a GPU, apart from the rest so that it can be seen.

driver     the CUDA driver's calls that torch lacks: IPC, plain copies, pinning
streams    copies on a stream of their own
pinned     host memory that copy engines can reach
ipc        a pool lent by another process on this node
messages   a pool lent by a process on another node, over NCCL
place      which GPU this process has, and how it is linked to another
"""
