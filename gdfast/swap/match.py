"""Finds neighbours in a graph that one of our operations computes, and puts it in their place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from gdfast import nn
from gdfast.swap import layers
from gdfast.swap.trace import STACK

NORMS = (torch.nn.BatchNorm2d, nn.BatchNorm2d)
POOLS = (torch.nn.MaxPool2d, nn.MaxPool2d)
CONVOLUTION = nn.Conv2d

_ACTIVATION_MODULES: dict[type, str] = {
    torch.nn.ReLU: "relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.SiLU: "silu",
}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    torch._C._nn.leaky_relu_: "leaky_relu",
    F.silu: "silu",
}
_POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d)
_POOL_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
# Modules that leave what they are given as it was and give a new tensor.
_PURE = (torch.nn.Conv2d, CONVOLUTION, torch.nn.Linear, *NORMS, *POOLS)
# Functions that do.
_NEW = (
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul,
    torch.cat, torch.conv2d, F.linear, F.batch_norm, F.avg_pool2d, F.adaptive_avg_pool2d,
    *_POOL_FUNCTIONS,
)  # fmt: skip

Modules = dict[str, torch.nn.Module]


class Path(str):
    """An argument that is the module of that path."""


@dataclass
class Group:
    """Nodes that one operation computes; it goes to the place of the node `at`.

    `bypassed` are the paths of the modules that are not called any more.
    """

    nodes: list[Node]
    at: Node
    op: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    bypassed: list[str]

    @property
    def parts(self) -> list[str]:
        """The names of what was fused, as they stand in the forward."""
        return [_label(node) for node in self.nodes]


class Matcher:
    """The groups of one graph; `allowed(path)` says whether a module may be fused."""

    def __init__(self, graph: Graph, modules: Modules, allowed: Callable[[str], bool]) -> None:
        self._graph = graph
        self._modules = modules
        self._allowed = allowed
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._taken: set[Node] = set()

    def groups(self) -> list[Group]:
        """What can be fused, in the order of the graph."""
        found = []
        for find in (self._from_norm, self._from_convolution, self._pool_function):
            for node in self._graph.nodes:
                group = None if node in self._taken else find(node)
                if group is not None:
                    self._taken.update(group.nodes)
                    found.append(group)
        return sorted(found, key=lambda group: self._order[group.at])

    def _from_norm(self, norm: Node) -> Group | None:
        if not self._is_module(norm, NORMS) or self._calls(norm) > 1:
            return None
        input = only_input(norm)
        user = self._only_user(norm)
        if input is None:
            return None
        nodes, at, residual = [norm], norm, None
        added = None if user is None else self._added(norm, user)
        if user is not None and added is not None and self._may_wait(norm, input, user):
            residual = added
            nodes.append(user)
            at, user = user, self._only_user(user)
        name, slope, bypassed = "none", None, [str(norm.target)]
        activation = self._activation(user)
        if user is not None and activation is not None:
            name, slope, paths = activation
            nodes.append(user)
            bypassed += paths
        if len(nodes) == 1 and not (
            self._is_fresh_of_ours(input) and len(input.users) == 1 and follows(norm, input)
        ):
            return None
        op = "batch_norm_act" + _braces(residual is not None and "residual", name)
        in_place = residual is not None and _is_in_place(at)
        args = (Path(norm.target), input, residual, name, slope, in_place)
        return Group(nodes, at, op, layers.norm_act, args, bypassed)

    def _from_convolution(self, convolution: Node) -> Group | None:
        if not self._is_module(convolution, (CONVOLUTION,)):
            return None
        input = only_input(convolution)
        first = self._only_user(convolution)
        if input is None or first is None:
            return None
        second = self._only_user(first)
        path = Path(convolution.target)
        # Max pooling and ReLU commute, gradients too: where the largest is not above 0 both are 0.
        for act, pool in ((first, second), (second, first)):
            activation, pooling = self._activation(act), self._pooling(pool)
            if (
                activation is not None and activation[0] == "relu"
                and pooling is not None and pool is not None and second is not None
                and pool.all_input_nodes == [act if pool is second else convolution]
            ):  # fmt: skip
                arguments, paths = pooling
                args = (path, input, *arguments)
                return Group(
                    [convolution, first, second], convolution, "conv2d_relu_max_pool2d",
                    layers.conv_relu_pool, args, [path, *activation[2], *paths],
                )  # fmt: skip
        activation = self._activation(first)
        if activation is None:
            return None
        name, slope, paths = activation
        result_may_change = self._result_may_change(first, name)
        op = "conv2d_act" + _braces(name, result_may_change and "without gradients")
        args = (path, input, name, slope, result_may_change)
        return Group([convolution, first], convolution, op, layers.conv_act, args, [path, *paths])

    def _pool_function(self, node: Node) -> Group | None:
        pooling = self._pooling(node)
        if pooling is None or node.op != "call_function":
            return None
        args = (node.args[0], *pooling[0])
        return Group([node], node, "max_pool2d", layers.max_pool, args, [])

    # What a node is.

    def _is_module(self, node: Node, types: tuple[type, ...]) -> bool:
        return (
            node.op == "call_module"
            and type(self._modules[str(node.target)]) in types
            and self._allowed(str(node.target))
        )

    def _calls(self, node: Node) -> int:
        module = self._modules[str(node.target)]
        return sum(
            other.op == "call_module" and self._modules[str(other.target)] is module
            for other in self._graph.nodes
        )

    def _only_user(self, node: Node | None) -> Node | None:
        if node is None or len(node.users) != 1:
            return None
        (user,) = node.users
        return None if user in self._taken else user

    def _activation(self, node: Node | None) -> tuple[str, Any, list[str]] | None:
        """Name, slope (or the module that has it) and modules of an activation."""
        if node is None:
            return None
        if node.op == "call_module":
            name = _ACTIVATION_MODULES.get(type(self._modules[str(node.target)]))
            if name is None or only_input(node) is None:
                return None
            path = Path(node.target)
            return name, (path if name == "leaky_relu" else None), [path]
        if node.op == "call_method" and node.target in ("relu", "relu_"):
            return ("relu", None, []) if len(node.args) == 1 else None
        name = _ACTIVATION_FUNCTIONS.get(node.target) if node.op == "call_function" else None
        if name is None or not isinstance(node.args[0] if node.args else None, Node):
            return None
        slope = None
        if name == "leaky_relu":
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
            if isinstance(slope, bool) or not isinstance(slope, (int, float)):
                return None
        return name, slope, []

    def _result_may_change(self, act: Node, name: str) -> bool:
        """Whether somebody may write to the result of an activation before backward, which native's
        allows and ours does not: native's keeps the argument, and ours the result.
        """
        if name in ("relu", "silu") or _is_in_place(act) or self._is_in_place_module(act):
            return False  # it is the same for both
        # What is no new tensor may be the result itself, or a part of it.
        seen: set[Node] = set()
        ahead = list(act.users)
        while ahead:
            node = ahead.pop()
            if node in seen:
                continue
            seen.add(node)
            if self._may_change(node):
                return True
            if not self._gives_new_tensor(node):
                ahead += node.users
        return False

    def _may_change(self, node: Node) -> bool:
        if node.op == "call_module":
            cls = type(self._modules[str(node.target)])
            known = cls.__module__.startswith(("torch.nn.", "gdfast.nn."))
            return not known or self._is_in_place_module(node)
        return node.op == "output" or _is_in_place(node)

    def _gives_new_tensor(self, node: Node) -> bool:
        if node.op == "call_module":
            return type(self._modules[str(node.target)]) in (*_PURE, *_ACTIVATION_MODULES)
        return node.op == "call_function" and node.target in (*_NEW, *_ACTIVATION_FUNCTIONS)

    def _is_in_place_module(self, node: Node) -> bool:
        if node.op != "call_module":
            return False
        return bool(vars(self._modules[str(node.target)]).get("inplace"))

    def _pooling(self, node: Node | None) -> tuple[tuple[Any, ...], list[str]] | None:
        """Arguments (or the module that has them) and modules of a max pooling."""
        if node is None:
            return None
        if self._is_module(node, POOLS) and only_input(node) is not None:
            return (Path(node.target),), [str(node.target)]
        if node.op != "call_function" or node.target not in _POOL_FUNCTIONS or not node.args:
            return None
        values = dict(zip(_POOL_ARGUMENTS, node.args[1:], strict=False)) | dict(node.kwargs)
        if values.pop("return_indices", False) or not values.keys() <= set(_POOL_ARGUMENTS):
            return None
        defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
        values = defaults | values
        if "kernel_size" not in values or not isinstance(node.args[0], Node):
            return None
        return tuple(values[name] for name in _POOL_ARGUMENTS[:5]), []

    def _added(self, norm: Node, add: Node) -> Node | None:
        """What `add` adds to the result of `norm`."""
        plus = add.op == "call_function" and add.target in (operator.add, operator.iadd, torch.add)
        plus |= add.op == "call_method" and add.target in ("add", "add_")
        if not plus or len(add.args) != 2 or not set(add.kwargs) <= {"alpha"}:
            return None
        alpha = add.kwargs.get("alpha", 1)
        if type(alpha) is not int or alpha != 1:
            return None
        first, second = add.args
        if first is second:
            return None
        if first is norm and isinstance(second, Node):
            return second
        # In place the first is written to, which is our own result only where it is the norm's.
        if second is norm and isinstance(first, Node) and not _is_in_place(add):
            return first
        return None

    def _may_wait(self, norm: Node, input: Node, until: Node) -> bool:
        """Whether `norm` gives the same if it runs only at `until`."""
        if len(input.users) == 1 and self._is_fresh(input):
            return True  # nobody else has it
        between = list(self._graph.nodes)[self._order[norm] + 1 : self._order[until]]
        return not any(self._may_mutate(node) for node in between)

    def _is_fresh(self, node: Node) -> bool:
        return node.op == "call_module" and type(self._modules[str(node.target)]) in (
            torch.nn.Conv2d, nn.Conv2d, torch.nn.Linear,
        )  # fmt: skip

    def _is_fresh_of_ours(self, node: Node) -> bool:
        return node.op == "call_module" and type(self._modules[str(node.target)]) is CONVOLUTION

    def _may_mutate(self, node: Node) -> bool:
        if node.op == "call_module":
            return type(self._modules[str(node.target)]) not in _PURE
        return _is_in_place(node)


def follows(node: Node, other: Node) -> bool:
    """Whether nothing is computed between a node and another one before it."""
    between = node.prev
    while between.op == "get_attr":
        between = between.prev
    return between is other


def drop_identities(graph: Graph, modules: Modules) -> list[str]:
    """Takes the modules out that give what they are given; their paths."""
    paths = []
    for node in list(graph.nodes):
        if node.op == "call_module" and type(modules[str(node.target)]) is torch.nn.Identity:
            input = only_input(node)
            if input is not None:
                paths.append(str(node.target))
                node.replace_all_uses_with(input)
                graph.erase_node(node)
    return paths


def rewrite(graph: Graph, groups: list[Group]) -> None:
    """Puts each group's operation into the graph in place of its nodes."""
    new: dict[Node, Node] = {}
    for group in groups:
        with graph.inserting_before(group.at):
            args = [
                graph.create_node("get_attr", arg) if isinstance(arg, Path)
                else new.get(arg, arg) if isinstance(arg, Node) else arg
                for arg in group.args
            ]  # fmt: skip
            fused = graph.call_function(group.function, tuple(args))
            fused.meta[STACK] = group.at.meta[STACK]
        new[group.nodes[-1]] = fused
        group.nodes[-1].replace_all_uses_with(fused)
        for node in reversed(group.nodes):
            graph.erase_node(node)


def _is_in_place(node: Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    return (
        name.endswith("_") or name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv",
        "imod", "ipow", "imatmul", "iand", "ior")
        or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        or (node.target in _ACTIVATION_FUNCTIONS and any(arg is True for arg in node.args))
    )  # fmt: skip


def only_input(node: Node) -> Node | None:
    values = [*node.args, *node.kwargs.values()]
    return values[0] if len(values) == 1 and isinstance(values[0], Node) else None


def _braces(*words: Any) -> str:
    words = tuple(word for word in words if word and word != "none")
    return f"({', '.join(words)})" if words else ""


def _label(node: Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    if node.op == "call_method":
        return f".{node.target}()"
    if node.target in (operator.add, operator.iadd):
        return "+" if node.target is operator.add else "+="
    name = torch.fx.node._get_qualified_name(node.target)  # type: ignore[arg-type]
    return name.replace("torch.nn.functional", "F")
