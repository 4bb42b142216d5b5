// The card of one latent: its numbers, its directions and its contexts.

const FIFTHS = ['top fifth', 'second fifth', 'middle fifth', 'fourth fifth', 'lowest fifth'];
const WEAKEST = 0.15; // how strong the background of the weakest activation is
const FEW = 20; // active tokens below which a latent cannot be judged
const KEY =
  'Contexts of a list neither overlap nor repeat a text; those at random differ from those above. Tint: activation, relative to the largest of this latent. Bold and underlined: the token that the context is about; the number is its activation.';

class Card {
  constructor(data, cards) {
    this.data = data;
    this.cards = cards;
  }

  content(one) {
    const facts = el('div', { class: 'facts' }, this.facts(one), this.histogram(one));
    return [
      ...this.few(one),
      facts,
      ...this.tokens(one),
      ...this.lens(one),
      ...this.near(one),
      ...this.contexts(one),
    ];
  }

  string(number) {
    return this.data.strings[number];
  }

  // A token by itself, with spaces that can be seen.
  token(number) {
    const [spaces, rest] = split(this.string(number));
    const dots = spaces ? el('span', { class: 'space', text: spaces }) : null;
    return el('bdi', { class: 'token' }, dots, document.createTextNode(rest));
  }

  // The same without elements.
  spelled(number) {
    return split(this.string(number)).join('');
  }

  // That there are too few contexts to tell what a latent is of.
  few(one) {
    if (!few(one)) return [];
    const text = `Too few activations to judge: it is active for fewer than ${FEW} tokens here.`;
    return [el('p', { class: 'notice', text })];
  }

  // The tokens of its list entry, as text.
  words(one) {
    return one.words.map((number) => isolated(this.spelled(number))).join('  ');
  }

  facts(one) {
    const { from, to } = one.histogram ?? {};
    const rows = [['Active for', `${percent(one.share)} of tokens (${group(one.count)})`]];
    if (to) rows.push(['Largest activation', digits(to)]);
    if (from) rows.push(['Most negative', digits(from)]);
    if (one.cosine !== undefined) rows.push(['Encoder–decoder cosine', digits(one.cosine)]);
    for (const [layer, norm] of (one.norms ?? []).entries())
      rows.push([`Decoder norm, layer ${layer + 1}`, digits(norm)]);
    const row = ([name, value]) =>
      el('div', {}, el('dt', { text: name }), el('dd', { text: value }));
    return el('dl', {}, ...rows.map(row));
  }

  histogram(one) {
    if (!one.histogram) return null;
    const { from, to, counts } = one.histogram;
    const step = (to - from) / counts.length;
    const bars = counts.map((count, i) => {
      const [low, high] = [from + i * step, from + (i + 1) * step];
      const tip = `${digits(low)} to ${digits(high)}: ${group(count)} tokens`;
      return { from: low, to: high, count, kind: high <= step / 2 ? 'neg' : 'pos', tip };
    });
    const size = { ...WIDE, height: 132 };
    const name = 'Histogram of activations';
    return barChart({ name, bars, range: [from, to], label: 'activation', size }).lastChild;
  }

  tokens({ tokens = [] }) {
    const chip = ([number, share, of]) => {
      const tip = `${percent(share)} of its activation is on this token.\nIt is active on ${percent(of)} of the token's occurrences.`;
      const parts = [this.token(number), el('small', { text: percent(share) })];
      return el('span', { class: 'chip', tabindex: 0, 'data-tip': tip }, ...parts);
    };
    return tokens.length ? titled('Tokens with most of its activation', tokens.map(chip)) : [];
  }

