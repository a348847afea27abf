"""The routing report as one HTML file that needs no network: its questions, its switches, and the data inside.

`routing_page_data` says what is embedded (one script element of the type application/json with the id routing-data),
`routing_page_script` what is done with it. Source: ours; the questions are those of paper 1 (arXiv 2503.05029).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hf_moe_cpt.analysis.page_assets import CHART_CSS, NUM_COLORS, PAGE_CSS
from hf_moe_cpt.analysis.routing_page_data import page_data
from hf_moe_cpt.analysis.routing_page_drawing import DRAWING_JS
from hf_moe_cpt.analysis.routing_page_maps import MAPS_JS
from hf_moe_cpt.analysis.routing_page_script import CURVES_JS, SWITCHES_JS


ROUTING_PAGE_CSS = """
main{max-width:1120px}
.switches{position:sticky;top:0;z-index:2;background:var(--paper);border-bottom:1px solid var(--grid);padding:10px 0;
  display:flex;flex-wrap:wrap;gap:8px 22px;align-items:center;font-size:.9rem}
.switches label,.inline{display:inline-flex;gap:7px;align-items:center;font-size:.9rem}
#checkpoints{display:inline-flex;flex-wrap:wrap;gap:6px}
button,select,input{font:inherit;color:var(--ink);background:var(--paper);border:1px solid var(--grid);
  border-radius:6px;padding:3px 9px}
button{cursor:pointer}
button[aria-pressed=false]{opacity:.4;text-decoration:line-through}
#set-layer{padding:0;width:150px}
.dot{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px}
.lead,.how{max-width:95ch}
.how{color:var(--faint)}
.quiet{color:var(--faint);font-style:italic}
.drawing{margin:1em 0}
.chart .dots{stroke-width:5}
.chart .bar{stroke:none}
.chart .strong{font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin-left:64px;font-size:.82rem}
.legend span{display:inline-flex;align-items:center;gap:6px}
.stroke{display:inline-block;width:18px;border-top:3px solid}
.stroke.broken{border-top-style:dashed}
#summary th{white-space:normal;vertical-align:bottom;min-width:64px}
.heats{display:flex;flex-wrap:wrap;gap:14px 22px}
.heat{position:relative;margin:4px 0 10px}
.heat canvas{position:absolute;image-rendering:pixelated;outline:1px solid var(--grid);cursor:crosshair}
.heat svg.chart{max-width:none}
.scale{display:flex;gap:8px;align-items:center;font-size:.82rem;color:var(--faint);margin:.2em 0 1.2em}
.scale b{width:150px;height:11px;border:1px solid var(--grid)}
.scale em{font-style:normal;margin-left:10px}
#tokens .table{max-height:480px;overflow:auto}
#tokens td{white-space:normal;vertical-align:top}
#tokens th{position:sticky;top:0;background:var(--paper)}
#parallel td{white-space:normal}
#tip{z-index:3}
.token{display:inline-block;border:1px solid var(--grid);border-radius:5px;padding:0 6px;margin:1px 0;
  font:.85em ui-monospace,Menlo,Consolas,monospace}
