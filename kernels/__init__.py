"""Fused Triton kernels, one folder an operation.

The package checks the arguments and chooses an implementation; `reference.py` is the specification in plain PyTorch,
`triton.py` holds the kernels and, where it is large, `operator.py` what compilers and autograd need.
"""

if __name__ == "kernels":
    # Not `fastgen.kernels`: Python started in a checkout, and somebody (transformers, diffusers) asked for the Hugging
    # Face package of that name. This folder must not be mistaken for it, so it steps aside.
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _elsewhere = [entry for entry in sys.path if os.path.abspath(entry) != _checkout]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        # The import system returns the module that is in sys.modules after this file has run.
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    # Otherwise this stays a module with no version and no content, which transformers takes for "not installed"; an
    # error here would reach the user.
