"""Records what a module's forward does, as a torch.fx graph, and what that graph relies on.

The modules are watched while their forward runs on proxies: each of them gets, for as long as that
takes, a class of its own that notes which attributes are read. What a graph cannot stand for (a
decision by data or by `self.training`, an attribute that is set, a random number, another gradient
mode) is found and ends the trace.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import io
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

Inline = Callable[[str, torch.nn.Module], bool]
STACK = "gdfast_stack"  # a node's meta: the paths of the containers that it was traced within

_IMMUTABLE = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, type,
    torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip


class Untraceable(Exception):
    """A forward that no graph can stand for; the message says why."""


@dataclass
class Reads:
    """What a graph relies on, by the paths of modules; the traced module's own path is ""."""

    types: dict[str, type] = field(default_factory=dict)  # of the modules that were reached
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of the containers
    same: dict[str, str] = field(default_factory=dict)  # a second path of a module, and its first
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)
    members: set[tuple[str, str]] = field(default_factory=set)  # found on the class
    tensors: set[tuple[str, str]] = field(default_factory=set)  # parameters and buffers
    nones: set[tuple[str, str]] = field(default_factory=set)  # registered as None


@dataclass
class Trace:
    """The graph of a forward, the names of the arguments it takes, and what it relies on."""

    graph: fx.Graph
    inputs: tuple[str, ...]
    reads: Reads


def trace(root: torch.nn.Module, inline: Inline) -> Trace:
    """The graph of `root`'s forward for tensors as its required arguments and defaults as the rest.

    Modules below are single nodes, but for those that `inline(path, module)` is true for. Raises
    Untraceable.
    """
    first = _trace_once(root, inline)
    # What reads the gradient mode or autocast comes out differently in another one.
    with torch.set_grad_enabled(not torch.is_grad_enabled()), _other_autocast():
        second = _trace_once(root, inline)
    if _code(first) != _code(second):
        raise Untraceable("it depends on the gradient mode or on autocast")
    return first


def _other_autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=not torch.is_autocast_enabled("cpu"))


def _code(traced: Trace) -> str:
    return traced.graph.python_code("self").src


def _trace_once(root: torch.nn.Module, inline: Inline) -> Trace:
    required = _required(root)
    tracer = _Tracer(root, inline)
    printed = io.StringIO()
    numbers = _random_state()
    try:
        with tracer.watching(), contextlib.redirect_stdout(printed):
            inputs = [tracer.create_proxy("placeholder", name, (), {}) for name in required]
            output = type(root).forward(root, *inputs)
            tracer.create_node("output", "output", (tracer.create_arg(output),), {})
    except Untraceable:
        raise
    except fx.proxy.TraceError as error:
        raise Untraceable(f"it decides by its data ({_first_line(error)})") from error
    except Exception as error:
        name = type(error).__name__
        raise Untraceable(f"it cannot be traced ({name}: {_first_line(error)})") from error
    finally:
        drew = _restore_random(numbers)
    if drew:
        raise Untraceable("it draws random numbers of its own")
    if printed.getvalue():
        raise Untraceable("it prints")
    if _asks_for_types(root, tracer.reads):
        raise Untraceable("it asks for types, which are others while it is traced")
    return Trace(tracer.graph, required, tracer.reads)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:100]


def _required(root: torch.nn.Module) -> tuple[str, ...]:
    try:
        _, *parameters = inspect.signature(type(root).forward).parameters.values()
    except (TypeError, ValueError) as error:
        raise Untraceable(f"it has no signature ({_first_line(error)})") from error
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise Untraceable(f"it takes *{parameter.name}")
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise Untraceable(f"it needs {parameter.name} by name")
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD)


def _asks_for_types(root: torch.nn.Module, reads: Reads) -> bool:
    names = {"forward", *(name for path, name in reads.members if not path)}
    codes = (getattr(getattr(type(root), name, None), "__code__", None) for name in names)
    return any(
        isinstance(code, types.CodeType) and {"type", "__class__"} & {*code.co_names}
        for code in codes
    )


