// Lines, bars and points, drawn as SVG with axes and tooltips.
const PHONE = innerWidth < 640;
const WIDE = { width: PHONE ? 340 : 420, height: 210, left: 46, right: 10, top: 8, bottom: 34 };

// What a run logs: its name in metrics.jsonl, the title of the chart, and how it is drawn.
const PANELS = [
  ['fvu', 'FVU: variance unexplained', { log: true }],
  ['l0', 'L0: active latents per token', {}],
  ['dead_fraction', 'Dead latents', { form: percent, atLeast: 0.05 }],
  ['downstream', 'Downstream loss, nats per token', {}],
];

function ticks(low, high, log) {
  if (!log) {
    const rough = (high - low) / 4 || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
      found.push(i * step + 0);
    return found;
  }
  for (const factors of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const f of factors)
        if (f * 10 ** e >= low * 0.999 && f * 10 ** e <= high * 1.001) found.push(f * 10 ** e);
    if (found.length >= 3) return found;
  }
  return ticks(low, high, false).filter((value) => value >= low);
}

function scale(values, from, to, { log = false, zero = false, air = 1 } = {}) {
  let low = Math.min(...values),
    high = Math.max(...values);
  if (zero) [low, high] = [Math.min(0, low), air * high];
  if (low === high) {
    if (log) {
      low /= 1.5;
      high *= 1.5;
    } else {
      const pad = Math.abs(high) / 2 || 1;
      low = zero ? low : low - pad;
      high += pad;
    }
  }
  const at = log ? Math.log10 : (x) => x;
  const place = (x) => from + ((at(x) - at(low)) / (at(high) - at(low))) * (to - from);
  return Object.assign(place, { ticks: ticks(low, high, log) });
}

// `form` is that of the y-axis, `formX` that of the x-axis.
function axes(node, size, x, y, { label, form = digits, formX = digits }) {
  for (const value of y.ticks) {
    node.append(
      svg('line', {
        class: 'grid',
        x1: size.left,
        x2: size.width - size.right,
        y1: y(value),
        y2: y(value),
      }),
    );
    node.append(
      svg('text', { x: size.left - 6, y: y(value) + 4, 'text-anchor': 'end', text: form(value) }),
    );
  }
  const floor = size.height - size.bottom;
  for (const value of x.ticks)
    node.append(
      svg('text', { x: x(value), y: floor + 15, 'text-anchor': 'middle', text: formX(value) }),
    );
  node.append(
    svg('text', {
      x: (size.left + size.width - size.right) / 2,
      y: size.height - 3,
      'text-anchor': 'middle',
      text: label,
    }),
  );
}

function chart(title, size, name) {
  const node = svg('svg', {
    viewBox: `0 0 ${size.width} ${size.height}`,
    role: 'img',
    'aria-label': name ?? title,
  });
  return [
    el('div', { class: 'panel chart' }, title ? el('h3', { text: title }) : null, node),
    node,
  ];
}

// series: {name, color, dashed, dots, x: [], y: []}
function lineChart({ title, series, log, atLeast = 0, form = digits, label = 'step' }) {
  const [box, node] = chart(title, WIDE);
  const drawn = series
    .map((one) => ({
      ...one,
      points: one.x.map((x, i) => [x, one.y[i]]).filter(([, y]) => !log || y > 0),
    }))
    .filter((one) => one.points.length);
  if (!drawn.length) {
    box.append(el('p', { class: 'soft', text: 'Nothing was logged.' }));
    return box;
  }
  const all = drawn.flatMap((one) => one.points);
  const x = scale(
    all.map((p) => p[0]),
    WIDE.left,
    WIDE.width - WIDE.right,
    { zero: true },
  );
  const y = scale(
    [...all.map((p) => p[1]), ...(log ? [] : [atLeast])],
    WIDE.height - WIDE.bottom,
    WIDE.top,
    { log, zero: !log, air: 1.04 },
  );
  axes(node, WIDE, x, y, { label, form });
  for (const one of drawn) {
    const path = one.points
      .map(([a, b], i) => `${i ? 'L' : 'M'}${x(a).toFixed(1)} ${y(b).toFixed(1)}`)
      .join('');
    node.append(
      svg('path', {
        d: path,
        fill: 'none',
        stroke: one.color,
        'stroke-width': 1.8,
        'stroke-linejoin': 'round',
        'stroke-dasharray': one.dashed ? '5 3' : null,
      }),
    );
    if (one.dots || one.points.length === 1)
      for (const [a, b] of one.points)
        node.append(svg('circle', { cx: x(a), cy: y(b), r: 2.6, fill: one.color }));
  }
  const cursor = svg('line', {
    class: 'cursor',
    y1: WIDE.top,
    y2: WIDE.height - WIDE.bottom,
    visibility: 'hidden',
  });
  node.append(cursor);
  node.addEventListener('pointermove', (event) => {
    const frame = node.getBoundingClientRect();
    const at = ((event.clientX - frame.left) / frame.width) * WIDE.width;
    const nearest = (points) =>
      points.reduce((best, p) => (Math.abs(x(p[0]) - at) < Math.abs(x(best[0]) - at) ? p : best));
    const step = nearest(all)[0];
    cursor.setAttribute('x1', x(step));
    cursor.setAttribute('x2', x(step));
    cursor.setAttribute('visibility', 'visible');
    const lines = drawn.map((one) => `${one.name}: ${form(nearest(one.points)[1])}`);
    showTip(
      [`${label} ${group(step)}`, ...lines].join('\n'),
      frame.left + (x(step) / WIDE.width) * frame.width,
      event.clientY,
    );
  });
  node.addEventListener('pointerleave', () => {
    cursor.setAttribute('visibility', 'hidden');
    hideTip();
  });
  return box;
}

// bars: {from, to, count, kind, tip}; x-axis from `range`
function barChart({ title, name, bars, range, size = WIDE, label, form = digits, marks = null }) {
  const [box, node] = chart(title, size, name);
  const x = scale(range, size.left, size.width - size.right);
  const y = scale(
    bars.map((bar) => bar.count),
    size.height - size.bottom,
    size.top,
    { zero: true },
  );
  if (marks) x.ticks = marks;
  y.ticks = y.ticks.filter(Number.isInteger);
  axes(node, size, x, y, { label, form: group, formX: form });
  for (const bar of bars) {
    const top = bar.count ? Math.min(y(bar.count), y(0) - 1.5) : y(0);
    const wide = Math.max(x(bar.to) - x(bar.from) - 1, 1);
    node.append(
      svg('rect', {
        class: `bar ${bar.kind ?? ''}`,
        x: x(bar.from) + 0.5,
        width: wide,
        y: top,
        height: y(0) - top,
        rx: 1,
      }),
    );
    node.append(
      svg('rect', {
        fill: 'transparent',
        x: x(bar.from),
        width: wide + 1,
        y: size.top,
        height: y(0) - size.top,
        'data-tip': bar.tip,
      }),
    );
  }
  return box;
}

const legend = (entries) =>
  entries.map(({ name, color, kind = '' }) =>
    el('span', {}, el('i', { class: kind, vars: { '--key': color } }), el('bdi', { text: name })),
  );
