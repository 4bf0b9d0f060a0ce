"""The losses: torch's CrossEntropyLoss and LinearCrossEntropyLoss on fastlm's ops."""

from __future__ import annotations

import torch

from fastlm import ops


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss (arguments, defaults) on `fastlm.ops.cross_entropy`, for class indices.

    A target of class probabilities is a ValueError. Args beyond torch's:
        z_loss: factor of lse², added to each row's loss.
        softcap: c, for the loss of c·tanh(input / c); None: no cap.
        inplace: overwrite the logits with their gradient; see the op. Only where the classes are the last dimension.
        return_z_loss, return_token_accuracy: also return these; forward then returns an ops.CrossEntropyOutput.
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average=None,
        ignore_index: int = ops.IGNORE_INDEX,
        reduce=None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        inplace: bool = False,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.inplace = z_loss, softcap, inplace
        self.return_z_loss, self.return_token_accuracy = return_z_loss, return_token_accuracy

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor | ops.CrossEntropyOutput:
        """input (C,), (N, C) or (N, C, d1, ...), target of that shape without C: the loss, as torch shapes it."""
        if input.dim() > 2:
            if self.inplace:
                raise ValueError(f"inplace: expected input (N, C), got {tuple(input.shape)}; flatten it, classes last")
            input = input.movedim(1, -1)
        return ops.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            inplace=self.inplace,
            return_z_loss=self.return_z_loss,
            return_token_accuracy=self.return_token_accuracy,
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """torch.nn.LinearCrossEntropyLoss (torch ≥ 2.13: arguments, state_dict, defaults) on the op of that name.

    The cross-entropy of linear(input), without all logits in memory at once. `options`, which chooses torch's chunks,
    has no effect. A ValueError: out_features, class probabilities as a target. Beyond torch's: z_loss, softcap,
    return_z_loss and return_token_accuracy, as of CrossEntropyLoss.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options=None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
    ) -> None:
        super().__init__()
        if tuple(out_features):
            raise ValueError(f"out_features: expected (), got {out_features}; torch.nn.LinearCrossEntropyLoss has it")
        if options is not None:
            raise ValueError(f"options: expected None, got {options!r}; fastlm chooses the chunks by itself")
        self.register_buffer("weight", weight)
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.ignore_index = ops.IGNORE_INDEX if ignore_index is None else ignore_index
        self.reduction, self.label_smoothing, self.z_loss, self.softcap = reduction, label_smoothing, z_loss, softcap
        self.return_z_loss, self.return_token_accuracy = return_z_loss, return_token_accuracy

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor | ops.CrossEntropyOutput:
        """input (..., in_features), target int64 (...): the loss, a scalar, or of target's shape for "none"."""
        return ops.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            self.linear.bias,
            class_weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=self.reduction,
            return_z_loss=self.return_z_loss,
            return_token_accuracy=self.return_token_accuracy,
        )
