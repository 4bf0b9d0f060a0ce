"""Labelled examples: rows of files in, encoded examples out, for fine-tuning.

    records = read_records(["reviews.csv"], report, plain="class")
    train, held = hold_out(len(records.rows), 0.1, 0, [record.values["label"] for record in records.rows])

records -> columns -> examples, a file each. What a task makes of a row is the task's (fastlm.tasks).
"""

from fastlm.data.labelled.columns import choose_columns, text_of
from fastlm.data.labelled.examples import Examples, Ragged, hold_out
from fastlm.data.labelled.records import PLAIN, Record, Records, read_records, saved_splits, stream_records

__all__ = [
    "PLAIN",
    "Examples",
    "Ragged",
    "Record",
    "Records",
    "choose_columns",
    "hold_out",
    "read_records",
    "saved_splits",
    "stream_records",
    "text_of",
]
