"""Train on two processes with a model that exchanges something in its forward, with the monitor or not.

Arguments: a folder, and "sharded" (FSDP2) or "gathering" (an all_reduce in the forward, as of momentum
contrast). What each process was left with is saved there, as WHAT-RANK.pt.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from conftest import SmallNet
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import ExplanationMonitor, fast_sigcam
from lightning_aop.monitor.explanation import Explanation, Moment

out, kind = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()

    def configure_model(self) -> None:
        if kind == "sharded" and not hasattr(self.net, "reshard"):
            mesh: Any = self.device_mesh
            for part in (self.net.features, self.net, self):
                fully_shard(part, mesh=mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        if kind == "gathering":
            mean = logits.detach().mean()
            dist.all_reduce(mean)
            logits = logits + 0 * mean
        return logits

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Found:
    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def write(self, explanation: Explanation, moment: Moment) -> None:
        self.maps.append(explanation.maps)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(24, 3, 32, 32, generator=generator)
    data = TensorDataset(images, torch.randint(0, 5, (24,), generator=generator))
    for what in ("without", "with"):
        found = Found()
        # Three images for two processes: shares of them would differ.
        monitor = ExplanationMonitor(fast_sigcam(iterations=2), probe=3, sinks=[found])
        timeout = timedelta(seconds=60)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ModelParallelStrategy(2, 1, timeout=timeout)
            if kind == "sharded"
            else DDPStrategy(timeout=timeout),
            callbacks=[monitor] if what == "with" else [],
            default_root_dir=out / what,
            logger=False,
            max_epochs=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        model = Module()
        trainer.fit(model, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
        if kind == "sharded":
            for part in (model.net.features, model.net, model):
                part.reshard()  # type: ignore[operator]
        states = trainer.optimizers[0].state.values()
        content = {
            "maps": found.maps,
            "state": {name: whole(value) for name, value in model.state_dict().items()},
            "optimizer": [whole(each["exp_avg"]) for each in states],
            "logged": sorted(trainer.callback_metrics),
        }
        torch.save(content, out / f"{what}-{dist.get_rank()}.pt")
    dist.destroy_process_group()  # or the interpreter may abort at its end
