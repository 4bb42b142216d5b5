// The cards: a list to search, sort and filter, and the card of one latent.

const DENSE = 0.1,
  COMMON = 0.01,
  MEDIUM = 0.001;

class Cards {
  constructor(data) {
    this.data = data;
    this.byId = new Map(data.latents.map((one) => [one.id, one]));
    for (const one of data.latents) this.prepare(one);
    this.form = find('form.tools');
    this.list = find('[data-latents]');
    this.card = find('#card');
    if (!data.signed) this.form.elements.filter.querySelector('[value=negative]').remove();
    if (data.latents.every((one) => one.cosine === undefined))
      this.form.elements.sort.querySelector('[value=cosine]').remove();
    if (data.latents.every((one) => !one.promoted))
      this.form.elements.where.querySelector('[value=lens]').remove();
    this.form.addEventListener('input', () => this.showList());
    this.form.addEventListener('submit', (event) => event.preventDefault());
    addEventListener('hashchange', () => this.follow(true));
    document.addEventListener('keydown', (event) => this.key(event));
    this.showList();
    this.follow(false);
  }

  string(number) {
    return this.data.strings[number];
  }
  contexts(one) {
    return [
      ...(one.top ?? []),
      ...(one.low ?? []),
      ...(one.bands ?? []).flatMap((band) => band.contexts),
    ];
  }

  // What a latent is searched by. Pieces of a word that are active together read as one.
  prepare(one) {
    const active = [],
      whole = [];
    for (const context of this.contexts(one)) {
      const texts = context.text.map((number) => this.string(number));
      whole.push(texts.join(''));
      let last = -2;
      for (let i = 0; i < context.active.length; i += 2) {
        active.push(context.active[i] === last + 1 ? '' : '\n', texts[context.active[i]]);
        last = context.active[i];
      }
    }
    const tokens = (one.tokens ?? []).map(([number]) => this.string(number));
    one.share = one.count / this.data.tokens;
    one.words = tokens.slice(0, 4).map((text) => text.trim() || text);
    one.focus = one.tokens?.length ? one.tokens[0][1] : 0;
    one.search = {
      active: [active.join(''), ...tokens].join('\n').toLowerCase(),
      context: whole.join('\n').toLowerCase(),
      lens: (one.promoted ?? [])
        .map(([number]) => this.string(number))
        .join('\n')
        .toLowerCase(),
    };
  }

  kept() {
    const { query, where, sort, filter } = Object.fromEntries(new FormData(this.form));
    const wanted = query.trim().toLowerCase();
    const number = /^#?\d+$/.test(wanted) ? Number(wanted.replace('#', '')) : null;
    const shares = {
      all: [0, 2],
      dense: [DENSE, 2],
      common: [COMMON, DENSE],
      medium: [MEDIUM, COMMON],
      rare: [0, MEDIUM],
    };
    const inRange = (one) =>
      filter === 'negative'
        ? one.low
        : one.share >= shares[filter][0] && one.share < shares[filter][1];
    const matches = (one) => !wanted || one.id === number || one.search[where].includes(wanted);
    const keys = {
      frequent: (one) => -one.count,
      rare: (one) => one.count,
      max: (one) => -size(one),
      focused: (one) => -one.focus,
      cosine: (one) => one.cosine,
      id: (one) => one.id,
    };
    const size = (one) => Math.max(one.histogram?.to ?? 0, -(one.histogram?.from ?? 0));
    return this.data.latents
      .filter((one) => inRange(one) && matches(one))
      .sort((a, b) => keys[sort](a) - keys[sort](b) || a.id - b.id);
  }

  showList() {
    this.shown = this.kept();
    this.list.replaceChildren(
      ...this.shown.map((one) =>
        el(
          'li',
          {},
          el(
            'a',
            { href: `#latent=${one.id}`, 'data-id': one.id },
            el('span', { text: one.id }),
            el('span', { class: 'share', text: percent(one.share) }),
            el('span', { class: 'words' }, ...one.words.map((text) => el('bdi', { text }))),
          ),
        ),
      ),
    );
    find('[data-found]').textContent = this.shown.length
      ? `${group(this.shown.length)} of ${group(this.data.latents.length)} latents: number, frequency, tokens`
      : 'No latent with a card matches.';
    this.mark();
  }

