"""The CUDA C++ column: from an op's arguments to csrc/cuda/<op>.cu, one file a page."""
