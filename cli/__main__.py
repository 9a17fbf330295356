"""``python -m cli``: the same as ``latentstore``; what ``torchrun -m cli`` starts."""

from __future__ import annotations

from cli.app import main

if __name__ == "__main__":
    main()
