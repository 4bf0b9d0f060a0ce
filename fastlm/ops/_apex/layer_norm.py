"""layer_norm and rms_norm by NVIDIA's apex: fused_layer_norm_affine and its kin, after torch's residual addition."""

from __future__ import annotations

from importlib import import_module

import torch

from fastlm.ops.layer_norm import Args


def limit(x, *, dropout=False, weight=None, bias=None):
    if dropout:
        return "apex has no dropout"
    for parameter in (weight, bias):
        if parameter is not None and parameter.dtype != x.dtype:
            return f"apex takes weight and bias in x's dtype, {x.dtype}, not {parameter.dtype}"
    return None if x.numel() else "it takes no empty input"


def layer_norm(args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h)."""
    library = import_module("apex.normalization.fused_layer_norm")
    h = args.x if args.residual is None else args.residual + args.x
    weight, bias, shape = args.weight, args.bias, tuple(h.shape[-1:])
    # The public function has cast already; apex would cast once more, to the low precision.
    with torch.autocast(h.device.type, enabled=False):
        if weight is None:
            norm = library.fused_rms_norm if args.rms else library.fused_layer_norm
            return norm(h, shape, args.eps), h
        if args.rms:
            return library.fused_rms_norm_affine(h, weight, shape, args.eps), h
        bias = torch.zeros_like(weight) if bias is None else bias  # apex has no weight without a bias
        return library.fused_layer_norm_affine(h, weight, bias, shape, args.eps), h
