"""Noise search: more compute at inference time, spent where a verifier says that it is needed."""
