"""The paper's tables as runs over many pictures, which can be stopped, resumed and shared out."""

from lightning_aop.benchmark.networks import Network
from lightning_aop.benchmark.pictures import Picture, Pictures
from lightning_aop.benchmark.run import Rules, run

__all__ = ["Network", "Picture", "Pictures", "Rules", "run"]
