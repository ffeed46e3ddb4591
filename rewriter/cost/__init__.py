"""What models cost: `Cost`, and `propagate` and `model_cost` that read it off a graph."""

from rewriter.cost.cost import Cost, storage_cost
from rewriter.cost.interpret import Region, model_cost, propagate
from rewriter.cost.meter import GraphCost

__all__ = ["Cost", "GraphCost", "Region", "model_cost", "propagate", "storage_cost"]
