# SPDX-License-Identifier: Apache-2.0
"""`report.html`: a model's description as one page for people. No scripts, no fonts, no requests: it can be mailed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from transforms.findings import findings
from transforms.recall import searched_with
from transforms.svg import Chart, number

Json = Mapping[str, Any]


def html(model: Json) -> str:
    """The page about one model.

    Args:
      model: the content of its `model.json`, with `quality`.
    """
    quality, told = model["quality"], model["provenance"]
    name = escape(model["model_id"])
    method = f"{told.get('index_description', model['model_definition']['name'])}, {model['space_type']}"
    lead = f"{method}, dimension {model['dimension']}, {model['data_type']}"
    parts = [
        f'<header><p class="state {escape(model["state"])}">{escape(model["state"])}</p><h1>{name}</h1>',
        f"<p>{escape(lead)}</p>",
        f"<p>{escape(model['description'])}</p>" if model.get("description") else "",
        f'<p class="failure">{escape(model["error"])}</p>' if model.get("error") else "",
        "</header>",
        _figures(quality, told),
        _said(quality),
        '<main class="charts">',
        *(chart for chart in _charts(quality) if chart),
        "</main>",
        _facts(model),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">{_SAFE}'
    head += f"<title>{name}</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _figures(quality: Json, told: Json) -> str:
    at, memory, vectors = quality["at"], quality["memory"], quality["vectors"]
    figures = [
        (f"{share:.2f}", f"recall@{k} to expect", f"± {2 * at['standard_error'][k]:.2f}, {searched_with(at)}")
        for k, share in at["expected"].items()
    ]
    figures += [
        (
            _bytes(memory["vectors_bytes"]),
            "memory of an index",
            f"{memory['bytes_per_vector']:.0f} bytes a vector, and {_bytes(memory['segment_bytes'])} a segment",
        ),
        (
            _count(vectors["trained"]),
            "vectors trained on",
            f"of {_count(vectors['source'])} in {told.get('source', '')}",
        ),
    ]
    if "lists" in quality:
        lists = quality["lists"]
        note = f"{lists['empty']:,} empty, the largest holds {lists['largest']:.1%}"
        figures.insert(-1, (f"{lists['imbalance_factor']:.2f}", "imbalance of the lists", note))
    cells = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span><small>{escape(note)}</small></div>"
        for value, label, note in figures
    )
    return f'<section class="figures">{cells}</section>'


def _said(quality: Json) -> str:
    sentences = findings(quality)
    if "previous" in quality:
        sentences.insert(0, _compared(quality["previous"], quality["at"]))
    items = "".join(f"<li>{escape(text)}</li>" for text in sentences)
    return f'<section class="said"><ul>{items}</ul></section>' if items else ""


def _compared(old: Json, at: Json) -> str:
    return (
        f"Error {old['error_of_new']:.5g}, recall@10 to expect {at['expected']['10']:.2f}; on the same vectors "
        f"{old['model_id']} has {old['error']:.5g} and {old['expected']['10']:.2f} ({searched_with(old)})."
    )


# --- charts --------------------------------------------------------------------------------------------------------


def _charts(quality: Json) -> list[str]:
    return [
        _recall(quality),
        _errors(quality["error"]),
        _subquantizers(quality.get("subquantizers", [])),
        _sizes(quality.get("lists")),
        _convergence(quality["history"]),
        _norms(quality.get("norms", {})),
        _drift(quality.get("drift")),
    ]


def _figure(title: str, body: str, caption: str, keys: tuple[tuple[str, str], ...] = ()) -> str:
    legend = "".join(f'<span class="key {style}">{escape(text)}</span>' for style, text in keys)
    legend = f'<p class="keys">{legend}</p>' if legend else ""
    return f"<figure><h2>{escape(title)}</h2>{legend}{body}<figcaption>{escape(caption)}</figcaption></figure>"


def _recall(quality: Json) -> str:
    rows, at, vectors = quality["recall"], quality["at"], quality["vectors"]
    if "nprobes" not in rows[0] or len(rows) < 2:
        return ""
    least = min(min(row[kind].values()) for row in rows for kind in ("expected", "measured"))
    low = max(0.0, 0.1 * int(10 * least - 0.5))
    chart = Chart("Recall against nprobes", (1, rows[-1]["nprobes"]), (low, 1), "nprobes", "", log_x=True)
    chart.rule(f"nprobes {at['nprobes']}", "rule", x=at["nprobes"])
    bar = (quality.get("gate") or {}).get("recall")
    if bar:
        chart.rule(f"at least {bar['share']:g} @{bar['k']}", "bar", y=bar["share"])
    for style, k in (("two", "100"), ("one", "10")):
        if k not in at["expected"]:
            continue
        chart.line([(row["nprobes"], row["measured"][k]) for row in rows], f"line thin {style}")
        chart.line([(row["nprobes"], row["expected"][k]) for row in rows], f"line {style}")
        texts = [
            (row["nprobes"], row["expected"][k], f"nprobes {row['nprobes']}: recall@{k} {row['expected'][k]:.3f}")
            for row in rows
        ]
        chart.dots(texts, f"dot {style}")
    kind = "held-out" if vectors["queries_held_out"] else "trained, each without itself,"
    caption = (
        f"{vectors['queries']:,} {kind} queries. Solid: to expect among {vectors['source']:,} vectors. "
        f"Dashed: as measured among {vectors['base']:,}."
    )
    if 10 * vectors["base"] < vectors["source"]:
        caption += " recall@10 is extrapolated."
    keys = (("one", "recall@10"), ("two", "recall@100"))
    return _figure("Recall", chart.svg(), caption, keys[: len(at["expected"])])


def _errors(error: Json) -> str:
    """What each step leaves of the spread of the vectors."""
    variance, held_out = error.get("variance"), error.get("held_out") or error.get("training")
    if not variance or not held_out:
        return ""
    stages = [
        (label, held_out[name]) for name, label in (("coarse", "centroids"), ("total", "codes")) if name in held_out
    ]
    rows = "".join(
        f'<tr><th>{label}</th><td><span class="meter" style="width:{min(1.0, value / variance):.2%}"></span></td>'
        f"<td>{value / variance:.1%}</td></tr>"
        for label, value in [("nothing", variance), *stages]
    )
    training = error.get("training", {}).get(error["compared_by"])
    caption = (
        "What is left of the squared spread of vectors once they are replaced by their centroid, and by their code."
    )
    if training and "held_out" in error:
        ratio = error["held_out"][error["compared_by"]] / training
        caption += f" Vectors that were not trained on have {ratio:.2f} times the error of those that were."
    return _figure("Quantisation error", f'<table class="meters">{rows}</table>', caption)


def _subquantizers(parts: list[Json]) -> str:
    if not parts:
        return ""
    kind = "held_out" if "held_out" in parts[0] else "training"
    most = 1.08 * max(part[kind] for part in parts) or 1.0
    chart = Chart("Error of each sub-quantizer", (-0.5, len(parts) - 0.5), (0, most), "sub-quantizer", "")
    bars = [
        (number_, part[kind], f"sub-quantizer {number_}: error {part[kind]:.4g}, {part['unused']} codewords unused")
        for number_, part in enumerate(parts)
    ]
    chart.bars(bars, "column one", 1)
    if kind == "held_out" and "training" in parts[0]:
        chart.dots(
            [(at, part["training"], f"trained: {part['training']:.4g}") for at, part in enumerate(parts)], "dot two", 2
        )
    total, unused = sum(part[kind] for part in parts), sum(part["unused"] for part in parts)
    top = max(parts, key=lambda part: part[kind])[kind]
    caption = (
        f"The worst of {len(parts)} has {top / total:.0%} of the error. Codewords that no vector uses: {unused:,}."
        if total
        else ""
    )
    keys = (("one", "held out"), ("two", "trained on")) if kind == "held_out" else ()
    return _figure("Error by sub-quantizer", chart.svg(), caption, keys)


def _sizes(lists: Json | None) -> str:
    if lists is None:
        return ""
    ranks, sizes = lists["sizes"]["rank"], lists["sizes"]["vectors"]
    if len(ranks) < 2:
        return ""
    chart = Chart(
        "Sizes of the inverted lists", (0, ranks[-1]), (0, 1.05 * max(sizes) or 1), "lists, the largest first", ""
    )
    points = list(zip(ranks, sizes, strict=True))
    chart.area(points, "area one").line(points, "line one")
    chart.rule(f"mean {number(lists['mean'])}", "rule", y=lists["mean"])
    caption = f"Vectors in each list. Imbalance factor {lists['imbalance_factor']:.2f}; 1 would be lists of one size."
    return _figure("List sizes", chart.svg(), caption)


def _convergence(history: list[Json]) -> str:
    if len(history) < 2:
        return ""
    values = [step["objective"] for step in history]
    low, high = min(values), max(values)
    room = (high - low) / 10 or abs(high) / 10 or 1.0
    chart = Chart("Convergence of k-means", (1, len(values)), (low - room, high + room), "iteration", "")
    points = list(enumerate(values, 1))
    chart.line(points, "line one").dots([(x, y, f"iteration {x}: {y:.6g}") for x, y in points], "dot one")
    change = abs(values[-1] - values[-2]) / abs(values[-2]) if values[-2] else 0.0
    return _figure(
        "k-means", chart.svg(), f"The objective of the centroids. The last iteration changed it by {change:.2%}."
    )


def _norms(norms: Json) -> str:
    if not norms:
        return ""
    spread = max(part["deviation"] / part["mean"] if part["mean"] else 0.0 for part in norms.values())
    if spread < 1e-3:
        return _figure("Lengths", "", "All vectors have the same length.")
    kinds = [(kind, style) for kind, style in (("training", "two"), ("held_out", "one")) if kind in norms]
    ends = [norms[kind]["quantiles"][at] for kind, _ in kinds for at in (0, -1)]
    chart = Chart("Lengths of vectors", (min(ends), max(ends)), (0, 1), "length", "share of vectors")
    for kind, style in kinds:
        quantiles = norms[kind]["quantiles"]
        chart.line([(value, at / (len(quantiles) - 1)) for at, value in enumerate(quantiles)], f"line {style}")
    names = {"training": "trained on", "held_out": "held out"}
    keys = tuple((style, names[kind]) for kind, style in reversed(kinds))
    caption = "Share of vectors up to each length. The lines lie on each other if the sample is like the rest."
    return _figure("Lengths", chart.svg(), caption, keys)


def _drift(drift: Json | None) -> str:
    """Errors and lengths along the source, each against its mean."""
    if drift is None:
        return ""
    lines = [(kind, style) for kind, style in (("length", "two"), ("error", "one")) if kind in drift]
    values = [value for kind, _ in lines for value in drift[kind]]
    low, high = min(0.9, *values), max(1.1, *values)
    room = 0.05 * (high - low)
    chart = Chart("Drift along the source", (0, 100), (low - room, high + room), "% of the source", "")
    chart.rule("mean", "rule", y=1)
    for kind, style in lines:
        points = [(100 * x, y) for x, y in zip(drift["position"], drift[kind], strict=True)]
        chart.line(points, f"line {style}")
        chart.dots([(x, y, f"at {x:.0f} %: {kind} {y:.3f} of the mean") for x, y in points], f"dot {style}")
    caption = (
        "Vectors in the order of their source, against the mean of all. "
        f"{drift['explained']:.1%} of their spread goes with their place in that order; 0 would be an order that means "
        "nothing."
    )
    keys = tuple((style, kind) for kind, style in reversed(lines))
    return _figure("Drift along the source", chart.svg(), caption, keys)


# --- facts ---------------------------------------------------------------------------------------------------------


def _facts(model: Json) -> str:
    told = dict(model["provenance"])
    rows = {
        name: model[name] for name in ("timestamp", "model_version", "mode", "compression_level") if model.get(name)
    }
    rows |= {"method": model["model_definition"], **told}
    cells = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{_value(value)}</td></tr>" for name, value in rows.items()
    )
    return f'<section class="facts"><h2>Plan and provenance</h2><table>{cells}</table></section>'


def _value(value: Any) -> str:
    if isinstance(value, Mapping) and not any(isinstance(item, Mapping) for item in value.values()):
        return "<br>".join(f"{escape(str(name).replace('_', ' '))} {_value(item)}" for name, item in value.items())
    if isinstance(value, (Mapping, list)):
        return f"<code>{escape(json.dumps(value))}</code>"
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no" if value is False else "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _count(value: int) -> str:
    return f"{value:,}" if value < 1_000_000 else number(value)


def _bytes(count: float) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


# Nothing on the page can run or load, whatever a name in it says.
_SAFE = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--quiet:#5f6873;--faint:#e6e9ed;--wash:#f6f7f9;--one:#1f5fd0;
--two:#c2710c;--bad:#b42318;--good:#12714a}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e7eaee;--quiet:#98a2ae;--faint:#2a3037;--wash:#1b1f25;
--one:#7aa7ff;--two:#f0a24a;--bad:#ff8a7d;--good:#5fd3a0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.9rem;line-height:1.2;margin:.2rem 0;letter-spacing:-.02em;overflow-wrap:anywhere;font-weight:650}
h2{font-size:1rem;margin:0 0 .25rem;font-weight:600}
header p{margin:.25rem 0;color:var(--quiet)}
header .state{display:inline-block;margin:0;padding:.05rem .6rem;border-radius:1rem;font-size:.8rem;
border:1px solid currentColor}
header .created{color:var(--good)}header .failed,header .failure{color:var(--bad)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1.5rem 1rem;margin:2rem 0;
padding:1.5rem 0;border-block:1px solid var(--faint)}
.figures b{display:block;font-size:1.9rem;line-height:1.15;font-weight:600;letter-spacing:-.02em}
.figures span{display:block;font-size:.9rem}
.figures small{display:block;color:var(--quiet);font-size:.8rem;overflow-wrap:anywhere}
.said ul{margin:0 0 2.5rem;padding:0;list-style:none}
.said li{padding:.5rem 0 .5rem 1rem;border-left:3px solid var(--two);margin:.5rem 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:2.5rem 2rem}
figure{margin:0}figure svg{display:block;width:100%;height:auto;overflow:visible}
figcaption{color:var(--quiet);font-size:.82rem;line-height:1.4;margin-top:.5rem}
.keys{margin:0 0 .25rem;font-size:.82rem;color:var(--quiet)}
.key{margin-right:1rem}.key:before{content:"";display:inline-block;width:.8rem;height:.2rem;border-radius:.1rem;
margin-right:.35rem;vertical-align:middle;background:var(--one)}.key.two:before{background:var(--two)}
svg text{fill:var(--quiet);font-size:11px}svg .note{fill:var(--ink)}
.grid{stroke:var(--faint)}.rule{stroke:var(--quiet);stroke-dasharray:1 3}.bar{stroke:var(--bad);stroke-dasharray:5 3}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round;stroke:var(--one)}
.line.two{stroke:var(--two)}.line.thin{stroke-width:1;stroke-dasharray:3 4;opacity:.75}
.dot{fill:var(--one);stroke:var(--paper);stroke-width:1}.dot.two{fill:var(--two)}
.area{fill:var(--one);opacity:.12}.column{fill:var(--one);opacity:.85}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th{text-align:left;font-weight:400;color:var(--quiet);vertical-align:top;padding:.35rem 1rem .35rem 0;
white-space:nowrap}
td{padding:.35rem 0;overflow-wrap:anywhere}
.meters{margin:1.2rem 0}.meters td{width:100%}.meters td:last-child{width:auto;text-align:right;padding-left:.75rem;
white-space:nowrap}
.meter{display:block;height:.9rem;min-width:2px;border-radius:.15rem;background:var(--one);opacity:.85;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.facts{margin-top:3rem;padding-top:1.5rem;border-top:1px solid var(--faint)}
.facts tr{border-bottom:1px solid var(--faint)}
code{font:.82rem/1.4 ui-monospace,SFMono-Regular,Menlo,monospace}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--quiet:#444;--faint:#ddd;--one:#1f5fd0;--two:#c2710c;
--bad:#b42318;--good:#12714a}body{padding:0;font-size:11pt;max-width:none}
.charts{grid-template-columns:1fr 1fr;gap:1.2rem}figure,.figures,.facts tr{break-inside:avoid}
.figures{grid-template-columns:repeat(5,1fr);margin:1rem 0;padding:.75rem 0}.figures b{font-size:1.4rem}
@page{margin:14mm}}
"""
