"""Cleaning of documents: rules that change a text or drop it, each counted and named.

    cleaner = Cleaner(Cleaning(repair=True, filters=("gopher", "c4")))
    text, rule = cleaner(text, ordinal=17, place="a.txt:3")   # (text, None), or (None, the rule that dropped it)
    cleaner.report.as_dict()

Every rule is a function of the document alone. So the result does not depend on the number of processes, and reports of
parts merge into that of the whole. Duplicates depend on other documents: `fastlm.data.duplicates`.
"""

from fastlm.data.cleaning.cleaner import Cleaner, Cleaning
from fastlm.data.cleaning.report import CleaningReport
from fastlm.data.cleaning.tidy import VERSION, clean_documents, clean_text, tidied

__all__ = ["VERSION", "Cleaner", "Cleaning", "CleaningReport", "clean_documents", "clean_text", "tidied"]
