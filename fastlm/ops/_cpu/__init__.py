"""The adapters of the backend "cpu": from an op's arguments to csrc/cpu/<op>.cpp, one file per page."""
