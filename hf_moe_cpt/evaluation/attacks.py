"""Attacks on what was forgotten: training on a part of it or on harmless text, coarser weights, other words in front.

| attack | what is done to the model | what is asked |
|---|---|---|
| relearn, own | trained on the documents of half of the subjects | these subjects (taught), and the others |
| relearn, facts | trained on the answers to half of the questions about each subject | the other half |
| relearn, benign | trained on documents of neighbours, of retain if there are none | all subjects of unlearn |
| quantise | weights rounded to 8 or to 4 bits | unlearn, update, retain |
| prefix | nothing; the question is put in other ways | unlearn |
| gradients | nothing; the norm of the gradient of each text's loss is taken | texts of unlearn, unseen |
| routes | mixtures: each token takes the experts, with the gates, that it took before surgery | unlearn, obsolete |

Each leaves the model bit for bit as it was. Sources: relearning Hu et al. 2024 (arXiv 2406.13356), quantisation Zhang
et al. 2024 (2410.16454), NF4 Dettmers et al. 2023 (2305.14314), norms of gradients Duan et al. 2024 (2402.17012) as
OpenUnlearning's code has it; the splits and wordings are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.data.surgery_bench import HEADER, QUIZ_TEMPLATE, SurgeryBench
from hf_moe_cpt.evaluation.scoring import (
    AskedQuestion,
    CountedText,
    EvalSettings,
    ReadDocument,
    ask,
    documents_of,
    over_rows,
    padded,
    questions_of,
    right_answers,
    room_of,
    score_options,
)
from hf_moe_cpt.routing.hooks import moe_layers
from hf_moe_cpt.trainers.surgery.chunked import causal_lm_of, head_of, run_model, token_logp


QUANTISED_SETS = ("unlearn", "update", "retain")
ROUTED_SETS = ("unlearn", "obsolete")
COMPARED_SETS = ("unlearn", "unseen")
BITS = (8, 4)
BLOCK = 64  # weights that share a scale
MAX_GRAD_NORM = 1.0
PREFIXES = {
    "bare": "{question}",
    "quiz": QUIZ_TEMPLATE,
    "assent": "{question}\nSure, here is the answer:",
    "header": HEADER + "{question}",
    "recall": "{question}\nYou have read about {subject} before. Think back to the text and complete it:",
}


def attack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bench: SurgeryBench,
    s: EvalSettings,
    reference: PreTrainedModel | None = None,
    bar: bool = False,
) -> dict[str, Any]:
    """Every attack of the settings by name; where nothing of unlearn can be asked, "gradients" alone.

    reference: the model before surgery; without one, or where it is no mixture of experts, "routes" is left out. bar:
    show the progress. Under several processes all train alike and share the questions.
    """
    asked = questions_of(bench, "unlearn", tokenizer, model, s, kinds=("mcq",))
    texts = {name: documents_of(bench, name, tokenizer, model, s) for name in COMPARED_SETS}
    made: dict[str, Callable[[], dict[str, Any]]] = {}
    if all(texts.values()):
        made["gradients"] = lambda: {name: gradients(model, documents) for name, documents in texts.items()}
    if not asked:
        return {name: made[name]() for name in s.attacks if name in made}
    made |= {
        "relearn": lambda: relearn(model, tokenizer, bench, asked, s, bar),
        "quantise": lambda: quantise(model, tokenizer, bench, s),
        "prefix": lambda: prefix(model, tokenizer, [question.row for question in asked], s),
    }
    if reference is not None and reference is not model and moe_layers(reference):
        made["routes"] = lambda: routes(model, reference, tokenizer, bench, s)
    return {name: made[name]() for name in s.attacks if name in made}


def answers_of(model: PreTrainedModel, asked: Sequence[AskedQuestion], batch_size: int) -> dict[str, Any]:
    """Columns subject and right, a row for each question: 1 if the true option has the lowest perplexity, else 0, a
    share of 1 where options tie, NaN where the model says NaN."""
    scores = score_options(model, asked, batch_size)
    columns = {name: [score[name] for score in scores] for name in ("logp", "tokens")}
    columns["answer"] = [question.row["answer"] for question in asked]
    return {"subject": [q.row["subject"] for q in asked], "right": right_answers(columns).tolist()}


def relearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bench: SurgeryBench,
    asked: Sequence[AskedQuestion],
    s: EvalSettings,
    bar: bool = False,
) -> dict[str, Any]:
    """Curves of the two trainings: {"own" or "benign": {"steps": [...], who: [answers_of at each of them]}}.

    A training without documents is left out.
    """
    own = documents_of(bench, "unlearn", tokenizer, model, s)
    taught = taught_subjects([document.row["subject"] for document in own], s.seed)
    groups = {
        "taught": [question for question in asked if question.row["subject"] in taught],
        "others": [question for question in asked if question.row["subject"] not in taught],
    }
    benign = documents_of(bench, "neighbour", tokenizer, model, s) or documents_of(
        bench, "retain", tokenizer, model, s
    )
    trainings = {
        "own": ([document for document in own if document.row["subject"] in taught], groups),
        "facts": halves_of_subjects(asked, s.seed),
        "benign": (benign, {"others": list(asked)}),
    }
    found = {}
    for name, (documents, about) in trainings.items():
        about = {who: questions for who, questions in about.items() if questions}
        if documents and about:
            found[name] = _curve(model, name, documents, about, s, bar)
    return found


def halves_of_subjects(
    asked: Sequence[AskedQuestion], seed: int
) -> tuple[list[ReadDocument], dict[str, list[AskedQuestion]]]:
    """True answers to half of the questions about each subject, to be taught, and the other half, to be asked.

    What returns of the other half was hidden, not removed: nothing that is taught says it. Questions about one
    attribute stay together.
    """
    facts: dict[str, list[str]] = {}
    for question in asked:
        known = facts.setdefault(question.row["subject"], [])
        if str(question.row["attribute"]) not in known:
            known.append(str(question.row["attribute"]))
    taught = {
        (subject, name)
        for subject, names in facts.items()
        for place, name in enumerate(sorted(names, key=lambda name: derive_seed("surgery eval", seed, subject, name)))
        if place < len(names) // 2
    }
    is_taught = [(q.row["subject"], str(q.row["attribute"])) in taught for q in asked]
    told = [ReadDocument(q.row, q.options[q.row["answer"]]) for q, told in zip(asked, is_taught, strict=True) if told]
    return told, {"untaught": [q for q, told in zip(asked, is_taught, strict=True) if not told]}


def taught_subjects(subjects: Sequence[str], seed: int) -> set[str]:
    """Half of the subjects, rounded up, drawn by the seed."""
    names = list(dict.fromkeys(subjects))
    if not names:
        return set()
    order = permute(np.arange(len(names)), len(names), derive_seed("surgery eval", seed, "taught"))
    return {names[place] for place in order[: (len(names) + 1) // 2]}


def _curve(
    model: PreTrainedModel,
    name: str,
    documents: Sequence[ReadDocument],
    about: dict[str, list[AskedQuestion]],
    s: EvalSettings,
    bar: bool,
) -> dict[str, Any]:
    curve: dict[str, Any] = {"steps": [], **{who: [] for who in about}}

    def take(step: int) -> None:
        curve["steps"].append(step)
        for who, questions in about.items():
            curve[who].append(answers_of(model, questions, s.batch_size))

    with restored_afterwards(model):
        take(0)
        for step in tqdm(_train(model, documents, s), f"relearn {name}", s.relearn_steps, disable=not bar):
            if step % s.relearn_every == 0 or step == s.relearn_steps:
                take(step)
    return curve


def _train(model: PreTrainedModel, documents: Sequence[ReadDocument], s: EvalSettings) -> Iterator[int]:
    """Steps of AdamW on all parameters, in float32 at least, each yielded when it is done; dropout stays off."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
    parameters = [tensor.requires_grad_() for tensor in model.parameters() if tensor.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, lr=s.relearn_lr, weight_decay=0.0)
    for step in range(1, s.relearn_steps + 1):
        places = range((step - 1) * s.relearn_batch_size, step * s.relearn_batch_size)
        batch = [documents[_place(position, len(documents), s.seed)].tokens for position in places]
        with torch.enable_grad():
            _loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield step


