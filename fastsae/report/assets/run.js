// The page of one SAE: its curves, frequencies, latents and map.

function showCurves({ curves }) {
  const box = find('[data-charts=curves]');
  if (!curves.some((run) => run.training)) {
    box.append(
      el('p', {
        class: 'soft',
        text: 'There is no metrics.jsonl here: this SAE was not trained by fastsae, or its run is elsewhere.',
      }),
    );
    return;
  }
  const keys = [];
  const series = (name) =>
    curves.flatMap((run, i) =>
      ['training', 'heldout'].flatMap((part) => {
        const found = run[part]?.[name];
        if (!found) return [];
        const held = part === 'heldout',
          label =
            curves.length > 1
              ? `${run.name}${held ? ', held-out' : ''}`
              : held
                ? 'held-out'
                : 'training';
        const one = {
          name: label,
          color: `var(--c${2 * i + (held ? 1 : 0)})`,
          dashed: i > 0,
          dots: held,
        };
        if (!keys.some((key) => key.color === one.color))
          keys.push({ ...one, kind: held ? 'dot' : i ? 'dashed' : '' });
        return [{ ...one, x: found.x, y: found.y }];
      }),
    );
  for (const [name, title, options] of PANELS) {
    const found = series(name);
    if (found.length) box.append(lineChart({ title, series: found, ...options }));
  }
  if (keys.length > 1) find('[data-legend=curves]').append(...legend(keys));
}

function showFrequencies(data) {
  const { edges, counts, dead, dense } = data.frequencies,
    gap = 0.25;
  const bars = counts.map((count, i) => ({
    from: edges[i],
    to: edges[i + 1],
    count,
    kind: edges[i] >= -1 - 1e-9 ? 'dense' : '',
    tip: `${percent(10 ** edges[i])} to ${percent(10 ** edges[i + 1])} of tokens: ${group(count)} latents`,
  }));
  const left = edges[0] - 2 * gap;
  bars.unshift({
    from: left,
    to: left + gap,
    count: dead.count,
    kind: 'dead',
    tip: `never: ${group(dead.count)} dead latents`,
  });
  const marks = edges.filter((edge) => Number.isInteger(edge));
  const form = (value) => (value === left + gap / 2 ? 'dead' : percent(10 ** value));
  const size = PHONE ? WIDE : { ...WIDE, width: 1100, height: 230 };
  const box = barChart({
    name: 'Histogram of frequencies',
    bars,
    range: [left, edges.at(-1)],
    marks: [left + gap / 2, ...marks],
    label: 'tokens that the latent is active for',
    form,
    size,
  });
  find('[data-charts=frequencies]').append(box.lastChild);
  const cards = new Set(data.latents.map((one) => one.id));
  const chip = (id, note) =>
    el(
      cards.has(id) ? 'a' : 'span',
      { class: cards.has(id) ? 'chip' : 'chip off', href: cards.has(id) ? `#latent=${id}` : null },
      el('span', { text: id }),
      note ? el('small', { text: note }) : null,
    );
  const lists = {
    dense: dense.ids.map((id, i) => chip(id, percent(dense.counts[i] / data.tokens))),
    dead: dead.ids.map((id) => chip(id)),
  };
  for (const [name, chips] of Object.entries(lists)) {
    const { count } = data.frequencies[name];
    find(`[data-count=${name}]`).textContent = group(count);
    if (count > chips.length)
      chips.push(el('span', { class: 'soft', text: `and ${group(count - chips.length)} more` }));
    find(`[data-list=${name}]`).append(
      ...(chips.length ? chips : [el('span', { class: 'soft', text: 'None.' })]),
    );
  }
}

const CLASSES = [
  [MEDIUM, 'under 0.1%', 1],
  [COMMON, '0.1% to 1%', 2],
  [DENSE, '1% to 10%', 3],
  [Infinity, 'over 10%', 4],
];
function colorOf(share) {
  if (!share) return 'var(--f0)';
  const [, , number] = CLASSES.find(([limit]) => share < limit);
  return `var(--f${number})`;
}

function showMap(data, latents) {
  const { ids, x, y, counts, grid, about } = data.map;
  const [width, height, pad] = PHONE ? [340, 360, 10] : [1100, 620, 16];
  const node = svg('svg', {
    class: 'map',
    viewBox: `0 0 ${width} ${height}`,
    role: 'img',
    'aria-label': 'Map of decoder rows',
  });
  const small = [],
    large = [];
  ids.forEach((id, i) => {
    const share = counts[i] / data.tokens,
      card = latents.cards.get(id);
    const place = {
      cx: pad + (x[i] / grid) * (width - 2 * pad),
      cy: height - pad - (y[i] / grid) * (height - 2 * pad),
      fill: colorOf(share),
    };
    const words = card?.words.length ? `\n${latents.view.words(card)}` : '';
    const text = `latent ${id}: ${share ? percent(share) : 'dead'}${words}`;
    if (!card)
      small.push(svg('circle', { ...place, r: 2.2, opacity: 0.5, 'data-tip': `${text}\nno card` }));
    else
      large.push(
        svg(
          'a',
          { href: `#latent=${id}`, 'data-id': id, tabindex: -1 },
          svg('circle', { ...place, r: 5.5, 'data-tip': text }),
        ),
      );
  });
  node.append(...small, ...large);
  find('[data-charts=map]').append(node);
  find('[data-about-map]').textContent =
    `${about}. ${group(ids.length)} of ${group(data.d_sae)} latents.`;
  find('[data-legend=map]').append(
    ...legend([
      ...CLASSES.map(([, name, number]) => ({
        name: `${name} of tokens`,
        color: `var(--f${number})`,
        kind: 'dot',
      })),
      ...(counts.includes(0) ? [{ name: 'dead', color: 'var(--f0)', kind: 'dot' }] : []),
    ]),
  );
  latents.mark();
}

start((data) => {
  showCurves(data);
  showFrequencies(data);
  showMap(data, new Latents(data));
});