class _Proxy(fx.Proxy):
    """A value of the graph that changes in place where tensors do, and passes for a tensor."""

    _is_param = False

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # isinstance asks for this. torch.fx wants to know what it is; a forward wants to know what
        # it was given, which is certain for its arguments only.
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return _Proxy
        if self.node.op == "placeholder":
            return Tensor
        raise Untraceable("it asks for the type of a value")

    def __repr__(self) -> str:
        raise Untraceable("it makes a text of its data")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class _Tracer(fx.proxy.TracerBase):
    def __init__(self, root: torch.nn.Module, inline: Inline) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.reads = Reads()
        self._inline = inline
        self._stack: list[str] = []
        self._paths: dict[int, str] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            first = self._paths.setdefault(id(module), path)
            if first != path:
                self.reads.same[path] = first
        self._modules = dict(root.named_modules())
        self._classes = {path: type(module) for path, module in self._modules.items()}
        self._state = _global_state()

    # What torch.fx asks of a tracer.

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _global_state() != self._state:
            raise Untraceable("it changes the gradient mode, autocast or how tensors are saved")
        node = self.graph.create_node(*args, **kwargs)
        node.meta[STACK] = tuple(self._stack)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            raise Untraceable("it uses a tensor that is no parameter and no buffer")
        if isinstance(a, dict) and type(a) is not dict:
            raise Untraceable(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    # What the watched modules report.

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Gives every module its watched class, and puts back all that changes meanwhile."""
        classes: dict[type, type] = {}
        before = {path: dict(vars(module)) for path, module in self._modules.items()}
        try:
            for path, module in self._modules.items():
                cls = self._classes[path]
                if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
                    continue
                if cls not in classes:
                    classes[cls] = _watched(cls, self)
                object.__setattr__(module, "__class__", classes[cls])
            yield
        finally:
            for path, module in self._modules.items():
                object.__setattr__(module, "__class__", self._classes[path])
            changed = [
                path for path, module in self._modules.items() if _put_back(module, before[path])
            ]
            unchanged = not changed and self._attributes_unchanged()
            # The watched classes hold this until the garbage collector runs; models are to go
            # before.
            self._modules.clear()
        if not unchanged:
            raise Untraceable("it changes attributes")

    def _attributes_unchanged(self) -> bool:
        for (path, name), value in self.reads.attributes.items():
            now = vars(self._modules[path])[name]
            if isinstance(value, list) and not same(now, value):
                now[:] = value
                return False
        return True

    def saw(self, module: torch.nn.Module, name: str, value: Any) -> None:
        """An attribute was read that is in the instance's or the class's dict."""
        if name.startswith("__"):
            return
        if name == "training":
            raise Untraceable("it reads self.training")
        path = self._paths[id(module)]
        if name not in object.__getattribute__(module, "__dict__"):
            self._saw_member(path, name)
        elif name == "_modules":
            self.reads.keys[path] = tuple(value)
            for key, child in value.items():
                if child is not None:
                    child_path = f"{path}.{key}" if path else key
                    self.reads.types[child_path] = self._classes[self._paths[id(child)]]
        elif isinstance(value, list) and all(_is_constant(item) for item in value):
            self.reads.attributes.setdefault((path, name), list(value))
        elif _is_constant(value):
            self.reads.attributes[path, name] = value
        else:
            raise Untraceable(f"it reads self.{name}, a {type(value).__name__}")

    def _saw_member(self, path: str, name: str) -> None:
        value = inspect.getattr_static(self._classes[path], name, None)
        if not (hasattr(type(value), "__get__") or _is_constant(value)):
            raise Untraceable(f"it reads self.{name}, a {type(value).__name__} of its class")
        if not isinstance(value, property):
            self.reads.members.add((path, name))

    def registered(self, module: torch.nn.Module, name: str, value: Any) -> Any:
        """A parameter, buffer or module was read."""
        path = self._paths[id(module)]
        own = f"{path}.{name}" if path else name
        if isinstance(value, torch.nn.Module):
            self.reads.types[own] = self._classes[self._paths[id(value)]]
            return value
        state = object.__getattribute__(module, "__dict__")
        if not any(name in state[kind] for kind in ("_parameters", "_buffers", "_modules")):
            raise Untraceable(f"it makes self.{name} by a __getattr__ of its own")
        if value is None:
            self.reads.nones.add((path, name))
            return value
        self.reads.tensors.add((path, name))
        return self.create_proxy("get_attr", own, (), {})

    def missed(self, module: torch.nn.Module, name: str) -> None:
        """An attribute was asked for that does not exist."""
        path = self._paths[id(module)]
        self.reads.members.add((path, name))
        self.reads.nones.add((path, name))

    def called(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """A module was called."""
        path = self._paths[id(module)]
        if not kwargs and len(args) == 1 and self._inline(path, module):
            self._stack.append(path)
            output = self._classes[path].forward(module, *args)
            self._stack.pop()
            return output
        return self.create_proxy("call_module", path, args, kwargs)


def _watched(cls: Any, tracer: _Tracer) -> type:
    def __getattribute__(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        tracer.saw(self, name, value)
        return value

    def __getattr__(self: Any, name: str) -> Any:
        try:
            value = cls.__getattr__(self, name)
        except AttributeError:
            tracer.missed(self, name)
            raise
        return tracer.registered(self, name, value)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        raise Untraceable(f"it sets self.{name}")

    def __delattr__(self: Any, name: str) -> None:
        raise Untraceable(f"it deletes self.{name}")

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return tracer.called(self, args, kwargs)

    members = {
        function.__name__: function
        for function in (__getattribute__, __getattr__, __setattr__, __delattr__, __call__)
    }
    return type(cls)(cls.__name__, (cls,), {**members, "__module__": cls.__module__})


def _put_back(module: torch.nn.Module, before: dict[str, Any]) -> bool:
    state = vars(module)
    changed = state.keys() != before.keys() or any(
        state[name] is not value for name, value in before.items()
    )
    if changed:
        state.clear()
        state.update(before)
    return changed


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, torch.Size)):
        return all(_is_constant(item) for item in value)
    return isinstance(value, _IMMUTABLE) or inspect.isroutine(value)


def same(value: Any, constant: Any) -> bool:
    """Whether an attribute still is the constant that was read."""
    return value is constant or (type(value) is type(constant) and bool(value == constant))


def _global_state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
    )


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore_random(before: tuple[Any, ...]) -> bool:
    """Puts random numbers back to what they were, and says whether any were drawn."""
    python, numpy, native = _random_state()
    drew = (
        python != before[0]
        or numpy[2:] != before[1][2:]
        or not np.array_equal(numpy[1], before[1][1])
        or not torch.equal(native, before[2])
    )
    if drew:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
    return drew
