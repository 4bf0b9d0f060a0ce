"""linear_cross_entropy on a CPU: torch's matrix products and this backend's cross_entropy, chunk by chunk."""

from fastlm.ops._chunks import raw_ops
from fastlm.ops._cpu.cross_entropy import Losses

linear_cross_entropy_fwd, linear_cross_entropy_bwd = raw_ops(Losses)
