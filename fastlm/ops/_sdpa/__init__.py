"""torch's fused attention as a backend: a function of the page's arguments in plain torch, without a raw op."""