  mark() {
    for (const link of this.list.querySelectorAll('a')) {
      const current = Number(link.dataset.id) === this.current;
      link.toggleAttribute('aria-current', current);
      if (current) this.reveal(link);
    }
    for (const point of document.querySelectorAll('.map a'))
      point.classList.toggle('current', Number(point.dataset.id) === this.current);
  }

  reveal(link) {
    const top = link.offsetTop - this.list.offsetTop,
      end = top + link.offsetHeight;
    const { scrollTop, clientHeight } = this.list;
    if (top < scrollTop || end > scrollTop + clientHeight)
      this.list.scrollTop = top - clientHeight / 2;
  }

  // Open the card that the address names; without one, the first of the list.
  follow(asked) {
    const named = /^#latent=(\d+)$/.exec(location.hash);
    if (!named && this.current !== undefined) return;
    const id = named ? Number(named[1]) : this.shown[0]?.id;
    this.current = id;
    const one = this.byId.get(id);
    if (one) this.card.replaceChildren(...this.content(one));
    else
      this.card.replaceChildren(
        el('p', {
          class: 'soft',
          text:
            id === undefined
              ? 'No latent has a card.'
              : id < this.data.d_sae
                ? `Latent ${id} has no card in this report. To make one: fastsae report … --include ${id}`
                : `There is no latent ${id}: this SAE has ${group(this.data.d_sae)}.`,
        }),
      );
    this.mark();
    if (named) {
      const top = this.card.getBoundingClientRect().top;
      if (top < 0 || top > innerHeight / 2) this.card.scrollIntoView({ block: 'start' });
      if (asked) this.card.focus({ preventScroll: true });
    }
  }

  step(by) {
    const at = this.shown.findIndex((one) => one.id === this.current);
    const next = this.shown[at < 0 ? 0 : at + by];
    if (next) location.hash = `latent=${next.id}`;
  }

  key(event) {
    if (
      event.target.closest('input, select, textarea') ||
      event.ctrlKey ||
      event.metaKey ||
      event.altKey
    )
      return;
    const by = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
    if (by) {
      this.step(by);
      event.preventDefault();
    }
  }

  content(one) {
    const at = this.shown.findIndex((other) => other.id === one.id);
    const button = (text, name, by) => {
      const node = el('button', {
        type: 'button',
        'aria-label': name,
        text,
        disabled: !this.shown[at < 0 ? 0 : at + by],
      });
      node.addEventListener('click', () => this.step(by));
      return node;
    };
    const head = el(
      'header',
      {},
      el('h3', {}, el('a', { href: `#latent=${one.id}`, text: `Latent ${one.id}` })),
      el('div', {}, button('←', 'Previous latent', -1), button('→', 'Next latent', 1)),
    );
    const facts = el(
      'div',
      { class: 'facts' },
      this.facts(one),
      one.histogram ? this.histogram(one) : null,
    );
    return [head, facts, ...this.directions(one), ...this.allContexts(one)];
  }

  facts(one) {
    const rows = [['Active for', `${percent(one.share)} of tokens (${group(one.count)})`]];
    if (one.histogram) rows.push(['Largest activation', digits(one.histogram.to)]);
    if (one.histogram?.from) rows.push(['Most negative', digits(one.histogram.from)]);
    if (one.cosine !== undefined) rows.push(['Encoder–decoder cosine', digits(one.cosine)]);
    (one.norms ?? []).forEach((norm, layer) =>
      rows.push([`Decoder norm, layer ${layer + 1}`, digits(norm)]),
    );
    return el(
      'dl',
      {},
      ...rows.map(([name, value]) =>
        el('div', {}, el('dt', { text: name }), el('dd', { text: value })),
      ),
    );
  }

