// A cursor that shows the numbers under the pointer, or moves with the arrow keys.
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
