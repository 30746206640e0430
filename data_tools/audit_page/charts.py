"""The charts of the audit page as HTML: histograms, tables with bars, and the funnel of steps. All text is escaped."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from html import escape

from data_tools.audit_page.sketches import Histogram
from data_tools.shards.steps import Step

COLOURS = 5  # c1 to c5; c0 is the colour of what is kept
_REASONS_SHOWN = 8

CSS = """
.tiles{grid-template-columns:repeat(auto-fit,minmax(166px,1fr))}
section.stage>.head{margin-bottom:14px}section.stage .charts,section.stage .wall,section.stage .pair{margin-top:0}
.charts+.card,.card+.pair{margin-top:14px!important}
th bdi{display:-webkit-box;-webkit-line-clamp:3;-webkit-box-orient:vertical;overflow:hidden;overflow-wrap:anywhere;
font-weight:450}
.bars{display:flex;align-items:flex-end;gap:2px;height:132px;margin-top:14px;border-bottom:1px solid var(--line)}
.bars i{flex:1;min-height:1px;border-radius:3px 3px 0 0;background:var(--accent)}.bars i.none{background:var(--line)}
.bars i:hover{filter:brightness(1.15) saturate(1.1)}
.edges{position:relative;height:18px;font-size:11px;color:var(--soft)}
.edges span{position:absolute;top:4px;transform:translateX(-50%);white-space:nowrap}
.edges span:first-child{transform:none}.edges span:last-child{transform:translateX(-100%)}
.chart>p{font-size:12.5px;color:var(--soft);margin:6px 0 2px}.chart>p b{color:var(--ink);font-weight:620}
.funnel{display:grid;gap:0}
.step{display:grid;grid-template-columns:132px minmax(0,1fr) 150px;column-gap:16px;align-items:start}
.step .name{font-weight:620;line-height:1.25;padding-top:2px;overflow-wrap:anywhere}
.step small{display:block;font-weight:400;font-size:12px;color:var(--soft);line-height:1.35}
.step .flow{position:relative;min-height:66px;padding-bottom:18px}
.step.now .flow{min-height:34px;padding-bottom:0}
.pour{position:absolute;inset:24px auto 0 0;background:var(--accent);opacity:.09}
.whole{display:flex;height:26px;border-radius:6px;overflow:hidden;gap:1px;position:relative}
.whole i{display:block;height:100%;min-width:2px}
.whole.marked i+i{background-image:repeating-linear-gradient(-45deg,transparent 0 4px,var(--card) 4px 6px)}
.step .legend{position:relative;margin-top:6px;padding-left:8px}
.step .legend i{height:8px;width:8px;border-radius:3px;vertical-align:0}
.step .count{text-align:right;font-weight:680;font-size:17px;letter-spacing:-.01em;line-height:1.3}
.now .whole i{background:var(--good)}
.k0{background:var(--accent)}.k1{background:var(--c1)}.k2{background:var(--c3)}.k3{background:var(--c4)}
.k4{background:var(--c2)}.k5{background:var(--c5)}
.kinds{display:grid;grid-template-columns:repeat(auto-fill,minmax(168px,1fr));gap:2px 22px;margin:0;padding:0;
list-style:none;font-size:13.5px}
.kinds li{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:0 8px;padding:4px 0}
.kinds .track{grid-column:1/-1;height:4px}.kinds bdi{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.kinds span:not(.track){color:var(--soft)}
.title{font-weight:620;font-size:14px;margin:0 0 6px}
h3.reason{text-transform:none;letter-spacing:0;font-size:15px;color:var(--ink)}
h3.reason span{color:var(--soft);font-weight:400;font-size:13px;margin-left:4px}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px;align-items:start;margin-top:14px}
.wall{display:grid;grid-template-columns:repeat(auto-fill,minmax(168px,1fr));gap:12px;margin-top:14px}
.sample{margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px;overflow:hidden;
font-size:12.5px;line-height:1.4}
.sample .frames{display:flex;background:var(--track);height:150px;gap:1px}
.sample img{flex:1;min-width:0;width:0;height:100%;object-fit:contain}
.sample .gone{flex:1;display:grid;place-items:center;text-align:center;padding:12px;color:var(--soft);font-size:12px}
.sample figcaption{padding:8px 10px 9px;font-size:12.5px;font-weight:400}
.sample bdi{display:-webkit-box;-webkit-line-clamp:4;-webkit-box-orient:vertical;overflow:hidden;overflow-wrap:anywhere}
.sample small{display:block;color:var(--soft);font-size:11px;margin-top:3px;overflow-wrap:anywhere}
.sample .facts{display:flex;justify-content:space-between;gap:0 8px;flex-wrap:wrap}
.pair td.bar{width:20%}
.sample .why{color:var(--bad);font-size:12px}
@media (max-width:760px){.pair{grid-template-columns:minmax(0,1fr)}
.step{grid-template-columns:minmax(0,1fr) auto}.step .flow{grid-column:1/-1;grid-row:2;margin-top:6px}}
@media (max-width:560px){.wall{grid-template-columns:repeat(2,minmax(0,1fr))}.sample .frames{height:120px}}
@media print{.sample,.step{break-inside:avoid}}
"""
# Steps that change no shard; what several directories had under one name is called NAME-2, ...
NAMING = ("filter_shards", "dedup", "leaks")


def clean(text: str) -> str:
    """Text from outside as HTML: no tag, no control character, no sign that turns the direction of what follows."""
    return escape("".join(c if c.isprintable() else " " for c in text), quote=True)


def isolated(text: str) -> str:
    """The same as an element, so that a text from right to left stays in its place."""
    return f'<bdi dir="auto">{clean(text)}</bdi>'


def bars(title: str, histogram: Histogram, unit: str, about: str, labels: Sequence[float], size: str = "wide") -> str:
    """A histogram with bars of equal width; `labels` are the edges that are named. "" without values."""
    if not histogram.total:
        return ""
    filled = [i for i, count in enumerate(histogram.counts) if count]
    low, high = max(filled[0] - 1, 0), min(filled[-1] + 2, len(histogram.counts))
    top, columns = max(histogram.counts), ""
    for i in range(low, high):
        count = int(histogram.counts[i])
        span = f"{edge(histogram.edges[i])} to {edge(histogram.edges[i + 1])} {unit}".strip()
        share = f"{count:,} ({percent(count, histogram.total)})"
        shape = f'style="height:{100 * count / top:.2f}%"' if count else 'class="none"'
        columns += f'<i {shape} title="{escape(span)}: {share}"></i>'
    named = [(i, value) for i, value in enumerate(histogram.edges) if value in labels and low <= i <= high]
    marks = "".join(
        f'<span style="left:{100 * (i - low) / (high - low):.2f}%">{edge(value)}</span>' for i, value in named
    )
    return (
        f'<figure class="chart {size}" role="img" aria-label="{escape(title)}: {clean(about)}">'
        f'<figcaption>{escape(title)}</figcaption><div class="bars">{columns}</div><div class="edges">{marks}</div>'
        f"<p>{about}</p></figure>"
    )


def edge(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def percent(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "< 0.1 %"
    return f"{share:.1f} %"


def table(title: str, about: str, head: Sequence[str], rows: Iterable[Sequence[str]], shares: Sequence[float]) -> str:
    """A card with a table: cells are HTML, the first is the row's name; `shares` (0 to 1) are the bars."""
    body = ""
    for cells, share in zip(rows, shares, strict=True):
        values = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        body += f'<tr><th scope="row">{cells[0]}</th>{values}<td class="bar">{track(share)}</td></tr>'
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<div class="card"><table><caption>{escape(title)} <span>{escape(about)}</span></caption>'
        f"<thead><tr>{heads}<td></td></tr></thead><tbody>{body}</tbody></table></div>"
    )


