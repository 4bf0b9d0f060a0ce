"""The Triton column: from an op's arguments to kernels/<op>.py, one file a page. Importing a file imports triton."""
