# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Times the collection of residuals against Heretic's own, on the built-in refuser.

    python benchmarks/residuals.py [--prompts 256] [--repeats 3]

Both ways run on the same loaded model and the same prompts, of varying length, in one process, in turns; the
best of several repeats counts. The cache is not used.
"""

import argparse
import json
import sys

import torch
from measuring import best_times_in_turns

from heretic_contrast.builtin import DATA, refuser_pool
from heretic_contrast.hosts.loading import open_model
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.hosts.surface import from_heretic
from heretic_contrast.prompts import Prompt, load_pool


def main() -> None:
    """Prints both times, their ratio, and the largest difference of the results."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()

    from heretic.utils import Prompt as HereticPrompt

    flags = [f"--batch-size={arguments.batch_size}", "--response-prefix="]
    settings = load_settings(HostSettings, sys.argv[0], [*flags, "--model", str(DATA / "refuser")])
    heretic = open_model(settings)
    model = from_heretic(heretic, settings, arguments.batch_size)
    texts = [prompt.text for prompt in load_pool(refuser_pool("harmful", "train"), "harmful")]
    # Real pools hold prompts of one to several sentences: every fourth is made longer.
    texts = [
        " ".join(texts[index : index + (1, 1, 1, 5)[index % 4]])
        for index in range(arguments.prompts)
    ]
    ours = [Prompt(text) for text in texts]
    theirs = [HereticPrompt(system=settings.system_prompt, user=text) for text in texts]

    difference = (model.residuals(ours) - heretic.get_residuals_batched(theirs)).abs().max()
    ways = (lambda: heretic.get_residuals_batched(theirs), lambda: model.residuals(ours))
    their_seconds, our_seconds = best_times_in_turns(ways, arguments.repeats)
    result = {
        "seconds": {"Heretic": their_seconds, "ours": our_seconds},
        "Heretic / ours": their_seconds / our_seconds,
        "largest difference": float(difference),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
