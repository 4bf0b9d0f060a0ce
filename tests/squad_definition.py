"""SQuAD 2.0's exact match and F1 of a question, written from the definition and apart from fastlm's."""

import re
import string


def official(predicted, right):
    """(exact, F1) by the definition: tokens are matched one by one."""

    def tokens(text):
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return [word for word in re.split(r"\s+", re.sub(r"\b(?:a|an|the)\b", " ", kept)) if word]

    golds = [answer for answer in right if tokens(answer)] or [""]
    exact, best = 0.0, 0.0
    for gold in golds:
        theirs, ours = tokens(gold), tokens(predicted)
        exact = max(exact, float(" ".join(theirs) == " ".join(ours)))
        rest, same = list(theirs), 0
        for word in ours:
            if word in rest:
                rest.remove(word)
                same += 1
        if not theirs or not ours:
            value = float(theirs == ours)
        elif not same:
            value = 0.0
        else:
            precision, recall = same / len(ours), same / len(theirs)
            value = 2 * precision * recall / (precision + recall)
        best = max(best, value)
    return exact, best
