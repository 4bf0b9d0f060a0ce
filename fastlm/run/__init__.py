"""A run and its directory.

recipe        what a run is: task, model, data, training
directory     who may write into it, where a run in it starts, the data in it
checkpoint    writing, finding and reading checkpoints
metrics       metrics.jsonl and loss.png
progress      what a person sees meanwhile
"""
