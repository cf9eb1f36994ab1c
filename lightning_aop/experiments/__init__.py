"""The paper's tables as runs over many images, which can be stopped, resumed and shared out."""

from lightning_aop.data.networks import Network
from lightning_aop.experiments.benchmark import Rules, run
from lightning_aop.experiments.pictures import Picture, Pictures

__all__ = ["Network", "Picture", "Pictures", "Rules", "run"]
