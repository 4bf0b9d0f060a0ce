"""The CPU C++ column: from an op's arguments to csrc/cpu/<op>.cpp, one file a page."""
