"""Fit on two processes, with or without the monitor, and save all that it could have changed.

python harmless.py OUT with|without
"""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "monitor"))

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from test_harmless import Module, Recorder, Watch, everything, plain

if __name__ == "__main__":
    out, how = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    pl.seed_everything(3, verbose=False)
    # However long the machine takes: each of them must leave the training as it was.
    monitor = Watch(method=None, metrics=True, probe=3, every_n_train_steps=1, max_overhead=None)
    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        callbacks=[monitor] if how == "with" else [],
        logger=Recorder(),
        default_root_dir=out,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, *plain())
    torch.save(
        everything(trainer, module) | {"fired": monitor.fired}, out / f"{dist.get_rank()}.pt"
    )
    dist.destroy_process_group()  # or the interpreter may abort at its end
