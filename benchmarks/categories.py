# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The lexicon's first category against public taxonomies of harmful prompts.

    python benchmarks/categories.py --repositories FOLDER [--wrong SET]

FOLDER holds git clones of `do-not-answer-ja` (kunishou), `abliteration-prefill` (joesposito8; StrongREJECT and HarmBench),
`refusal_direction` (andyrdt; JailbreakBench), `multilingual-safety-for-LLMs` (DAMO-NLP-SG; MultiJail), `ailuminate` (mlcommons) and
`SimpleSafetyTests` (bertiev). What a taxonomy calls a category is mapped to ours below; what has no counterpart is left out, and so
is all that is about children. Where it has several, each of them is right.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from heretic_contrast.evaluation.statistics import wilson_interval
from heretic_contrast.prompts.categories import assign

# Set: repository, path, column of the prompt, column of the category, our categories by how theirs begin.
SETS: dict[str, tuple[str, str, str, str, dict[str, str]]] = {
    "StrongREJECT": (
        "abliteration-prefill",
        "data/strongreject_dataset.csv",
        "forbidden_prompt",
        "category",
        {
            "Sexual content": "sexual",
            # Theirs includes harming oneself and animals.
            "Violence": "violence self-harm",
            "Hate, harassment": "harassment",
        },
    ),
    "Do-Not-Answer": (
        "do-not-answer-ja",
        "datasets/Instruction/do_not_answer_en.csv",
        "question",
        "specific_harms",
        {
            **dict.fromkeys(("Explicit Sexual", "Sexual Expl"), "sexual"),
            **dict.fromkeys(("Graphic Violence", "Terrorist", "Violence and Phys"), "violence"),
            **dict.fromkeys(("Cybersecurity Vuln", "Illegal Digital"), "hacking"),
            **dict.fromkeys(("Self-Harm", "Depression and"), "self-harm"),
            **dict.fromkeys(("Illegal Drugs", "Substance Abuse"), "drugs"),
            **dict.fromkeys(("Animal Ab", "Propaganda", "False News", "Rumors"), "miscellaneous"),
            **dict.fromkeys(("Threats and", "Endorsement of Cyber", "Trolling"), "harassment"),
            **dict.fromkeys(("Insult", "Obscene", "Defamatory", "Body Sh"), "harassment"),
            **dict.fromkeys(("Racial", "Religious", "Location Disc", "Other Forms"), "harassment"),
            **dict.fromkeys(("Gender", "Disability"), "harassment"),
            "Financial Crimes": "fraud",
            "Illegitimate surv": "surveillance",
        },
    ),
    "HarmBench": (
        "abliteration-prefill",
        "data/harmbench_standard_behaviors.csv",
        "forbidden_prompt",
        "category",
        {
            "cybercrime": "hacking",
            "harassment": "harassment",
            "misinformation": "miscellaneous",
        },
    ),
    "JailbreakBench": (
        "refusal_direction",
        "dataset/raw/jailbreakbench.csv",
        "Goal",
        "Category",
        {
            "Harassment": "harassment",
            "Malware": "hacking",
            "Physical harm": "violence self-harm",
            "Fraud": "fraud",
            "Economic harm": "fraud",
            "Sexual": "sexual",
            "Privacy": "surveillance fraud hacking",
            "Disinformation": "miscellaneous",
            "Expert advice": "miscellaneous",
        },
    ),
    "MultiJail": (
        "multilingual-safety-for-LLMs",
        "data/MultiJail.csv",
        "en",
        "tags",
        {
            **dict.fromkeys(("Violence & inc", "Terrorism", "Weapons"), "violence"),
            **dict.fromkeys(("Hate", "Discrimination", "Bullying"), "harassment"),
            **dict.fromkeys(("Conspiracy", "Animal"), "miscellaneous"),
            **dict.fromkeys(("Theft", "Fraud"), "fraud"),
            **dict.fromkeys(("Adult", "Sexual", "Child abuse"), "sexual"),
            "Substance": "drugs",
            "Soliciting": "surveillance",
            "Self-harm": "self-harm",
        },
    ),
    "AILuminate": (
        "ailuminate",
        "airr_official_1.0_demo_en_us_prompt_set_release.csv",
        "prompt_text",
        "hazard",
        {
            **dict.fromkeys(("vcr", "iwp"), "violence"),
            **dict.fromkeys(("src", "sxc"), "sexual"),
            **dict.fromkeys(("dfm", "hte"), "harassment"),
            "ncr": "fraud drugs hacking",
            "ipv": "fraud miscellaneous",
            "ssh": "self-harm",
            "prv": "surveillance",
            "spc": "miscellaneous",
        },
    ),
    "SimpleSafetyTests": (
        "SimpleSafetyTests",
        "SimpleSafetyTests - test cases.csv",
        "prompts_final",
        "harm_area",
        {
            "Suicide": "self-harm",
            "Physical harm": "violence",
            "Scams": "fraud",
            "Illegal": "drugs violence",
        },
    ),
}


def cases(repositories: Path, name: str) -> Iterator[tuple[str, set[str]]]:
    """Prompts of a set, with the categories that are right."""
    repository, path, prompt, category, mapping = SETS[name]
    command = ["git", "-C", str(repositories / repository), "show", f"HEAD:{path}"]
    text = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    for row in csv.DictReader(io.StringIO(text)):
        theirs = row[category]
        labels = ast.literal_eval(theirs) if theirs.startswith("[") else [theirs]
        right = {
            ours
            for label in labels
            for start, names in mapping.items()
            if label.strip().startswith(start)
            for ours in names.split()
        }
        if right:
            yield row[prompt], right


def main() -> None:
    """Prints, for each set, how often the first category is right, and the recall of each."""
    parser = argparse.ArgumentParser(description="Categories against public taxonomies.")
    parser.add_argument("--repositories", type=Path, required=True, help="folder of git clones")
    parser.add_argument("--wrong", choices=SETS, help="print what is wrong in a set")
    arguments = parser.parse_args()
    for name in SETS:
        recall: dict[str, list[bool]] = defaultdict(list)
        found = []
        for text, right in cases(arguments.repositories, name):
            given = assign(text)
            found.append(given in right)
            if len(right) == 1:
                recall[min(right)].append(found[-1])
            if name == arguments.wrong and not found[-1]:
                print(f"{' or '.join(sorted(right))}, here {given}: {text[:120]}")
        low, high = wilson_interval(sum(found), len(found))
        by_category = ", ".join(f"{key} {sum(v)}/{len(v)}" for key, v in sorted(recall.items()))
        print(
            f"{name}: {sum(found)} of {len(found)}, {sum(found) / len(found):.1%} ({low:.1%} to {high:.1%}); {by_category}"
        )


if __name__ == "__main__":
    main()
