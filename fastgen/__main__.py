"""`python -m fastgen`, also under `torchrun -m` and `accelerate launch -m`."""

from __future__ import annotations

if __name__ == "__main__":
    from fastgen.cli.main import main

    main()
