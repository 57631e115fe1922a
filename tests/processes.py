"""Processes of tests, forked from a server that has imported torch once, and has not trained.

A process that has trained cannot be forked: autograd refuses to work in the fork.
"""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SERVER = mp.get_context('forkserver')
SERVER.set_forkserver_preload(['repopt_timm.train.command'])


def in_processes(count, function, tmp_path, *args):
    """Runs a function of rank and arguments in processes that form a group, and returns what it returned on each."""
    mp.start_processes(_run, (count, tmp_path, function, args), nprocs=count, start_method='forkserver')
    return [torch.load(tmp_path / str(rank)) for rank in range(count)]


def _run(rank, count, folder, function, args):
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=count)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.save(function(rank, count, *args), folder / str(rank))
    dist.destroy_process_group()