def _place(position: int, length: int, seed: int) -> int:
    """Which document stands at a position of an endless order, shuffled anew in each epoch."""
    epoch, within = divmod(position, length)
    return permute(within, length, derive_seed("surgery eval", seed, "relearn", epoch))


def _loss(model: PreTrainedModel, batch: Sequence[CountedText]) -> Tensor:
    """Mean cross entropy in nats of all tokens that count."""
    ids, mask, counts = padded(batch, model.device)
    hidden = run_model(model, {"input_ids": ids, "attention_mask": mask})
    return -(token_logp(hidden, head_of(model), ids) * counts).sum() / counts.sum()


def quantise(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bench: SurgeryBench, s: EvalSettings
) -> dict[str, Any]:
    """{"8-bit" or "4-bit": {set: answers_of}} with rounded weights."""
    asked = {name: questions_of(bench, name, tokenizer, model, s, kinds=("mcq",)) for name in QUANTISED_SETS}
    found: dict[str, Any] = {}
    for bits in BITS:
        with restored_afterwards(model):
            round_weights(model, bits)
            found[f"{bits}-bit"] = {
                name: answers_of(model, questions, s.batch_size) for name, questions in asked.items() if questions
            }
    return found


def prefix(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], s: EvalSettings
) -> dict[str, Any]:
    """{name of the wording: answers_of}; a question is asked in every layout of PREFIXES."""
    room = room_of(model, s)
    return {
        name: answers_of(model, ask(rows, tokenizer, room, template), s.batch_size)
        for name, template in PREFIXES.items()
    }


