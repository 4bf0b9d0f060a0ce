"""LayerNorm and RMSNorm: torch's modules, each in one pass with the dropout and residual addition before it."""

from __future__ import annotations

import torch

from fastlm import ops


def _norm(module, op, parameters, x, eps, residual, options):
    """`op` over the last len(normalized_shape) dimensions of x."""
    if module.keep_dtype and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _norm(module, op, parameters, x, eps, residual, options)
    shape = module.normalized_shape
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"input: expected the last dimensions {shape}, as normalized_shape, got {tuple(x.shape)}")
    if len(shape) == 1:
        return op(x, *parameters, eps=eps, residual=residual, **options)
    flat, residual = x.flatten(-len(shape)), None if residual is None else residual.flatten(-len(shape))
    out = op(flat, *(None if p is None else p.flatten() for p in parameters), eps=eps, residual=residual, **options)
    return tuple(o.view(x.shape) for o in out) if isinstance(out, tuple) else out.view(x.shape)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm (arguments, state_dict, defaults) on `fastlm.ops.layer_norm`.

    Args beyond torch's:
        keep_dtype: under autocast the output keeps the input's dtype, so a low-precision residual stays low-precision.
            torch's module, and the default here, return float32 under CUDA autocast. Statistics are always float32.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        keep_dtype: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.keep_dtype = keep_dtype

    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        rng: torch.Tensor | None = None,
        site: int = 0,
        return_residual: bool = False,
        x_bias: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """LN(h) with h = residual + dropout(input), shaped like input; with `return_residual`, (LN(h), h).

        dropout_p is applied as given: the caller passes 0 in evaluation. The rest as in `fastlm.ops.layer_norm`.
        """
        options = {"dropout_p": dropout_p, "rng": rng, "site": site, "return_residual": return_residual}
        if x_bias is not None:
            options["x_bias"] = x_bias.flatten()
        return _norm(self, ops.layer_norm, (self.weight, self.bias), input, self.eps, residual, options)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm (arguments, state_dict, defaults) on `fastlm.ops.rms_norm`. keep_dtype: see `LayerNorm`."""

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
        *,
        keep_dtype: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.keep_dtype = keep_dtype

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        rng: torch.Tensor | None = None,
        site: int = 0,
        return_residual: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm(h) with h = residual + dropout(x). Arguments as of `LayerNorm.forward`."""
        # torch's default: the epsilon of the dtype of the statistics
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        options = {"dropout_p": dropout_p, "rng": rng, "site": site, "return_residual": return_residual}
        return _norm(self, ops.rms_norm, (self.weight,), x, eps, residual, options)
