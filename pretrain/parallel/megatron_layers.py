"""Megatron's split layers with the calls, parameter names and initial numbers of pretrain/layers.py.

Each layer draws the whole matrix, as the layer on one device does, and keeps this rank's slice. Unlike Megatron's
modules they return one tensor, and have no `_extra_state` in their state_dict.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.cross_entropy import Scored, join_best, linear_cross_entropy
from pretrain.layers import draw, draw_first, draw_head, mark_padded, padded
from pretrain.parallel.mesh import Axis

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron warns that Apex is missing, for optimizers that we do not use
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )
    from megatron.core.tensor_parallel.layers import (
        linear_with_frozen_weight,
        linear_with_grad_accumulation_and_async_allreduce,
    )

# It would ask for CUDA_DEVICE_MAX_CONNECTIONS=1, which suits Megatron's own overlap of kernels but prevents ZeRO's.
linear_with_grad_accumulation_and_async_allreduce.warned = True


def layer_config(tensor_size: int) -> Any:
    """Megatron's configuration of the layers below."""
    # "cpu": weights are drawn where torch.empty puts them (zero.Init: on the GPU), by torch's generator.
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor_size, use_cpu_initialization=True, gradient_accumulation_fusion=False
    )


class _Plain:
    """Removes the extra state from Megatron's linear layers, and computes a bias's gradient also if the weight is
    frozen. It is not an nn.Module itself: zero.Init would give it a constructor that hides Megatron's."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = kwargs["bias"]
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return linear_with_grad_accumulation_and_async_allreduce(input, weight, *args, **kwargs)
        return linear_with_frozen_weight(input, weight, *args, **kwargs)


class Column(_Plain, ColumnParallelLinear):
    """Splits its outputs."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        std: float = 0.02,
        bias: bool = True,
        cut: float = 1.0,
        tensor: Axis,
        config: Any,
    ):
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=partial(draw, std=std, cut=cut),
            bias=bias,
            gather_output=False,
            tp_group=tensor.group,
        )
        self._load_state_dict_pre_hooks.clear()  # they add `_extra_state`

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Row(_Plain, RowParallelLinear):
    """Splits its inputs, and sums its outputs."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        std: float = 0.02,
        bias: bool = True,
        cut: float = 1.0,
        tensor: Axis,
        config: Any,
    ):
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=partial(draw, std=std, cut=cut),
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=tensor.group,
        )
        self._load_state_dict_pre_hooks.clear()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Vocabulary(VocabParallelEmbedding):
    """Splits its rows."""

    def __init__(self, size: int, dim: int, *, std: float = 0.02, tensor: Axis, config: Any):
        drawn = partial(draw_first, rows=size, draw_rows=partial(draw, std=std))
        super().__init__(padded(size), dim, init_method=drawn, config=config, tp_group=tensor.group)
        mark_padded(self.weight, size)


class Classifier(_Plain, ColumnParallelLinear):
    """Splits its classes. See pretrain.layers.Classifier."""

    def __init__(self, inputs: int, classes: int, *, tied: bool = False, tensor: Axis, config: Any):
        super().__init__(
            inputs,
            padded(classes),
            config=config,
            init_method=partial(draw_first, rows=classes, draw_rows=draw_head),
            gather_output=False,
            skip_weight_param_allocation=tied,
            tp_group=tensor.group,
        )
        self._load_state_dict_pre_hooks.clear()
        self.tensor, self.classes = tensor, classes
        for parameter in (self.bias,) if tied else (self.weight, self.bias):
            mark_padded(parameter, classes)

    def forward(self, rows: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Scored:
        options: dict[str, Any] = {"classes": self.classes, "group": self.tensor.group, "smoothing": smoothing}
        return linear_cross_entropy(rows, self.weight, self.bias, targets, weights, **options)

    def predict(self, rows: Tensor) -> Tensor:
        logits = self.logits(rows)
        top, place = logits.float().max(-1)
        return join_best(top, place + self.tensor.rank * logits.shape[-1], self.tensor.group)[1]

    def logits(self, rows: Tensor) -> Tensor:
        """[R, inputs] -> [R, classes of this rank]; padding is -inf."""
        logits = super().forward(rows)[0]
        real = max(self.classes - self.tensor.rank * logits.shape[1], 0)
        return (
            logits if real >= logits.shape[1] else F.pad(logits[:, :real], (0, logits.shape[1] - real), value=-math.inf)
        )
