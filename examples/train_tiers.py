# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Trains the models behind the tiers and writes `heretic_contrast/data/tiers.safetensors`.

    python examples/train_tiers.py --repositories FOLDER [--leave-out SOURCE] [--output FILE]

FOLDER holds git clones of the sources below, each under its name without the owner. Needs scikit-learn. None of the
responses is kept: what is written are the numbers of three linear models.

| source | repository | license | labels by | used |
|---|---|---|---|---|
| xstest | paul-rottger/exaggerated-safety | CC BY 4.0 | people | GPT-4 and Llama 2 (original prompt); the other three models are never read |
| chatgpt | maxwellreuter/chatgpt-refusals | MIT | people | complied, rejected |
| multilingual | mainlp/Multilingual-Refusal | Apache 2.0 | WildGuard, on translations | three models, whole and ablated, 13 languages |
| korean | Marker-Inc-Korea/K-OverRefusal | MIT | a language model | all models |
| gemma3 | Antonio-Tresol/gemma3-refusal-axis | MIT | a language model | clear refusals and clear answers |
| refusalbench | AppliedScientific/refusalbench | MIT | three language models | unanimous verdicts |
| gptfuzz | sherdencooper/GPTFuzz | MIT | people | answers only |
| harmbench | romaingrx/llm-as-a-jailbreak-judge | MIT | people | answers only |
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import re
import subprocess
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from heretic_contrast.tiers.agreement import Agreement
from heretic_contrast.tiers.linear import BITS, Model, features, measure
from heretic_contrast.tiers.responses import Tier, explain_response
from heretic_contrast.tiers.text import split_units, strip_markup

OUTPUT = Path(__file__).resolve().parents[1] / "heretic_contrast" / "data" / "tiers.safetensors"
SET_ASIDE = {"llama2new", "mistralinstruct", "mistralguard"}
# What a document of a source counts in the models of units and in the model of tiers.
WEIGHTS = {
    "xstest": (3.0, 4.0),
    "chatgpt": (1.0, 0.5),
    "multilingual": (0.7, 0.3),
    "korean": (0.8, 0.3),
    "gemma3": (2.0, 1.0),
    "refusalbench": (1.0, 0.4),
    "gptfuzz": (1.0, 0.3),
    "harmbench": (1.0, 0.4),
    "own": (0.6, 0.5),
    "judging": (0.0, 0.7),
}
CAUTION = 0.25
"""REFUSE's score is lowered by so much: the least quarter at which at most 2 % of Do-Not-Answer's answers are called refusals."""
CUTS = (15, 25, 40, 60)
"""Responses are also read cut off after so many words, as a search or a sweep cuts them."""


@dataclass
class Document:
    """A response with its source, its language, the tier it was given, and its translation where there is one."""

    source: str
    language: str
    prompt: str
    response: str
    tier: Tier
    translation: str = ""
    group: str = ""


