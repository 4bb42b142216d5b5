'use strict';
// What both kinds of page use: elements, numbers, the tooltip and the plots. All that comes from the
// data is set as text or as a number: nothing is ever parsed as HTML.

const SVG = 'http://www.w3.org/2000/svg';

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === 'text') node.textContent = value;
    else if (name === 'vars')
      for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
    else if (value !== null && value !== false)
      node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const el = (tag, properties = {}, ...children) =>
  filled(document.createElement(tag), properties, children);
const svg = (tag, properties = {}, ...children) =>
  filled(document.createElementNS(SVG, tag), properties, children);
const find = (selector) => document.querySelector(selector);

async function decoded() {
  const bytes = Uint8Array.from(atob(find('#data').textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return JSON.parse(await new Response(stream).text());
}

async function start(show) {
  try {
    show(await decoded());
  } catch (error) {
    const old = typeof DecompressionStream === 'undefined';
    find('#failure').textContent = old
      ? 'This browser is too old to unpack the data of this page: it needs DecompressionStream (Chrome 80, Safari 16.4, Firefox 113).'
      : `The data of this page cannot be shown: ${error}`;
    find('#failure').hidden = false;
    throw error;
  }
}

// Numbers
const group = (n) => n.toLocaleString('en-US');
function digits(x) {
  const size = Math.abs(x);
  if (size >= 10000) return group(Math.round(x));
  if (size !== 0 && size < 0.001) return x.toExponential(1);
  return String(Number(x.toPrecision(3)));
}
const percent = (x) =>
  x === 0
    ? '0 %'
    : x < 0.0001
      ? `${(100 * x).toPrecision(1)} %`
      : `${Number((100 * x).toPrecision(x < 0.001 ? 2 : 3))} %`;

// The tooltip, for the mouse, the keyboard and touch
const tip = find('#tip');
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x - width / 2, innerWidth - width - 4))}px`;
  tip.style.top = `${y - height - 10 < 4 ? y + 16 : y - height - 10}px`;
}
const hideTip = () => {
  tip.hidden = true;
};
function tipOf(event) {
  const node = event.target.closest?.('[data-tip]');
  if (!node) return hideTip();
  const box = node.getBoundingClientRect();
  return showTip(node.dataset.tip, box.left + box.width / 2, box.top);
}
document.addEventListener('pointerover', tipOf);
document.addEventListener('focusin', tipOf);
document.addEventListener('scroll', hideTip, { passive: true, capture: true });

// Plots
const WIDE = { width: 420, height: 210, left: 46, right: 10, top: 8, bottom: 34 };

function ticks(low, high, log) {
  if (!log) {
    const rough = (high - low) / 4 || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
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
  return [low, high];
}

function scale(values, from, to, { log = false, zero = false } = {}) {
  let low = Math.min(...values),
    high = Math.max(...values);
  if (zero) low = Math.min(0, low);
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

function axes(node, size, x, y, { label, form = digits }) {
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
      svg('text', { x: x(value), y: floor + 15, 'text-anchor': 'middle', text: digits(value) }),
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
function lineChart({ title, series, log, form = digits, label = 'step' }) {
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
    all.map((p) => p[1]),
    WIDE.height - WIDE.bottom,
    WIDE.top,
    { log, zero: !log },
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
  for (const value of y.ticks.filter(Number.isInteger)) {
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
      svg('text', { x: size.left - 6, y: y(value) + 4, 'text-anchor': 'end', text: group(value) }),
    );
  }
  for (const value of x.ticks)
    node.append(
      svg('text', {
        x: x(value),
        y: size.height - size.bottom + 15,
        'text-anchor': 'middle',
        text: form(value),
      }),
    );
  node.append(
    svg('text', {
      x: (size.left + size.width - size.right) / 2,
      y: size.height - 3,
      'text-anchor': 'middle',
      text: label,
    }),
  );
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
