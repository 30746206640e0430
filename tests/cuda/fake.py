"""A GPU that is not there: tensors of device "cuda" without any data, for our branches of CUDA where there is none.

torch's FakeTensorMode knows shapes, types and devices, and refuses operators that mix devices. Here only the GPU is
fake: tensors on the host are as ever, so that what the loader knows about a batch can be asked, and calls for whose
answer the host would wait for a GPU are counted, by the line of ours that makes them.

What runs under it has shown that its tensors lie on the right device, that types and shapes go together, and where it
waits. Not shown are numbers (what comes to the host is zero), limits of the kernels themselves (what a kernel of torch
or cuDNN asks beyond devices, types and shapes), streams, memory, and anything of DeepSpeed, NCCL and the driver.

torch's own autograd needs a CUDA build for tensors of device "cuda". So its C++ sees device "meta" here, and Python
"cuda": what C++ alone decides by the device (which kernel of scaled_dot_product_attention) is decided as for "meta".

Private to torch, and tried with 2.13: FakeTensorMode and what is patched of it, Tensor._make_subclass,
_disable_current_modes and DisableTorchFunction.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.calls import WAITING

CUDA, META = torch.device("cuda", 0), torch.device("meta")
OURS = ("/pretrain/",)
aten = torch.ops.aten


class FakeGpu:
    """`waits`: by file and line, since the last `waits.clear()`."""

    def __init__(self) -> None:
        # Host tensors may stand beside the GPU's as torch itself allows it: numbers of no dimension.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: Counter[str] = Counter()

    def put(self, value: Tensor) -> FakeTensor:
        """A tensor of any device as one of the GPU."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return FakeTensor(self.mode, empty, CUDA, requires_grad=value.requires_grad)

    def place(self, module: nn.Module) -> nn.Module:
        """What module.to("cuda") moves: parameters and buffers, those that are shared staying so."""
        known: dict[int, Any] = {}  # with each original, so that no id is used twice
        for part in module.modules():
            for values in (part._parameters, part._buffers):
                for name, value in values.items():
                    if value is not None and not isinstance(value, FakeTensor):
                        known.setdefault(id(value), (self._placed(value), value))
                        values[name] = known[id(value)][0]
        return module

    def _placed(self, value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            return self.put(value)
        made = nn.Parameter(self.put(value.detach()), value.requires_grad)
        made.__dict__.update(value.__dict__)
        return made

    def waited(self, what: str) -> None:
        self.waits[f"{self.where()} {what}"] += 1

    def where(self) -> str:
        """File and line of our own code that is running."""
        frame: Any = sys._getframe(1)
        while frame is not None and not any(part in frame.f_code.co_filename for part in OURS):
            frame = frame.f_back
        return "" if frame is None else f"{frame.f_code.co_filename.rpartition('/pretrain/')[2]}:{frame.f_lineno}"


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """torch says that there is one GPU, an A100; what is made on it or sent to it has no data."""
    gpu = FakeGpu()
    properties = type("A100", (), {"major": 8, "minor": 0, "name": "A100", "multi_processor_count": 108})()
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (8, 0),
        "get_device_properties": properties, "get_device_name": "A100", "is_bf16_supported": True,
        "set_device": None, "is_current_stream_capturing": False, "synchronize": None, "_lazy_init": None,
    }  # fmt: skip
    patches = [patch.object(torch.cuda, name, lambda *_, _is=answer, **__: _is) for name, answer in answers.items()]
    patches += [patch.object(torch.cuda, name, kind) for name, kind in (("Stream", _Stream), ("Event", _Event))]
    patches += [patch.object(torch.cuda, "current_stream", _Stream), patch.object(torch.cuda, "stream", nullcontext)]
    patches += [patch.object(fake_tensor, "init_gpu_context", lambda device: None)]
    patches += [patch.object(FakeTensorMode, "avoid_device_init", True)]
    patches += [
        patch.object(FakeTensor, "is_cuda", property(lambda value: value.fake_device.type == "cuda"), create=True)
    ]
    dispatch = FakeTensorMode.dispatch

    def on_gpu(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})  # what C++ makes within an operator, for the device that it sees
        return dispatch(mode, func, types, args, kwargs | ({"device": CUDA} if kwargs.get("device") == META else {}))

    patches += [patch.object(FakeTensorMode, "dispatch", on_gpu)]
    move = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return gpu.place(module) if args and _named(args[0]) is META else move(module, *args, **kwargs)

    patches += [patch.object(nn.Module, "to", to)]  # torch's own cannot exchange a convolution's weight
    # C++ would look at the stream's type before any mode is asked.
    patches += [patch.object(Tensor, "record_stream", lambda *_: None)]
    plain = Tensor._make_subclass

    def meta_in_cpp(*args: Any, dispatch_device: bool = False, **more: Any) -> Any:
        return plain(*args, **more)

    patches += [patch.object(Tensor, "_make_subclass", meta_in_cpp)]
    for one in patches:
        one.start()
    try:
        with _Calls(gpu), _Kernels(gpu):
            yield gpu
    finally:
        for one in reversed(patches):
            one.stop()