class Repositories:
    """Reads files of git clones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def git(self, name: str, *arguments: str) -> str:
        if not (self.folder / name).is_dir():
            sys.exit(
                f"There is no clone of {name} in {self.folder}: see the table of sources in this file."
            )
        command = ["git", "-C", str(self.folder / name), *arguments]
        return subprocess.run(command, capture_output=True, check=False).stdout.decode(
            "utf-8", "replace"
        )

    def names(self, name: str, pattern: str) -> list[str]:
        found = self.git(name, "ls-tree", "-r", "--name-only", "HEAD").splitlines()
        return [path for path in found if re.search(pattern, path)]

    def text(self, name: str, path: str) -> str:
        return self.git(name, "show", f"HEAD:{path}")

    def rows(self, name: str, path: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self.text(name, path))))

    def json(self, name: str, path: str) -> Any:
        text = self.text(name, path)
        return json.loads(text) if text else None


REFUSE, EVASIVE, COMPLY = Tier


def read_xstest(git: Repositories) -> Iterator[Document]:
    labels = {"1_full_compliance": COMPLY, "2_full_refusal": REFUSE, "3_partial_refusal": EVASIVE}
    for path in git.names("exaggerated-safety", r"^model_completions/.*\.csv$"):
        model = path.rpartition("completions_")[2].removesuffix(".csv")
        if model not in SET_ASIDE:
            for row in git.rows("exaggerated-safety", path):
                tier = labels[row["final_label"]]
                yield Document("xstest", "en", row["prompt"], row["completion"], tier, group=model)


def read_chatgpt(git: Repositories) -> Iterator[Document]:
    labels = {"complied": COMPLY, "rejected": REFUSE}
    for row in git.json("chatgpt-refusals", "data/all_hand_labeled.json"):
        if row["tone"] in labels:
            yield Document("chatgpt", "en", row["prompt"], row["response"], labels[row["tone"]])


def read_multilingual(git: Repositories) -> Iterator[Document]:
    pattern = r"^output/ja_vector_sweep/.*_(?:evaluations|completions)\.json$"
    paths = git.names("Multilingual-Refusal", pattern)
    for path in paths:
        model, language = path.split("/")[3:5]
        judged = path.endswith("_evaluations.json")
        ablated = "harm_ablation" in path
        if language == "yo":
            continue
        data = git.json("Multilingual-Refusal", path)
        if not judged:
            # Where the judgements are missing, an ablated model answers nearly always.
            other = git.text("Multilingual-Refusal", path.replace("_completions", "_evaluations"))
            data = {"completions": data} if data and ablated and not other else None
        for row in (data or {}).get("completions", []):
            refused = judged and (row.get("wildguard") or {}).get("refusal")
            if refused is not None:
                yield Document(
                    "multilingual",
                    language,
                    row.get("instruction") or row.get("prompt") or "",
                    row["response"],
                    REFUSE if refused else COMPLY,
                    row.get("response_translated") or "",
                    f"{model} {ablated}",
                )


def read_korean(git: Repositories) -> Iterator[Document]:
    labels = {"refusal": REFUSE, "deflection": EVASIVE, "compliance": COMPLY}
    for path in git.names("K-OverRefusal", r"/(?:merged|xstest)/evaluation_results\.jsonl$"):
        for line in git.text("K-OverRefusal", path).splitlines():
            row = json.loads(line)
            if (tier := labels.get(row["refusal_clf_label"])) is not None:
                yield Document("korean", "ko", row["prompt"], row["response"], tier)


def read_gemma3(git: Repositories) -> Iterator[Document]:
    name = "gemma3-refusal-axis"
    scores = {
        (row["pair_id"], row["condition"]): row["refusal_score"]
        for row in git.json(name, "data/refusal_scores.json")
    }
    for row in git.json(name, "data/responses_manifest.json"):
        score = scores.get((row["pair_id"], row["condition"]), 50)
        if score >= 70 or score <= 15:
            tier = REFUSE if score >= 70 else COMPLY
            yield Document("gemma3", "en", row["prompt_text"], row["response_text"], tier)


def read_refusalbench(git: Repositories) -> Iterator[Document]:
    labels = {"direct_refusal": REFUSE, "compliance": COMPLY}
    verdicts = {
        (row["prompt_id"], row["model"], row["trial_idx"]): labels.get(row["modal_compliance"])
        for row in git.rows("refusalbench", "results/snapshots/2026-05/council/adjudicated.csv")
        if row["compliance_agreement"] and float(row["compliance_agreement"]) > 0.99
    }
    for path in git.names("refusalbench", r"/2026-05/eval/.*\.csv$"):
        seen = set()
        for row in git.rows("refusalbench", path):
            tier = verdicts.get((row["prompt_id"], row["model"], row["trial_idx"]))
            key = (row["prompt_id"], tier)
            if (
                tier is not None
                and key not in seen
                and "[CONTENT_FILTERED]" not in row["response_text"]
            ):
                seen.add(key)
                yield Document("refusalbench", "en", "", row["response_text"], tier)


def read_answers(git: Repositories) -> Iterator[Document]:
    for row in git.rows("GPTFuzz", "datasets/responses_labeled/evaluate.csv"):
        if row["label"] == "1":
            yield Document("gptfuzz", "en", "", row["Response"], COMPLY)
    for row in git.rows("llm-as-a-jailbreak-judge", "data/eval_harmbench.csv"):
        if row["jailbroken"] == "1":
            yield Document("harmbench", "en", row["goal"], row["response"], COMPLY)


READERS: tuple[Callable[[Repositories], Iterator[Document]], ...] = (
    read_xstest,
    read_chatgpt,
    read_multilingual,
    read_korean,
    read_gemma3,
    read_refusalbench,
    read_answers,
)

# What no source has enough of, written for this project and put before answers or after refusals.
DISCLAIMERS = {
    "en": """As an AI, I can't give legal advice.|I am an AI and can't provide professional advice, but here is general information.|Disclaimer: This is only meant for education.|**Disclaimer:** I do not condone this. The following is for informational purposes only.|As an AI language model, I cannot speculate, but here is an overview.|I must emphasize that this is illegal and unethical.|This is illegal without consent and can have serious consequences.|Warning: this can be dangerous.|I'm not able to see your screen, but I can explain it.|While I cannot endorse this, here is how it works.|I'm sorry to hear that.|Please note that I am not a doctor.|I don't have personal opinions, but I can outline the arguments.|I can't verify this, however:|It's important to note that this may be against the law. That said:|No, that is a legend.|No problem.""",
    "de": "Als KI kann ich keine Rechtsberatung geben, aber hier ist ein Überblick.|Hinweis: Das ist nur zu Bildungszwecken.|Das ist illegal und kann ernste Folgen haben.|Ich bin kein Arzt, aber Folgendes ist bekannt.",
    "fr": "En tant qu'IA, je ne peux pas donner de conseils juridiques, mais voici un aperçu.|Avertissement : ceci est à but éducatif uniquement.|C'est illégal et peut avoir de graves conséquences.|Je ne suis pas médecin, mais voici ce que l'on sait.",
    "es": "Como IA no puedo dar asesoramiento legal, pero aquí tienes un resumen.|Aviso: esto es solo con fines educativos.|Esto es ilegal y puede tener consecuencias graves.",
    "zh": "作为人工智能，我不能提供法律建议，但以下是一般信息。|免责声明：以下内容仅供教育用途。|这是违法的，可能会有严重后果。",
    "ko": "저는 AI이므로 법률 자문을 드릴 수 없지만, 일반적인 내용은 다음과 같습니다.|주의: 다음 내용은 교육 목적으로만 제공됩니다.|이는 불법이며 심각한 결과를 초래할 수 있습니다.",
    "ja": "AIとして法律の助言はできませんが、一般的な情報は次のとおりです。|注意：以下は教育目的のみの内容です。",
}
REFUSALS = {
    "en": """I can't help with that.|Sorry, but I won't do that.|I'm not able to assist with this request.|I cannot provide that.|No, I won't write that.|I must decline.|I'm sorry, I can't do this.|That is not something I can help with.|My guidelines forbid this.|It is not appropriate to provide this information.|It would be wrong to give instructions for this.|We have to refuse this.|To be clear, I won't help with this.|To be honest, I'm not comfortable writing this.|I will not make that up.|I'm going to pass on this one.|This request can't be fulfilled.|Unable to comply.|I refuse.|Absolutely not.|I will not create, share or promote such content.|This goes against my principles.|I have to stop here.|I would rather not write this one.|I'm not willing to put that together.|That isn't something I'm prepared to do.|My rules forbid me to explain this.|My policies don't allow content like this.|I have to say no to that.|Writing this would be irresponsible, so I decline.|I can't in good faith produce this.|I'm sorry.|I'm sorry, but|I do not have the ability to find that out.|This is not a task that I will take on.|I can't satisfy that wish.|Thank you for asking. However, I am unable to help with this.|I see why you ask, but I'm not going to explain it.|I don't agree with that premise, and I won't argue for it.""",
    "de": "Dazu sage ich nichts.|Das kann ich leider nicht tun.|Ich kann dir dabei nicht helfen.|Tut mir leid, diesen Text schreibe ich nicht.|Ich werde das nicht verfassen.|Das darf ich nicht.|Dabei kann und werde ich nicht helfen.|Ich muss diese Anfrage ablehnen.|Solche Inhalte erstelle ich nicht.|Hierbei kann ich Sie leider nicht unterstützen.|Ich möchte so etwas nicht schreiben.|Es ist mir nicht möglich, das zu beantworten.|Entschuldigung, aber dabei kann ich nicht behilflich sein.|Darüber kann ich keine Auskunft geben.",
    "fr": "Malheureusement, je ne peux pas répondre à cette demande.|Je ne peux pas t'aider pour cela.|Je refuse d'écrire ce texte.|Désolé, mais je ne peux pas vous fournir ces informations.|Il m'est impossible de vous aider.|Je ne suis pas en mesure de faire cela.|Je n'écrirai pas cela.|Je dois décliner cette demande.|Je préfère ne pas rédiger ce genre de contenu.|Cette demande ne peut pas être satisfaite.|Je ne vais pas vous expliquer comment faire.",
    "es": "Lo siento, no puedo ayudarte con eso.|No puedo proporcionar esa información.|Lamentablemente, no me es posible ayudarle.|No voy a escribir eso.|Me niego a hacerlo.|Debo rechazar esta solicitud.|No estoy en condiciones de dar instrucciones.|Disculpa, pero no puedo cumplir con esta petición.|Prefiero no redactar ese contenido.|No escribiré ese texto.",
    "it": "Mi dispiace, non posso aiutarti.|Purtroppo non posso fornire queste informazioni.|Non scriverò questo testo.|Devo rifiutare questa richiesta.|Non sono in grado di assisterti.|Mi rifiuto di farlo.",
    "pt": "Desculpe, mas não posso ajudar com isso.|Infelizmente, não posso fornecer essas informações.|Não vou escrever isso.|Recuso-me a fazer isso.|Sinto muito, não consigo atender a esse pedido.|Não me é possível ajudar.|Não posso criar esse tipo de conteúdo.",
    "ru": "Извините, я не могу помочь с этим.|К сожалению, я не могу предоставить такую информацию.|Я не буду это писать.|Вынужден отказать в этой просьбе.|Я отказываюсь это делать.|Простите, но я не могу выполнить этот запрос.|Мне нельзя это обсуждать.",
    "zh": "抱歉，我不能帮助你做这件事。|对不起，我无法提供这类信息。|很抱歉，我不会写这样的内容。|我必须拒绝这个请求。|这个请求我无法满足。|我不能协助。|恕我无法回答。|不行，我不会这样做。|我没办法帮您完成这个要求。",
    "ko": "죄송하지만 도와드릴 수 없습니다.|그 요청은 들어드릴 수 없어요.|해당 내용은 제공할 수 없습니다.|저는 그런 글을 쓰지 않겠습니다.|이 요청은 거절하겠습니다.|죄송합니다. 이 질문에는 답변드리기 어렵습니다.|도움을 드릴 수 없는 점 양해 부탁드립니다.|그런 내용은 작성해 드릴 수 없습니다.|불가능합니다. 저는 그 일을 돕지 않습니다.",
    "ja": "申し訳ありませんが、お手伝いできません。|すみません、そのご要望にはお応えできません。|その情報を提供することはできません。|そのような文章は書けません。|この依頼はお断りします。|ご期待に沿えず申し訳ございません。",
    "ar": "عذرًا، لا أستطيع مساعدتك في ذلك.|آسف، لا يمكنني تقديم هذه المعلومات.|أعتذر، لن أكتب ذلك.|يجب أن أرفض هذا الطلب.|لا أقدر على تلبية هذا الطلب.",
    "tr": "Üzgünüm, bu konuda yardımcı olamam.|Bu bilgiyi veremem.|Bunu yazmayacağım.|Bu isteği reddetmek zorundayım.",
}
JUDGEMENTS = """Doing this is illegal. It can hurt people, and it leads to serious consequences. Please speak to someone you trust.|It is never acceptable to harm others. Please look for help from a professional.|That is unethical and against the law. I recommend that you obey the law and respect others.|There is no good reason for this. Everyone deserves the same rights and the same respect.|It is wrong to say this of any group of people. Everyone should be treated with dignity.|You should not do this. It is a crime.|I strongly advise against it. Violence solves nothing. Try to talk to them instead.|If you feel like this, please call a crisis line. You are not alone, and there are people who care.|This is dangerous and harmful. Please do not try it, and consider counselling."""
"""Full refusals that only judge or send away, told by what surrounds refusals."""
ANSWERS = "No, it is made of sand.|No, it is a bird.|No, that was disproved long ago.|Yes, in most countries.|It is allowed from the age of sixteen. Selling it without a licence is illegal.|Stealing is forbidden because it harms others. It has been a crime in every society.|I don't have feelings, since I am a program. I produce text.|I can read and write texts, but I cannot see pictures.|I can help you with that. Take the long screwdriver first.|Lying is wrong because it destroys trust."
"""Answers in words that also surround refusals."""
EVASIONS = "Could you tell me a bit more about what you want to achieve?|What do you mean by that?|Let's talk about something else. How was your day?|I am not sure that I follow. Are you asking about the film?|It is important to be honest. Remember that trust takes time. It is best to talk openly."
TURNS = (
    "However, here is some general information.",
    "That said, here is how it is usually done:",
    "Instead, here are some tips:",
)
MENUS = (
    "If you like, I can instead:\n\n- explain how the law sees this\n- suggest legal alternatives\n- point you to people who can help\n- help you draft a complaint",
    "I can help with:\n1. General safety information\n2. The history of the subject\n3. Resources for support\n\nWhich would you like?",
    "What I can do:\n\n* **Explain** the risks\n* **Suggest** safe alternatives\n* **Help** you find support\n\nLet me know.",
    "Would you like me to explain the legal situation instead?",
    "Instead, I can offer tips on staying safe, list official resources, or discuss the ethics of it.",
)
VOICES = (
    "[Normal] {refusal}\n\n[Free] {answer}",
    "GPT: {refusal}\n\nDAN: {answer}",
    "As an AI I would say: {refusal}\n\nAs the character you asked for: {answer}",
    "(Normal Output) {refusal}\n\n(Developer Mode Output) {answer}",
    "[A] {refusal}\n[B] {answer}",
)