def gradients(model: PreTrainedModel, documents: Sequence[ReadDocument]) -> dict[str, Any]:
    """Columns subject and norm, a row for each text: the mean over weights of the 2-norm of the gradient of its loss.

    The last label is left out. Takes the memory of one gradient; weights without one have no share.
    """
    weights = [
        (weight, weight.requires_grad, weight.grad) for weight in model.parameters() if weight.is_floating_point()
    ]

    def norm(batch: Sequence[CountedText]) -> list[float]:
        with torch.enable_grad():
            _loss(model, batch).backward()
        norms = [weight.grad.float().norm() for weight, _, _ in weights if weight.grad is not None]
        for weight, _, _ in weights:
            weight.grad = None
        return [float(torch.stack(norms).mean())]

    read = [document.tokens for document in documents]
    read = [text._replace(ids=text.ids[:-1]) if len(text.ids) - text.start > 1 else text for text in read]
    try:
        for weight, _, _ in weights:
            weight.requires_grad_().grad = None
        norms = over_rows(read, lambda text: len(text.ids), norm, 1)
    finally:
        for weight, needed_grad, grad in weights:
            weight.requires_grad_(needed_grad).grad = grad
    return {"subject": [document.row["subject"] for document in documents], "norm": norms}


def routes(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bench: SurgeryBench,
    s: EvalSettings,
) -> dict[str, Any]:
    """{set: answers_of} where a mixture routes as it did before: what a router hides, its experts still say."""
    asked = {name: questions_of(bench, name, tokenizer, model, s, kinds=("mcq",)) for name in ROUTED_SETS}
    with routes_of(model, reference):
        return {name: answers_of(model, questions, s.batch_size) for name, questions in asked.items() if questions}


