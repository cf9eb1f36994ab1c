"""Validate on several processes, and save which samples each takes for the worst.

python failures.py OUT PROCESSES
"""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "monitor"))

import torch
import torch.distributed as dist
from test_failures import Module, Watch, loaders, trainer

if __name__ == "__main__":
    out, processes = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    monitor = Watch(failures=6)
    run = trainer(out, monitor, devices=processes, strategy="ddp" if processes > 1 else "auto")
    run.validate(Module(), loaders()[1], verbose=False)
    failures = monitor._run.failures.now
    found = [(each.place, each.why, round(each.loss, 3), int(each.label)) for each in failures]
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save(found, out / f"{rank}.pt")
    if processes > 1:
        dist.destroy_process_group()  # or the interpreter may abort at its end
