"""linear_cross_entropy on CUDA: torch's matrix products and this backend's cross_entropy, chunk by chunk."""

from fastlm.ops._chunks import raw_ops
from fastlm.ops._cuda.cross_entropy import Losses

# The fast kernels of cuBLAS need leading dimensions of whole 16 bytes. Where a row is padded, to whole cache lines.
linear_cross_entropy_fwd, linear_cross_entropy_bwd = raw_ops(Losses, row_bytes=128)
