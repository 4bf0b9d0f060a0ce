"""The adapters of the backend "triton": from an op's arguments to kernels/<op>.py, one file per page.

Importing one of the files imports triton.
"""
