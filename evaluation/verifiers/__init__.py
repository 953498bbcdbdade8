"""Verifiers: scores of pictures for their prompts, which noise search maximises and reports quote.

`fastgen.evaluation.verifiers.names.load_verifier` makes one from its name.
"""
