"""Joins fused layers of a graph: norms with the convolution in front of them, both with others to
residual blocks.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from gdfast.nn.norm import convolve_for
from gdfast.swap import layers
from gdfast.swap.match import CONVOLUTION, Modules, follows, only_input

_MOST_LAYERS = 4  # of a block, with the shortcut's


def join_convolutions(graph: Graph, modules: Modules) -> None:
    """Joins fused norms with the convolution in front of them.

    Where anything else runs between the two, it only gives the norm the moments of its output.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not layers.norm_act:
            continue
        norm, convolution, *rest = node.args
        if (
            not isinstance(norm, Node) or not isinstance(convolution, Node)
            or len(convolution.users) > 1 or convolution.op != "call_module"
            or type(modules[str(convolution.target)]) is not CONVOLUTION
            or (input := only_input(convolution)) is None
        ):  # fmt: skip
            continue
        with graph.inserting_before(convolution):
            paths = convolution.target, norm.target
            conv, own_norm = (graph.create_node("get_attr", str(path)) for path in paths)
            if follows(node, convolution):
                node.target, node.args = layers.conv_norm_act, (conv, own_norm, input, *rest)
            else:
                both = graph.call_function(convolve_for, (own_norm, conv, input))
                output, moments = (
                    graph.call_function(operator.getitem, (both, i)) for i in range(2)
                )
                node.args = norm, output, *rest, moments
        graph.erase_node(convolution)


def join_blocks(graph: Graph) -> list[list[Node]]:
    """Joins chains of convolutions with norms whose input is added to what they give, or what
    another such layer makes of it; gives the layers of each."""
    blocks = []
    for node in list(graph.nodes):
        found = _block(node) if _is_layer(node) else None
        if found is None:
            continue
        input, shortcut, chain = found
        of_shortcut = None if shortcut is None else _layer(shortcut)
        args = input, _argument(node, 6, False), of_shortcut, *map(_layer, chain)
        with graph.inserting_before(node):
            joined = graph.call_function(layers.residual_block, args)
        node.replace_all_uses_with(joined)
        blocks.append([*reversed(chain), *([] if shortcut is None else [shortcut])])
        for each in blocks[-1]:
            graph.erase_node(each)
    return blocks


def _block(last: Node) -> tuple[Node, Node | None, list[Node]] | None:
    """Input, shortcut if that is a layer, and chain of the block that ends with a layer."""
    residual = _argument(last, 3)
    if not isinstance(residual, Node):
        return None
    chain = [last]
    input: Any = last.args[2]
    while _is_within(input):
        chain.insert(0, input)
        input = input.args[2]
    shortcut = None
    if _is_within(residual) and residual.args[2] is input:
        shortcut = residual
    elif residual is not input:
        return None
    nodes = {*chain, shortcut} - {None}
    if not isinstance(input, Node) or not 1 < len(nodes) <= _MOST_LAYERS:
        return None
    # They run together where the last one stands, with nothing in between.
    node, seen = last, set[Node]()
    while seen != nodes:
        if node in nodes:
            seen.add(node)
        elif node.op != "get_attr":
            return None
        node = node.prev
    return input, shortcut, chain


def _is_layer(node: Any) -> bool:
    return isinstance(node, Node) and node.target is layers.conv_norm_act


def _is_within(node: Any) -> bool:
    """Whether a layer's output goes on within a block alone."""
    return _is_layer(node) and _argument(node, 3) is None and len(node.users) == 1


def _layer(node: Node) -> tuple[Any, ...]:
    return *node.args[:2], _argument(node, 4, "none"), _argument(node, 5)


def _argument(node: Node, place: int, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else default
