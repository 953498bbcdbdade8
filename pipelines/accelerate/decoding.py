"""Decoding in parts: pictures of a batch one by one, or tiles of a large picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgen.pipelines.accelerate.part import Part, Undo

__all__ = ["VaeSlicing", "VaeTiling"]


class _Decoding(Part):
    """Sets a switch of the VAE."""

    def why_not(self, pipe: Any) -> str | None:
        kind = self.name.removeprefix("vae_")
        vae = getattr(pipe, "vae", None)
        if not hasattr(vae, f"enable_{kind}") or not hasattr(vae, f"use_{kind}"):
            return f"it has no VAE with {kind}"
        return "enabled already" if getattr(vae, f"use_{kind}") else None

    def enable(self, pipe: Any) -> Undo:
        kind, vae = self.name.removeprefix("vae_"), pipe.vae
        before = dict(vars(vae))
        getattr(vae, f"enable_{kind}")()
        changed = [name for name, value in vars(vae).items() if name not in before or before[name] is not value]

        def undo() -> None:
            for name in changed:
                if name in before:
                    setattr(vae, name, before[name])
                else:
                    delattr(vae, name)

        return undo


@dataclass(frozen=True)
class VaeSlicing(_Decoding):
    """The VAE decodes the pictures of a batch one by one: less memory."""

    name = "vae_slicing"
    loss = "exact"


@dataclass(frozen=True)
class VaeTiling(_Decoding):
    """The VAE decodes pictures above its tile size in tiles: less memory, other pixels near the borders of tiles."""

    name = "vae_tiling"
    loss = "lossy"
