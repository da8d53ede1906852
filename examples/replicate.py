# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Measures which of the paper's claims appear on a model, and writes the replication report.

    python examples/replicate.py measure --model builtin:refuser --sweep SWEEP.json --output docs/replication/refuser.json
    python examples/replicate.py measure --model PATH --prompts FILE.jsonl --sweep SWEEP.json --name NAME --output docs/replication/NAME.json
    python examples/replicate.py report --results docs/replication --output docs/replication.md

An interrupted measurement resumes with the same command.
"""

import sys

if __name__ == "__main__":
    try:
        # Importing takes seconds.
        from replication.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()