  histogram(one) {
    const { from, to, counts } = one.histogram,
      step = (to - from) / counts.length;
    const bars = counts.map((count, i) => {
      const [a, b] = [from + i * step, from + (i + 1) * step];
      return {
        from: a,
        to: b,
        count,
        kind: b <= step / 2 ? 'neg' : 'pos',
        tip: `${digits(a)} to ${digits(b)}: ${group(count)} tokens`,
      };
    });
    const box = barChart({
      name: 'Histogram of activations',
      bars,
      range: [from, to],
      label: 'activation',
      size: { ...WIDE, height: 132 },
    });
    return box.lastChild;
  }

  token(number) {
    return el('bdi', { class: 'token', text: this.string(number) });
  }

  directions(one) {
    const found = [];
    if (one.tokens?.length)
      found.push(
        el('h4', { text: 'Tokens with most of its activation' }),
        el(
          'div',
          { class: 'chips' },
          ...one.tokens.map(([number, share, of]) =>
            el(
              'span',
              {
                class: 'chip',
                tabindex: 0,
                'data-tip': `${percent(share)} of its active tokens are this one.\nIt is active on ${percent(of)} of this token's occurrences.`,
              },
              this.token(number),
              el('small', { text: percent(share) }),
            ),
          ),
        ),
      );
    const side = (title, pairs) =>
      el(
        'div',
        {},
        el('h4', { text: title }),
        el(
          'div',
          { class: 'chips' },
          ...pairs.map(([number, value]) =>
            el('span', { class: 'chip' }, this.token(number), el('small', { text: digits(value) })),
          ),
        ),
      );
    const flip = this.data.signed ? ' (the other way around where negative)' : '';
    if (one.promoted)
      found.push(
        el(
          'div',
          { class: 'pair' },
          side(`Next tokens it promotes${flip}`, one.promoted),
          side(`Next tokens it suppresses${flip}`, one.suppressed),
        ),
      );
    if (one.near?.length)
      found.push(
        el('h4', { text: 'Nearest decoder rows, by cosine' }),
        el(
          'div',
          { class: 'chips' },
          ...one.near.map(([id, cosine]) => {
            const parts = [el('span', { text: id }), el('small', { text: digits(cosine) })],
              words = this.byId.get(id)?.words.join('  ');
            return this.byId.has(id)
              ? el(
                  'a',
                  { class: 'chip', href: `#latent=${id}`, 'data-tip': words || null },
                  ...parts,
                )
              : el('span', { class: 'chip', 'data-tip': 'Has no card in this report.' }, ...parts);
          }),
        ),
      );
    return found;
  }

  allContexts(one) {
    const largest = Math.max(one.histogram?.to ?? 0, -(one.histogram?.from ?? 0)) || 1;
    const block = (title, contexts) => [
      el('h4', { text: title }),
      el(
        'div',
        { class: 'contexts' },
        ...contexts.flatMap((context) => this.context(context, largest)),
      ),
    ];
    const found = [];
    if (one.top) found.push(...block('Strongest activations', one.top));
    if (one.low) found.push(...block('Most negative activations', one.low));
    const names = ['top fifth', 'second fifth', 'middle fifth', 'fourth fifth', 'lowest fifth'];
    (one.bands ?? []).forEach((band, i) =>
      found.push(
        ...block(
          `At random from the ${names[i]} of its activations: ${digits(band.range[0])} to ${digits(band.range[1])}`,
          band.contexts,
        ),
      ),
    );
    return found;
  }

  context(context, largest) {
    const values = new Map();
    for (let i = 0; i < context.active.length; i += 2)
      values.set(context.active[i], context.active[i + 1]);
    const tokens = context.text.map((number, i) => {
      const node = this.token(number),
        value = values.get(i);
      if (value !== undefined) {
        node.classList.add('on');
        node.classList.toggle('neg', value < 0);
        node.style.setProperty('--a', (0.15 + (0.85 * Math.abs(value)) / largest).toFixed(3));
        node.dataset.tip = `${this.string(number).trim() || '(space)'}: ${digits(value)}`;
      }
      node.classList.toggle('peak', i === context.peak);
      return node;
    });
    const [before, after] = context.cut.map((cut) =>
      cut ? el('span', { class: 'cut', text: '…' }) : null,
    );
    return [
      el('span', { class: 'strength', text: digits(values.get(context.peak)) }),
      el('p', { class: 'text' }, before, ...tokens, after),
    ];
  }
}
