"""An auxiliary loss on the caption: its state at every word.

"A red circle left of a blue star" requires that colours are bound to their nouns and both nouns to the relation. The
loss on image tokens alone does not teach that: in 300,000 pictures, next-token prediction stayed on a plateau where
the model knows both colours and guesses which belongs to which object. A linear head on an early layer predicts the
state of the caption at each word. So the binding has its own loss, and every image token can attend to the last word
as a summary. The head is not exported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastgen.data.captions import COUNT_WORDS
from fastgen.data.shapes import COLORS, SHAPES

_RELATION_WORDS = {"left": 1, "right": 2, "above": 3, "over": 3, "below": 4, "under": 4}

#: The state of a caption at each word, with the number of classes; 0 means "nothing yet".
FIELDS: dict[str, int] = {
    "noun": 1 + len(SHAPES),
    "color": 1 + len(COLORS),
    "first_noun": 1 + len(SHAPES),
    "first_color": 1 + len(COLORS),
    "relation": 5,
    "count": 1 + len(COUNT_WORDS),
}


class CaptionReader:
    """Labels of tokenised captions.

    Args:
        tokenizer: a word-level tokenizer of ShapesWorld.
    """

    def __init__(self, tokenizer: Any) -> None:
        known = tokenizer.get_vocab()
        meanings = {
            "shape": {word: i + 1 for i, shape in enumerate(SHAPES) for word in (shape, f"{shape}s", f"{shape}es")},
            "color": {color: i + 1 for i, color in enumerate(COLORS)},
            "relation": _RELATION_WORDS,
            "count": {word: i + 1 for i, word in enumerate(COUNT_WORDS.values())},
        }
        size = max(known.values()) + 1
        self.tables = {kind: torch.zeros(size, dtype=torch.int64) for kind in meanings}
        for kind, words in meanings.items():
            for word, value in words.items():
                if word in known:
                    self.tables[kind][known[word]] = value

    def labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The state of each prefix of a caption.

        Args:
            input_ids: int64 [n, L].

        Returns:
            int64 [n, L, 6], one column for each of `FIELDS`: the last noun so far and its colour, the first noun and
            its colour, the relation, the number.
        """
        n, length = input_ids.shape
        words = {kind: table[input_ids] for kind, table in self.tables.items()}
        state = {name: torch.zeros(n, dtype=torch.int64) for name in FIELDS}
        pending, rows = torch.zeros(n, dtype=torch.int64), []
        for place in range(length):
            shape = words["shape"][:, place]
            is_noun, is_first = shape > 0, (shape > 0) & (state["first_noun"] == 0)
            for name, value, where in (
                ("noun", shape, is_noun),
                ("color", pending, is_noun),
                ("first_noun", shape, is_first),
                ("first_color", pending, is_first),
                ("relation", words["relation"][:, place], words["relation"][:, place] > 0),
                ("count", words["count"][:, place], words["count"][:, place] > 0),
            ):
                state[name] = torch.where(where, value, state[name])
            pending = words["color"][:, place]
            rows.append(torch.stack(list(state.values()), dim=1))
        return torch.stack(rows, dim=1)


class CaptionHead(torch.nn.Module):
    """Linear prediction of the caption's state from hidden states of width `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width, elementwise_affine=False)
        self.linear = torch.nn.Linear(width, sum(FIELDS.values()))

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean over words of the cross-entropy, summed over fields.

        Args:
            hidden: [n, L, width].
            labels: int64 [n, L, 6] of `CaptionReader.labels`.
            mask: [n, L], nonzero where there is a word.
        """
        logits = self.linear(self.norm(hidden)).float().flatten(0, 1).split(list(FIELDS.values()), dim=-1)
        weights = mask.flatten().to(logits[0].dtype)
        losses = torch.stack(
            [
                F.cross_entropy(part, target, reduction="none")
                for part, target in zip(logits, labels.flatten(0, 1).unbind(1), strict=True)
            ]
        )
        return (losses.sum(dim=0) * weights).sum() / weights.sum().clamp(min=1)
