"""How well a pretrained model predicts a text: `evaluate(model, data)`, and `fastlm evaluate`.

    gpt2   perplexity and bits per byte, in windows that overlap       fastlm/evaluate/causal.py
    bert   pseudo-perplexity, each token masked alone                  fastlm/evaluate/masked.py
    t5     loss of span corruption                                     fastlm/evaluate/spans.py

Text is read as `fastlm prepare` reads it. It is not cleaned, but white space at the ends of a document is dropped, as
there. Sequences are packed back to back; no padding is computed.
"""

from fastlm.evaluate._evaluate import describe, evaluate

__all__ = ["describe", "evaluate"]