.token b{font-weight:400;color:var(--faint)}
.terms dt{font-weight:600;margin-top:.5em}
.terms dd{margin:0;max-width:90ch}
""" + "".join(f".chart .b{i}{{fill:var(--c{i})}}i.b{i}{{background:var(--c{i})}}\n" for i in range(NUM_COLORS))

_SWITCHES = """
<div class="switches"><span id="checkpoints"></span>
<label>Text <select id="set-domain"></select></label>
<label>Layer <input type="range" id="set-layer" min="0" value="0"> <span class="layer-name"></span></label></div>
"""

_MEASURES = {
    "mri_normalized": "MRI × E/K",
    "mri": "MRI",
    "load_entropy": "entropy of the load",
    "load_cv": "variation of the load",
    "dead_experts": "dead experts",
    "router_entropy": "entropy of the router",
    "router_confidence": "confidence of the router",
}


def _select(name: str, label: str, options: Mapping[str, str]) -> str:
    items = "".join(f'<option value="{escape(key)}">{escape(text)}</option>' for key, text in options.items())
    return f'<p class="inline"><label>{label} <select id="set-{name}">{items}</select></label></p>'


# Heading, how to read it, switch of its own, ids of what is drawn.
_SECTIONS: Sequence[tuple[str, str, str, Sequence[str]]] = (
    (
        "What changed, in one look?",
        "One line for each checkpoint, means over the layers, on the text chosen above. MRI × E/K is how many times "
        "the mean load the busiest expert carries: 1 is perfect balance. 100 % in the column of same experts means "
        "that every token still visits the experts that it visited in the first checkpoint. Tokens and the last three "
        "columns are those of all text.",
        "",
        ("summary",),
    ),
    (
        "How evenly are the experts used, layer by layer?",
        "If each expert has its own device, a layer waits for its busiest expert, so the highest layers cost most "
        "time. The broken line is the ideal: a curve on it wastes nothing. Choose the text above: one that a model "
        "was not trained on usually lies higher.",
        _select("measure", "Measure", _MEASURES),
        ("balance",),
    ),
    (
        "Did the router recover when the data changed?",
        "The upright line marks the first step on the new data. A healthy router shows a short spike there and comes "
        "back to its level from before; how many steps that takes is marked too. One that stays above it keeps "
        "paying for the change.",
        _select("step", "Layer", {"mean": "mean over layers"}),
        ("training",),
    ),
    (
        "Do tokens still visit the same experts?",
        "Of the experts that a token visited in the first checkpoint, how many does it visit still (saturation)? "
        "At 100 % the router sends tokens where it always did; near chance, a layer has been reorganised. Layers that "
        "fell furthest are where a model changed most.",
        "",
        ("saturation",),
    ),
    (
        "Do token ids keep to their experts?",
        "For every token id there is one expert that it visited most often in the first checkpoint. Curves tell "
        "how often it goes there (vocabulary specialisation). High values mean that a layer routes by the word, "
        "low ones that it routes by context; a fall means that words were moved to other experts.",
        _select(
            "side", "Token", {"input": "input: the token that is read", "output": "output: the token that follows"}
        ),
        ("vocabulary",),
    ),
    (
        "Which experts work together, and did that change?",
        "A cell tells how many of the tokens of expert i visit expert j too. Blue pairs work together more often than "
        "chance would have it, orange ones avoid each other. The second row shows what changed, the curves how much "
        "in each layer. Layer is chosen above; the diagonal is left grey.",
        "",
        ("coactivation",),
    ),
    (
        "Which experts does each text use?",
        "A row is a kind of text, a cell the share of its tokens that visit an expert of the chosen layer. White is "
        "the share in perfect balance. An expert that is blue in one row and orange in the others has specialised on "
        "that text.",
        "",
        ("domains",),
    ),
    (
        "How much does each expert carry?",
        "Bars: the chosen layer. The broken line is the share of every expert in perfect balance; an expert without "
        "a bar is dead for this text. Below: every layer at once.",
        _select("order", "Order", {"number": "by number", "busiest": "busiest first"}),
        ("load", "load-map"),
    ),
    (
        "What does each expert like to read?",
        "The token ids of which the largest share goes to an expert of the chosen layer. ␣ is a space, ⏎ a new line. "
        "An expert whose tokens have nothing in common routes by something other than the word.",
        '<p class="inline"><label>Token <input id="set-token" type="search" placeholder="find a token"></label></p>',
        ("tokens",),
    ),
    (
        "What would uneven experts cost in a cluster?",
        "An estimate, not a measurement: experts are spread over ranks and every rank waits for the busiest one. The "
        "slowdown is the load of that rank over the mean, for experts in order of their number and for a placement "
        "that spreads busy ones (longest processing time first). Communication is not in it.",
        "",
        ("parallel",),
    ),
)

_TERMS = {
    "MoE layer, expert, K, E": "A layer with E small networks (experts), of which a router lets every token visit K.",
    "MRI": "Maximum routing imbalance: share of the tokens that visit the busiest expert, from K/E (balance) to 1. "
    "Times E/K it can be compared between models.",
    "Load": "Share of all visits in a layer that an expert gets; they add up to 1.",
    "Saturation": "Share of a token's K experts that an earlier checkpoint chose too, mean over tokens.",
    "Vocabulary specialisation": "Share of the visits of a token id to the expert it visited most often in the first "
    "checkpoint, averaged over {average}.",
    "Co-activation": "P(j | i): share of the tokens of expert i that also visit expert j.",
    "Dead expert": "One that no token of the text visits.",
}


def routing_page(analysis: Mapping[str, Any], title: str) -> str:
    """The page as text. analysis: the dictionary of `analyse_traces`."""
    data = page_data(analysis)
    embedded = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    sections = "".join(_section(*section) for section in _SECTIONS)
    script = f'"use strict";\nconst PALETTE = {NUM_COLORS};{DRAWING_JS}{CURVES_JS}{MAPS_JS}{SWITCHES_JS}'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CHART_CSS}{PAGE_CSS}{ROUTING_PAGE_CSS}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1><p class='lead'>{escape(_lead(analysis))}</p>{_SWITCHES}{sections}"
        f"{_footnotes(analysis, data['notes'])}</main>\n"
        f'<script type="application/json" id="routing-data">{embedded}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def _lead(analysis: Mapping[str, Any]) -> str:
    """What was compared, on what, and how to use the page."""
    checkpoints, layers = analysis["checkpoints"], analysis["layers"]
    shapes = sorted(
        {f"{layer['num_experts']} experts, {layer['experts_per_token']} for each token" for layer in layers}
    )
    tokens = min(checkpoint["num_tokens"] for checkpoint in checkpoints)
    what = f"{len(checkpoints)} checkpoints" if len(checkpoints) > 1 else "One checkpoint"
    texts = analysis["domains"]
    return (
        f"{what} of a mixture of experts ({len(layers)} MoE layers: {'; '.join(shapes)}) read the same "
        f"{tokens:,} tokens of {len(texts)} kind{'s' if len(texts) > 1 else ''} of text: {', '.join(texts)}. "
        f"Changes are told against the first, {checkpoints[0]['name']}. Point at a chart for its numbers; click on a "
        "checkpoint below to hide it."
    )


def _section(heading: str, how: str, switch: str, targets: Sequence[str]) -> str:
    drawings = "".join(f'<div class="drawing" id="{target}"></div>' for target in targets)
    return f'<section><h2>{escape(heading)}</h2><p class="how">{escape(how)}</p>{switch}{drawings}</section>\n'


def _footnotes(analysis: Mapping[str, Any], notes: Sequence[str]) -> str:
    averages = {part["average"] for part in (analysis.get("vocabulary_specialization") or {}).values()}
    words = {"occurrences": "occurrences of tokens", "ids": "token ids"}
    average = " and ".join(sorted(words.get(name, name) for name in averages)) or "token ids"
    terms = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v.format(average=average))}</dd>" for k, v in _TERMS.items())
    left_out = [*notes, *(f"{part}: {why}" for part, why in (analysis.get("skipped") or {}).items())]
    items = "".join(f"<li>{escape(note)}</li>" for note in left_out) or "<li>Nothing.</li>"
    return (
        f'<section><h2>What do the words mean?</h2><dl class="terms">{terms}</dl></section>'
        f'<section><h2>What is not on this page?</h2><ul id="left-out">{items}</ul></section>'
    )
