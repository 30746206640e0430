"""The report page's style sheet and script: inline, so that the page is one file that needs no network."""

CSS = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--ink:#1a1c20;--soft:#5d636e;--line:#e3e4e1;--grid:#ecedea;
--accent:#2459c9;--good:#1b7f56;--bad:#b3362b;--mark:#fdebb4;--track:#ebece8;
--c0:#2459c9;--c1:#c96a12;--c2:#1b8a63;--c3:#a83a8c;--c4:#6b5bd2;--c5:#6f7682}
@media (prefers-color-scheme:dark){:root{--bg:#121417;--card:#1a1d22;--ink:#eceef1;--soft:#a0a7b3;--line:#2b2f37;
--grid:#262a31;--accent:#86adff;--good:#5fcf9f;--bad:#ff9488;--mark:#5a4a12;--track:#2a2e36;
--c0:#86adff;--c1:#f2a65a;--c2:#5fcf9f;--c3:#e58fcd;--c4:#afa3ff;--c5:#98a0ad}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main,header{max-width:1160px;margin:0 auto;padding:0 24px}
header{padding-top:44px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.022em;margin:4px 0 6px;font-weight:680;overflow-wrap:anywhere}
h2{font-size:21px;letter-spacing:-.012em;margin:0;font-weight:650}
h3{font-size:12px;letter-spacing:.07em;text-transform:uppercase;color:var(--soft);margin:26px 0 10px;font-weight:600}
p{margin:6px 0}.soft,.note{color:var(--soft);font-size:13.5px}.over{font-size:12px;letter-spacing:.09em;
text-transform:uppercase;color:var(--accent);font-weight:650;margin:0}
nav{display:flex;flex-wrap:wrap;gap:6px;margin:20px 0 0}
nav a{font-size:13px;color:var(--ink);text-decoration:none;border:1px solid var(--line);background:var(--card);
border-radius:99px;padding:3px 12px}nav a:hover{border-color:var(--accent);color:var(--accent)}
a:focus-visible,.chart:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:22px 0 0;padding:0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.tile dt{font-size:12.5px;color:var(--soft)}.tile dd{margin:0}
.tile .big{font-size:29px;font-weight:680;letter-spacing:-.025em;line-height:1.25}
.tile .big small{font-size:15px;font-weight:550;letter-spacing:0;color:var(--soft);margin-left:1px}
.tables{display:grid;grid-template-columns:minmax(0,1.22fr) minmax(0,1fr);gap:16px;align-items:start}
.stack{display:grid;gap:16px}.tables>:only-child{grid-column:1/-1}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
caption{text-align:left;font-weight:620;padding-bottom:6px}caption span{font-weight:400;color:var(--soft)}
th,td{padding:6px 8px;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
thead th,thead td{font-size:12px;font-weight:550;color:var(--soft);border:0;padding-bottom:3px}
th:first-child,td:first-child{text-align:left;padding-left:0}tbody th{font-weight:550;white-space:normal}
tbody th small{display:block;color:var(--soft);font-weight:400;font-size:12px;line-height:1.3}
tr.minor th,tr.minor td{color:var(--soft);font-weight:400}td.key{font-weight:680}
td.bar{width:34%;min-width:84px;padding-right:0}
.track{display:block;position:relative;height:8px;border-radius:4px;background:var(--track)}
.track i{position:absolute;inset:0 auto 0 0;border-radius:4px;background:var(--accent)}
.track b{position:absolute;top:-3px;bottom:-3px;width:2px;background:var(--ink)}
section.stage{margin-top:44px;padding-top:22px;border-top:1px solid var(--line);scroll-margin-top:8px}
.head{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:baseline}
.badge{font-size:12px;border-radius:99px;padding:1px 10px;border:1px solid currentColor;color:var(--good)}
.badge.open{color:var(--c1)}
.charts{display:grid;gap:12px;margin-top:14px;grid-template-columns:repeat(12,minmax(0,1fr))}
.chart{margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px 10px;
grid-column:span 3}
.chart.wide{grid-column:span 6}.chart.full{grid-column:span 12}.chart.third{grid-column:span 4}
figcaption{font-size:13px;font-weight:620}
.plot{display:grid;grid-template-columns:auto minmax(0,1fr);margin-top:10px}
.y{position:relative;width:40px;font-size:11px;color:var(--soft)}
.y span{position:absolute;right:8px;transform:translateY(-50%);white-space:nowrap}
.area{position:relative;height:104px}.wide .area,.full .area{height:190px}
.area svg{display:block;width:100%;height:100%;overflow:visible}
.x{grid-column:2;position:relative;height:18px;font-size:11px;color:var(--soft)}
.x span{position:absolute;top:4px;transform:translateX(-50%)}
path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
.grid{stroke:var(--grid)}.line{stroke-width:1.8}.raw{stroke-width:1;opacity:.28}
.c0{stroke:var(--c0);background:var(--c0)}.c1{stroke:var(--c1);background:var(--c1)}
.c2{stroke:var(--c2);background:var(--c2)}.c3{stroke:var(--c3);background:var(--c3)}
.c4{stroke:var(--c4);background:var(--c4)}.c5{stroke:var(--c5);background:var(--c5)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:8px 0 0;padding:0;font-size:12px;
color:var(--soft)}.legend b{color:var(--ink);font-weight:600}.legend i{display:inline-block;width:12px;height:3px;
border-radius:2px;margin-right:6px;vertical-align:3px}
.cursor{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}
.tip{position:absolute;top:0;z-index:2;pointer-events:none;background:var(--ink);color:var(--bg);border-radius:8px;
padding:6px 10px;font-size:12px;line-height:1.45;white-space:nowrap}
details{margin-top:16px}summary{cursor:pointer;font-size:13px;font-weight:620;width:max-content;border-radius:4px}
.shows{display:grid;grid-template-columns:repeat(auto-fill,minmax(264px,1fr));gap:12px;margin-top:10px}
.show,.query{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px;margin:0;
font-size:13px}.trio{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:8px;text-align:center;font-size:11px;
color:var(--soft)}
.trio img,.results img,.ask img{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:6px;
image-rendering:pixelated;background:var(--track)}
.words{margin:8px 0 0;padding:0;list-style:none;overflow-wrap:anywhere}
.words:first-child{margin:0}.words li+li{margin-top:4px;line-height:1.4}
.words small{display:block;color:var(--soft);font-size:11px}
mark{background:var(--mark);color:inherit;border-radius:4px;padding:0 3px}
.off{text-decoration:underline wavy var(--bad) 1px;text-underline-offset:3px}
.queries{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:12px;margin-top:10px}
.ask{display:flex;gap:12px;align-items:center;justify-content:space-between;font-weight:560;overflow-wrap:anywhere}
.ask img{width:72px;flex:none}
.rank{flex:none;font-size:12px;font-weight:650;color:var(--bad);border:1px solid currentColor;border-radius:99px;
padding:0 9px}.rank.first{color:var(--good)}
.results{list-style:none;margin:10px 0 0;padding:0;font-size:11px;color:var(--soft)}
.results.pictures{display:grid;grid-template-columns:repeat(5,minmax(0,1fr));gap:8px;text-align:center}
.results.texts li{display:flex;gap:8px;font-size:13px;padding:2px 0}.results .right{color:var(--good);font-weight:620}
.results .right img{outline:3px solid var(--good);outline-offset:-1px}
footer{max-width:1160px;margin:44px auto 0;padding:18px 24px 40px;border-top:1px solid var(--line)}
@media (max-width:900px){.tables{grid-template-columns:minmax(0,1fr)}.chart,.chart.third{grid-column:span 6}
.chart.wide{grid-column:span 12}}
@media (max-width:560px){main,header{padding-left:16px;padding-right:16px}h1{font-size:27px}header{padding-top:28px}
.chart,.chart.third,.chart.wide{grid-column:span 12}.wide .area,.full .area{height:150px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tile .big{font-size:24px}.card{padding:12px}th,td{padding:6px 5px}
td.bar{min-width:48px}table{font-size:13px}}
@media print{.chart,.show,.query,.tile{break-inside:avoid}body{background:#fff}}
"""

# A cursor that shows the numbers under the pointer, or moves with the arrow keys.
SCRIPT = """
for (const chart of document.querySelectorAll('.chart')) {
  const {unit, frame: [x0, x1, y0, y1], curves} = JSON.parse(chart.dataset.chart);
  const area = chart.querySelector('.area'), cursor = chart.querySelector('.cursor'), tip = chart.querySelector('.tip');
  const steps = [...new Set(curves.flatMap(c => c.points.map(p => p[0])))].sort((a, b) => a - b);
  const nearest = (list, x) => list.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a);
  let at = steps.length - 1;
  const show = () => {
    const step = steps[at], share = (step - x0) / (x1 - x0);
    tip.replaceChildren(`step ${step.toLocaleString('en')}`);
    for (const c of curves) {
      const known = c.points.filter(p => p[1] !== null);
      const value = known.find(p => p[0] === nearest(known.map(q => q[0]), step))[1];
      const line = document.createElement('div');
      line.textContent = `${c.name}: ${Number(value.toPrecision(4))}${unit}`;
      tip.append(line);
    }
    cursor.hidden = tip.hidden = false;
    cursor.style.left = `${100 * share}%`;
    tip.style.left = share < .5 ? `calc(${100 * share}% + 10px)` : '';
    tip.style.right = share < .5 ? '' : `calc(${100 - 100 * share}% + 10px)`;
  };
  const hide = () => { cursor.hidden = tip.hidden = true; };
  area.addEventListener('pointermove', e => {
    const box = area.getBoundingClientRect();
    at = steps.indexOf(nearest(steps, x0 + (e.clientX - box.left) / box.width * (x1 - x0)));
    show();
  });
  area.addEventListener('pointerleave', hide);
  chart.addEventListener('blur', hide);
  chart.addEventListener('keydown', e => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[e.key];
    if (!move) return;
    e.preventDefault();
    at = Math.min(Math.max(at + move * Math.ceil(steps.length / 100), 0), steps.length - 1);
    show();
  });
}
"""
