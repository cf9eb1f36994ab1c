"""Tensors in, picture out."""

from lightning_aop.view.grid import heatmap_grid
from lightning_aop.view.heat import displayable, overlay
from lightning_aop.view.png import write_png
from lightning_aop.view.table import map_table

__all__ = ["displayable", "heatmap_grid", "map_table", "overlay", "write_png"]
