"""The forward that a module carries in place of its class's: a graph, and what must hold for it.

It is an attribute of the instance. It goes with the module through deepcopy and pickle as source
text, and runs the class's own forward wherever something that the graph relies on has changed.
"""

from __future__ import annotations

import hashlib
import importlib
import linecache
import re
import types
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import _get_qualified_name
from torch.nn.modules.module import _has_any_global_hook

from gdfast.errors import mismatch
from gdfast.swap.trace import Reads, Trace, Untraceable, same

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
# What torch.nn.DataParallel calls for a shallow copy of each module, whose children it replaces.
_REPLICATE = "_replicate_for_data_parallel"
_MISSING = object()


class FusedForward:
    """Runs `source`'s forward on its module where `source`'s holds says so, else the class's."""

    source: str
    names: dict[str, str]  # what the source calls by which name
    constants: dict[str, Any]
    inputs: tuple[str, ...]
    methods: tuple[str, ...]  # of the module's class that the source stands for
    code: str  # what those were when they were traced

    def __init__(
        self, owner: torch.nn.Module, source: str, names: dict[str, str],
        constants: dict[str, Any], inputs: tuple[str, ...], methods: tuple[str, ...] = ("forward",),
    ) -> None:  # fmt: skip
        self.source, self.names, self.constants = source, names, constants
        self.inputs, self.methods = inputs, methods
        self.code = _fingerprint(type(owner), methods)
        self._bind(owner)

    def _bind(self, owner: torch.nn.Module) -> None:
        # The owner holds this; the other way round it would live until the garbage collector runs.
        self._owner = weakref.ref(owner)
        names = {name: _imported(path) for name, path in self.names.items()}
        names |= fixed_names() | self.constants | {"original": type(owner).forward}
        exec(_compiled(self.source), names)
        self._run, self._holds = names["forward"], names["holds"]
        self._is_current = self.code == _fingerprint(type(owner), self.methods)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner: Any = self._owner()
        if owner is None:
            fix = "Copy models with copy.deepcopy, or call gdfast.restore_ before copy.copy"
            text = mismatch("swap_", "forward", "the module it was made for", "none alive", fix)
            raise RuntimeError(text)
        values = self._positional(args, kwargs) if kwargs else args
        if self._is_current and self._holds(owner, values):
            return self._run(owner, *values)
        return type(owner).forward(owner, *args, **kwargs)

    def _positional(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        rest = self.inputs[len(args) :]
        return (*args, *(kwargs[n] for n in rest)) if kwargs.keys() == set(rest) else ()

    def replicate(self) -> torch.nn.Module:
        """The module's shallow copy, with the class's own forward: ours is bound to the module."""
        owner: Any = self._owner()
        replica: torch.nn.Module = type(owner)._replicate_for_data_parallel(owner)
        uncarry(replica)
        return replica

    @property
    def __wrapped__(self) -> Any:
        """The class's own forward; inspect.signature asks for it."""
        owner: Any = self._owner()
        return types.MethodType(type(owner).forward, owner)

    @property
    def __code__(self) -> Any:
        # torch.export names the forward's file and line by it.
        return self.__wrapped__.__code__

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**state, "owner": self._owner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        owner = state.pop("owner")
        vars(self).update(state)
        self._bind(owner)


def carries_fused(module: torch.nn.Module) -> bool:
    """Whether a module runs a forward of ours."""
    return type(vars(module).get("forward")) is FusedForward


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether a module carries hooks that run when it is called."""
    return any(vars(module)[name] for name in _HOOKS)


def install_layer(module: torch.nn.Module, function: Callable[..., Any]) -> None:
    """Makes `function(module, input)` the forward of a module without children."""
    name = f"{function.__module__}.{function.__qualname__}"
    source = (
        "def forward(self, input):\n    return function(self, input)\n\n\n"
        "def holds(self, args):\n    return len(args) == 1 and type(self).forward is original\n"
    )
    _carry(module, FusedForward(module, source, {"function": name}, {}, ("input",)))


def install(module: torch.nn.Module, traced: Trace, bypassed: dict[str, bool]) -> None:
    """Makes a traced graph the forward of a module.

    `bypassed` has the paths of the modules that the graph does not call although the forward did,
    and whether they carry a forward of ours themselves. Raises Untraceable where the graph cannot
    be written as source text.
    """
    code = traced.graph.python_code("self")
    names = {
        name: _name_of(value) for name, value in code.globals.items() if name not in fixed_names()
    }
    guards = _Guards(module, traced.reads, bypassed, len(traced.inputs))
    source = f"{_by_dict(code.src.strip(), module)}\n\n\n{guards.source()}"
    own = sorted({name for path, name in traced.reads.members if not path} - {"forward"})
    _carry(
        module,
        FusedForward(module, source, names, guards.constants, traced.inputs, ("forward", *own)),
    )


def _by_dict(source: str, module: torch.nn.Module) -> str:
    """The source with the modules of `self` by their dict: as attributes Python looks for them in
    vain first, and calls torch's function then, ten times as long."""
    names = "|".join(map(re.escape, sorted(filter(str.isidentifier, module._modules))))
    return re.sub(rf"\bself\.({names})\b", r'self._modules["\1"]', source) if names else source


def _carry(module: torch.nn.Module, forward: FusedForward) -> None:
    vars(module)["forward"] = forward
    vars(module)[_REPLICATE] = forward.replicate


def uncarry(module: torch.nn.Module) -> None:
    """Takes a forward of ours away."""
    for name in ("forward", _REPLICATE):
        vars(module).pop(name, None)


class _Guards:
    """Writes the function that says whether all that a graph relies on is as it was."""

    def __init__(
        self, root: torch.nn.Module, reads: Reads, bypassed: dict[str, bool], inputs: int
    ) -> None:
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._reads = reads
        self._bypassed = bypassed
        self._inputs = inputs
        self._lines: list[str] = []
        self._variables: dict[str, str] = {"": "self"}
        self._parents: dict[str, str] = {}  # the variables of their dicts of modules
        self.constants: dict[str, Any] = {}

    def source(self) -> str:
        self._fail(f"len(args) != {self._inputs}")
        for i in range(self._inputs):
            self._fail(f"not isinstance(args[{i}], Tensor)")
        self._fail("type(self).forward is not original")
        if self._bypassed:
            self._fail("has_any_global_hook()")
        reads = self._reads
        reached = [*reads.types, *self._bypassed]
        for path in reached:
            self._module(path)
        for second, first in reads.same.items():
            if first in reached or second in reached:
                self._fail(f"{self._module(second)} is not {self._module(first)}")
        for path, is_ours in self._bypassed.items():
            self._bypass(path, is_ours)
        for path, keys in reads.keys.items():
            self._fail(f"tuple({self._module(path)}._modules) != {keys!r}")
        for (path, name), value in reads.attributes.items():
            self._attribute(self._module(path), name, value)
        for path, name in sorted(reads.members):
            module = self._module(path)
            if name == "forward":
                self._forward_is_ours(module)
            else:
                self._fail(f"{name!r} in {module}.__dict__")
        for path, name in sorted(reads.tensors):
            module = self._module(path)
            absent = [f"{module}.{kind}.get({name!r}) is None" for kind in _TENSORS]
            self._fail(" and ".join(absent))
        for path, name in sorted(reads.nones):
            module = self._module(path)
            present = [
                f"{module}.{kind}.get({name!r}) is not None" for kind in (*_TENSORS, "_modules")
            ]
            self._fail(" or ".join(present))
        return "\n".join(["def holds(self, args):", *self._lines, "    return True", ""])

    def _fail(self, condition: str) -> None:
        self._lines += [f"    if {condition}:", "        return False"]

    def _module(self, path: str) -> str:
        """The variable that holds the module of that path, whose type is as it was."""
        if path not in self._variables:
            parent, _, key = path.rpartition(".")
            owner = self._module(parent)
            variable = self._variables[path] = f"m{len(self._variables)}"
            if parent not in self._parents:
                self._parents[parent] = f"c{len(self._parents)}"
                self._lines.append(f"    {self._parents[parent]} = {owner}._modules")
            self._lines.append(f"    {variable} = {self._parents[parent]}.get({key!r})")
            self._fail(f"type({variable}) is not {self._constant(type(self._modules[path]))}")
        return self._variables[path]

    def _constant(self, value: Any) -> str:
        for name, known in self.constants.items():
            if known is value:
                return name
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def _bypass(self, path: str, is_ours: bool) -> None:
        # What a module has of its own is found in a quarter of the time in its dict.
        self._lines.append(f"    own = {self._module(path)}.__dict__")
        self._fail(" or ".join(f"own[{hooks!r}]" for hooks in _HOOKS))
        if is_ours:
            self._fail('type(own.get("forward")) is not FusedForward')
        else:
            self._fail('not isinstance(own.get("forward"), nothing_or_ours)')
        if isinstance(self._modules[path], torch.nn.Conv2d):
            self._fail('"_conv_forward" in own')

    def _forward_is_ours(self, module: str) -> None:
        self._fail(f'not isinstance({module}.__dict__.get("forward"), nothing_or_ours)')

    def _attribute(self, module: str, name: str, value: Any) -> None:
        constant = self._constant(value)
        if value is None or isinstance(value, bool) or callable(value):
            self._fail(f"{module}.__dict__.get({name!r}, missing) is not {constant}")
        else:
            self._fail(f"not same({module}.__dict__.get({name!r}, missing), {constant})")


def fixed_names() -> dict[str, Any]:
    """The names that every source may use: ours, and those that torch.fx writes."""
    fx_names = {
        name: entry.obj for name, entry in fx.graph._custom_builtins.items()
    }  # fmt: skip
    ours = {
        "FusedForward": FusedForward, "Tensor": Tensor, "same": same, "missing": _MISSING,
        "nothing_or_ours": (type(None), FusedForward),
        "has_any_global_hook": _has_any_global_hook,
    }  # fmt: skip
    return {**fx_names, **ours}


def _name_of(value: Any) -> str:
    try:
        name = _get_qualified_name(value)
        if _imported(name) is value:
            return name
    except Exception:
        pass
    raise Untraceable(f"it calls {value!r}, which cannot be imported by a name")


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@lru_cache(maxsize=512)
def _compiled(source: str) -> types.CodeType:
    file = f"<gdfast fused forward {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    # Tracebacks show its lines.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    return compile(source, file, "exec")


def _fingerprint(cls: type, methods: tuple[str, ...]) -> str:
    """Tells methods from other versions of them, which a saved model may meet."""
    digest = hashlib.sha256()

    def add(code: types.CodeType) -> None:
        digest.update(code.co_code)
        digest.update(repr(code.co_names).encode())
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                add(constant)
            else:
                ordered = sorted(map(repr, constant)) if isinstance(constant, frozenset) else None
                digest.update(repr(ordered or constant).encode())

    for name in methods:
        code = getattr(getattr(cls, name, None), "__code__", None)
        if isinstance(code, types.CodeType):
            add(code)
    return digest.hexdigest()