  lens({ promoted, suppressed }) {
    if (!promoted) return [];
    const flip = this.data.signed ? ' (where negative, the other way around)' : '';
    const level = this.data.lens_level;
    const clear = ([, logit]) => Math.abs(logit) >= level;
    const chip = (pair) => {
      const parts = [this.token(pair[0]), el('small', { text: `${digits(pair[1])} SD` })];
      return el('span', { class: clear(pair) ? 'chip' : 'chip off' }, ...parts);
    };
    const side = (name, pairs) => {
      const none = pairs.some(clear) ? '' : ': no clear effect';
      return el('div', {}, ...titled(name + flip + none, pairs.map(chip)));
    };
    const sides = [side('Next tokens it promotes', promoted)];
    sides.push(side('Next tokens it suppresses', suppressed));
    const text = `Logit lens: the logits of the decoder row, in standard deviations (SD) from their mean over the vocabulary. Gray: below ${digits(level)} SD, which no logit of 95% of random directions reaches.`;
    return [el('div', { class: 'pair' }, ...sides), el('p', { class: 'soft key', text })];
  }

  near({ near = [] }) {
    const chip = ([id, cosine, tokens]) => {
      const words = tokens.map((number) => this.token(number));
      const parts = [el('span', { text: id }), el('small', { text: digits(cosine) }), ...words];
      if (this.cards.has(id)) return el('a', { class: 'chip', href: `#latent=${id}` }, ...parts);
      const tip = `No card in this report: --include ${id} makes one`;
      return el('span', { class: 'chip off', 'data-tip': tip }, ...parts);
    };
    const title = near.some(([, , tokens]) => tokens.length)
      ? 'Nearest decoder rows, with cosine and main tokens'
      : 'Nearest decoder rows, by cosine';
    return near.length ? titled(title, near.map(chip)) : [];
  }

  contexts(one) {
    const largest = Math.max(one.histogram?.to ?? 0, -(one.histogram?.from ?? 0)) || 1;
    const rows = (contexts) => contexts.flatMap((context) => this.context(context, largest));
    const block = (title, contexts = []) =>
      contexts.length
        ? [el('h4', { text: title }), el('div', { class: 'contexts' }, ...rows(contexts))]
        : [];
    const bands = (one.bands ?? []).flatMap(({ range, contexts }, i) => {
      const [low, high] = range.map(digits);
      return block(
        `At random from the ${FIFTHS[i]} of its activations: ${low} to ${high}`,
        contexts,
      );
    });
    const top = block('Strongest activations', one.top);
    const shown = [...top, ...block('Most negative activations', one.low), ...bands];
    return shown.length ? [el('p', { class: 'soft key', text: KEY }), ...shown] : [];
  }

  context({ text, peak, active, cut }, largest) {
    const values = new Map(pairs(active));
    const tokens = text.flatMap((number, i) => {
      const [, spaces, rest] = /^( *(?=[^ ]))?(.*)$/s.exec(this.string(number));
      const blank = /^ +$/.test(rest) && (values.has(i) || i === peak);
      const node = el('bdi', { class: 'token', text: blank ? '·' : rest });
      node.classList.toggle('peak', i === peak);
      if (values.has(i)) this.shade(node, rest, values.get(i), largest);
      return spaces ? [spaces, node] : [node];
    });
    const [before, after] = cut.map((is) => (is ? el('span', { class: 'cut', text: '…' }) : null));
    const strength = el('span', { class: 'strength', text: digits(values.get(peak)) });
    return [strength, el('p', { class: 'text' }, before, ...tokens, after)];
  }

  shade(node, text, value, largest) {
    node.classList.add('on');
    node.classList.toggle('neg', value < 0);
    const strength = WEAKEST + (1 - WEAKEST) * (Math.abs(value) / largest);
    node.style.setProperty('--a', strength.toFixed(3));
    node.dataset.tip = `${isolated(text.trim() || '(space)')}: ${digits(value)}`;
  }
}

const few = (one) => one.count < FEW;

// The spaces at the start of a token, as dots, and the rest.
const split = (text) => {
  const [, spaces, rest] = /^( *)(.*)$/s.exec(text);
  return ['·'.repeat(spaces.length), rest];
};

const titled = (title, chips) => [
  el('h4', { text: title }),
  el('div', { class: 'chips' }, ...chips),
];

function pairs(flat) {
  const found = [];
  for (let i = 0; i < flat.length; i += 2) found.push([flat[i], flat[i + 1]]);
  return found;
}