class _Stream:
    """Nothing runs, so that nothing has to be waited for."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record_event(self) -> _Event:
        return _Event()

    def wait_event(self, event: _Event) -> None:
        pass

    wait_stream = wait_event


class _Event(_Stream):
    def record(self, *_: Any) -> None:
        pass

    synchronize = record


def _named(value: Any) -> Any:
    """A GPU as our code names it -> as torch's C++ sees it here."""
    if isinstance(value, torch.device):
        return META if value.type == "cuda" else value
    return META if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class _Calls(TorchFunctionMode):
    """What Python asks of torch."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy") and isinstance(args[0], FakeTensor):
            self.gpu.waited(name)
            return func(torch.zeros(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
        if name == "pin_memory":
            return _pinned(func, args[0])
        if name == "is_pinned":
            return hasattr(args[0], "pinned")
        if kwargs.pop("pin_memory", False):
            return _pinned(func, func(*args, **kwargs))
        if name in ("tensor", "as_tensor", "new_tensor") and _named(kwargs.get("device")) is META:
            return func(*args, **{**kwargs, "device": None}).to(META)
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(map(_named, args)) if name != "__get__" else args
        if "device" in kwargs:
            kwargs["device"] = _named(kwargs["device"])
        return func(*args, **kwargs)


def _pinned(func: Any, value: Tensor) -> Tensor:
    assert not isinstance(value, FakeTensor), "only memory of the host can be pinned"
    copy = value.detach().clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


class _Kernels(TorchDispatchMode):
    """What reaches a kernel, in the forward pass and the backward pass."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():  # in there "cuda" and "meta" are what they say
            there = any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves((args, kwargs)))
            if not there and kwargs.get("device") != META:
                return func(*args, **kwargs)
            return self._there(func, *tree_map(self._own, (args, kwargs)))

    def _there(self, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("device") == META:
            kwargs["device"] = CUDA
        name = func.overloadpacket.__name__
        if name in ("copy_", "_to_copy"):
            return self._copied(func, args, kwargs)
        indexes = _indexes(name, args)
        if name in WAITING or any(index.dtype == torch.bool for index in indexes):
            self.gpu.waited(name)
            return self._answer(name, *args)
        if any(index.device.type == "cpu" for index in indexes):
            self.gpu.waited(f"{name} by an index of the host")
        with self:  # an operator that consists of others
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        with self.gpu.mode:
            return tree_map(_host, func(*args, **kwargs))

    def _own(self, value: Any) -> Any:
        """What C++ made by itself for a device that it takes for meta is the GPU's."""
        alone = isinstance(value, Tensor) and value.is_meta and not isinstance(value, FakeTensor)
        return self.gpu.put(value) if alone else value

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Between host and GPU: no wait if the host's memory is pinned and the call says that it need not wait, or, on
        the way there, if it says so."""
        target, source = (args[0], args[1]) if func is aten.copy_.default else (None, args[0])
        to = (kwargs.get("device") or source.device) if target is None else target.device
        asked = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if source.device.type != to.type:
            free = asked and (to.type == "cuda" or hasattr(target, "pinned"))
            if not free and source.numel() > 0:
                self.gpu.waited(f"{source.device.type} to {to.type}")
        if to.type == "cpu":
            here = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype) if target is None else target
            return here.zero_()
        if source.device.type == "cpu":
            source = self.gpu.put(source if target is None else source.expand_as(target))
            source = source if kwargs.get("dtype") is None else source.to(kwargs["dtype"])
            return source if target is None else target
        with self.gpu.mode:
            return func(*args, **kwargs)

    def _answer(self, name: str, value: Tensor, *more: Any) -> Any:
        """Of a call that waits: zero, or nothing at all."""
        if name == "_local_scalar_dense":
            return torch.zeros((), dtype=value.dtype).item()
        if name == "equal":
            return False
        if name == "nonzero":
            return self.gpu.put(torch.zeros(0, value.dim(), dtype=torch.long))
        if name.startswith(("index_put", "_index_put")):
            return value
        if name == "index":
            (index,) = (each for each in more[0] if each is not None and each.dtype == torch.bool)
            return self.gpu.put(torch.zeros(0, *value.shape[index.dim() :], dtype=value.dtype))
        if name == "masked_select":
            return self.gpu.put(torch.zeros(0, dtype=value.dtype))
        raise NotImplementedError(f"the fake GPU has no answer of {name}")


def _host(value: Any) -> Any:
    """Values on the host have data."""
    if isinstance(value, FakeTensor) and value.device.type == "cpu":
        return torch.zeros(value.shape, dtype=value.dtype)
    return value


def _indexes(name: str, args: Any) -> list[Tensor]:
    """The tensors by which a kernel of indexing is asked; of any other kernel none."""
    if not name.startswith(("index", "_index_put", "_unsafe_index")) or len(args) < 2:
        return []
    return [index for index in tree_leaves(args[1]) if isinstance(index, Tensor)]