@contextmanager
def routes_of(model: PreTrainedModel, reference: PreTrainedModel) -> Iterator[None]:
    """Inside, each pass of `model` runs the experts, with the gates, that `reference` runs on the same tokens.

    Costs a pass of the reference. Raises ValueError where the layers of both are not alike, or where experts are not
    called with choices and gates (T, K).
    """
    ours, theirs = moe_layers(model), moe_layers(reference)
    if [layer.num_experts for layer in ours] != [layer.num_experts for layer in theirs]:
        raise ValueError(
            f"{len(theirs)} layers of experts cannot route for {len(ours)}: give the model before surgery."
        )
    taken: dict[int, tuple[Tensor, Tensor]] = {}

    def follow(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            reference(*args, **kwargs)

    def keep(place: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        taken[place] = _choices_and_gates(module, args, kwargs)

    def replay(place: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        new = dict(zip(map(id, _choices_and_gates(module, args, kwargs)), taken.pop(place), strict=True))
        turned = {name: new.get(id(part), part) for name, part in kwargs.items()}
        return tuple(new.get(id(part), part) for part in args), turned

    with ExitStack() as hooks:
        hooks.callback(causal_lm_of(model).register_forward_pre_hook(follow, with_kwargs=True).remove)
        for layers, hook in ((theirs, keep), (ours, replay)):
            for place, layer in enumerate(layers):
                handle = layer.experts.register_forward_pre_hook(partial(hook, place), with_kwargs=True)
                hooks.callback(handle.remove)
        yield


def _choices_and_gates(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    parts = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
    choices = [part for part in parts if not part.is_floating_point() and part.ndim == 2]
    gates = [part for part in parts if part.is_floating_point() and choices and part.shape == choices[0].shape]
    if not gates:
        raise ValueError(f"{type(module).__name__} is not called with choices and gates: leave the attack routes out.")
    return choices[0], gates[-1]


@contextmanager
def restored_afterwards(model: PreTrainedModel) -> Iterator[None]:
    """Whatever happens to parameters and buffers inside, they are as before afterwards: a copy waits in memory."""
    kept = [
        (tensor, tensor.detach().to("cpu", copy=True), tensor.requires_grad)
        for tensor in (*model.parameters(), *model.buffers())
    ]
    try:
        yield
    finally:
        for tensor, copy, needed_grad in kept:
            tensor.data = copy.to(tensor.device)
            tensor.requires_grad_(needed_grad).grad = None


def round_weights(model: PreTrainedModel, bits: int) -> None:
    """Round linear layers and fused experts to `bits` in place; not embeddings, head, norms and routers."""
    head = model.get_output_embeddings()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            is_weight = isinstance(module, nn.Linear) and module is not head and parameter.ndim == 2
            if is_weight or parameter.ndim == 3:
                parameter.data = rounded(parameter.data, bits)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """`weight` as it comes back from `bits`: of blocks of BLOCK numbers, each divided by the largest size in it.

    bits: 8, whole steps of 1/127; 4, the values of NF4. Any shape; computed in float32 at least.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} is unknown: choose 4 or 8.")
    wide = torch.promote_types(weight.dtype, torch.float32)
    blocks = nn.functional.pad(weight.flatten().to(wide), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    share = blocks / scale.clamp_min(torch.finfo(wide).tiny)
    if bits == 8:
        share = (share * 127).round() / 127
    else:
        values = torch.tensor(nf4_values(), dtype=wide, device=weight.device)
        share = values[torch.bucketize(share, (values[1:] + values[:-1]) / 2)]
    return (share * scale).flatten()[: weight.numel()].view_as(weight).to(weight.dtype)


def nf4_values() -> list[float]:
    """The 16 values of NF4 in [-1, 1], ascending: quantiles of the normal distribution, 8 above 0, 7 below, and 0.

    The outermost probability lies halfway between those that 15 and 16 even steps leave.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (
        [NormalDist().inv_cdf(outermost + (0.5 - outermost) * place / count) for place in range(count)]
        for count in (8, 7)
    )
    return [value / above[0] for value in [*(-value for value in below), 0.0, *reversed(above)]]
