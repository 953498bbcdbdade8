"""GenEval, the FID family, verifiers, reports and benchmarks."""

from fastgen._compat import repair_torchvision

repair_torchvision()  # before the first import of transformers, diffusers, torchmetrics or open_clip
