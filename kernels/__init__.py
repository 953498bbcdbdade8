"""Fused Triton kernels, one folder per operation.

`__init__.py` checks the arguments and chooses an implementation; `reference.py` is the reference in plain PyTorch,
`triton.py` has the kernels, and `operator.py`, if any, registers them for compilers and autograd.
"""

if __name__ == "kernels":
    # Not `fastgen.kernels`: Python was started in a checkout, and transformers or diffusers imports the Hugging Face
    # package `kernels`. Import that one instead of this folder.
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _elsewhere = [entry for entry in sys.path if os.path.abspath(entry) != _checkout]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        # The import system returns whatever module is in sys.modules after this file has run.
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    # Otherwise this stays an empty module without a version, which transformers treats as "not installed"; an error
    # here would reach the user.
