'use strict';
// What both kinds of page use: elements, numbers and the tooltip. All that comes from the
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
// Text whose direction is its own, for places that take no elements.
const isolated = (text) => `\u2068${text}\u2069`;
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
    ? '0%'
    : x < 0.0001
      ? `${(100 * x).toPrecision(1)}%`
      : `${Number((100 * x).toPrecision(x < 0.001 ? 2 : 3))}%`;

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
