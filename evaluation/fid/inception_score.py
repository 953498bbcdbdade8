"""The inception score of class logits (arXiv:1606.03498)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def inception_score(
    features: Tensor,
    to_logits: Callable[[Tensor], Tensor] | None = None,
    *,
    split_size: int | None = None,
    splits: int | None = None,
    shuffle_seed: int | None = None,
) -> tuple[float, float]:
    """Mean and standard deviation over parts of exp(mean KL of the class probabilities to their mean).

    Args:
        features: [n, d], or the logits [n, classes] themselves.
        to_logits: features -> logits [n, classes]; called for one part at a time.
        split_size: images in a part, the last one has the remainder (ADM: 5000); or
        splits: number of equal parts (torch-fidelity: 10).
        shuffle_seed: of the order before the split, drawn as torch-fidelity draws it; None keeps the order.

    Raises:
        ValueError: neither or both of `split_size` and `splits`, or no image in a part.
    """
    n = len(features)
    if (split_size is None) == (splits is None):
        raise ValueError("inception score: needs split_size or splits, and not both")
    if split_size is not None:
        bounds = [*range(0, n, split_size), n] if n else [0]
    else:
        bounds = [i * n // splits for i in range(splits + 1)] if splits else [0]
    parts = list(zip(bounds[:-1], bounds[1:], strict=True))
    if not parts or any(stop <= start for start, stop in parts):
        raise ValueError(f"inception score: {n} images are too few for the split")
    order = None if shuffle_seed is None else torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(n))
    scores = []
    for start, stop in parts:
        part = features[start:stop] if order is None else features[order[start:stop].to(features.device)]
        log_p = (part if to_logits is None else to_logits(part)).double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(stop - start)  # finite where every probability underflows
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    found = torch.tensor(scores, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))
