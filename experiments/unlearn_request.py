"""Serve a deletion request: `clkit unlearn` as a script, the same code.

    python experiments/unlearn_request.py --run runs/first --request request.json --plan
    python experiments/unlearn_request.py --run runs/first --request request.json --method exact_replay

docs/unlearning.md says what a request is and what happens to it.
"""

from __future__ import annotations

import sys

from clkit.cli import main

if __name__ == "__main__":
    sys.exit(main(["unlearn", *sys.argv[1:]]))
