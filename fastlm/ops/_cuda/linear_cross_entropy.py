"""linear_cross_entropy on CUDA: torch's products and this column's cross_entropy, chunk by chunk."""

from fastlm.ops._chunks import raw_ops
from fastlm.ops._cuda.cross_entropy import Losses

# cuBLAS wants leading dimensions on 16 bytes for its fast kernels, whatever the vocabulary: rows on whole cache lines.
linear_cross_entropy_fwd, linear_cross_entropy_bwd = raw_ops(Losses, row_bytes=128)
