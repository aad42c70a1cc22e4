"""What each process of test_ranks.py's torchrun does: the runs of some command lines, one after the
other.
"""

import json
import sys

import torch
import torch.distributed as dist

import train
from support.checkpoint import keep_gathered, load_policy, shard
from support.run import setup
from tiny_runs import settings


def gather_with_room_on_one_rank_alone(folder: str, rank: int) -> None:
    """If the ranks did not agree to keep nothing, one would wait for gathers that never come."""
    policy = load_policy(folder, prepare=shard)
    with torch.no_grad(), keep_gathered(policy, 1e12 if rank == 0 else 0):
        for _ in range(3):
            policy.append_text(policy.empty(1), torch.arange(4)[None])
    dist.barrier()


if __name__ == "__main__":
    ranks = setup()
    for flags in json.loads(sys.argv[1]):
        train.train(settings(*flags), ranks)
    gather_with_room_on_one_rank_alone(sys.argv[2], ranks.rank)
    dist.destroy_process_group()
