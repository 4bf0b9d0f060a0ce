"""flash-attn, as of August 2026, with its Triton norms and loss. Imported when a peer first runs."""

from __future__ import annotations

from importlib import import_module

from fastlm.bench.peers._peer import Loss, Peer, loss_peer, refuse


def _norm(name):
    def call(x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
        norm = getattr(import_module("flash_attn.ops.triton.layer_norm"), name)
        fused = residual is not None or dropout_p > 0  # else h is x itself
        out = norm(x, weight, bias, residual=residual, eps=eps, dropout_p=dropout_p, prenorm=fused)
        return out if fused else (out, x)

    return call


@loss_peer
def _cross_entropy(logits, target, loss: Loss):
    refuse(weight=loss.weight)
    losses, _ = import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss(
        logits,
        target,
        label_smoothing=loss.label_smoothing,
        lse_square_scale=loss.z_loss,
        ignore_index=loss.ignore_index,
        inplace_backward=loss.inplace,
    )
    return loss.reduce(losses, target)


def _attention(q, k, v, *, site=0, **options):
    """options: dropout_p, softmax_scale, causal, window_size and packed lengths, by the library's own names."""
    library = import_module("flash_attn")
    if "cache_seqlens" in options:
        return library.flash_attn_with_kvcache(q, k, v, **options)
    function = library.flash_attn_varlen_func if "cu_seqlens_q" in options else library.flash_attn_func
    return function(q, k, v, **options)


def _adapt_attention(inputs, options):
    """Packed rows and caches as they are."""
    inputs = dict(inputs)
    refuse(key_mask=inputs.pop("key_mask"), relative_bias=inputs.pop("table"))
    if "cache_seqlens" in inputs:
        refuse(cu_seqlens_q=inputs.get("cu_seqlens_q"))
    inputs.pop("rng")
    return inputs, options, None


PEERS = {
    "layer_norm": {"flash_attn": Peer(_norm("layer_norm_fn"), cuda=True)},
    "rms_norm": {"flash_attn": Peer(_norm("rms_norm_fn"), cuda=True)},
    "cross_entropy": {"flash_attn": Peer(_cross_entropy, cuda=True)},
    "attention": {"flash_attn": Peer(_attention, _adapt_attention, cuda=True)},
}
