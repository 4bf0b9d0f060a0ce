"""Where text comes from: files read as a stream of documents.

| what                                   | documents                                                            |
|----------------------------------------|----------------------------------------------------------------------|
| `.jsonl`, `.ndjson`, `.json`           | the field "text" (`fields`) of each line                             |
| `.txt`, `.md`, `.rst`, `.text`         | by `documents`: the file, each line, or each block between blank lines |
| `.csv`, `.tsv`, `.parquet`, `.arrow`   | the column "text" (`fields`) of each row                             |
| `.gz`, `.zst` of these                 | as the file inside; read to its end before, and set aside where damaged |
| a directory                            | every such file in it, recursively, in the order of their paths      |
| a directory that `datasets` saved      | its rows, in its order; of one with several splits those of "train"  |
| a glob                                 | what it matches, sorted                                              |
| `-`, `-.jsonl`, `-.csv.gz`, ...        | standard input, in the format of the suffix; without one plain text  |
| `hf:owner/name?split=train`            | a dataset by name, see `fastlm.data.sources.hub`                     |
| a file of another name, named by itself | as plain text                                                       |

Inside a directory, what is hidden is skipped in silence; links to directories, what `prepare` wrote and the directories
of runs are skipped with an entry in the `Report`. The order is a function of the arguments and the file names alone. A
record that cannot be used (malformed JSON, bytes that are not UTF-8, a binary file) is entered in the `Report` with its
reason and place, and reading goes on. Parquet, Arrow and zstd need the extra `data`, a dataset by name `datasets`.
"""

from fastlm.data.sources.files import MANIFEST, RUN_FILES, TOKENIZER, SourceFile
from fastlm.data.sources.find import find_files, is_prepared
from fastlm.data.sources.reading import DOCUMENTS, FIELDS, Part, read_documents, split
from fastlm.data.sources.report import Report

__all__ = [
    "DOCUMENTS",
    "FIELDS",
    "MANIFEST",
    "RUN_FILES",
    "TOKENIZER",
    "Part",
    "Report",
    "SourceFile",
    "find_files",
    "is_prepared",
    "read_documents",
    "split",
]
