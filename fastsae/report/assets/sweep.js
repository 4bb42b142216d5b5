// The page of a sweep: a table to sort, the frontier, and the curves of all runs.

const COLUMNS = [
  ['name', 'SAE', (x) => x],
  ['fvu', 'FVU', (x) => x.toFixed(4)],
  ['l0', 'L0', (x) => x.toFixed(1)],
  ['dead', 'dead', percent],
  ['d_sae', 'latents', group],
  ['speed', 'tokens/s', (x) => group(Math.round(x))],
  ['seconds', 'seconds', (x) => group(Math.round(x))],
];
const SIZE = { ...WIDE, width: PHONE ? 340 : 580, height: PHONE ? 260 : 320, left: 52 };

function showTable(runs) {
  const head = el('tr'),
    body = find('tbody');
  let sorted = ['fvu', 1];
  const show = () => {
    const [key, sign] = sorted;
    for (const cell of head.children) {
      if (cell.dataset.key === key)
        cell.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
      else cell.removeAttribute('aria-sort');
    }
    const order = [...runs].sort(
      (a, b) =>
        sign * (typeof a[key] === 'string' ? a[key].localeCompare(b[key]) : a[key] - b[key]),
    );
    body.replaceChildren(
      ...order.map((run) =>
        el(
          'tr',
          {},
          ...COLUMNS.map(([name, , form]) => {
            if (name !== 'name') return el('td', { text: form(run[name]) });
            const title = el('bdi', { text: run.name });
            return el(
              'td',
              {},
              el('i', { vars: { '--key': run.color } }),
              run.report ? el('a', { href: run.report }, title) : title,
            );
          }),
        ),
      ),
    );
  };
  for (const [key, title] of COLUMNS) {
    const button = el('button', { type: 'button', text: title });
    button.addEventListener('click', () => {
      sorted = [key, sorted[0] === key ? -sorted[1] : 1];
      show();
    });
    head.append(el('th', { scope: 'col', 'data-key': key }, button));
  }
  find('thead').append(head);
  show();
}

function scatter(runs, { title, key, log, form = digits }) {
  const [box, node] = chart(title, SIZE);
  const spread = runs.map((run) => run.l0);
  const wide = Math.min(...spread) > 0 && Math.max(...spread) / Math.min(...spread) > 8;
  const x = scale(
    wide ? spread.flatMap((l0) => [0.9 * l0, 1.1 * l0]) : [0, ...spread.map((l0) => 1.05 * l0)],
    SIZE.left,
    SIZE.width - SIZE.right,
    { log: wide },
  );
  const usesLog = log && runs.every((run) => run[key] > 0);
  const y = scale(
    runs.flatMap((run) => [run[key] * 0.95, run[key] * 1.05]),
    SIZE.height - SIZE.bottom,
    SIZE.top,
    { log: usesLog, zero: !usesLog },
  );
  axes(node, SIZE, x, y, { label: 'L0: active latents per token', form });
  for (const run of runs)
    node.append(
      svg('circle', {
        cx: x(run.l0),
        cy: y(run[key]),
        r: 6,
        fill: run.color,
        tabindex: 0,
        'data-tip': `${run.name}\nFVU ${run.fvu.toFixed(4)}, L0 ${run.l0.toFixed(1)}, dead ${percent(run.dead)}`,
      }),
    );
  return box;
}

start(({ runs }) => {
  runs.forEach((run, i) => {
    run.color = i < 8 ? `var(--c${i})` : `hsl(${(i * 137.5) % 360} 55% 52%)`;
  });
  showTable(runs);
  find('[data-legend=sweep]').append(
    ...legend(runs.map(({ name, color }) => ({ name, color, kind: 'dot' }))),
  );
  find('[data-charts=frontier]').append(
    scatter(runs, { title: 'FVU against L0', key: 'fvu', log: true }),
    scatter(runs, { title: 'Dead latents against L0', key: 'dead', form: percent }),
  );
  const curves = PANELS.map(([key, title, options]) => {
    const series = runs.flatMap(({ name, color, training }) =>
      training?.[key] ? [{ name, color, ...training[key] }] : [],
    );
    return series.length ? lineChart({ title, series, ...options }) : null;
  });
  find('[data-charts=curves]').append(...curves.filter(Boolean));
});
