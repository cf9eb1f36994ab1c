"""Let one of two processes wait for another that is asleep, and print what it is told.

Arguments: a file by which the two find each other.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_aop.monitor.processes import ProcessError, Processes


def meet(rank: int, file: str) -> None:
    dist.init_process_group(
        "gloo", f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    if rank == 1:
        time.sleep(30)
        return
    for work in (Processes().together, Processes().from_first):
        try:
            work(lambda: None)
        except ProcessError as error:
            print(error, flush=True)


if __name__ == "__main__":
    mp.spawn(meet, (str(Path(sys.argv[1]).resolve()),), nprocs=2)
