"""The adapters of the backend "cuda": from an op's arguments to csrc/cuda/<op>.cu, one file per page."""
