// The experts as a picture: a row per layer, a cell per expert. Shows how much each did lately, or
// which ones computed one token.

/** Share of an expert's glow that is left after a token. */
const FADE = 0.92;

export class HeatMap {
  /** @type {Float32Array[]} */
  #glow = [];
  /** @type {{ layer: number, experts: number, top_k: number }[]} */
  #layers = [];
  /** @type {number[] | undefined} */
  #shown;
  #drawing = false;

  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    new ResizeObserver(() => this.#draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  /** @param {{ layer: number, experts: number, top_k: number }[]} layers */
  setLayers(layers) {
    this.#layers = layers;
    this.#glow = layers.map(({ experts }) => new Float32Array(experts));
    this.#shown = undefined;
    const widest = Math.max(1, ...layers.map(({ experts }) => experts));
    this.canvas.style.aspectRatio = `${widest} / ${Math.max(1, layers.length) * Math.min(4, Math.max(1, widest / 8))}`;
    this.#draw();
  }

  /** Takes the experts of a new token. @param {number[]} experts */
  add(experts) {
    this.#glow.forEach((row) => row.forEach((_, i) => (row[i] *= FADE)));
    this.#each(experts, (row, expert) => (this.#glow[row][expert] += 1 - FADE));
    this.#draw();
  }

  /** Shows the experts of one token, or all again. @param {number[]} [experts] */
  show(experts) {
    this.#shown = experts;
    this.#draw();
  }

  /** The same in words. @param {number[]} experts */
  describe(experts) {
    const rows = new Map();
    this.#each(experts, (row, expert) => rows.set(row, [...(rows.get(row) ?? []), expert]));
    return [...rows].map(([row, ids]) => `layer ${this.#layers[row].layer}: ${ids.join(", ")}`).join("; ");
  }

  /**
   * @param {number[]} experts
   * @param {(row: number, expert: number) => void} take
   */
  #each(experts, take) {
    let at = 0;
    this.#layers.forEach(({ top_k }, row) => {
      for (const expert of experts.slice(at, at + top_k)) take(row, expert);
      at += top_k;
    });
  }

  #draw() {
    if (this.#drawing) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      this.#paint();
    });
  }

  #paint() {
    const { canvas } = this;
    const scale = devicePixelRatio;
    canvas.width = Math.round(canvas.clientWidth * scale);
    canvas.height = Math.round(canvas.clientHeight * scale);
    const context = canvas.getContext("2d");
    if (!context || this.#layers.length === 0) return;
    const style = getComputedStyle(canvas);
    const [cold, warm] = ["--cold", "--amber"].map((name) => style.getPropertyValue(name));
    // Custom properties hold light-dark(); a property of the element resolves it.
    const resolve = (/** @type {string} */ color) => {
      canvas.style.color = color;
      return getComputedStyle(canvas).color;
    };
    const colors = { cold: resolve(cold), warm: resolve(warm) };
    const height = canvas.height / this.#layers.length;
    this.#glow.forEach((row, y) => {
      const width = canvas.width / row.length;
      row.forEach((glow, x) => {
        context.globalAlpha = 1;
        context.fillStyle = colors.cold;
        const cell = /** @type {const} */ ([x * width + 0.5, y * height + 0.5, Math.max(1, width - 1), Math.max(1, height - 1)]);
        context.fillRect(...cell);
        context.globalAlpha = this.#shown ? 0.12 * Math.min(1, glow * 3) : Math.min(1, glow * 3);
        context.fillStyle = colors.warm;
        context.fillRect(...cell);
      });
    });
    context.globalAlpha = 1;
    context.fillStyle = colors.warm;
    this.#each(this.#shown ?? [], (y, x) => {
      const width = canvas.width / this.#glow[y].length;
      context.fillRect(x * width + 0.5, y * height + 0.5, Math.max(1, width - 1), Math.max(1, height - 1));
    });
  }
}