def track(share: float) -> str:
    return f'<span class="track"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>'


def kinds(counts: Sequence[tuple[str, int]]) -> str:
    """Many short things with their counts, in columns."""
    top = max((count for _, count in counts), default=1)
    lines = "".join(f"<li>{isolated(name)}<span>{n:,}</span>{track(n / top)}</li>" for name, n in counts)
    return f'<ul class="kinds">{lines}</ul>'


def funnel(steps: dict[str, Step], samples: int, marks: Collection[str] = ()) -> str:
    """The way from the list to what is there now: a bar for each step, and under it why samples were dropped. `marks`:
    more steps that only name what they drop."""
    top = max([*(step.rows for step in steps.values()), samples, 1])
    flow, blocks = 0, ""
    for name, step in steps.items():
        marked = bool(step.dropped) and (name in marks or name.partition("-")[0] in NAMING)
        # A step of one of several directories leaves the samples of the others as they are.
        flow = max(flow, step.rows) - (0 if marked else step.rows - step.kept)
        blocks += _step(name, step, marked, flow / top, step.rows / top)
    return (
        f'<div class="card funnel">{blocks}<div class="step now"><div class="name">in the shards<small>today</small>'
        f'</div><div class="flow"><div class="whole" style="width:{100 * samples / top:.3f}%">'
        f'<i class="k0" style="flex:1"></i></div></div><div class="count">{samples:,}'
        f"<small>{percent(samples, top)} of the most</small></div></div></div>"
    )


def _step(name: str, step: Step, marked: bool, flow: float, width: float) -> str:
    reasons = sorted(step.dropped.items(), key=lambda item: (-item[1], item[0]))
    if len(reasons) > _REASONS_SHOWN:
        rest = sum(count for _, count in reasons[_REASONS_SHOWN - 1 :])
        reasons = [*reasons[: _REASONS_SHOWN - 1], (f"{len(reasons) - _REASONS_SHOWN + 1} more reasons", rest)]
    parts = [("kept", step.kept, 0), *((r, n, 1 + i % COLOURS) for i, (r, n) in enumerate(reasons))]
    shown = "".join(
        f'<i class="k{colour}" style="flex:{count}" title="{clean(reason)}: {count:,}"></i>'
        for reason, count, colour in parts
        if count
    )
    legend = "".join(
        f'<li><i class="k{colour}"></i>{clean(reason)} <b>{count:,}</b></li>' for reason, count, colour in parts[1:]
    )
    lost = step.rows - step.kept
    what = f"{'names' if marked else 'drops'} {percent(lost, step.rows)}" if lost else "drops nothing"
    return (
        f'<div class="step"><div class="name">{clean(name)}<small>{datetime.fromtimestamp(step.time):%d %b %Y, %H:%M}'
        f'</small></div><div class="flow"><div class="pour" style="width:{100 * flow:.3f}%"></div>'
        f'<div class="whole{" marked" if marked else ""}" style="width:{100 * width:.3f}%">{shown}</div>'
        f'<ul class="legend">{legend}</ul></div>'
        f'<div class="count">{step.kept:,}<small>of {step.rows:,} {clean(step.unit)}</small><small>{what}</small></div>'
        "</div>"
    )