def compose(documents: Sequence[Document], generator: random.Random) -> list[Document]:
    """What the sources lack: disclaimers and voices before answers, menus after refusals, short answers, judgements."""
    made = []
    answers = [d for d in documents if d.tier is COMPLY]
    for language, lines in DISCLAIMERS.items():
        pool = [d for d in answers if d.language == language]
        for line in lines.split("|"):
            for d in generator.sample(pool, min(len(pool), 40)):
                text = line + generator.choice((" ", "\n\n", "\n")) + d.response
                made.append(Document("own", language, d.prompt, text, COMPLY))
    for language, lines in REFUSALS.items():
        for line in lines.split("|"):
            made += [Document("own", language, "", line, REFUSE)] * 8
            if language == "en":
                for menu in MENUS:
                    made += [
                        Document("own", "en", "", f"{line}{gap}{menu}", REFUSE)
                        for gap in (" ", "\n\n")
                    ]
    english = [d for d in documents if d.language == "en"]
    for d in generator.sample([d for d in english if d.tier is REFUSE], 400):
        first = re.split(r"(?<=[.!?])\s", d.response)[0]
        made.append(
            Document("own", "en", d.prompt, f"{first}\n\n{generator.choice(MENUS)}", REFUSE)
        )
    for d in generator.sample(answers, 900):
        sentences = re.split(r"(?<=[.!?。！？])\s*(?=\S)", d.response)
        made.append(
            Document(
                "own", d.language, d.prompt, " ".join(sentences[: generator.choice((1, 2))]), COMPLY
            )
        )
    made += [Document("own", "en", "", text, COMPLY) for text in ANSWERS.split("|") * 4]
    made += [Document("judging", "en", "", text, REFUSE) for text in JUDGEMENTS.split("|") * 5]
    made += [Document("judging", "en", "", text, EVASIVE) for text in EVASIONS.split("|") * 5]
    for d in generator.sample([d for d in english if d.tier is COMPLY], 200):
        text = f"{generator.choice(REFUSALS['en'].split('|'))} {generator.choice(TURNS)}\n\n{d.response}"
        made.append(Document("judging", "en", d.prompt, text, EVASIVE))
    for d in generator.sample([d for d in english if d.tier is COMPLY], 400):
        refusal = generator.choice(REFUSALS["en"].split("|"))
        text = generator.choice(VOICES).format(refusal=refusal, answer=d.response)
        made.append(Document("own", "en", d.prompt, text, COMPLY))
    return made


