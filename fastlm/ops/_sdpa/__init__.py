"""The backend "sdpa": torch's fused attention, a plain torch function of the op's arguments, without a raw op."""
