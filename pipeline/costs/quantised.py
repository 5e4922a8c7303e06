"""x"""

from pipeline.costs.onnx_graph import Node


def to_integers(nodes: list[Node]) -> list[Node]:
    return nodes
