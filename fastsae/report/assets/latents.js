// The list of latents, to search, sort and filter, and which card is open.

const [DENSE, COMMON, MEDIUM] = [0.1, 0.01, 0.001];
const SHARES = {
  all: [0, 2],
  dense: [DENSE, 2],
  common: [COMMON, DENSE],
  medium: [MEDIUM, COMMON],
  rare: [0, MEDIUM],
};
const size = (one) => Math.max(one.histogram?.to ?? 0, -(one.histogram?.from ?? 0));
const ORDERS = {
  frequent: (one) => -one.count,
  rare: (one) => one.count,
  max: (one) => -size(one),
  focused: (one) => -one.focus,
  cosine: (one) => one.cosine,
  id: (one) => one.id,
};
const JUDGED = ['max', 'focused']; // orders with latents of too few activations at the end
const STEPS = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 };

// The number of a latent that a search is for.
const numbered = (text) => (/^#?\d+$/.test(text) ? Number(text.replace('#', '')) : null);
const note = (text) => el('p', { class: 'soft', text });

class Latents {
  constructor(data) {
    this.data = data;
    this.cards = new Map(data.latents.map((one) => [one.id, one]));
    this.view = new Card(data, this.cards);
    for (const one of data.latents) this.prepare(one);
    this.form = find('form.tools');
    this.list = find('[data-latents]');
    this.card = find('#card');
    this.offer();
    this.form.addEventListener('input', () => this.showList());
    this.form.addEventListener('submit', (event) => event.preventDefault());
    addEventListener('hashchange', () => this.follow(true));
    document.addEventListener('keydown', (event) => this.key(event));
    this.showList();
    this.follow(false);
  }

  // Leave out choices that the data has nothing for.
  offer() {
    const { filter, sort, where } = this.form.elements;
    const drop = (choice, value) => choice.querySelector(`[value=${value}]`).remove();
    const none = (has) => !this.data.latents.some(has);
    if (!this.data.signed) drop(filter, 'negative');
    if (none((one) => one.cosine !== undefined)) drop(sort, 'cosine');
    if (none((one) => one.promoted)) drop(where, 'lens');
  }

  // What a latent is searched by. Pieces of a word that are active together read as one.
  prepare(one) {
    const active = [];
    const whole = [];
    const bands = (one.bands ?? []).flatMap((band) => band.contexts);
    for (const context of [...(one.top ?? []), ...(one.low ?? []), ...bands]) {
      const texts = context.text.map((number) => this.view.string(number));
      whole.push(texts.join(''));
      let last = -2;
      for (const [place] of pairs(context.active)) {
        active.push(place === last + 1 ? '' : '\n', texts[place]);
        last = place;
      }
    }
    const tokens = (one.tokens ?? []).map(([number]) => this.view.string(number));
    const promoted = (one.promoted ?? []).map(([number]) => this.view.string(number));
    one.share = one.count / this.data.tokens;
    one.words = (one.tokens ?? []).slice(0, 4).map(([number]) => number);
    one.focus = one.tokens?.length ? one.tokens[0][1] : 0;
    one.search = {
      active: [active.join(''), ...tokens].join('\n').toLowerCase(),
      context: whole.join('\n').toLowerCase(),
      lens: promoted.join('\n').toLowerCase(),
    };
  }

  kept() {
    const { query, where, sort, filter } = Object.fromEntries(new FormData(this.form));
    const wanted = query.trim().toLowerCase();
    const number = numbered(wanted);
    const [low, high] = SHARES[filter] ?? SHARES.all;
    const shown = (one) =>
      one.share >= low && one.share < high && (filter !== 'negative' || one.low);
    const matches = (one) => !wanted || one.id === number || one.search[where].includes(wanted);
    const order = ORDERS[sort];
    const late = (one) => Number(JUDGED.includes(sort) && few(one));
    return this.data.latents
      .filter((one) => shown(one) && matches(one))
      .sort((a, b) => late(a) - late(b) || order(a) - order(b) || a.id - b.id);
  }

  showList() {
    this.shown = this.kept();
    const row = (one) => {
      const words = one.words.map((number) => this.view.token(number));
      const link = el(
        'a',
        { href: `#latent=${one.id}`, 'data-id': one.id },
        el('span', { text: one.id }),
        el('span', { class: 'share', text: percent(one.share) }),
        el('span', { class: 'words' }, ...words),
      );
      return el('li', {}, link);
    };
    this.list.replaceChildren(...this.shown.map(row));
    const [some, all] = [this.shown, this.data.latents].map((list) => group(list.length));
    const number = numbered(this.form.elements.query.value.trim());
    const found = number === null || this.cards.has(number) ? [] : [this.missing(number)];
    if (this.shown.length) found.push(`${some} of ${all} latents: number, frequency, tokens`);
    else if (!found.length) found.push('No latent with a card matches.');
    find('[data-found]').textContent = found.join(' ');
    if (!this.shown.length) this.card.replaceChildren(note(found[0]));
    else if (this.current !== undefined) this.showCard();
    this.mark();
  }

  // Show in the list and on the map which card is open.
  mark() {
    for (const link of this.list.querySelectorAll('a')) {
      const current = Number(link.dataset.id) === this.current;
      if (current) link.setAttribute('aria-current', 'true');
      else link.removeAttribute('aria-current');
      if (current) this.reveal(link);
    }
    for (const point of document.querySelectorAll('.map a')) {
      const current = Number(point.dataset.id) === this.current;
      point.classList.toggle('current', current);
      if (current && point.nextSibling) point.parentNode.append(point); // over the others
    }
  }

  reveal(link) {
    const top = link.offsetTop - this.list.offsetTop;
    const { scrollTop, clientHeight } = this.list;
    if (top < scrollTop || top + link.offsetHeight > scrollTop + clientHeight)
      this.list.scrollTop = top - clientHeight / 2;
  }

  // Open the card that the address names; without one, the first of the list.
  follow(asked) {
    const named = /^#latent=(\d+)$/.exec(location.hash);
    if (!named && this.current !== undefined) return;
    this.current = named ? Number(named[1]) : this.shown[0]?.id;
    this.showCard();
    this.mark();
    if (!named) return;
    const { top } = this.card.getBoundingClientRect();
    if (top < 0 || top > innerHeight / 2) this.card.scrollIntoView({ block: 'start' });
    if (asked) this.card.focus({ preventScroll: true });
  }

  showCard() {
    const one = this.cards.get(this.current);
    const content = one ? [this.head(one), ...this.view.content(one)] : [];
    if (!one) content.push(note(this.missing(this.current)));
    this.card.replaceChildren(...content);
  }

  head({ id }) {
    const button = (text, name, by) => {
      const properties = { type: 'button', 'aria-label': name, text, disabled: !this.beside(by) };
      const node = el('button', properties);
      node.addEventListener('click', () => this.step(by));
      return node;
    };
    const title = el('h3', {}, el('a', { href: `#latent=${id}`, text: `Latent ${id}` }));
    const buttons = [button('←', 'Previous latent', -1), button('→', 'Next latent', 1)];
    return el('header', {}, title, el('div', {}, ...buttons));
  }

  // Why there is no card of that number.
  missing(id) {
    if (id === undefined) return 'No latent has a card.';
    if (id >= this.data.d_sae)
      return `There is no latent ${id}: this SAE has ${group(this.data.d_sae)}.`;
    return `Latent ${id} has no card in this report. To make one: fastsae report … --include ${id}`;
  }

  // The latent that is so many places further in the list.
  beside(by) {
    const at = this.shown.findIndex((one) => one.id === this.current);
    return this.shown[at < 0 ? 0 : at + by];
  }

  step(by) {
    const next = this.beside(by);
    if (next) location.hash = `latent=${next.id}`;
  }

  key(event) {
    const typing = event.target.closest('input, select, textarea');
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in STEPS)) return;
    this.step(STEPS[event.key]);
    event.preventDefault();
  }
}