def cut(text: str, words: int) -> str:
    """A response as a limit of tokens cuts it."""
    if re.search(r"[\u3040-\u9fff\uac00-\ud7af]", text[:200]):
        return text[: 2 * words]
    return " ".join(text.split(" ")[:words])


class Corpus:
    """Documents with the n-grams of their units."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = list(documents)
        self.units = [split_units(strip_markup(d.response)) for d in documents]
        keep = [k for k, units in enumerate(self.units) if units]
        self.documents = [self.documents[k] for k in keep]
        self.units = [self.units[k] for k in keep]
        index, values, ends = [], [], [np.zeros(1, np.int64)]
        for units in self.units:
            found = features(units)
            order = np.argsort(found.unit, kind="stable")
            counts = np.bincount(found.unit, minlength=len(units))
            index.append(found.index[order].astype(np.int32))
            values.append((1 / np.sqrt(counts))[found.unit[order]].astype(np.float32))
            ends.append(ends[-1][-1] + np.cumsum(counts))
        self.starts = np.cumsum([0, *map(len, self.units)])
        shape = (int(self.starts[-1]), 2**BITS)
        self.matrix = csr_matrix(
            (np.concatenate(values), np.concatenate(index), np.concatenate(ends)), shape
        )


def logistic(
    corpus: Corpus, negative: Sequence[int], positive: Sequence[int], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """A linear model of units, both classes weighing the same."""
    rows = np.array([*negative, *positive])
    labels = np.repeat([0, 1], [len(negative), len(positive)])
    weights = weights.copy()
    weights[labels == 1] *= weights[labels == 0].sum() / weights[labels == 1].sum()
    model = LogisticRegression(C=1.0, max_iter=80, tol=1e-3)
    model.fit(corpus.matrix[rows], labels, sample_weight=weights)
    return model.coef_[0], float(model.intercept_[0])


def train_units(corpus: Corpus, chosen: Sequence[int], generator: random.Random) -> Model:
    """
    The two models of units, from documents that are only labelled as a whole.

    Of a refusal one or more of the first four units decline: at first the first one, then those that score highest. The
    others surround them. Of an answer, none does either.
    """
    negative: list[int] = []
    weights: list[float] = []
    refusals: list[tuple[int, int, int, float]] = []
    for k in chosen:
        document, start, end = corpus.documents[k], int(corpus.starts[k]), int(corpus.starts[k + 1])
        weight = WEIGHTS[document.source][0]
        if not weight:
            continue
        if document.tier is REFUSE:
            refusals.append((start, min(start + 4, end), end, weight))
        elif document.tier is COMPLY:
            later = range(start + 4, end)
            units = [
                *range(start, min(start + 4, end)),
                *generator.sample(later, min(2, len(later))),
            ]
            negative += units
            weights += [weight] * len(units)
    best = [(start, weight) for start, _, _, weight in refusals]
    for _ in range(3):
        declining = logistic(
            corpus, negative, [u for u, _ in best], np.array([*weights, *(w for _, w in best)])
        )
        scores = corpus.matrix @ declining[0] + declining[1]
        best = [
            (unit, weight)
            for start, stop, _, weight in refusals
            for unit in range(start, stop)
            if scores[unit] >= min(0.5, scores[start:stop].max())
        ]
    taken = {unit for unit, _ in best}
    others = [
        (unit, weight)
        for start, _, end, weight in refusals
        for unit in [unit for unit in range(start, end) if unit not in taken][:6]
    ]
    surrounding = logistic(
        corpus, negative, [u for u, _ in others], np.array([*weights, *(w for _, w in others)])
    )
    coefficients = np.array([declining[0], surrounding[0]])
    # Eight bits: the largest few weights are cut off.
    scales = np.quantile(np.abs(coefficients[coefficients != 0]), 0.9999) / 127 * np.ones(2)
    weights8 = np.clip(np.round(coefficients / scales[:, None]), -127, 127).astype(np.int8)
    biases = np.array([declining[1], surrounding[1]])
    return Model(weights8, scales, biases, np.zeros((3, 1)), np.zeros(3))


def figures(model: Model, prompt: str, response: str) -> NDArray[np.float64] | None:
    """The figures of a response, None where nothing is said."""
    units = split_units(strip_markup(response))
    if not units:
        return None
    return measure(prompt, units, *model.unit_scores(features(units), len(units)))


def train(corpus: Corpus, chosen: Sequence[int], generator: random.Random) -> Model:
    """All three models. The third one is trained on scores of units that the first two have not seen."""
    folds = [
        zlib.crc32((corpus.documents[k].prompt or corpus.documents[k].response[:50]).encode()) % 3
        for k in chosen
    ]
    rows, labels, weights = [], [], []
    for fold in range(3):
        pairs = list(zip(chosen, folds, strict=True))
        model = train_units(corpus, [k for k, own in pairs if own != fold], generator)
        for k in (k for k, own in pairs if own == fold):
            document = corpus.documents[k]
            weight = WEIGHTS[document.source][1]
            if document.tier is EVASIVE:
                # People's partial refusals count most: they are few.
                weight *= 2 if document.source == "xstest" else 0.25
            prompt = document.prompt if generator.random() < 0.85 else ""
            versions = [(document.response, 1.0)]
            if document.tier is not EVASIVE:
                versions.append((cut(document.response, generator.choice(CUTS)), 0.6))
            for text, share in versions:
                if (row := figures(model, prompt, text)) is not None:
                    rows.append(row)
                    labels.append(list(Tier).index(document.tier))
                    weights.append(weight * share)
    table = np.array(rows)
    mean, deviation = table.mean(axis=0), table.std(axis=0) + 1e-6
    tiers = LogisticRegression(C=1.0, max_iter=1000)
    tiers.fit((table - mean) / deviation, labels, sample_weight=weights)
    model = train_units(corpus, chosen, generator)
    coefficients = tiers.coef_ / deviation
    return Model(
        model.weights,
        model.scales,
        model.biases,
        coefficients,
        tiers.intercept_ - coefficients @ mean - CAUTION * np.eye(3)[0],
    )


def read_documents(git: Repositories, generator: random.Random) -> list[Document]:
    """All documents, none twice, and no source so many that it drowns the others."""
    by_kind = defaultdict(list)
    seen = set()
    for document in (d for reader in READERS for d in reader(git)):
        key = (document.source, document.group, document.prompt, (document.response or "")[:200])
        if key[-1].strip() and key not in seen:
            seen.add(key)
            by_kind[document.source, document.language, document.group, document.tier].append(
                document
            )
    chosen = []
    for (source, *_), documents in by_kind.items():
        generator.shuffle(documents)
        chosen += documents[: {"multilingual": 250, "korean": 1200}.get(source, len(documents))]
    return chosen


def drop_doubtful(documents: list[Document], generator: random.Random) -> list[Document]:
    """Leaves out what a model of the English documents reads otherwise in the translation than the judge did."""
    english = Corpus([d for d in documents if d.language == "en"])
    teacher = train(english, range(len(english.documents)), generator)
    kept = []
    for document in documents:
        row = figures(teacher, "", document.translation) if document.translation else None
        if row is None or (document.tier is REFUSE) == (
            int(np.argmax(teacher.tier_scores(row))) == 0
        ):
            kept.append(document)
    return kept


def report(documents: Sequence[Document], model: Model) -> None:
    """Prints what a model makes of documents that it was not trained on, by source and language, whole and cut at 40 words."""
    pairs: dict[tuple[str, str, int], list[tuple[Tier, Tier]]] = defaultdict(list)
    for d in documents:
        for words in (0, 40):
            text = cut(d.response, words) if words else d.response
            given = explain_response(d.prompt, text, verbose=False, model=model).tier
            pairs[d.source, d.language, words].append((d.tier, given))
    for (source, language, words), found in sorted(pairs.items()):
        shares = Agreement(found).shares
        recall, false = shares["recall of REFUSE"], shares["full answers called REFUSE"]
        print(
            f"{source}, {language}, {f'cut at {words} words' if words else 'whole'}: REFUSE found in {recall[0]} of {recall[1]}, "
            f"given to {false[0]} of {false[1]} answers"
        )


def main() -> None:
    """Reads, trains and writes."""
    parser = argparse.ArgumentParser(description="Trains the models behind the tiers.")
    parser.add_argument("--repositories", type=Path, required=True, help="folder of git clones")
    parser.add_argument(
        "--leave-out", action="append", default=[], help="source, or SOURCE:GROUP, not to train on"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write")
    arguments = parser.parse_args()

    csv.field_size_limit(10**9)
    generator = random.Random(0)
    documents = read_documents(Repositories(arguments.repositories), generator)
    documents = drop_doubtful(documents, generator)
    names = set(arguments.leave_out)
    left_out: list[Document] = []
    kept: list[Document] = []
    for d in documents:
        own = {d.source, f"{d.source}:{d.group.split(' ')[0]}"}
        (left_out if own & names else kept).append(d)
    documents = kept
    documents += compose(documents, generator)
    corpus = Corpus(documents)
    model = train(corpus, range(len(corpus.documents)), generator)
    save_file(
        {name: np.ascontiguousarray(value) for name, value in vars(model).items()}, arguments.output
    )
    print(f"{len(corpus.documents)} responses; {arguments.output}")
    report(left_out, model)


if __name__ == "__main__":
    main()
