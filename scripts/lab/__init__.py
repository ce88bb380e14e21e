"""The lab family: small language models trained on Python's own standard library."""
