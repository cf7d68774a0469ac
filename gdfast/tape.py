"""A training step on the CPU as a tape: what it called, in order, to be called again.

While a step is recorded, it runs as it always does. Our kernels tell of each call, by addresses and
numbers (see `gdfast.native`); a dispatch mode of torch sees the operators between them, in
forward, loss, backward and optimizer alike. Replaying calls them again on the same memory, past
autograd and the Python code that led there:

- what only makes memory, or another view of it, needs no call: the memory is kept;
- what writes to its arguments is called as it was;
- what computes new tensors writes them where it did: by its out= variant, or with a copy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from gdfast import native

_aten: Any = torch.ops.aten
_MAKE_MEMORY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_permuted.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
# What fills fresh memory with one number, and copies: in place they cost half as much.
_FILL = {
    _aten.zeros.default: 0, _aten.zeros_like.default: 0, _aten.new_zeros.default: 0,
    _aten.ones.default: 1, _aten.ones_like.default: 1, _aten.new_ones.default: 1,
}  # fmt: skip
_COPY = {_aten.clone.default, _aten._to_copy.default}
# Memory that Python filled, as torch.tensor does, comes out of these as it went in.
_LIFT = {_aten.lift.default, _aten.lift_fresh.default, _aten.lift_fresh_copy.default}
# Answers by sizes alone, and operators that note what runs.
_TELL_NOTHING = {_aten.is_same_size.default}
_NOTING = "profiler"
# Tensors change their memory there, which nothing on the tape would learn of.
_MOVE_MEMORY = {"resize_", "resize_as_", "_resize_output_", "set_", "_unsafe_set_", "swap_"}
# Python reads values by these past the operators; the last few run a function on each.
_READING = {
    "numpy", "tolist", "__array__", "__dlpack__", "__deepcopy__", "apply_", "map_", "map2_",
}  # fmt: skip
# C++ reads tensors in lists that are given to these.
_READING_LISTS = {"tensor", "as_tensor", "asarray", "new_tensor", "new"}
_uses: Any = torch._C._storage_Use_Count
_LEAST_ADDRESS = 1 << 32  # numbers from here on are addresses: kernels count less


class Tape:
    """The calls of one step, and everything that they name.

    A call may read a tensor of the batch. `bind` puts that of another batch in its place, of the
    same sizes and strides.
    """

    def __init__(self, batch: tuple[Tensor, ...]) -> None:
        self._calls: list[Callable[[], Any]] = []
        self._kept: dict[int, torch.UntypedStorage] = {}  # by the address of the storage's object
        self._batch = [_Read(x) for x in batch]

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Callable[[], Any]) -> None:
        self._calls.append(call)

    def add_kernel(
        self, kernel: Callable[..., Any], arguments: tuple[Any, ...], result: bool | None
    ) -> None:
        """Adds a call that takes addresses, and that has to give the same in each replay."""
        if result is not None:
            kernel = partial(_same, result, kernel)
        index, given = len(self._calls), list(arguments)
        self.add(partial(kernel, *arguments))
        for place, number in enumerate(arguments):
            read = next(
                (x for x in self._batch if type(number) is int and number in x.memory), None
            )
            if read is not None:
                self._bind_number(read, kernel, given, place, index)

    def has_batch(self, numbers: Iterable[int]) -> bool:
        """Whether one of these is an address in the batch's memory."""
        return any(number in read.memory for number in numbers for read in self._batch)

    def _bind_number(
        self, read: _Read, kernel: Callable[..., Any], given: list[Any], place: int, index: int
    ) -> None:
        offset = given[place] - read.memory.start

        def bind(tensor: Tensor) -> None:
            given[place] = tensor.data_ptr() + offset
            self._calls[index] = partial(kernel, *given)

        read.binders.append(bind)

    def alias(self, value: Any) -> Any:
        """A tensor on the memory of another, for a call that takes tensors.

        Not the tensor itself, which keeps its graph, and whose gradients autograd copies where
        somebody else has them too.
        """
        if not isinstance(value, Tensor):
            return value
        alias = value.detach()
        for read in self._batch:
            if alias.data_ptr() in read.memory:
                read.follow(alias)
        return alias

    def reads_otherwise(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the batch's memory, with elements of another size."""
        reads = (x for x in self._batch if tensor.data_ptr() in x.memory)
        return any(x.itemsize != tensor.itemsize for x in reads)

    def bind(self, batch: tuple[Tensor, ...]) -> None:
        for read, tensor in zip(self._batch, batch, strict=True):
            if tensor.data_ptr() != read.address:
                read.bind(tensor)

    def keep(self, tensor: Tensor) -> torch.UntypedStorage:
        """Keeps a tensor's memory, but that of the batch."""
        storage = tensor.untyped_storage()
        if not any(tensor.data_ptr() in x.memory for x in self._batch):
            self._kept[storage._cdata] = storage
        return storage

    def keeps(self, addresses: Iterable[int]) -> bool:
        """Whether each address is in memory that is kept, or in the batch's."""
        ends = {each.data_ptr(): each.data_ptr() + each.nbytes() for each in self._kept.values()}
        ends |= {each.memory.start: each.memory.stop for each in self._batch}
        starts = sorted(ends)
        for address in addresses:
            index = bisect_right(starts, address) - 1
            if index < 0 or address >= ends[starts[index]]:
                return False
        return True

    @property
    def bytes(self) -> int:
        """How much memory is kept."""
        return sum(storage.nbytes() for storage in self._kept.values())

    def replay(self) -> None:
        """Calls all again."""
        with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
            for call in self._calls:
                call()


def _same(expected: bool, kernel: Callable[..., Any], *arguments: Any) -> None:
    """Calls a kernel, which tells whether it did anything."""
    if (got := kernel(*arguments)) is not expected:
        raise RuntimeError(f"a kernel of gdfast: expected {expected} as recorded, got {got}")


class _Read:
    """A tensor of the batch, and what has to know where that of another batch is."""

    def __init__(self, tensor: Tensor) -> None:
        self.address = tensor.data_ptr()
        self.memory, self.itemsize = extent(tensor), tensor.itemsize
        self.binders: list[Callable[[Tensor], None]] = []

    def bind(self, tensor: Tensor) -> None:
        self.address = tensor.data_ptr()
        for bind in self.binders:
            bind(tensor)

    def follow(self, alias: Tensor) -> None:
        """Moves an alias of the tensor with it."""
        offset = alias.data_ptr() - self.memory.start
        size, strides, itemsize = alias.shape, alias.stride(), self.itemsize

        def bind(tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            place = tensor.data_ptr() + offset - storage.data_ptr()
            alias.set_(storage, place // itemsize, size, strides)

        self.binders.append(bind)


def extent(tensor: Tensor) -> range:
    """The addresses from a tensor's first element to the end of its last."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return range(0)
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return range(start, start + (steps + 1) * tensor.itemsize)


class Recorder(TorchDispatchMode):
    """Records the thread's step within `with recorder.running():` on a tape.

    `why_not` says then what cannot be replayed, or is "". The step reads `batch`, of which no two
    tensors share memory. Tensors of `known` are kept, beside all that the operators see: a kernel
    may be given their addresses.
    """

    def __init__(self, batch: tuple[Tensor, ...], known: Iterable[Tensor]) -> None:
        super().__init__()
        self.tape = Tape(batch)
        self.why_not = ""
        self._blocks: dict[int, list[torch.UntypedStorage]] = {}  # by their size in bytes
        # Memory whose values are those of the step before, or that a replay fills again.
        self._sound: set[int] = {x.untyped_storage()._cdata for x in batch}
        self._leaves: dict[int, tuple[Tensor, Tensor | None]] = {}  # others, and their gradients
        for tensor in known:
            self._sound.add(self.tape.keep(tensor)._cdata)

    @contextmanager
    def running(self) -> Iterator[None]:
        with native.recorded_by(self), _Readings(self), self:
            yield
        if any(leaf.grad is not grad for leaf, grad in self._leaves.values()):
            self.refuse("a tensor outside the model and the optimizer gets a gradient")
        self._leaves.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        with native.recorded_by(None), _disable_current_modes():
            yield

    def allocate(
        self, make: Callable[[], Tensor], size: Any, strides: Any, dtype: torch.dtype
    ) -> Tensor:
        """Memory for a kernel's result: of another one that is gone, as it will be in a replay."""
        blocks = self._blocks.setdefault(prod(size) * dtype.itemsize, [])
        for storage in blocks:
            # Neither a tensor nor the tape, for an operator, has it.
            if _uses(storage._cdata) == 1:
                with self.paused():
                    return torch.empty(0, dtype=dtype).set_(storage, 0, size, strides)
        tensor = make()
        blocks.append(self.tape.keep(tensor))
        self._sound.add(blocks[-1]._cdata)
        return tensor

    def refuse(self, reason: str) -> None:
        self.why_not = self.why_not or reason

    def call(self, kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Calls one of our kernels, which reads what it is given itself."""
        inner = [x for x in arguments if type(x) is not int], getattr(kernel, "keywords", {})
        unbound = [x for x in tree_leaves(inner) if type(x) is int]
        numbers = [*unbound, *(x for x in arguments if type(x) is int)]
        if not self.tape.keeps(x for x in numbers if x >= _LEAST_ADDRESS):
            self.refuse("a kernel of gdfast reads a tensor that may be gone by the next step")
        if self.tape.has_batch(unbound):
            self.refuse("a kernel of gdfast takes the batch in a list or by a keyword")
        with native.recorded_by(None):
            result = kernel(*arguments)
        if result is None or type(result) is bool:  # whether it did anything
            self.tape.add_kernel(kernel, arguments, result)
        else:
            self.refuse(f"a kernel of gdfast gives a {type(result).__name__}")
        return result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if native.recorder() is self and not self.why_not:
            try:
                self._note(func, args, kwargs, result)
            except Exception as error:  # the step itself went well
                self.refuse(f"{func.name()}: {type(error).__name__}: {error}")
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func.namespace == _NOTING or func in _TELL_NOTHING:
            return
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if x is not None]
        if reason := _why_not(func, inputs, outputs):
            self.refuse(f"{func.name()} {reason}")
            return
        storages = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in storages]
        for tensor in (*inputs, *fresh):
            self.tape.keep(tensor)
            if self.tape.reads_otherwise(tensor):
                self.refuse(f"{func.name()} takes the batch for {tensor.dtype}")
                return
        self._sound.update(x.untyped_storage()._cdata for x in fresh)
        if func in _LIFT:
            self._note_constant(inputs[0], result)
            return
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        for tensor in _written(func, args, kwargs) if writes else ():
            if not self._is_sound(tensor):
                self.refuse(f"{func.name()} writes to a tensor that comes from outside the step")
                return
        for tensor in inputs:
            if tensor.requires_grad and tensor.is_leaf and not self._is_sound(tensor):
                self._leaves.setdefault(id(tensor), (tensor, tensor.grad))
        if func in _MAKE_MEMORY or (outputs and not fresh and not writes):
            return
        args, kwargs = tree_map(self.tape.alias, (args, kwargs))
        self.tape.add(_again(func, args, kwargs, result, fresh))

    def _is_sound(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._sound

    def _note_constant(self, given: Tensor, lifted: Tensor) -> None:
        """Fills a tensor that Python made with its values of now in each replay: what follows may
        change them."""
        storage = given.untyped_storage()
        # What cannot be resized belongs to somebody else, as an array of NumPy.
        if lifted.untyped_storage()._cdata != storage._cdata or storage.resizable():
            self._sound.add(lifted.untyped_storage()._cdata)
            self.tape.add(partial(lifted.detach().copy_, given.detach().clone()))


class _Readings(TorchFunctionMode):
    """Refuses what reads a tensor's memory with no operator."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING:
            self._recorder.refuse(f"Tensor.{name} reads values")
        elif _reads_arguments(name, args, kwargs or {}):
            self._recorder.refuse(f"{name} reads the values of a tensor that it is given")
        return func(*args, **(kwargs or {}))


def _reads_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether C++ reads values of tensors that a function is given."""
    if name in _READING_LISTS:
        lists = [x for x in (*args, *kwargs.values()) if isinstance(x, (list, tuple))]
        return any(isinstance(x, Tensor) for x in tree_leaves(lists))
    given = (*args[1:], *(x for key, x in kwargs.items() if key not in ("input", "self")))
    return name == "tensor_split" and any(isinstance(x, Tensor) for x in given)


def _why_not(func: Any, inputs: list[Tensor], outputs: list[Any]) -> str:
    """Why an operator cannot be called again in its place, or ""."""
    if func.namespace != "aten":
        return "is no operator of PyTorch's own"
    tags, name = func.tags, func._schema.name.removeprefix("aten::")
    if torch.Tag.data_dependent_output in tags:
        return "reads a value"
    has_mask = func is _aten.index.Tensor and any(
        x.dtype in (torch.bool, torch.uint8) for x in inputs[1:]
    )
    if has_mask or (torch.Tag.dynamic_output_shape in tags and func is not _aten.index.Tensor):
        return "gives as many elements as values say"
    if name in _MOVE_MEMORY:
        return "changes a tensor's memory"
    for tensor in (*inputs, *outputs):  # numbers too
        if type(tensor) not in (Tensor, Parameter):
            return f"takes or gives a {type(tensor).__name__}"
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return f"takes or gives a tensor on {tensor.device}, {tensor.layout}"
        if tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
            return "takes or gives a tensor whose memory does not hold its values"
    return ""


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes."""
    arguments = func._schema.arguments
    given = {**dict(zip((x.name for x in arguments), args, strict=False)), **kwargs}
    written = [given.get(x.name) for x in arguments if x.alias_info and x.alias_info.is_write]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]


def _again(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, fresh: list[Tensor]
) -> Callable[[], Any]:
    """Calls an operator with its results where they were."""
    op = partial(func._op, *args, **kwargs)
    if not fresh:
        return op
    if func in _FILL:
        return partial(fresh[0].detach().fill_, _FILL[func])
    if func in _COPY:
        return partial(fresh[0].detach().copy_, args[0])
    results = _flat(result)
    targets = tuple(x.detach() if any(x is y for y in fresh) else None for x in results)
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    if len(fresh) == len(targets) and not is_random and (found := _out_variant(func)):
        variant, names = found
        # One that gives a list takes one.
        given = (list(targets),) if isinstance(result, list) else targets
        return partial(variant._op, *args, **kwargs, **dict(zip(names, given, strict=True)))

    def call() -> None:
        for one, target in zip(_flat(op()), targets, strict=True):
            if target is not None:
                if one.shape != target.shape:
                    expected, got = list(target.shape), list(one.shape)
                    raise RuntimeError(f"{func.name()}: expected {expected} as recorded, got {got}")
                target.copy_(one)

    return call


def _flat(result: Any) -> Any:
    """What an operator gives: tensors, or None, also out of a list among them."""
    if isinstance(result, Tensor):
        return (result,)
    return tree_leaves(result) if any(isinstance(x, list) for x in result) else result


def _out_variant(func: Any) -> tuple[Any, list[str]] | None:
    """The variant of an operator that takes the same arguments and the tensors to write to, and
    their names."""
    schema = func._schema
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
    wanted = [(x.name, str(x.type)) for x in schema.arguments]
    for name in packet.overloads():
        variant = getattr(packet, name)
        given, names = [], []
        for x in variant._schema.arguments:
            if x.alias_info is not None and x.alias_info.is_write:
                names.append(x.name)
            else:
                given.append((x.name, str(x.type)))
        if names and given == wanted and len(names) == len(schema.returns):
            return variant, names
    return None
